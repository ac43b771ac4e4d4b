"""Commands that RabbitMQ itself takes out of their queues: each gets exactly one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import orjson
import pytest
from tests.contract import faults_of
from tests.fakes import MemoryBus, MemoryStore
from tests.unit.test_sending import Message

from warren.core.names import Topology
from warren.ports import Desired, Published, PutStarts, SessionRecord
from warren.services import outcomes as ends
from warren.services.delivery import Delivery, DeliveryOptions
from warren.services.gateway import Gateway
from warren.services.outcomes import Outcomes

NAMES = Topology("warren")


class Bus(MemoryBus):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    async def publish(self, exchange: str, routing_key: str, body: bytes, **more: Any) -> Any:
        if exchange == NAMES.out:
            self.events.append(orjson.loads(body))
        return await super().publish(exchange, routing_key, body, **more)


class NoFleet:
    def get(self, session: str) -> None:
        return None


@dataclass
class World:
    bus: Bus
    store: MemoryStore
    gateway: Gateway
    outcomes: Outcomes

    async def lapse(self, message: Message, reason: str = "expired") -> list[dict[str, Any]]:
        """What is published for it."""
        before = len(self.bus.events)
        self.gateway.on_dead(message, reason)
        async with asyncio.timeout(30):
            while not message.acks + message.requeues:
                await asyncio.sleep(0.001)
        return self.bus.events[before:]


@contextlib.asynccontextmanager
async def running(*, served: bool) -> AsyncIterator[World]:
    bus, store = Bus(), MemoryStore()
    now = lambda: datetime(2026, 11, 20, tzinfo=UTC)  # noqa: E731
    options = DeliveryOptions("t", retry_base_s=0.001, retry_cap_s=0.002)
    delivery = Delivery(cast(Any, bus), store, NAMES, options, now=now, random01=lambda: 0.5, disk_ok=lambda: True)
    await delivery.start()
    if served:
        delivery.begin(SessionRecord("acme", 3, Desired.RUNNING))
    outcomes = Outcomes(cast(Any, bus), store, delivery, NAMES)
    gateway = Gateway(cast(Any, bus), cast(Any, NoFleet()), outcomes, NAMES, "t", now=now)
    try:
        yield World(bus, store, gateway, outcomes)
    finally:
        await gateway.stop()
        await delivery.stop()


def send(**more: Any) -> Message:
    body = {"command": "send", "session": "acme", "id": "order-1", "args": {"to": "+15551234567", "text": "hi"}, **more}
    return Message(orjson.dumps(body))


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize(
    ("reason", "code", "kept"),
    [("expired", "expired", True), ("delivery_limit", "gave_up", False), ("maxlen", "internal", False)],
)
async def test_it_fails_with_the_reason_and_the_same_event_when_it_comes_again(
    reason: str, code: str, kept: bool, served: bool
) -> None:
    async with running(served=served) as world:
        (event,) = await world.lapse(send(), reason)
        assert faults_of(event) == []
        assert event["type"] == "warren.command_failed"
        assert (event["data"]["id"], event["data"]["error"]["code"]) == ("order-1", code)
        assert event["causationid"] == "order-1"
        assert event.get("sequence") == ("0000000001" if served else None)
        assert (("acme", "order-1") in world.store.journal) == (served and kept)
        assert orjson.loads(world.bus.replies[0][2])["error"]["code"] == code
        world.outcomes._told.clear()  # as after a restart
        (again,) = await world.lapse(send(), reason)
        assert again["id"] == event["id"]


@pytest.mark.parametrize("served", [True, False])
async def test_what_has_an_outcome_already_keeps_it(served: bool) -> None:
    async with running(served=True) as first:
        (event,) = await first.lapse(send())
    async with running(served=served) as world:
        world.store.journal = first.store.journal
        (again,) = await world.lapse(send(), "maxlen")
        assert again["data"] == event["data"]
        (conflict,) = await world.lapse(send(args={"to": "+15551234567", "text": "other"}))
        assert conflict["data"]["error"]["code"] == "id_conflict"


async def test_what_had_been_begun_is_not_called_expired() -> None:
    async with running(served=True) as world:
        await world.store.write(PutStarts("acme", "order-1", 2))
        (event,) = await world.lapse(send())
        assert event["data"]["error"]["code"] == "gave_up"


async def test_what_cannot_be_decoded_is_not_buried_once_more() -> None:
    async with running(served=True) as world:
        (event,) = await world.lapse(Message(b"no json", message_id="m1"))
        assert (event["data"]["id"], event["data"]["error"]["code"]) == ("m1", "invalid_json")
        assert [key for _, key in world.bus.published] == ["acme.command_failed"]


async def test_what_warren_itself_buried_has_its_outcome() -> None:
    async with running(served=True) as world:
        assert await world.lapse(Message(b"no json"), "") == []


async def test_with_an_unreadable_journal_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "GIVE_BACK_S", 0.01)
    async with running(served=True) as world:
        await world.store.close()
        message = send()
        assert await world.lapse(message) == []
        assert (message.acks, message.requeues) == (0, 1)


async def test_nothing_is_acked_before_its_outcome_is_confirmed() -> None:
    async with running(served=False) as world:
        world.bus.gate.clear()
        message = send()
        world.gateway.on_dead(message, "expired")
        async with asyncio.timeout(30):
            while not world.bus.events:
                await asyncio.sleep(0.001)
        assert message.acks == 0
        world.bus.gate.set()
        async with asyncio.timeout(30):
            while not message.acks:
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("body", [b"no json", orjson.dumps({"command": "fly", "session": "acme", "id": "order-1"})])
async def test_what_cannot_be_served_stays_until_rabbitmq_takes_its_outcome(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the queue of unclaimed commands; and without going round and round."""
    monkeypatch.setattr(ends, "GIVE_BACK_S", 0.05)
    async with running(served=False) as world:
        world.bus.answers = lambda _: Published.REFUSED
        message = Message(body)
        began = time.monotonic()
        world.gateway.on_unclaimed(message)
        async with asyncio.timeout(30):
            while not message.requeues:
                await asyncio.sleep(0.001)
        assert time.monotonic() - began >= 0.05
        assert message.acks == 0
        world.bus.answers = lambda _: Published.CONFIRMED
        world.gateway.on_unclaimed(message)
        async with asyncio.timeout(30):
            while not message.acks:
                await asyncio.sleep(0.001)
        assert world.bus.published[-1][1] == "acme.command_failed"
