"""The lane in which a session's sends run while it is ONLINE, one after the other, so that their order is the queue's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from loguru import logger

from warren.core import events
from warren.core.envelope import Outcome, SendArgs
from warren.core.names import whatsapp_message_id
from warren.errors import CommandError, EngineError
from warren.services.outcomes import Outcomes, Task

SEND_TIMEOUT_S = 60.0
SEND_TRIES = 5
RETRY_PAUSE_S = 1.0

RequestSend = Callable[..., Awaitable[dict[str, Any]]]
"""`request(message_id=, to=, text=, timeout_ms=)`; raises EngineError."""


class SendLane:
    """One stay in ONLINE. It never gives a command back: what it leaves unsettled returns to the queue, in order, when the
    session's work channel is closed (`Claim.pause_work`). So a command that cannot go out now is tried again in its place.

    `tries` outlives the lane (it is the session's): how often a command's outcome at WhatsApp stayed unknown.
    """

    def __init__(
        self, session: str, request: RequestSend, outcomes: Outcomes, tries: dict[str, int], *, now: Callable[[], datetime]
    ) -> None:
        self._session, self._request, self._outcomes, self._tries, self._now = session, request, outcomes, tries, now
        self._queue: asyncio.Queue[Task] = asyncio.Queue()
        self._busy = False
        self._ending = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"sender.{session}")

    def offer(self, task: Task) -> None:
        """Take a send; bounded by the prefetch of the session's queue. One that comes after `stop` is left unsettled."""
        self._queue.put_nowait(task)

    async def stop(self, timeout_s: float) -> None:
        """Begin no further send, and wait for the one under way, at most `timeout_s`; then it is cancelled.

        A cancelled send may or may not be out; the same command, redelivered, sends the same message.
        """
        self._ending.set()
        if not self._busy:
            self._task.cancel()
        await asyncio.wait({self._task}, timeout=timeout_s)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while not self._ending.is_set():
            task = await self._queue.get()
            self._busy = True
            await self._contained(task)
            self._busy = False

    async def _contained(self, task: Task) -> None:
        try:
            await self._send(task)
        except Exception:
            logger.bind(action="session_bug", session=self._session).exception("A send met a bug.")
            bug = CommandError("internal", "The command met a bug.", hint="See the log of the daemon.", final=False)
            self._outcomes.fail(task, bug)

    async def _send(self, task: Task) -> None:
        try:
            if await self._outcomes.replayed(task):
                return
            result = await self._until_sent(task)
        except CommandError as e:
            await asyncio.shield(self._outcomes.fail(task, e).stored)
            return
        if result is not None:
            ticket = self._outcomes.finish(task, Outcome("send", task.command.id, result))
            # The next send waits until this outcome is on disk: a full outbox stops sending instead of growing.
            await asyncio.shield(ticket.stored)

    async def _until_sent(self, task: Task) -> dict[str, Any] | None:
        """Try until it is sent, has failed (raises CommandError) or the lane ends (None). Later sends wait: order is kept."""
        while True:
            if task.command.expired(self._now()):
                raise self._too_late(task)
            if (result := await self._through_engine(task)) is not None:
                return result
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), RETRY_PAUSE_S)
            if self._ending.is_set():
                return None

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
            self._not_sent(command_id, e)
            return None
        self._tries.pop(command_id, None)
        return {"message_id": result["message_id"], "timestamp": result["timestamp"]}

    def _not_sent(self, command_id: str, error: EngineError) -> None:
        """Return when the command is to be tried again; raise CommandError when it has failed."""
        code = error.engine_code
        if code in events.NOT_SENT:
            return
        if code in events.UNKNOWN_OUTCOME:
            tries = self._tries.get(command_id, 0) + 1
            self._tries[command_id] = tries
            if tries < SEND_TRIES:
                return
            raise self._gave_up(command_id, tries) from error
        failure = events.send_failure(code, error.message, error.server_code)
        raise CommandError(
            failure.code, failure.message, hint=failure.hint, final=failure.final, retry_after=failure.retry_after
        ) from error

    def _too_late(self, task: Task) -> CommandError:
        """Expired; but a message that may be out already must not be called unsent."""
        command_id = task.command.id or ""
        tries = self._tries.get(command_id, 0)
        return self._gave_up(command_id, tries) if tries else expired_error()

    def _gave_up(self, command_id: str, tries: int) -> CommandError:
        self._tries.pop(command_id)
        return CommandError(
            "gave_up",
            f"The message was tried {tries} times and WhatsApp never confirmed it.",
            hint="It may have arrived. Repeating the command with the same id sends the same message, not a second one.",
            final=False,
        )


def expired_error() -> CommandError:
    return CommandError(
        "expired",
        "The command's `expires_at` passed before it was its turn.",
        hint="Publish it again with a new id if it still matters.",
    )
