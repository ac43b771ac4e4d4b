"""Delivery against edges in memory: order, numbers without gaps, nothing given up, nothing twice without need."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from loguru import logger
from tests.fakes import MemoryBus, MemoryStore

from warren.core.names import Topology
from warren.ports import Desired, JournalRow, OutboxRow, Published, SessionRecord
from warren.services import delivery as module
from warren.services.delivery import Delivery, DeliveryOptions

NOW = datetime(2026, 11, 20, 12, 0, 0, 120_000, tzinfo=UTC)


@contextlib.asynccontextmanager
async def running(
    bus: MemoryBus, store: MemoryStore, *, disk: Any = lambda: True, awaited: bool = True, **options: Any
) -> AsyncIterator[Delivery]:
    quick = {"retry_base_s": 0.001, "retry_cap_s": 0.002, **options}
    delivery = Delivery(
        bus,  # type: ignore[arg-type]
        store,
        Topology("warren"),
        DeliveryOptions("test", **quick),
        now=lambda: NOW,
        random01=lambda: 0.5,
        disk_ok=disk,
    )
    await delivery.start()
    if awaited:
        delivery.submit = functools.partial(delivery.submit, awaited=True)  # type: ignore[method-assign]
    try:
        yield delivery
    finally:
        await delivery.stop()


def begin(delivery: Delivery, session: str = "a", sequence: int = 0, epoch: int = 1) -> None:
    delivery.begin(SessionRecord(session, epoch, Desired.RUNNING, sequence))


@pytest.fixture
async def bus() -> MemoryBus:
    return MemoryBus()


@pytest.fixture
async def store() -> MemoryStore:
    return MemoryStore()


async def test_events_leave_in_order_and_rows_go(bus: MemoryBus, store: MemoryStore) -> None:
    async with running(bus, store) as delivery:
        begin(delivery, sequence=7)
        tickets = [delivery.submit("a", "message", {"n": n}, event_id=f"a/{n}") for n in range(300)]
        await asyncio.gather(*(t.confirmed for t in tickets))
        await asyncio.wait_for(delivery.drain(), 30)
    assert [i for i, _ in bus.published] == [f"a/{n}" for n in range(300)]
    assert bus.most_in_flight == 1
    assert store.rows == {}


async def test_the_envelope(bus: MemoryBus, store: MemoryStore) -> None:
    bus.connected.clear()
    async with running(bus, store) as delivery:
        begin(delivery, sequence=41, epoch=3)
        await delivery.submit("a", "message", {"text": "hi"}, event_id="a/x", causation_id="c").stored
    (row,) = store.rows.values()
    assert (row.epoch, row.sequence) == (3, 42)
    assert orjson.loads(row.body) == {
        "specversion": "1.0",
        "id": "a/x",
        "source": "/warren/warren",
        "type": "warren.message",
        "subject": "a",
        "time": "2026-11-20T12:00:00.120Z",
        "datacontenttype": "application/json",
        "session": "a",
        "instance": "test",
        "epoch": 3,
        "sequence": "0000000042",
        "causationid": "c",
        "data": {"text": "hi"},
    }


async def test_a_restart_publishes_what_was_left_unchanged_and_then_goes_on(bus: MemoryBus, store: MemoryStore) -> None:
    bus.connected.clear()
    total = module.LANE_CACHE * 2 + 50
    async with running(bus, store) as delivery:
        begin(delivery)
        tickets = [delivery.submit("a", "message", {"n": n}, event_id=f"a/{n}") for n in range(total)]
        await asyncio.gather(*(t.stored for t in tickets))
    bodies = [row.body for _, row in sorted(store.rows.items())]
    again = MemoryBus()
    async with running(again, store) as delivery:
        begin(delivery, sequence=total)
        ticket = delivery.submit("a", "message", {"n": total}, event_id=f"a/{total}")
        await ticket.confirmed
        await asyncio.wait_for(delivery.drain(), 30)
    assert [i for i, _ in again.published] == [f"a/{n}" for n in range(total + 1)]
    assert len(bodies) == total
    assert store.rows == {}


async def test_a_long_outage_keeps_few_rows_in_memory_and_the_order(bus: MemoryBus, store: MemoryStore) -> None:
    bus.gate.clear()
    async with running(bus, store) as delivery:
        begin(delivery)
        total = module.LANE_CACHE * 4
        for n in range(total):
            await delivery.submit("a", "message", {"n": n}, event_id=f"a/{n}").stored
        assert len(delivery._lanes["a"].cache) <= module.LANE_CACHE
        bus.gate.set()
        late = [delivery.submit("a", "message", {"n": n}, event_id=f"a/{n}") for n in range(total, total + 20)]
        await asyncio.gather(*(t.confirmed for t in late))
    assert [i for i, _ in bus.published] == [f"a/{n}" for n in range(total + 20)]


async def test_unknown_and_refused_are_tried_again_with_the_same_id(bus: MemoryBus, store: MemoryStore) -> None:
    answers = iter([Published.UNKNOWN, Published.REFUSED, Published.CONFIRMED, Published.CONFIRMED])
    bus.answers = lambda _: next(answers)
    async with running(bus, store) as delivery:
        begin(delivery)
        first, second = (delivery.submit("a", "message", {}, event_id=i) for i in ("a/1", "a/2"))
        await asyncio.gather(first.confirmed, second.confirmed)
    assert [i for i, _ in bus.published] == ["a/1", "a/1", "a/1", "a/2"]


async def test_one_stuck_session_does_not_hold_up_another(bus: MemoryBus, store: MemoryStore) -> None:
    bus.answers = lambda message_id: Published.UNKNOWN if message_id.startswith("a/") else Published.CONFIRMED
    async with running(bus, store) as delivery:
        begin(delivery, "a")
        begin(delivery, "b")
        stuck = delivery.submit("a", "message", {}, event_id="a/1")
        for n in range(20):
            await asyncio.wait_for(delivery.submit("b", "message", {}, event_id=f"b/{n}").confirmed, 30)
        assert not stuck.confirmed.done()


async def test_whatsapp_is_answered_soon_after_the_row_is_on_disk(bus: MemoryBus, store: MemoryStore) -> None:
    bus.connected.clear()
    async with running(bus, store, answer_after_s=0.02) as delivery:
        begin(delivery)
        ticket = delivery.submit("a", "message", {}, event_id="a/1")
        await ticket.stored
        assert not ticket.safe.done()
        await asyncio.wait_for(ticket.safe, 30)
        assert not ticket.confirmed.done()


async def test_the_same_event_while_its_row_is_there_gets_no_second_row(bus: MemoryBus, store: MemoryStore) -> None:
    bus.connected.clear()
    async with running(bus, store) as delivery:
        begin(delivery)
        first = delivery.submit("a", "message", {}, event_id="a/1")
        await first.stored
        assert delivery.submit("a", "message", {}, event_id="a/1") is first
        assert len(store.rows) == 1


async def test_a_full_disk_makes_no_gap_and_loses_nothing(bus: MemoryBus, store: MemoryStore) -> None:
    store.failing = 2
    async with running(bus, store) as delivery:
        begin(delivery)
        journal = JournalRow("a", "c", "f", b"{}")
        ticket = delivery.submit("a", "command_completed", {}, journal=journal)
        await asyncio.sleep(0.01)
        assert not ticket.stored.done()
        assert delivery.trouble
        assert store.journal == {}
        await asyncio.wait_for(ticket.confirmed, 30)
        assert not delivery.trouble
        assert store.journal["a", "c"] == journal
        assert delivery._sequences["a", 1] == 1


async def test_a_full_outbox_stops_taking_until_there_is_room(
    bus: MemoryBus, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOM_POLL_S", 0.005)
    bus.gate.clear()
    async with running(bus, store, max_bytes=10) as delivery:
        begin(delivery)
        first = delivery.submit("a", "message", {}, event_id="a/1")
        await first.stored
        second = delivery.submit("a", "message", {}, event_id="a/2")
        await asyncio.sleep(0.03)
        assert not second.stored.done()
        bus.gate.set()
        await asyncio.wait_for(second.confirmed, 30)


async def test_ephemeral_events_are_dropped_while_rabbitmq_is_away(bus: MemoryBus, store: MemoryStore) -> None:
    async with running(bus, store) as delivery:
        begin(delivery)
        bus.connected.clear()
        delivery.ephemeral("a", "qr", {}, event_id="a/qr1")
        bus.connected.set()
        delivery.ephemeral("a", "qr", {}, event_id="a/qr2")
        await delivery.submit("a", "connected", {}).confirmed
    assert [i for i, k in bus.published if k == "a.qr"] == ["a/qr2"]


async def test_a_new_epoch_counts_from_one_behind_the_old(bus: MemoryBus, store: MemoryStore) -> None:
    bus.connected.clear()
    async with running(bus, store) as delivery:
        begin(delivery, sequence=5)
        old = delivery.submit("a", "logout", {})
        begin(delivery, epoch=2)
        new = delivery.submit("a", "connected", {})
        await asyncio.gather(old.stored, new.stored)
        assert sorted(store.rows) == [("a", 1, 6), ("a", 2, 1)]
        bus.connected.set()
        await new.confirmed
        assert old.confirmed.done()


async def test_what_nobody_awaits_costs_no_memory_in_a_long_outage(bus: MemoryBus, store: MemoryStore) -> None:
    bus.connected.clear()
    async with running(bus, store, awaited=False, answer_after_s=0.0) as delivery:
        begin(delivery)
        total = module.LANE_CACHE * 5
        tickets = [delivery.submit("a", "message", {"n": n}, event_id=f"a/{n}") for n in range(total)]
        await asyncio.gather(*(t.safe for t in tickets))
        lane = delivery._lanes["a"]
        assert max(len(lane.tickets), len(lane.ids), len(lane.cache)) <= module.LANE_CACHE
        assert delivery.backlog("a") == total
        bus.connected.set()
        await asyncio.wait_for(delivery.drain(), 30)
    assert [i for i, _ in bus.published] == [f"a/{n}" for n in range(total)]


async def test_data_that_is_no_json_is_its_sender_s_trouble_alone(bus: MemoryBus, store: MemoryStore) -> None:
    async with running(bus, store) as delivery:
        begin(delivery)
        with pytest.raises(TypeError):
            delivery.submit("a", "message", {"x": object()})
        await asyncio.wait_for(delivery.submit("a", "message", {}).confirmed, 30)


async def test_a_bug_of_the_store_or_the_bus_silences_nobody(bus: MemoryBus, store: MemoryStore) -> None:
    broken = iter([RuntimeError("bug"), RuntimeError("bug")])

    def sometimes(_: str) -> Published:
        if (error := next(broken, None)) is not None:
            raise error
        return Published.CONFIRMED

    bus.answers = sometimes
    async with running(bus, store) as delivery:
        begin(delivery)
        tickets = [delivery.submit("a", "message", {"n": n}, event_id=f"a/{n}") for n in range(3)]
        await asyncio.wait_for(asyncio.gather(*(t.confirmed for t in tickets)), 30)
    assert [i for i, _ in bus.published][-3:] == ["a/0", "a/1", "a/2"]


async def test_an_event_that_can_not_be_stored_holds_up_its_session_alone(
    bus: MemoryBus, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "delay", lambda *_, **__: 0.001)
    async with running(bus, store) as delivery:
        store.rows["a", 1, 2] = OutboxRow("a", 1, 2, "older", "message", b"{}")  # as if its number had been used
        begin(delivery, "a")
        begin(delivery, "b")
        tickets = [delivery.submit(s, "message", {"n": n}, event_id=f"{s}/{n}") for n in range(3) for s in ("a", "b")]
        await asyncio.wait_for(asyncio.gather(tickets[0].confirmed, *(t.confirmed for t in tickets[1::2])), 30)
        later = [delivery.submit(s, "message", {"n": 3}, event_id=f"{s}/3") for s in ("a", "b")]
        await asyncio.wait_for(later[1].confirmed, 30)
        assert not tickets[2].stored.done()
        assert not later[0].stored.done()
        assert not delivery.empty
        assert delivery.waiting() == 3
        assert delivery.trouble == ""
        del store.rows["a", 1, 2]
        await asyncio.wait_for(asyncio.gather(tickets[4].confirmed, later[0].confirmed), 30)
        await asyncio.wait_for(delivery.drain(), 30)
    assert [i for i, _ in bus.published if i.startswith("a/")] == ["a/0", "a/1", "a/2", "a/3"]
    assert delivery._sequences == {("a", 1): 4, ("b", 1): 4}


async def test_what_comes_again_while_nothing_can_be_stored_does_not_pile_up(
    bus: MemoryBus, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WhatsApp repeats what is not answered, at every connection; each session has one such message at a time."""
    monkeypatch.setattr(module, "ROOM_POLL_S", 0.005)
    room = False
    async with running(bus, store, disk=lambda: room, awaited=False) as delivery:
        for session in ("a", "b"):
            begin(delivery, session)
        for _ in range(500):
            tickets = {s: delivery.submit(s, "message", {"n": 1}, event_id=f"{s}/1") for s in ("a", "b")}
            await asyncio.sleep(0)
        assert len(delivery._waiting) == 2
        assert "nearly full" in delivery.trouble
        room = True
        for session, ticket in tickets.items():
            await asyncio.wait_for(ticket.confirmed, 30)
            await asyncio.wait_for(delivery.submit(session, "message", {"n": 2}, event_id=f"{session}/2").confirmed, 30)
        assert delivery.trouble == ""
    assert [i for i, k in bus.published if k.startswith("a.")] == ["a/1", "a/2"]
    assert [i for i, k in bus.published if k.startswith("b.")] == ["b/1", "b/2"]
    assert store.rows == {}


async def test_a_failing_disk_is_told_once(bus: MemoryBus, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "delay", lambda *_, **__: 0.001)
    told: list[str] = []
    sink = logger.add(lambda line: told.append(str(line)), level="INFO", format="{extra[action]}")
    store.failing = 50
    try:
        async with running(bus, store) as delivery:
            begin(delivery)
            await asyncio.wait_for(delivery.submit("a", "message", {}).confirmed, 30)
    finally:
        logger.remove(sink)
    assert [line.strip() for line in told] == ["store_failed", "outbox_room"]
