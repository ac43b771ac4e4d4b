"""What delivery tells of itself: how much waits, since when, and how publishing goes."""

from __future__ import annotations

import asyncio

import pytest
from tests.fakes import MemoryBus, MemoryStore
from tests.unit.test_delivery import NOW, begin, running

from warren.core.metrics import Metrics
from warren.ports import Published
from warren.services.delivery import Delivery


@pytest.fixture
async def bus() -> MemoryBus:
    return MemoryBus()


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


def metrics(delivery: Delivery) -> Metrics:
    return delivery._metrics


async def test_what_waits_is_counted_and_has_an_age_until_it_is_confirmed(bus: MemoryBus, store: MemoryStore) -> None:
    bus.gate.clear()  # RabbitMQ confirms nothing
    async with running(bus, store) as delivery:
        begin(delivery)
        assert (delivery.waiting(), delivery.oldest()) == (0, None)
        tickets = [delivery.submit("a", "message", {"n": n}) for n in range(3)]
        assert (delivery.waiting(), delivery.oldest()) == (3, NOW)
        await asyncio.gather(*(t.stored for t in tickets))
        async with asyncio.timeout(10):
            while not bus.in_flight.get("a"):
                await asyncio.sleep(0)
        assert (delivery.waiting(), delivery.oldest()) == (3, NOW)
        assert delivery.outbox_bytes == sum(len(row.body) for row in store.rows.values()) > 0
        bus.gate.set()
        await asyncio.gather(*(t.confirmed for t in tickets))
        assert (delivery.waiting(), delivery.oldest(), delivery.outbox_bytes) == (0, None, 0)


async def test_what_an_earlier_run_left_has_an_age_too(bus: MemoryBus, store: MemoryStore) -> None:
    bus.connected.clear()
    async with running(bus, store) as delivery:
        begin(delivery)
        await delivery.submit("a", "message", {}).stored
    async with running(bus, store) as delivery:
        async with asyncio.timeout(10):
            while delivery.oldest() is None:
                await asyncio.sleep(0)
        assert delivery.oldest() == NOW
        assert delivery.outbox_bytes > 0


async def test_events_and_attempts_are_counted(bus: MemoryBus, store: MemoryStore) -> None:
    answers = iter([Published.REFUSED, Published.UNKNOWN])
    bus.answers = lambda _: next(answers, Published.CONFIRMED)
    async with running(bus, store) as delivery:
        begin(delivery)
        await delivery.submit("a", "message", {}).confirmed
        await delivery.submit("a", "receipt", {}).confirmed
        delivery.ephemeral("a", "qr", {}, event_id="a/qr")
        counted = metrics(delivery)
        assert dict(counted.events) == {"message": 1, "receipt": 1, "qr": 1}
        assert dict(counted.publishes) == {"refused": 1, "unknown": 1, "confirmed": 2}
        assert counted.confirms.cumulative()[-1] == ("+Inf", 2)
