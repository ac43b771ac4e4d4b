"""The way back: which state a session starts from, and bringing a sealed one onto this disk.

Before a session is opened for the first time in a daemon's life its position is compared with the store (`check`). A state is
restored only by the owner, while the engine has the session closed, in an order in which a kill at any point does no harm:

1. read the newest state that is whole: opened with the session's key, its database checked on this disk;
2. put a seal at the number the former owner would use next. Whoever finds it there instead of its own is not the owner any more;
3. the database becomes the state of a new epoch, then the pointer names it;
4. the session puts epoch and position on record, in one unit. Killed before that, all of it happens again, one epoch higher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from loguru import logger

from warren.core.backoff import delay
from warren.core.backup_names import MAX_NUMBER, Place
from warren.core.backup_plan import (
    CheckIntent,
    Fresh,
    Local,
    Read,
    Refuse,
    UseLocal,
    choose,
    decide,
    newest,
    next_epoch,
)
from warren.core.sealing import Kind, Sealed
from warren.errors import SealError, StorageError
from warren.ports import BackupRow, Listed, PutBackup, SessionRecord, StateDir, Store
from warren.services.backup import Backups
from warren.services.session_record import End, Stored, decode, decode_end, encode_end
from warren.services.vault import Vault

TURN_S = 0.1
"""Least time between two questions of a session that waits for its turn, whether the store is away."""


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    instance: str
    source: str
    wait_s: float = 15.0
    """How long a session that has its state here waits for a store that does not answer."""
    retry_base_s: float = 1.0
    retry_cap_s: float = 60.0
    concurrency: int = 4


@dataclass(frozen=True, slots=True)
class Restored:
    """A state that was brought back. The session puts `row` and its new epoch on record, in one unit."""

    place: Place
    row: BackupRow
    stored: Stored


@dataclass(frozen=True, slots=True)
class Peeked:
    """What the store tells of a session that this machine does not know."""

    stored: Stored
    epoch: int
    """Above all its others."""
    last: Place
    """Its newest object."""


Tell = Callable[[str, str], None]
"""Told the code of a cause, and what is the matter, while a session waits."""


@dataclass(slots=True)
class _Chosen:
    place: Place
    stored: Stored
    end: End | None
    """What the newest object says, when it is a seal."""


class Restorer:
    """Compares and restores. `vault` None: there is no store, and what is here is all there is."""

    def __init__(
        self,
        vault: Vault | None,
        store: Store,
        state_dir: StateDir,
        backups: Backups,
        *,
        options: RestoreOptions,
        now: Callable[[], datetime],
        random01: Callable[[], float],
    ) -> None:
        self._vault, self._store, self._state_dir, self._backups = vault, store, state_dir, backups
        self._options, self._now, self._random01 = options, now, random01
        self._slots = asyncio.Semaphore(options.concurrency)
        self._looks = asyncio.Semaphore(options.concurrency)
        self._away: StorageError | None = None
        """How the last listing before an `open` failed."""

    # --- before a session is opened

    async def check(self, record: SessionRecord, tell: Tell) -> Restored | None:
        """Find what the session starts from; None: from what is here. Tries until it is known, telling what it waits for.

        A store that does not answer: with a state on this disk it goes on with that after a while, loudly (should somebody else
        own the session, the first backup finds out); without one it waits for ever, because it must not begin a new identity.
        Raises SealError for backups that cannot be restored, StateError for local state that cannot be read.
        """
        if self._vault is None or self._backups.settled(record.session):
            return None
        loop = asyncio.get_running_loop()
        began, attempt = loop.time(), 0
        while True:
            try:
                async with self._backups.lock(record.session):
                    return await self._compare(self._vault, record, tell)
            except StorageError as e:
                waited = loop.time() - began
                if waited >= self._options.wait_s and await self._local(record, None) is not None:
                    await self._go_on_locally(record, e)
                    return None
                if attempt == 0:
                    logger.bind(action="storage_unavailable", session=record.session, reason=e.kind).warning(
                        "The session waits for its backups to be looked at: {}", e
                    )
                tell("storage_unavailable", e.message)
                options = self._options
                pause = delay(attempt, base_s=options.retry_base_s, cap_s=options.retry_cap_s, random01=self._random01())
                await asyncio.sleep(pause)
                attempt += 1

    async def rescue(self, record: SessionRecord, tell: Tell) -> Restored | None:
        """The local state cannot be read: set it aside and restore, if the store has a state that is as new. None: it has not.

        Raises StorageError and SealError.
        """
        if self._vault is None:
            return None
        async with self._backups.lock(record.session):
            row = await self._store.backup(record.session)
            last = newest(await self._vault.listed(record.session))
            epoch = await self._state_dir.current_epoch(record.session)
            if last is None or (row is not None and _is_lost(row, last, epoch)):
                return None
            # Until the session has put the new position on record nothing may be backed up under the old one.
            self._backups.unsettle(record.session)
            if epoch is not None and await self._state_dir.has_state(record.session, epoch):
                await self._state_dir.keep(record.session, epoch)
            logger.bind(action="rescue", session=record.session).error(
                "The local state cannot be read; it is left as it is, and the newest backup is restored."
            )
            return await self._restore(self._vault, record, None, tell)

    async def restore(self, record: SessionRecord, at: Place | None, tell: Tell) -> Restored:
        """Restore the newest state, or the one at `at`, whatever is here. Raises StorageError and SealError."""
        if self._vault is None:
            raise SealError("This warren keeps no backups.", hint="Set `[storage] mode` to `hybrid`.")
        async with self._backups.lock(record.session):
            return await self._restore(self._vault, record, at, tell)

    # --- on an empty machine

    async def strangers(self, known: Mapping[str, int]) -> list[str]:
        """Sessions in the store that are not `known` here (with the epoch in which they ended). Raises StorageError."""
        if self._vault is None:
            return []
        found = await self._vault.sessions()
        return [s for s, places in found.items() if s not in known or places[-1].epoch > known[s]]

    async def peek(self, session: str, before: Peeked | None = None) -> Peeked | None:
        """The newest record of a session; None: it is another warren's, or has no whole state. Not read again if nothing was put
        since `before`. Raises StorageError.
        """
        assert self._vault is not None
        try:
            listed = await self._vault.listed(session)
            if before is not None and newest(listed) == before.last:
                return before
            chosen = await self._choose(self._vault, session, listed, None, stage=False)
        except SealError as e:
            logger.bind(action="adoption_refused", session=session).error("A session in the store cannot be taken up: {}", e)
            return None
        if chosen.stored.source != self._options.source:
            logger.bind(action="adoption_refused", session=session).warning(
                "Session {} in the store belongs to {}, not to {}: left alone. `create` takes it over.",
                session,
                chosen.stored.source,
                self._options.source,
            )
            return None
        return Peeked(chosen.stored, next_epoch(listed, chosen.end.next_epoch if chosen.end else 0), max(listed))

    # --- inside

    async def _compare(self, vault: Vault, record: SessionRecord, tell: Tell) -> Restored | None:
        session = record.session
        row = await self._store.backup(session)
        local = await self._local(record, row)
        while True:
            places = await self._look(vault, session)
            match decide(local, places):
                case Fresh() | UseLocal():
                    if row is not None and row.sequence and Place(row.epoch, row.sequence) not in places:
                        # Another store than last time: an unchanged session needs a backup there, too.
                        self._backups.settle(session, replace(row, digest=""), at_once=True)
                    else:
                        self._backups.settle(session, row)
                    return None
                case CheckIntent(place):
                    assert row is not None
                    if await vault.digest(session, place) in row.attempts:
                        # Our own put, whose answer was lost by a crash.
                        row = replace(row, sequence=place.sequence, attempts=(), digest="")
                        await self._store.write(PutBackup(row))
                        local = Local(place)
                    else:
                        local = Local(_recorded(record, row))
                case _:
                    return await self._restore(vault, record, None, tell)

    async def _look(self, vault: Vault, session: str) -> list[Place]:
        """The places of a session. At the start everybody looks: a few at once.

        Raises StorageError, also for who waited for its turn in vain while the store does not answer the others.
        """
        while True:
            try:
                async with asyncio.timeout(max(self._options.wait_s, TURN_S)):
                    await self._looks.acquire()
                break
            except TimeoutError:
                if (away := self._away) is not None:
                    raise StorageError(away.message, kind=away.kind, hint=away.hint) from None
        try:
            places = list(await vault.listed(session))
        except StorageError as e:
            self._away = e
            raise
        else:
            self._away = None
            return places
        finally:
            self._looks.release()

    async def _local(self, record: SessionRecord, row: BackupRow | None) -> Local | None:
        epoch = await self._state_dir.current_epoch(record.session)
        if epoch is None or not await self._state_dir.has_state(record.session, epoch):
            # A new pairing was ordered after an unlinking, and cut off before it had a state: the store has the unlinked phone.
            begun = row is not None and record.epoch > row.epoch and not record.paired
            return Local(_recorded(record, row)) if begun else None
        intent = Place(row.epoch, row.sequence + 1) if row is not None and row.attempts else None
        return Local(_recorded(record, row), intent)

    async def _go_on_locally(self, record: SessionRecord, error: StorageError) -> None:
        logger.bind(action="storage_unavailable", session=record.session, reason=error.kind).warning(
            "The store does not answer, so nobody knows whether a newer state is there; going on with the local one: {}", error
        )
        self._backups.settle(record.session, await self._store.backup(record.session))

    async def _restore(self, vault: Vault, record: SessionRecord, at: Place | None, tell: Tell) -> Restored:
        session = record.session
        tell("restoring", "")
        async with self._slots:
            while True:
                listed = await vault.listed(session)
                chosen = await self._choose(vault, session, listed, at, stage=True)
                epoch = await self._take_over(vault, record, listed, chosen.end)
                if epoch is not None:
                    break
            await self._state_dir.install(session, epoch)
        modified = listed[chosen.place].modified
        logger.bind(action="restored", session=session, position=str(chosen.place), epoch=epoch).info(
            "Restored from the backup {} of {:.0f} s ago.", chosen.place, max(0.0, self._now().timestamp() - modified)
        )
        row = BackupRow(session, epoch, 0, at=modified, size=listed[chosen.place].size)
        return Restored(chosen.place, row, chosen.stored)

    async def _choose(
        self, vault: Vault, session: str, listed: Mapping[Place, Listed], at: Place | None, *, stage: bool
    ) -> _Chosen:
        """The newest state that is whole (or the one at `at`). `stage` puts it on this disk and checks its database."""
        places = list(listed)
        if at is not None and at not in listed:
            raise SealError(f"There is no backup {at} of session {session}.", hint="`warren backup list` shows what there is.")
        if places:
            await vault.key(session)  # raises: without it nothing opens, and that must not look like damage
        opened: dict[Place, Kind | None] = {}
        stored: dict[Place, Stored] = {}
        end: End | None = None

        async def read(place: Place) -> None:
            nonlocal end
            try:
                sealed = await vault.read(session, place, listed[place].size)
                if sealed is not None and sealed.kind is Kind.SEAL and place == places[-1]:
                    end = decode_end(session, place, sealed.record)
                elif sealed is not None and sealed.kind is Kind.STATE:
                    stored[place] = await self._prove(session, place, sealed, stage=stage)
                opened[place] = None if sealed is None else sealed.kind
            except SealError as e:
                logger.bind(action="backup_damaged", session=session, position=str(place)).error("{}", e)
                opened[place] = None

        if at is not None and at != places[-1]:
            await read(places[-1])  # for what it tells when it is a seal
            await read(at)
        elif at is not None:
            await read(at)
        if at is not None:
            if opened[at] is not Kind.STATE:
                raise SealError(f"The backup {session} {at} is no whole state.", hint="`warren backup verify` shows which are.")
            return _Chosen(at, stored[at], end)
        while isinstance(step := choose(places, opened), Read):
            await read(step.place)
        if isinstance(step, Refuse):
            raise SealError(f"Session {session} cannot be restored. {step.reason}", hint="`warren backup verify` tells more.")
        if step.passed:
            logger.bind(action="backup_passed", session=session).error(
                "{} newer backups of {} are damaged or gone; what was only in them is lost.", len(step.passed), session
            )
        return _Chosen(step.place, stored[step.place], end)

    async def _prove(self, session: str, place: Place, sealed: Sealed, *, stage: bool) -> Stored:
        stored = decode(session, place, sealed.record)
        if stage:
            await self._state_dir.stage(session, sealed.database)
        return stored

    async def _take_over(
        self, vault: Vault, record: SessionRecord, listed: Mapping[Place, Listed], end: End | None
    ) -> int | None:
        """Put the seal that makes us the owner. Our epoch; None: somebody was quicker, look again."""
        session, last = record.session, max(listed)
        # Behind a seal: whoever made it has taken the epoch it names, and has put nothing there yet.
        place = Place(end.next_epoch, 1) if end is not None and end.next_epoch > last.epoch else last.following()
        here = await self._state_dir.epochs(session)
        epoch = next_epoch(listed, place.epoch, record.epoch, *here)
        body = encode_end(End(epoch, self._options.instance, self._now().timestamp()))
        return epoch if await vault.create(session, place, await vault.seal_end(session, place, body)) else None


def _recorded(record: SessionRecord, row: BackupRow | None) -> Place | None:
    """The position of the local state: everything in the store up to it is in it."""
    if row is None:
        return None
    if row.epoch == record.epoch and row.sequence:
        return Place(row.epoch, row.sequence)
    # An epoch has begun here and nothing of it is in the store: newer than whatever the one before it holds. Of those between the
    # two numbers (a registry that was rebuilt counts on) nothing is ours.
    before = row.epoch if record.epoch > row.epoch else row.epoch - 1
    return Place(before, MAX_NUMBER) if before else None


def _is_lost(row: BackupRow, last: Place, directory: int | None) -> bool:
    """Whether what cannot be read here is more than the store has: a backup that is gone, or a phone that was never backed up."""
    behind = row.sequence > 0 and last < Place(row.epoch, row.sequence)
    return behind or (directory or 0) > row.epoch
