"""How sends go out and how they end: pace, deadlines, poison, and what the engine refuses. Real outcomes and delivery, edges in
memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import orjson
import pytest
from tests.contract import type_faults
from tests.fakes import MemoryBus, MemoryStore

from warren.core import contract, events
from warren.core.envelope import Origin, decode_command, timestamp
from warren.core.limiter import Window
from warren.core.names import Topology
from warren.errors import EngineError
from warren.ports import AddEvent, Desired, JournalRow, Published, PutStarts, SessionRecord, Write
from warren.services import outcomes as ends
from warren.services import sending as module
from warren.services.delivery import Delivery, DeliveryOptions
from warren.services.outcomes import MAX_STARTS, Outcomes, Task
from warren.services.sending import Pacer, Pacing, SendLane

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


def utc() -> datetime:
    return datetime.now(UTC)


async def true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


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
    requeues: int = 0

    async def ack(self) -> None:
        self.acks += 1

    async def requeue(self) -> None:
        self.requeues += 1

    def task(self) -> Task:
        return Task(decode_command(self.body, Origin("commands", "acme")), self)


def a_send(command_id: str = "order-1", expires_in_s: float | None = None, text: str = "x", **properties: Any) -> Message:
    body: dict[str, Any] = {"command": "send", "session": "acme", "id": command_id, "args": {"to": "+15551234567", "text": text}}
    if expires_in_s is not None:
        body["expires_at"] = timestamp(utc() + timedelta(seconds=expires_in_s))
    return Message(orjson.dumps(body), **properties)


class Queue:
    """The work queue behind `ports.Claim`: what is not acked when it is paused comes again, in order."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.lane: SendLane
        self.consumed = 0
        self._consuming = False

    async def consume_work(self) -> None:
        if not self._consuming:
            self._consuming = True
            self.consumed += 1
            for message in self.messages:
                self.lane.offer(message.task())

    async def pause_work(self) -> None:
        self._consuming = False
        left = [m for m in self.messages if not m.acks]
        self.messages = [Message(m.body, reply_to=None, redelivered=True) for m in left]


class LoggedStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[dict[str, Any]] = []
        """Of every row there ever was, in order."""
        self.marks: list[int] = []

    def write(self, *writes: Write) -> asyncio.Future[None]:
        if not self.failing:
            self.outcomes += [orjson.loads(w.row.body)["data"] for w in writes if isinstance(w, AddEvent)]
            self.marks += [w.count for w in writes if isinstance(w, PutStarts)]
        return super().write(*writes)


class World:
    def __init__(self) -> None:
        self.bus, self.store, self.queue = MemoryBus(), LoggedStore(), Queue()
        self.pacing = Pacing(0)
        self.sent: list[tuple[str, float]] = []
        """(text, when) of everything the engine was asked to send."""
        self.error: Exception | None = None
        self.engine = asyncio.Event()
        self.engine.set()
        self.disk_ok = True
        self.begin()

    def begin(self) -> None:
        """A new run of the daemon on the same disk."""
        options = DeliveryOptions("test", retry_base_s=0.001)
        self.delivery = Delivery(
            self.bus,  # type: ignore[arg-type]
            self.store,
            NAMES,
            options,
            now=utc,
            random01=lambda: 0.5,
            disk_ok=lambda: self.disk_ok,
        )
        self.outcomes = Outcomes(self.bus, self.store, self.delivery, NAMES)  # type: ignore[arg-type]

    async def _request(self, *, text: str, message_id: str, **_: Any) -> dict[str, Any]:
        self.sent.append((text, asyncio.get_running_loop().time()))
        await self.engine.wait()
        if self.error is not None:
            raise self.error
        return {"message_id": message_id, "timestamp": "2026-11-20T12:00:00Z"}

    def lane(self, *messages: Message) -> SendLane:
        """A stay in ONLINE, with these in the queue."""
        pacer = Pacer("acme", Window(self.store.windows.get("acme", ())), lambda: self.pacing.pace(None), utc)
        self.queue.messages += messages
        queue: Any = self.queue
        self.queue.lane = SendLane(
            "acme", self._request, queue, self.outcomes, pacer, refuses=lambda: self.pacing.on_limit == "refuse", now=utc
        )
        return self.queue.lane

    async def ended(self, count: int) -> list[str]:
        """How the commands ended, in order, once `count` have."""
        await true(lambda: len(self.store.outcomes) >= count)
        await asyncio.wait_for(self.outcomes.wait(), 10)
        return ["ok" if data["ok"] else data["error"]["code"] for data in self.store.outcomes]


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.001)
    world = World()
    await world.delivery.start()
    world.delivery.begin(SessionRecord("acme", 1, Desired.RUNNING))
    yield world
    if world.queue.messages:
        await world.queue.lane.stop(1)
    world.outcomes.cancel()
    await world.delivery.stop()


# --- what the engine refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", FAILURES)
async def test_what_the_engine_refuses_fails_with_its_code(world: World, code: str) -> None:
    message = a_send()
    world.error = FAILURES[code]
    world.lane(message)
    assert await world.ended(1) == [code]
    ((to, correlation_id, body),) = world.bus.replies
    reply = orjson.loads(body)
    assert (to, correlation_id, message.acks) == ("replies", "c", 1)
    assert type_faults(contract.REPLIES["send"], reply) == []
    assert reply["error"]["hint"]
    assert len(world.sent) == (MAX_STARTS if code == "gave_up" else 1)
    kept = await world.store.outcome("acme", "order-1")
    assert (kept is not None) == (code in {"invalid_recipient", "recipient_not_found"}), "final ones are kept"
    server_code = getattr(FAILURES[code], "server_code", None)
    assert server_code is None or str(server_code) in reply["error"]["message"]
    assert (reply["error"].get("retry_after") == 60.0) == (code == "rate_limited")
    assert ("dead" in world.bus.headers) == (code == "gave_up")


async def test_a_bug_is_told_as_internal(world: World) -> None:
    message = a_send()
    world.error = ZeroDivisionError()
    world.lane(message)
    assert await world.ended(1) == ["internal"]
    assert message.acks == 1


OWN = ["control.acme", "session.acme", "owner.acme", "queries.x.1", "unclaimed", "dead", "events.unrouted", "anything"]


@pytest.mark.parametrize("reply_to", [f"warren.{name}" for name in OWN])
async def test_a_reply_into_warrens_own_names_is_dropped_and_the_event_comes(world: World, reply_to: str) -> None:
    message = a_send(reply_to=reply_to)
    world.error = FAILURES["rejected"]
    world.lane(message)
    assert await world.ended(1) == ["rejected"]
    assert world.bus.replies == []
    assert [key for _, key in world.bus.published] == ["acme.command_failed"]
    assert message.acks == 1


def test_every_engine_code_is_looked_at() -> None:
    said = {e.engine_code for e in FAILURES.values()}
    assert said >= set(events._SEND_FAILURES)
    assert said & events.UNKNOWN_OUTCOME


async def test_what_certainly_did_not_go_out_is_tried_for_ever_and_counts_nothing(world: World) -> None:
    world.error = EngineError("?", engine_code="not_connected")
    world.pacing = Pacing(1)
    world.lane(a_send())
    await true(lambda: len(world.sent) > 3 * MAX_STARTS)
    world.error = None
    assert await world.ended(1) == ["ok"]
    assert world.store.started == {}


# --- pace -------------------------------------------------------------------------------------------------------------


async def test_sends_keep_the_pace_and_their_order(world: World) -> None:
    world.pacing = Pacing(1_200, burst=2)  # two in any 100 ms
    world.lane(*(a_send(str(n), text=str(n)) for n in range(7)))
    assert await world.ended(7) == ["ok"] * 7
    assert [text for text, _ in world.sent] == [str(n) for n in range(7)]
    times = [at for _, at in world.sent]
    assert all(later - earlier > 0.09 for earlier, later in zip(times, times[2:], strict=False))


async def test_over_the_limit_a_command_is_refused_when_configured(world: World) -> None:
    world.pacing = Pacing(2, on_limit="refuse")
    world.lane(a_send("1"), a_send("2"), a_send("3"))
    assert await world.ended(3) == ["ok", "ok", "rate_limited"]
    error = world.store.outcomes[2]["error"]
    assert 50 < error["retry_after"] <= 60
    assert await world.store.outcome("acme", "3") is None, "it may be tried again"


async def test_a_command_that_waits_for_its_turn_expires_at_its_deadline(world: World) -> None:
    world.pacing = Pacing(1)
    world.lane(a_send("1"), a_send("2"), a_send("3", expires_in_s=0.15), a_send("4", expires_in_s=0.05))
    assert await world.ended(3) == ["ok", "expired", "expired"]
    assert [data["id"] for data in world.store.outcomes] == ["1", "4", "3"]
    assert len(world.sent) == 1


async def test_a_window_survives_a_restart_at_no_cost(world: World) -> None:
    world.pacing = Pacing(2, on_limit="refuse")
    lane = world.lane(a_send("1"), a_send("2"))
    await world.ended(2)
    await lane.stop(1)
    world.queue.messages.clear()
    await world.queue.pause_work()
    assert len(world.store.windows["acme"]) == 2
    world.lane(a_send("3"))
    assert await world.ended(3) == ["ok", "ok", "rate_limited"]


async def test_an_answer_from_the_journal_is_not_counted(world: World) -> None:
    world.pacing = Pacing(1, on_limit="refuse")
    world.lane(a_send("1"), a_send("1"), a_send("1"))
    assert await world.ended(1) == ["ok"]
    await true(lambda: all(m.acks == 1 for m in world.queue.messages))
    assert len(world.sent) == 1


async def test_stopping_cuts_the_wait_for_a_turn(world: World) -> None:
    world.pacing = Pacing(1)
    lane = world.lane(a_send("1"), a_send("2"))
    await world.ended(1)
    assert lane.busy
    await asyncio.wait_for(lane.stop(300), 30)
    assert [m.acks for m in world.queue.messages] == [1, 0]


def test_a_session_says_its_own_pace() -> None:
    assert Pacing(30, burst=10).pace(None) == module.Pace(30, 10)
    assert Pacing(30, burst=10).pace(5) == module.Pace(5, 5)
    assert Pacing(30).pace(0) is None
    assert Pacing(0).pace(None) is None


# --- what stays too long goes back ------------------------------------------------------------------------------------


async def test_commands_that_wait_too_long_go_back_in_order_and_come_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_S", 0.1)
    world.pacing = Pacing(240, burst=1)  # one in 250 ms
    world.lane(*(a_send(str(n), text=str(n)) for n in range(4)))
    assert await world.ended(4) == ["ok"] * 4
    assert [text for text, _ in world.sent] == ["0", "1", "2", "3"]
    assert world.queue.consumed > 2
    assert all(b - a > 0.2 for a, b in pairwise(at for _, at in world.sent))


async def test_after_a_bug_of_the_lane_its_commands_come_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    until_stored, bugs = SendLane._until_stored, iter([True])

    async def broken(lane: SendLane, ticket: Any) -> None:
        if next(bugs, False):
            raise ZeroDivisionError
        await until_stored(lane, ticket)

    monkeypatch.setattr(SendLane, "_until_stored", broken)
    world.lane(a_send("1"), a_send("2"))
    assert await world.ended(2) == ["ok", "ok"]
    assert world.queue.consumed > 1


async def test_an_expired_command_that_meets_a_bug_holds_up_nobody(world: World) -> None:
    """A journal row that cannot be read is there also when the command comes again."""
    expired = a_send("1", expires_in_s=-1)
    world.store.journal["acme", "1"] = JournalRow("acme", "1", expired.task().command.fingerprint, b"{")
    world.lane(expired, a_send("2"))
    assert await world.ended(2) == ["internal", "ok"]
    assert world.queue.consumed == 1


async def test_a_full_outbox_holds_no_command_and_makes_none_go_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_S", 0.1)
    monkeypatch.setattr("warren.services.delivery.ROOM_POLL_S", 0.01)
    world.disk_ok = False
    world.lane(a_send("1"), a_send("2"))
    await true(lambda: world.queue.messages[0].redelivered)
    assert world.queue.consumed == 1, "nothing is taken before there is room"
    world.disk_ok = True
    assert await world.ended(2) == ["ok", "ok"]
    await true(lambda: all(m.acks == 1 for m in world.queue.messages))
    assert len(world.sent) == 2


async def test_while_rabbitmq_confirms_nothing_commands_go_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an outcome that is not final is told once, though its command comes again."""
    monkeypatch.setattr(module, "HELD_S", 0.1)
    monkeypatch.setattr(module, "ACK_GRACE_S", 0.01)
    world.bus.gate.clear()
    world.error = FAILURES["restricted"]
    world.lane(a_send("1"), a_send("2"))
    await true(lambda: world.queue.messages[0].redelivered)
    world.bus.gate.set()
    await true(lambda: world.queue.consumed == 2 and all(m.acks == 1 for m in world.queue.messages))
    assert await world.ended(2) == ["restricted", "restricted"]
    assert len(world.sent) == 2


async def test_a_command_whose_outcome_is_not_confirmed_is_requeued(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "UNACKED_S", 0.05)
    world.bus.gate.clear()
    message = a_send("1")
    world.lane(message)
    await true(lambda: message.requeues == 1)
    again = a_send("1", redelivered=True)
    assert await world.outcomes.replayed(again.task())
    world.bus.gate.set()
    await true(lambda: again.acks == 1)
    assert (message.acks, len(world.sent)) == (0, 1)


async def test_after_an_error_that_is_not_final_the_sender_may_try_again(world: World) -> None:
    world.error = FAILURES["restricted"]
    lane = world.lane(a_send("1"))
    await world.ended(1)
    world.error = None
    lane.offer(a_send("1").task())
    assert await world.ended(2) == ["restricted", "ok"]


# --- poison -----------------------------------------------------------------------------------------------------------


async def killed(world: World, **properties: Any) -> None:
    """One execution that ends the daemon: the command was begun, and nothing after that."""
    world.begin()
    world.delivery.begin(SessionRecord("acme", 1, Desired.RUNNING))
    await world.outcomes.begin(a_send("1", **properties).task())


async def test_a_command_that_ends_the_daemon_is_started_five_times(world: World) -> None:
    await world.delivery.stop()
    await killed(world)
    for _ in range(MAX_STARTS - 1):
        await killed(world, redelivered=True)
    world.begin()
    world.delivery.begin(SessionRecord("acme", 1, Desired.RUNNING))
    await world.delivery.start()
    message = a_send("1", redelivered=True)
    world.lane(message)
    assert await world.ended(1) == ["gave_up"]
    assert world.sent == []
    assert world.bus.headers["dead"]["x-warren-reason"] == "gave_up"
    assert world.bus.headers["dead"]["x-warren-exchange"] == "warren.commands"
    assert message.acks == 1
    assert world.store.started == {}, "who publishes it again has five more"


async def test_a_redelivered_command_that_was_never_started_has_no_count(world: World) -> None:
    world.lane(a_send("1", redelivered=True))
    assert await world.ended(1) == ["ok"]
    assert world.store.marks == [1, 0]


async def test_a_repeated_execution_does_not_begin_before_it_is_counted(world: World) -> None:
    world.store.failing = 3
    world.lane(a_send("1", redelivered=True))
    assert await world.ended(1) == ["ok"]
    assert len(world.sent) == 1


async def test_a_command_stays_while_rabbitmq_does_not_take_it_for_dead(world: World) -> None:
    world.store.started["acme", "1"] = MAX_STARTS
    world.bus.answers = lambda id: Published.UNKNOWN if id.startswith("dead-") else Published.CONFIRMED
    message = a_send("1", redelivered=True)
    world.lane(message)
    await true(lambda: len(world.bus.published) > 3)
    assert message.acks == 0
    assert world.store.outcomes == []
    world.bus.answers = lambda _: Published.CONFIRMED
    assert await world.ended(1) == ["gave_up"]


async def test_what_may_be_out_is_not_called_expired(world: World) -> None:
    world.error = FAILURES["gave_up"]
    world.engine.clear()
    world.lane(a_send("1", expires_in_s=0.1))
    await true(lambda: len(world.sent) == 1)
    await asyncio.sleep(0.1)  # the deadline
    world.engine.set()
    assert await world.ended(1) == ["gave_up"]
