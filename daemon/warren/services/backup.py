"""Every session's way into the object store: when, what, and under which number.

A session that changed is backed up about a second later when its identity changed (what a restore needs to heal), else when its
timer is up. One backup: the engine copies the state, the copy is sealed with the session record, the digest of the sealed bytes
is put on disk (so that a put whose answer is lost can be told from a stranger's), then comes the one put that creates the next
number, then the new position is on disk. Whoever finds that number taken by a stranger has lost the session and steps down.

A failed backup never stops a session: it is tried again with backoff, logged once a minute at most, and told once as an alarm.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from loguru import logger

from warren.core.backoff import delay
from warren.core.backup_names import Place
from warren.core.backup_plan import DAY_S, newest, prune
from warren.core.envelope import timestamp
from warren.core.metrics import Metrics
from warren.errors import CommandError, SealError, StateError, StorageError, WarrenError
from warren.ports import BackupRow, PutBackup, RemoveBackup, SessionRecord, StateDir, Store
from warren.services.delivery import Delivery
from warren.services.engines import Engines
from warren.services.session_record import JOURNAL_ROWS, Stored, encode
from warren.services.vault import Shelf, Vault, sha256

MAX_ATTEMPTS_KEPT = 200
"""Digests of tries under one number. More tries than that are hours apart: no put of the first can arrive any more."""
LOG_EVERY_S = 60.0
"""Between two log lines about the same trouble, over all sessions."""


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """`source` and `instance` as in events. `interval_s` 0: only at once, at the end and when asked."""

    instance: str
    source: str
    interval_s: float = 300.0
    at_once_s: float = 1.0
    """How long changes that are backed up at once are collected."""
    gap_s: float = 5.0
    """Least time between two backups of a session that come by themselves: a session that meets a new contact every second would
    put that often.
    """
    concurrency: int = 4
    alarm_after: int = 3
    keep_last: int = 3
    keep_days: int = 31
    retry_base_s: float = 5.0
    retry_cap_s: float = 300.0


class Backed(Protocol):
    """A session, as its backups see it."""

    id: str

    @property
    def record(self) -> SessionRecord: ...

    def superseded(self) -> None:
        """Somebody else owns the session now: stand down."""
        ...


class _Superseded(WarrenError):
    code = "superseded"


@dataclass(slots=True)
class _Job:
    """One session's backups."""

    owner: Backed
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by a backup, and by a restore."""
    settled: bool = False
    """It is proved that the local state is the newest: only now may it be backed up."""
    row: BackupRow | None = None
    dirty: bool = False
    dirty_since: datetime | None = None
    timer: asyncio.TimerHandle | None = None
    running: asyncio.Task[bool] | None = None
    failures: int = 0
    trouble: str = ""
    put_at: float = float("-inf")
    """On the loop's clock."""
    pruned_at: float = 0.0
    key_seen_at: float = 0.0
    used: bool = False
    """Something of it has changed since `unused_s` last looked."""


class Backups:
    """The backups of every session of this daemon. `vault` None: `[storage] mode` is `local`, and nothing here does anything,
    except that what earlier days have put goes with its session: `leftovers` is where that would be; None: nowhere.
    """

    def __init__(
        self,
        vault: Vault | None,
        store: Store,
        state_dir: StateDir,
        engines: Engines,
        *,
        delivery: Delivery,
        options: BackupOptions,
        now: Callable[[], datetime],
        random01: Callable[[], float],
        metrics: Metrics | None = None,
        leftovers: Callable[[], Shelf | None] = lambda: None,
    ) -> None:
        self._leftovers = leftovers
        self._vault, self._store, self._state_dir = vault, store, state_dir
        self._engines, self._delivery, self._options = engines, delivery, options
        self._now, self._random01, self._metrics = now, random01, metrics or Metrics()
        self._jobs: dict[str, _Job] = {}
        self._ending: dict[str, _Job] = {}
        self._slots = asyncio.Semaphore(options.concurrency)
        self._told: dict[str, float] = {}
        self._closing = False

    @property
    def on(self) -> bool:
        return self._vault is not None

    def use(self, options: BackupOptions) -> None:
        """From now on; waits that have begun go on as they are, and so does `concurrency`."""
        self._options = options

    # --- a session's place here

    def begin(self, owner: Backed) -> None:
        """A session is served here. Nothing of it is backed up before it is settled."""
        if self.on:
            self._jobs[owner.id] = _Job(owner)

    def settled(self, session: str) -> bool:
        """Whether what is on disk was compared with the store, in this life of the daemon. True without a store."""
        job = self._jobs.get(session)
        return job is None or job.settled

    def settle(self, session: str, row: BackupRow | None, *, at_once: bool = False) -> None:
        """The local state is the newest, and `row` its position. What it has changed meanwhile nobody remembers: it counts as
        changed.
        """
        if (job := self._jobs.get(session)) is not None:
            job.row, job.settled = row, True
            self._mark(job, at_once=at_once)

    def unsettle(self, session: str) -> None:
        """Compare again before the next `open`; no backup until then."""
        if (job := self._jobs.get(session)) is not None:
            job.settled = False

    def lock(self, session: str) -> asyncio.Lock:
        """Held while a backup of the session is made; whoever replaces its state takes it."""
        return self._jobs[session].lock

    def end(self, session: str) -> None:
        """The session is not served here any more: nothing more of it is put."""
        if (job := self._jobs.pop(session, None)) is not None:
            job.settled = False
            self._unschedule(job)
            self._ending[session] = job

    async def forget(self, session: str) -> None:
        """Delete every object of a session that has ended, the key first, unless somebody else lives on them.

        Raises StorageError, StateError, ConfigError.
        """
        if (job := self._ending.get(session)) is not None:
            async with job.lock:  # what is being put must not arrive behind our back
                del self._ending[session]
        if (shelf := await self._shelf(session)) is not None:
            if await self._is_ours(shelf, session):
                await shelf.forget(session)
            else:
                logger.bind(action="backups_left", session=session).warning(
                    "Another warren goes on with session {}: it is removed here, and its backups are left alone.", session
                )
        await self._store.write(RemoveBackup(session))

    async def unused_s(self, session: str, *, unused: bool) -> float:
        """Note whether anybody uses the session; for how many seconds nobody has. 0 as long as it was never backed up."""
        job = self._jobs.get(session)
        if job is None:
            return 0.0
        async with job.lock:
            row, now = await self._store.backup(session), self._now().timestamp()
            if row is None:
                return 0.0
            # Who connects for some minutes a day is seen by no look.
            since = 0.0 if not unused else now if job.used else row.idle_since or now
            job.used = False
            if since != row.idle_since:
                await self._store.write(PutBackup(replace(row, idle_since=since)))
                job.row = replace(job.row, idle_since=since) if job.row is not None else None
            return now - since if unused else 0.0

    async def newest_is_ours(self, session: str) -> bool:
        """Whether nobody else has written behind our last backup: what is another one's is not ours to delete. Raises
        StorageError, StateError.
        """
        shelf = await self._shelf(session)
        return shelf is None or await self._is_ours(shelf, session)

    async def _shelf(self, session: str) -> Shelf | None:
        """Where the session may have backups; None: nowhere."""
        if self._vault is not None:
            return self._vault
        return self._leftovers() if await self._store.backup(session) is not None else None

    async def _is_ours(self, shelf: Shelf, session: str) -> bool:
        # In this order: what is put meanwhile is on record before it is there.
        last, row = newest(await shelf.listed(session)), await self._store.backup(session)
        if last is None or row is None or (last.epoch, last.sequence) <= (row.epoch, row.sequence):
            return True
        # Our own put, whose answer was lost.
        return last == Place(row.epoch, row.sequence + 1) and await shelf.digest(session, last) in row.attempts

    # --- triggers

    def changed(self, session: str, *, at_once: bool = False) -> None:
        """Something of the session changed that a restore would need."""
        if (job := self._jobs.get(session)) is not None:
            job.used = True
            self._mark(job, at_once=at_once)

    async def now(self, session: str) -> BackupRow:
        """Back up now, whether the timer is up or not; the position afterwards. Raises CommandError."""
        job = self._jobs.get(session)
        if job is None:
            raise no_storage()
        if not job.settled:
            raise CommandError(
                "backup_failed",
                "The session was not compared with its backups yet.",
                hint="Its first connection does that: publish `create`.",
                final=False,
            )
        if not job.owner.record.paired:
            raise CommandError("backup_failed", "No phone is linked, so there is nothing to back up.", final=False)
        job.dirty, job.dirty_since = True, self._now()
        if not await self._run(job):
            trouble = job.trouble or "The backup was cut short."
            raise CommandError("backup_failed", trouble, hint="It is tried again.", final=False)
        if job.row is None or not job.row.at:
            raise CommandError("backup_failed", "No phone is linked, so there is nothing to back up.", final=False)
        return job.row

    async def finish(self) -> bool:
        """Back up whatever changed, all sessions side by side: the last step of a stop; bounded by the caller. False: not all
        of it.
        """
        self._closing = True
        for job in self._jobs.values():
            self._unschedule(job)
        running = [job.running for job in self._jobs.values() if job.running is not None]
        await asyncio.gather(*running, return_exceptions=True)
        due = [job for job in self._jobs.values() if job.settled and job.dirty]
        await asyncio.gather(*(self._run(job) for job in due))
        return not any(job.dirty for job in due)

    async def close(self) -> None:
        """Cut what is under way. A put that is cut off is found again at the next start."""
        self._closing = True
        tasks = [job.running for job in self._jobs.values() if job.running is not None]
        for job in self._jobs.values():
            self._unschedule(job)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def status(self, session: str) -> dict[str, Any] | None:
        """See docs/message-api.md; None without a store."""
        job = self._jobs.get(session)
        if job is None:
            return None
        row = job.row
        done = row is not None and row.at > 0
        return {
            "position": f"{row.epoch}/{row.sequence}" if row is not None and row.sequence else None,
            "at": _time(row.at) if row is not None and done else None,
            "size": row.size if row is not None and done else 0,
            "pending": job.dirty or job.lock.locked(),
            "failures": job.failures,
            "message": job.trouble or None,
        }

    @property
    def trouble(self) -> str:
        """What is the matter with the backups of some session; "" when the last try of every one went well."""
        return next((job.trouble for job in self._jobs.values() if job.trouble), "")

    def oldest_unsaved_at(self) -> datetime | None:
        """Since when the longest-waiting change is in no backup; None: everything is saved."""
        return min((job.dirty_since for job in self._jobs.values() if job.dirty and job.dirty_since is not None), default=None)

    # --- when

    def _mark(self, job: _Job, *, at_once: bool) -> None:
        if not job.dirty:
            job.dirty, job.dirty_since = True, self._now()
        if self._closing or not job.settled or job.failures:
            return  # it has its time already, or gets it
        if at_once:
            gap = job.put_at + self._options.gap_s - asyncio.get_running_loop().time()
            self._schedule(job, max(self._options.at_once_s, gap))
        elif self._options.interval_s:
            # Spread, so that sessions that changed at the same moment are not backed up at the same moment.
            self._schedule(job, self._options.interval_s * (0.5 + self._random01() / 2))

    def _schedule(self, job: _Job, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if job.timer is not None:
            if job.timer.when() <= loop.time() + seconds:
                return
            job.timer.cancel()
        job.timer = loop.call_later(seconds, self._due, job)

    def _unschedule(self, job: _Job) -> None:
        if job.timer is not None:
            job.timer.cancel()
            job.timer = None

    def _due(self, job: _Job) -> None:
        job.timer = None
        if job.running is not None:
            self._schedule(job, self._options.at_once_s)  # it changed while it was being copied
            return

        def ended(_: asyncio.Task[bool]) -> None:
            job.running = None

        job.running = asyncio.create_task(self._run(job), name=f"backup.{job.owner.id}")
        job.running.add_done_callback(ended)

    async def _run(self, job: _Job) -> bool:
        """One try, whatever comes of it; whether everything up to its call is saved now, though it may have changed since. What
        it needs memory for happens in one of a few slots.
        """
        async with job.lock, self._slots:
            if not job.settled or not job.dirty:
                return job.settled
            try:
                job.dirty = False
                await self._back_up(job)
            except _Superseded as e:
                job.settled = False
                logger.bind(action="superseded", session=job.owner.id).error("{}", e)
                job.owner.superseded()
            except WarrenError as e:
                self._failed(job, e)
            except Exception as e:
                logger.bind(action="backup_bug", session=job.owner.id).exception("A backup met a bug.")
                self._failed(job, StateError(f"A bug: {e!r}.", hint="See the log."))
            except asyncio.CancelledError:
                job.dirty = True
                raise
            else:
                self._succeeded(job)
                await self._prune(job)
                return True
            return False

    # --- what

    async def _back_up(self, job: _Job) -> None:
        record = job.owner.record
        if not record.paired or (made := await self._contents(record)) is None:
            return  # without a device row there is nothing worth keeping, and it must not hide what is worth it
        body, database = made
        row = self._position(job, record)
        await self._see_key(job, row)
        digest = await asyncio.to_thread(_digest, body, database)
        if digest == row.digest and row.sequence:
            return
        row, size = await self._put(job, row, body, database)
        self._metrics.backup(ok=True, size=size)
        job.put_at = asyncio.get_running_loop().time()
        idle_since = 0.0 if job.used else row.idle_since
        job.row = replace(row, at=self._now().timestamp(), size=size, digest=digest, idle_since=idle_since)
        await self._store.write(PutBackup(job.row))

    async def _see_key(self, job: _Job, row: BackupRow) -> None:
        """Once a day, and once for each life and epoch: backups that nobody can read are none. Raises StorageError."""
        assert self._vault is not None
        now = self._now().timestamp()
        if not row.sequence or now - job.key_seen_at >= DAY_S:
            await self._vault.see_key(row.session)
            job.key_seen_at = now

    async def _contents(self, record: SessionRecord) -> tuple[bytes, bytes] | None:
        """The session record and a copy of the database; None when no device is linked."""

        async def copy(directory: Any, target: Any) -> dict[str, Any]:
            return await self._engines.snapshot(record.session, directory, target)

        journal = await self._store.last_outcomes(record.session, JOURNAL_ROWS)
        pacing = await self._store.pacing(record.session)
        body = encode(Stored(self._options.source, record, tuple(journal), pacing))
        copied = await self._state_dir.copied(record.session, copy)
        if copied is None or not copied[0].get("paired") or not copied[1]:
            return None
        return body, copied[1]

    @staticmethod
    def _position(job: _Job, record: SessionRecord) -> BackupRow:
        if job.row is None:
            return BackupRow(record.session, record.epoch, 0)
        if job.row.epoch == record.epoch:
            return job.row
        return replace(job.row, epoch=record.epoch, sequence=0, digest="", attempts=())

    async def _put(self, job: _Job, row: BackupRow, body: bytes, database: bytes) -> tuple[BackupRow, int]:
        """Put it under the next number that is ours. Returns the new position and the bytes put. Raises _Superseded."""
        assert self._vault is not None
        session = row.session
        if not row.sequence and not row.attempts:
            # Once for each epoch. The local state may have been taken for the newest because the store did not answer.
            last = newest(await self._vault.listed(session))
            if last is not None and last.epoch >= row.epoch:
                raise _overtaken(session, last)
        while True:
            place = Place(row.epoch, row.sequence + 1)
            sealed = await self._vault.seal_state(session, place, body, database)
            row = replace(row, attempts=(*row.attempts[-MAX_ATTEMPTS_KEPT:], sha256(sealed)))
            job.row = row
            await self._store.write(PutBackup(row))
            created = await self._vault.create(session, place, sealed)
            there = sha256(sealed) if created else await self._vault.digest(session, place)
            if there is not None and there not in row.attempts:
                there = await self._proved(session, place)
            if there is None:
                raise StorageError(f"The store says that {session} {place} is taken, and has nothing there.", kind="unavailable")
            if there not in row.attempts:
                raise _overtaken(session, place)
            ours = replace(row, sequence=place.sequence, attempts=())
            if there == row.attempts[-1]:
                return ours, len(sealed)
            row = ours  # an earlier try, whose answer was lost, had arrived: this one is the next

    async def _proved(self, session: str, place: Place) -> str | None:
        """The digest of an object that looked like a stranger's: half a read, or damage, takes a session from nobody."""
        assert self._vault is not None
        try:
            await self._vault.read(session, place)
        except SealError as e:
            raise StorageError(f"{session} {place} is taken, and it cannot be told by whom. {e}", kind="corrupt") from e
        return await self._vault.digest(session, place)

    async def _prune(self, job: _Job) -> None:
        """Delete what is too old to be wanted, at most once a day."""
        assert self._vault is not None
        now, session = self._now().timestamp(), job.owner.id
        if now - job.pruned_at < DAY_S or job.row is None or not job.row.sequence:
            return
        job.pruned_at = now
        try:
            listed = await self._vault.listed(session)
            modified = {place: found.modified for place, found in listed.items()}
            for place in prune(modified, now, self._options.keep_last, self._options.keep_days):
                await self._vault.delete(session, place)
        except StorageError as e:
            logger.bind(action="prune_failed", session=session).warning("Old backups could not be deleted: {}", e)

    # --- how it goes

    def _failed(self, job: _Job, error: WarrenError) -> None:
        job.dirty = True
        job.failures += 1
        self._metrics.backup(ok=False)
        job.trouble = str(error)
        kind = error.kind if isinstance(error, StorageError) else error.code
        self._complain(kind, job, error)
        if job.failures == self._options.alarm_after:
            self._alarm(job, kind, error)
        if not self._closing:
            pause = delay(
                job.failures - 1,
                base_s=self._options.retry_base_s,
                cap_s=self._options.retry_cap_s,
                random01=self._random01(),
            )
            self._unschedule(job)
            self._schedule(job, pause)

    def _complain(self, kind: str, job: _Job, error: WarrenError) -> None:
        loop_time = asyncio.get_running_loop().time()
        if loop_time - self._told.get(kind, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._told[kind] = loop_time
            failing = sum(1 for j in self._jobs.values() if j.failures)
            logger.bind(action="backup_failed", session=job.owner.id, reason=kind, failing=failing).warning(
                "Backups fail ({} sessions): {}", failing, error
            )

    def _alarm(self, job: _Job, kind: str, error: WarrenError) -> None:
        self._delivery.submit(
            job.owner.id,
            "backup_failed",
            {
                "code": kind,
                "message": error.message,
                "hint": error.hint or "Nothing to do: it is tried again.",
                "failures": job.failures,
                "last_backup_at": _time(job.row.at) if job.row is not None and job.row.at else None,
            },
        )

    def _succeeded(self, job: _Job) -> None:
        if not job.failures:
            return
        job.failures, job.trouble = 0, ""
        if job.dirty:
            self._mark(job, at_once=True)  # it changed while this was put, when it counted as failing and got no time
        if not any(j.failures for j in self._jobs.values()):
            self._told.clear()
            logger.bind(action="backup_recovered", session=job.owner.id).info("Backups have recovered.")


def _overtaken(session: str, place: Place) -> _Superseded:
    return _Superseded(
        f"Somebody else has backed up session {session} as {place}, so it is not ours any more.",
        hint="Two warrens must not share a session. `create` takes it back, from the other one's last backup.",
    )


def no_storage() -> CommandError:
    return CommandError("no_storage", "This warren keeps no backups.", hint="Set `[storage] mode` to `hybrid`.", final=False)


def _digest(body: bytes, database: bytes) -> str:
    digest = hashlib.sha256(len(body).to_bytes(8, "big"))
    digest.update(body)
    digest.update(database)
    return digest.hexdigest()


def _time(at: float) -> str:
    return timestamp(datetime.fromtimestamp(at, UTC))
