"""Every session of this daemon: claimed, started, found, removed. One session's trouble stays its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from loguru import logger

from warren.core.backoff import delay
from warren.core.backup_names import MAX_NUMBER
from warren.core.backup_plan import DAY_S
from warren.errors import BrokerUnavailable, CommandError, OwnershipError, StateError, StorageError, WarrenError
from warren.ports import Bus, Claim, Desired, OnMessage, PutSession, SessionRecord, Store
from warren.services.restore import Peeked
from warren.services.session import Deps, Session, SessionOptions

CLAIM_TIMEOUT_S = 30.0
HOUSEKEEPING_S = 3_600.0


@dataclass(frozen=True, slots=True)
class FleetOptions:
    max_sessions: int = 1_000
    forget_after_days: int = 0
    """After how many days a session that nobody uses is removed; 0: never."""


class Fleet:
    """Session id to session. `deps_for` makes what a session needs, given what to call when it has been removed."""

    def __init__(
        self, bus: Bus, store: Store, deps_for: Callable[[Callable[[Session], None]], Deps], options: FleetOptions
    ) -> None:
        self._bus, self._store, self._options = bus, store, options
        self._deps = deps_for(self._on_removed)
        self._sessions: dict[str, Session] = {}
        self._claims: dict[str, Claim] = {}
        self._actors: dict[str, asyncio.Task[None]] = {}
        self._resuming: set[asyncio.Task[None]] = set()
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._adopting: asyncio.Task[None] | None = None
        self._claiming: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Of each session that is being taken up, by `create` or from the store: the two must not claim it side by side."""
        self._keeping_house: asyncio.Task[None] | None = None
        self._on_control: OnMessage
        self._on_work: OnMessage

    async def start(self, on_control: OnMessage, on_work: OnMessage) -> None:
        """Take up every session of the registry. How many connect at once is bounded by `Deps.connecting`."""
        self._on_control, self._on_work = on_control, on_work
        for record in await self._store.sessions():
            if record.desired is Desired.GONE:
                continue
            claim = self._bus.keep_claim(record.session, on_control=on_control, on_work=on_work)
            if record.desired is Desired.REMOVING:
                self._begin_removal(record, claim)
            else:
                task = asyncio.create_task(self._resume(self._add(record, claim), claim))
                self._resuming.add(task)
                task.add_done_callback(self._resuming.discard)
        logger.bind(action="fleet_started", sessions=len(self._sessions)).info("Taking up {} sessions.", len(self._sessions))
        if self._deps.backups.on:
            self._adopting = asyncio.create_task(self._adopt_all(), name="fleet.adopting")
            self._keeping_house = asyncio.create_task(self._keep_house(), name="fleet.housekeeping")

    def use(self, options: SessionOptions) -> None:
        """From now on, for all sessions; a wait that has begun goes on as it is."""
        self._deps.options = options

    @staticmethod
    async def _resume(session: Session, claim: Claim) -> None:
        """Connect only once the lock is ours: two owners of one device would replace each other for ever."""
        await claim.wait_held()
        session.resume()

    def get(self, session: str) -> Session | None:
        return self._sessions.get(session)

    def removing(self, session: str) -> bool:
        return session in self._removals

    async def removed(self, session: str, timeout_s: float) -> bool:
        """Wait for the removal under way, if any; False when it was not done in time."""
        if (removal := self._removals.get(session)) is not None:
            await asyncio.wait({removal}, timeout=timeout_s)
        return not self.removing(session)

    def states(self) -> Counter[str]:
        """How many sessions are in each state."""
        return Counter(session.state.value for session in self._sessions.values())

    def statuses(self) -> list[dict[str, Any]]:
        """Every session's status, by id."""
        return [self._sessions[s].status() for s in sorted(self._sessions)]

    async def create(self, session: str) -> Session:
        """Find the session, or claim one that nobody serves; see `_create`."""
        async with self._claiming.setdefault(session, asyncio.Lock()):
            return self._sessions.get(session) or await self._create(session)

    async def _create(self, session: str) -> Session:
        """Claim a session nobody serves and put it on record; the `create` command itself then starts it.

        Raises CommandError `session_limit`, `owned_elsewhere` or `internal`; nothing is left behind then.
        """
        if len(self._sessions) >= self._options.max_sessions:
            raise CommandError(
                "session_limit",
                f"This daemon serves {len(self._sessions)} sessions, its limit.",
                hint="Log out sessions that are not needed, raise `[fleet] max_sessions`, or run another daemon.",
                final=False,
            )
        claim = await self._claim(session)
        try:
            before = await self._store.session(session)
            record = SessionRecord(session, epoch=before.epoch + 1 if before else 1, desired=Desired.STOPPED)
            await self._store.write(PutSession(record))
        except StateError as e:
            # The queues did not exist before, and without a session nobody would answer what lands in them.
            with contextlib.suppress(BrokerUnavailable):
                await claim.release(remove=True)
            raise CommandError("internal", e.message, hint=e.hint, final=False) from e
        return self._add(record, claim)

    async def _claim(self, session: str) -> Claim:
        try:
            async with asyncio.timeout(CLAIM_TIMEOUT_S):
                return await self._bus.claim(session, on_control=self._on_control, on_work=self._on_work)
        except TimeoutError as e:
            raise CommandError(
                "internal", "RabbitMQ did not let us claim the session in time.", hint="Publish the command again.", final=False
            ) from e
        except OwnershipError as e:
            raise CommandError(
                "owned_elsewhere", "Another daemon serves this session.", hint="Publish the command again.", final=False
            ) from e
        except BrokerUnavailable as e:
            raise CommandError("internal", e.message, hint="Publish the command again.", final=False) from e

    def _add(self, record: SessionRecord, claim: Claim) -> Session:
        session = Session(record, claim, self._deps)
        self._sessions[session.id], self._claims[session.id] = session, claim
        self._actors[session.id] = asyncio.create_task(session.run(), name=f"session.{session.id}")
        self._deps.changed(session.id)
        return session

    # --- sessions that this machine does not know

    async def _adopt_all(self) -> None:
        """Take up what the store has and nobody serves. Tried until the store has been looked at once."""
        attempt = 0
        while True:
            try:
                await self._bus.connected.wait()
                known = {r.session: r.epoch for r in await self._store.sessions() if r.desired is Desired.GONE}
                known |= dict.fromkeys((*self._sessions, *self._removals), MAX_NUMBER)
                found = await self._deps.restorer.strangers(known)
                await self._adopt_each(found)
            except (StorageError, BrokerUnavailable, StateError) as e:
                if attempt == 0:
                    logger.bind(action="adoption_waits").warning("Sessions in the store cannot be looked for: {}", e)
                await asyncio.sleep(delay(attempt, base_s=1.0, cap_s=60.0, random01=self._deps.random01()))
                attempt += 1
            except Exception:
                logger.bind(action="fleet_bug").exception("Taking up sessions from the store met a bug.")
                return
            else:
                if found:
                    logger.bind(action="adopted", sessions=len(found)).info("The store had {} sessions more.", len(found))
                return

    async def _adopt_each(self, sessions: list[str]) -> None:
        """Raises BrokerUnavailable, StateError at once; StorageError, which may be of one session's objects only, at the end."""
        failed: StorageError | None = None
        for session in sessions:
            try:
                await self._adopt(session)
            except StorageError as e:
                failed = e
        if failed is not None:
            raise failed

    async def _adopt(self, session: str) -> None:
        """Claim a session that only the store knows, and put on record what its last backup says; its state comes when it opens.

        Raises StorageError, BrokerUnavailable, StateError.
        """
        if session in self._sessions or session in self._removals or len(self._sessions) >= self._options.max_sessions:
            return
        if (peeked := await self._deps.restorer.peek(session)) is None:
            return
        async with self._claiming.setdefault(session, asyncio.Lock()):
            if session not in self._sessions:
                await self._take_up(session, peeked)

    async def _take_up(self, session: str, peeked: Peeked) -> None:
        try:
            claim = await self._bus.claim(session, on_control=self._on_control, on_work=self._on_work)
        except OwnershipError:
            return  # it is served elsewhere
        try:
            # Whoever served it until now may have backed it up, or logged it out, since we looked.
            if (now := await self._deps.restorer.peek(session, peeked)) is None:
                await claim.release(remove=True)
                return
            record = replace(now.stored.record, epoch=now.epoch)
            await self._store.write(PutSession(record), *now.stored.beside(()))
        except (StateError, StorageError):
            await claim.release()
            raise
        logger.bind(action="adopted", session=session).info("Session {} is taken up from the store.", session)
        self._add(record, claim).resume()

    # --- housekeeping

    async def _keep_house(self) -> None:
        """Remove what nobody has used for too long. Looked at every hour, so that a session's first use resets the count."""
        while self._options.forget_after_days:
            for session in list(self._sessions.values()):
                try:
                    await self.forget_if_unused(session)
                except WarrenError as e:
                    logger.bind(action="housekeeping_failed", session=session.id).warning("{}", e)
            await asyncio.sleep(HOUSEKEEPING_S)

    async def forget_if_unused(self, session: Session) -> None:
        """Tell, and remove it, if nobody has used it for `forget_after_days`. Raises StateError."""
        unused_s = await self._deps.backups.unused_s(session.id, unused=session.unused)
        if unused_s < self._options.forget_after_days * DAY_S:
            return
        if not await self._deps.backups.newest_is_ours(session.id):
            logger.bind(action="forgotten_not", session=session.id).warning(
                "Nobody has used session {} here, but another warren goes on with it: it is left alone.", session.id
            )
        else:
            logger.bind(action="forgotten", session=session.id).warning(
                "Nobody has used session {} for {:.0f} days: it and its backups are removed.", session.id, unused_s / DAY_S
            )
            session.forget()

    # --- the end of a session

    def _on_removed(self, session: Session) -> None:
        self._deps.backups.end(session.id)
        self._sessions.pop(session.id, None)
        self._actors.pop(session.id, None)
        self._deps.outcomes.forget(session.id)
        self._deps.changed(session.id)
        self._begin_removal(session.record, self._claims.pop(session.id))
        for incoming in session.abandoned():
            self._on_control(incoming)  # answered like every command for a session that is not there

    def _begin_removal(self, record: SessionRecord, claim: Claim) -> None:
        task = asyncio.create_task(self._remove(record, claim), name=f"remove.{record.session}")
        self._removals[record.session] = task
        task.add_done_callback(lambda _: self._removals.pop(record.session, None))

    async def _remove(self, record: SessionRecord, claim: Claim) -> None:
        """Delete the state and the queues of a session that is logged out; goes on after a restart until it is done."""
        attempt = 0
        while True:
            try:
                await self._deps.state_dir.remove(record.session)
                # Before the lock is given up: whoever finds its backups then would take the session up again.
                await self._deps.backups.forget(record.session)
                await self._bus.connected.wait()
                await claim.release(remove=True)
                gone = SessionRecord(record.session, record.epoch, Desired.GONE)
                await self._store.write(PutSession(gone))
            except WarrenError as e:
                logger.bind(action="removal_failed", session=record.session).warning("Removing the session failed: {}", e)
                await asyncio.sleep(delay(attempt, base_s=1.0, cap_s=30.0, random01=self._deps.random01()))
                attempt += 1
            else:
                return

    # --- the daemon's stop

    async def finish_sending(self) -> None:
        await asyncio.gather(*(s.finish_sending() for s in self._sessions.values()))

    async def halt(self) -> None:
        """Close every connection, side by side. Bounded by the caller."""
        waiting = [s.halt() for s in self._sessions.values()]
        if waiting:
            await asyncio.wait(waiting)

    async def stop(self) -> None:
        """End the actors."""
        tasks = [*self._resuming, *self._actors.values(), *self._removals.values()]
        tasks += [task for task in (self._adopting, self._keeping_house) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
