"""What an engine's refusal to send becomes, and where replies go: the real outcomes and delivery, edges in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from tests.contract import type_faults
from tests.fakes import MemoryBus, MemoryStore

from warren.core import contract, events
from warren.core.envelope import Command, Origin, decode_command
from warren.core.names import Topology
from warren.errors import EngineError
from warren.ports import Desired, SessionRecord
from warren.services import sending as module
from warren.services.delivery import Delivery, DeliveryOptions
from warren.services.outcomes import Outcomes, Task
from warren.services.sending import SendLane

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
NAMES = Topology("warren")

FAILURES = {
    "invalid_recipient": EngineError("?", engine_code="invalid_recipient"),
    "recipient_not_found": EngineError("?", engine_code="recipient_not_found"),
    "recipient_unreachable": EngineError("?", engine_code="recipient_unreachable"),
    "restricted": EngineError("?", engine_code="restricted", server_code=463),
    "rate_limited": EngineError("?", engine_code="rate_limited", server_code=429),
    "rejected": EngineError("?", engine_code="rejected", server_code=499),
    "gave_up": EngineError("?", engine_code="timeout"),
    "internal": EngineError("?", engine_code="a word that nobody knows"),
}
"""What the engine says, by the code that the command then fails with: rows of the table of errors."""


@dataclass
class Message:
    """`ports.Incoming`."""

    body: bytes
    exchange: str = "warren.commands"
    routing_key: str = "acme"
    message_id: str | None = None
    reply_to: str | None = "replies"
    correlation_id: str | None = "c"
    redelivered: bool = False
    acks: int = 0

    async def ack(self) -> None:
        self.acks += 1

    async def requeue(self) -> None:
        raise AssertionError("nothing is given back here")


class World:
    def __init__(self) -> None:
        self.bus, self.store = MemoryBus(), MemoryStore()
        self.tries = 0
        options = DeliveryOptions("test", retry_base_s=0.001)
        self.delivery = Delivery(
            self.bus,  # type: ignore[arg-type]
            self.store,
            NAMES,
            options,
            now=lambda: NOW,
            random01=lambda: 0.5,
            disk_ok=lambda: True,
        )
        self.outcomes = Outcomes(self.bus, self.store, self.delivery, NAMES)  # type: ignore[arg-type]

    def lane(self, error: Exception) -> SendLane:
        async def refuse(**_: Any) -> dict[str, Any]:
            self.tries += 1
            raise error

        return SendLane("acme", refuse, self.outcomes, {}, now=lambda: NOW)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.001)
    world = World()
    await world.delivery.start()
    world.delivery.begin(SessionRecord("acme", 1, Desired.RUNNING))
    yield world
    await world.delivery.stop()


def a_send(**properties: Any) -> tuple[Command, Message]:
    body = {"command": "send", "session": "acme", "id": "order-1", "args": {"to": "+15551234567", "text": "x"}}
    message = Message(orjson.dumps(body), **properties)
    return decode_command(message.body, Origin("commands", "acme")), message


@contextlib.asynccontextmanager
async def offered(world: World, error: Exception, task: Task) -> AsyncIterator[None]:
    lane = world.lane(error)
    try:
        lane.offer(task)
        async with asyncio.timeout(5):
            while not world.bus.published:
                await asyncio.sleep(0.001)
            await world.outcomes.wait()
        yield
    finally:
        await lane.stop(1)


@pytest.mark.parametrize("code", FAILURES)
async def test_what_the_engine_refuses_fails_with_its_code(world: World, code: str) -> None:
    command, message = a_send()
    async with offered(world, FAILURES[code], Task(command, message)):
        ((to, correlation_id, body),) = world.bus.replies
    reply = orjson.loads(body)
    assert (to, correlation_id, message.acks) == ("replies", "c", 1)
    assert type_faults(contract.REPLIES["send"], reply) == []
    assert reply["error"]["code"] == code
    assert reply["error"]["hint"]
    assert world.tries == (module.SEND_TRIES if code == "gave_up" else 1)
    kept = await world.store.outcome("acme", "order-1")
    assert (kept is not None) == (code in {"invalid_recipient", "recipient_not_found"}), "final ones are kept"
    server_code = FAILURES[code].server_code
    assert server_code is None or str(server_code) in reply["error"]["message"]
    assert (reply["error"].get("retry_after") == 60.0) == (code == "rate_limited")


async def test_a_bug_is_told_as_internal(world: World) -> None:
    command, message = a_send()
    async with offered(world, ZeroDivisionError(), Task(command, message)):
        assert orjson.loads(world.bus.replies[0][2])["error"]["code"] == "internal"
    assert message.acks == 1


OWN = ["control.acme", "session.acme", "owner.acme", "queries.x.1", "unclaimed", "dead", "events.unrouted", "anything"]


@pytest.mark.parametrize("reply_to", [f"warren.{name}" for name in OWN])
async def test_a_reply_into_warrens_own_names_is_dropped_and_the_event_comes(world: World, reply_to: str) -> None:
    command, message = a_send(reply_to=reply_to)
    async with offered(world, FAILURES["rejected"], Task(command, message)):
        assert world.bus.replies == []
    assert [key for _, key in world.bus.published] == ["acme.command_failed"]
    assert message.acks == 1


def test_every_engine_code_is_looked_at() -> None:
    said = {e.engine_code for e in FAILURES.values()}
    assert said >= set(events._SEND_FAILURES)
    assert said & events.UNKNOWN_OUTCOME
