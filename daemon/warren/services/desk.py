"""Commands that people give on the page. They go the way of everybody's commands, over RabbitMQ, and so end like them: in exactly
one outcome, also when this daemon is killed in between.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import orjson

from warren.core.envelope import JSON, Outcome
from warren.core.names import SESSION_ID, Topology, is_session_id
from warren.errors import BrokerUnavailable, CommandError
from warren.ports import Bus, Published

FOR_PEOPLE = ("create", "disconnect", "logout")
"""What the page can do. All of it is a session's life; messages are the services' business."""


class Desk:
    """`ended` must hear of every outcome of this daemon."""

    def __init__(self, bus: Bus, topology: Topology) -> None:
        self._bus, self._topology = bus, topology
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}

    def ended(self, outcome: Outcome) -> None:
        """A command has its outcome."""
        waiting = self._waiting.get(outcome.command_id or "")
        if waiting is not None and not waiting.done():
            waiting.set_result(outcome)

    async def run(self, command: str, session: str, args: dict[str, Any], timeout_s: float) -> Outcome | None:
        """Publish a command and wait for its outcome; None when it takes longer, or when another daemon serves the session.

        Raises CommandError for what cannot be published, BrokerUnavailable when RabbitMQ did not confirm that it has the command.
        Cancelling stops the waiting, not the command.
        """
        if command not in FOR_PEOPLE:
            raise CommandError(
                "unknown_command", f"The page has no command `{command}`.", hint=f"It has {', '.join(FOR_PEOPLE)}."
            )
        if not is_session_id(session):
            raise CommandError("invalid_session", "That is no session id.", hint=f"A session id matches ^{SESSION_ID.pattern}$.")
        if not self._bus.connected.is_set():
            raise BrokerUnavailable("RabbitMQ cannot be reached, so nothing was asked.", hint="Try again when it is back.")
        command_id = f"page-{uuid.uuid4().hex}"
        body = {"command": command, "session": session, "id": command_id, "args": args}
        waiting: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[command_id] = waiting
        try:
            await self._publish(session, command_id, orjson.dumps(body))
            async with asyncio.timeout(timeout_s):
                return await waiting
        except TimeoutError:
            return None
        finally:
            del self._waiting[command_id]

    async def _publish(self, session: str, command_id: str, body: bytes) -> None:
        control = self._topology.control
        result = await self._bus.publish(control, session, body, message_id=command_id, content_type=JSON, headers={})
        if result is not Published.CONFIRMED:
            raise BrokerUnavailable(
                "RabbitMQ did not confirm that it has the command.", hint="It may run all the same: look at the session first."
            )
