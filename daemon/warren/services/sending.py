"""The lane in which a session's sends run while it is ONLINE, one after the other, so that their order is the queue's."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from loguru import logger

from warren.core import events
from warren.core.envelope import Outcome, SendArgs
from warren.core.limiter import Pace, Window
from warren.core.names import whatsapp_message_id
from warren.errors import CommandError, EngineError, StateError
from warren.ports import Claim, PutPacing, Write
from warren.services.delivery import Ticket
from warren.services.outcomes import Exhausted, Outcomes, Task

SEND_TIMEOUT_S = 60.0
RETRY_PAUSE_S = 1.0
HELD_S = 150.0
"""How long a command may be with us unsettled until all that are go back to RabbitMQ. A send that has just begun may take another
75 s, and settling 2 s: together below the five minutes that are promised."""
ACK_GRACE_S = 2.0
"""How long giving commands back waits for RabbitMQ to confirm outcomes; what is not acked then comes and is answered again."""

RequestSend = Callable[..., Awaitable[dict[str, Any]]]
"""`request(message_id=, to=, text=, timeout_ms=)`; raises EngineError."""


@dataclass(frozen=True, slots=True)
class Pacing:
    """How fast sessions send, where they say nothing else. `messages_per_minute` 0: as fast as they can. `burst` None: as many.

    `on_limit`: whether a command over the limit waits for its turn or is refused.
    """

    messages_per_minute: int = 30
    burst: int | None = None
    on_limit: Literal["wait", "refuse"] = "wait"

    def pace(self, own: int | None) -> Pace | None:
        """The pace of a session that wants `own` messages a minute; None: no limit."""
        most = self.messages_per_minute if own is None else own
        return Pace(most, min(self.burst or most, most)) if most else None


class Pacer:
    """When a session's messages went out: in memory, and on disk with each outcome, so that a restart is no new minute."""

    def __init__(self, session: str, window: Window, pace: Callable[[], Pace | None], now: Callable[[], datetime]) -> None:
        self._session, self._window, self._pace, self._now = session, window, pace, now
        self._before = self._on_disk = window

    def wait_s(self) -> float:
        """How long until the next message may go; 0: now."""
        pace = self._pace()
        return self._window.wait_ms(pace, self._now_ms()) / 1000 if pace else 0.0

    def take(self) -> None:
        """A message goes out."""
        self._before = self._window
        if self._pace() is not None:
            self._window = self._window.taken(self._now_ms())

    def give_back(self) -> None:
        """The last one did not go out."""
        self._window = self._before

    def limit(self) -> int:
        pace = self._pace()
        return pace.per_minute if pace else 0

    def writes(self) -> tuple[Write, ...]:
        """What the disk does not know yet, to be written with the next outcome."""
        if self._window == self._on_disk:
            return ()
        self._on_disk = self._window
        return (PutPacing(self._session, self._window.stamps),)

    def _now_ms(self) -> int:
        return int(self._now().timestamp() * 1000)


@dataclass(slots=True)
class _Waiting:
    """A send that has not ended. `looked_up`: the journal does not know it."""

    task: Task
    looked_up: bool = False


class SendLane:
    """One stay in ONLINE: consumes the session's queue until `stop`. It never gives a single command back: what it leaves
    unsettled returns to the queue, in order, when the session's work channel is closed (`Claim.pause_work`). So a command that
    cannot go out now, or not yet, waits in its place; and when one has been here for HELD_S, all go back at once.

    `restricted_until`: until when WhatsApp has locked new conversations, if that is known.
    """

    def __init__(
        self,
        session: str,
        request: RequestSend,
        claim: Claim,
        outcomes: Outcomes,
        pacer: Pacer,
        *,
        refuses: Callable[[], bool],
        now: Callable[[], datetime],
        restricted_until: Callable[[], datetime | None] = lambda: None,
    ) -> None:
        self._session, self._request, self._claim, self._outcomes, self._pacer = session, request, claim, outcomes, pacer
        self._refuses, self._now, self._restricted_until = refuses, now, restricted_until
        self._queue: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._ending = asyncio.Event()
        self._taking = False
        self._log = logger.bind(session=session)
        self._task = asyncio.create_task(self._run(), name=f"sender.{session}")

    def offer(self, task: Task) -> None:
        """Take a send; bounded by the prefetch of the session's queue. One that comes when nothing is taken is left unsettled."""
        if self._taking:
            self._queue.append(_Waiting(task))
            self._wake.set()

    @property
    def busy(self) -> bool:
        """Whether a send waits or is under way."""
        return bool(self._queue)

    async def stop(self, timeout_s: float) -> None:
        """Begin no further send, and wait for the one under way, at most `timeout_s`; then it is cancelled. Waits are cut.

        A cancelled send may or may not be out; the same command, redelivered, sends the same message. The queue stays consumed.
        """
        self._ending.set()
        self._wake.set()
        await asyncio.wait({self._task}, timeout=timeout_s)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # --- taking and giving back

    async def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._taking = True
                await self._claim.consume_work()
                await self._serve()
                self._taking = False
                if not self._ending.is_set():
                    await self._give_back()
            except Exception:
                self._log.bind(action="session_bug").exception("The send lane met a bug.")
                self._taking = False
                # What it had taken would else stay unsettled, and fill the prefetch, for as long as the session is online.
                await asyncio.gather(self._claim.pause_work(), return_exceptions=True)
                await self._first(asyncio.sleep(RETRY_PAUSE_S))
            finally:
                self._taking = False
                self._queue.clear()

    async def _give_back(self) -> None:
        """Everything unsettled returns to the queue. What the lane waited for may still be wanting: an outcome that RabbitMQ does
        not confirm or the disk does not take; then nothing is taken until it is there, instead of the same again and again.
        """
        self._log.bind(action="work_given_back", commands=len(self._queue)).info(
            "Commands were held for {:g} s without an end; they go back to their queue.", HELD_S
        )
        await self._first(asyncio.wait_for(self._outcomes.wait(self._session), ACK_GRACE_S))
        await self._claim.pause_work()
        await self._first(self._outcomes.told(self._session))

    async def _first(self, awaitable: Awaitable[object]) -> None:
        """Wait for it, or for the lane's end. Its errors are nobody's."""
        waits = {asyncio.ensure_future(awaitable), asyncio.ensure_future(self._ending.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _patience_s(self) -> float:
        """For how much longer the oldest unsettled command may stay here."""
        oldest = self._outcomes.oldest(self._session)
        came = [waiting.task.at for waiting in self._queue] + ([] if oldest is None else [oldest])
        return min(came) + HELD_S - time.monotonic() if came else HELD_S

    async def _pause(self, *bounds_s: float, until: asyncio.Future[None] | None = None) -> None:
        """Until a bound is over or `until` is done; also ends when something comes or has been here for too long."""
        bounds = [self._patience_s(), *bounds_s]
        waits: set[asyncio.Future[Any]] = {asyncio.ensure_future(self._wake.wait())}
        waker = next(iter(waits))
        waits |= {until} if until is not None else set()
        try:
            await asyncio.wait(waits, timeout=max(0.0, min(bounds)), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waker.cancel()
        if not self._ending.is_set():
            self._wake.clear()

    def _deadlines(self) -> list[float]:
        now = self._now()
        expiries = (waiting.task.command.expires_at for waiting in self._queue)
        return [(e - now).total_seconds() for e in expiries if e is not None]

    # --- the sends

    async def _serve(self) -> None:
        """Send until the lane ends or commands have been here for too long."""
        while not self._ending.is_set() and self._patience_s() > 0:
            try:
                await self._expire()
                if not self._queue:
                    await self._pause()
                elif (ticket := await self._contained(self._queue[0])) is not None:
                    self._queue.popleft()
                    await self._until_stored(ticket)
            except StateError as e:
                # It can be neither looked up nor counted now: it waits in its place.
                self._log.bind(action="store_failed").warning("A send waits for the disk: {}", e)
                await self._pause(RETRY_PAUSE_S)

    async def _until_stored(self, ticket: Ticket) -> None:
        """The next send waits until this outcome is on disk: a full outbox stops sending instead of growing."""
        while not ticket.stored.done() and not self._ending.is_set() and self._patience_s() > 0:
            await self._pause(until=ticket.stored)

    async def _expire(self) -> None:
        """End what has waited beyond its deadline, wherever it stands."""
        now = self._now()
        for waiting in [w for w in self._queue if w.task.command.expired(now)]:
            try:
                if not await self._known(waiting):
                    self._outcomes.fail(waiting.task, await self._too_late(waiting.task), also=self._pacer.writes())
            except StateError:
                raise
            except Exception:
                self._met_a_bug(waiting.task)
            self._queue.remove(waiting)

    async def _contained(self, waiting: _Waiting) -> Ticket | None:
        """Bring the first send to its end, or closer to it. None: it is still the first, or had its end already."""
        task = waiting.task
        try:
            return await self._step(waiting)
        except Exhausted as e:
            return await self._bury(task, e)
        except CommandError as e:
            return self._outcomes.fail(task, e, also=self._pacer.writes())
        except StateError:
            raise
        except Exception:
            return self._met_a_bug(task)

    def _met_a_bug(self, task: Task) -> Ticket:
        """To be called where it is caught."""
        self._log.bind(action="session_bug").exception("A send met a bug.")
        bug = CommandError("internal", "The command met a bug.", hint="See the log of the daemon.", final=False)
        return self._outcomes.fail(task, bug, also=self._pacer.writes())

    async def _known(self, waiting: _Waiting) -> bool:
        """Whether it had its end before, and has been answered with that."""
        if not waiting.looked_up:
            try:
                if await self._outcomes.replayed(waiting.task):
                    return True
            except CommandError as e:
                self._outcomes.fail(waiting.task, e)
                return True
            waiting.looked_up = True
        return False

    async def _step(self, waiting: _Waiting) -> Ticket | None:
        task = waiting.task
        if await self._known(waiting):
            self._queue.popleft()
            return None
        if (wait_s := self._pacer.wait_s()) > 0:
            if self._refuses() and not await self._outcomes.starts(task):
                raise self._over_limit(wait_s)
            await self._pause(wait_s, *self._deadlines())
            return None
        await self._outcomes.begin(task)
        self._pacer.take()
        if (result := await self._through_engine(task)) is None:
            await self._pause(RETRY_PAUSE_S)
            return None
        return self._outcomes.finish(task, Outcome("send", task.command.id, result), also=self._pacer.writes())

    async def _through_engine(self, task: Task) -> dict[str, Any] | None:
        """The result; None when it may be tried again. Raises CommandError when it has failed."""
        args, command_id = task.command.args, task.command.id
        assert isinstance(args, SendArgs)
        assert command_id is not None
        try:
            result = await self._request(
                message_id=whatsapp_message_id(self._session, command_id),
                to=args.jid,
                text=args.text,
                timeout_ms=int(SEND_TIMEOUT_S * 1000),
            )
        except EngineError as e:
            self._not_sent(task, e)
            return None
        return {"message_id": result["message_id"], "timestamp": result["timestamp"]}

    def _not_sent(self, task: Task, error: EngineError) -> None:
        """Return when the command is to be tried again; raise CommandError when it has failed."""
        code = error.engine_code
        if code in events.NOT_SENT:
            self._outcomes.not_begun(task)
            self._pacer.give_back()
            return
        if code in events.UNKNOWN_OUTCOME:
            return
        failure = events.send_failure(code, error.message, error.server_code)
        retry_after = failure.retry_after
        if failure.code == "restricted" and (until := self._restricted_until()) is not None:
            retry_after = max(0.0, (until - self._now()).total_seconds())
        raise CommandError(
            failure.code, failure.message, hint=failure.hint, final=failure.final, retry_after=retry_after
        ) from error

    async def _bury(self, task: Task, error: Exhausted) -> Ticket | None:
        if await self._outcomes.to_dead(task.incoming, error):
            return self._outcomes.fail(task, error, also=self._pacer.writes())
        await self._pause(RETRY_PAUSE_S)
        return None

    async def _too_late(self, task: Task) -> CommandError:
        """Expired; but a message that may be out already must not be called unsent."""
        starts = await self._outcomes.starts(task)
        return Exhausted(starts) if starts else expired_error()

    def _over_limit(self, wait_s: float) -> CommandError:
        return CommandError(
            "rate_limited",
            f"The session's limit of {self._pacer.limit()} messages a minute is reached.",
            hint='Publish it again after `retry_after`. With `[pacing] on_limit` "wait" commands wait for their turn.',
            final=False,
            retry_after=round(wait_s, 3),
        )


def expired_error() -> CommandError:
    return CommandError(
        "expired",
        "The command's `expires_at` passed before it was its turn.",
        hint="Publish it again with a new id if it still matters.",
    )
