"""How an event leaves: a row in the outbox, then RabbitMQ's confirm, then the row goes.

One committer puts whatever waits, of all sessions, on disk in one commit and gives out the sequence numbers at that moment: a
number is used only if its row is stored, so there are no gaps. One lane per session publishes its rows in order, one unconfirmed
publish at a time; many lanes run side by side. A restart publishes what is left, unchanged.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson
from loguru import logger

from warren.core import envelope
from warren.core.backoff import delay
from warren.core.metrics import Metrics
from warren.core.names import Topology, event_id, event_routing_key
from warren.errors import StateError, WarrenError
from warren.ports import AddEvent, Bus, JournalRow, OutboxRow, Published, PutOutcome, RemoveEvents, SessionRecord, Store, Write

MAX_BATCH = 500
"""Events in one commit."""
LANE_CACHE = 200
"""Rows a lane keeps in memory; behind that it reads them back from the outbox, so a long outage costs disk, not memory."""
ROOM_POLL_S = 1.0
MAX_EPHEMERAL = 100
"""Unconfirmed ephemeral events; more are dropped."""


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """`answer_after_s`: how long WhatsApp waits for RabbitMQ once the event is on disk; None: until it is confirmed. `max_bytes`
    bounds the outbox.
    """

    instance: str
    answer_after_s: float | None = 0.25
    max_bytes: int = 1 << 30
    publishes_at_once: int = 100
    retry_base_s: float = 0.2
    retry_cap_s: float = 5.0


class Ticket:
    """What becomes of one submitted event, as futures that never fail and may be awaited by anybody (shield them).

    `stored`: its row is on disk. `confirmed`: RabbitMQ has it. `safe`: confirmed, or on disk for `answer_after_s`: whoever gave
    us the event may now be told that it arrived.
    """

    __slots__ = ("confirmed", "safe", "stored")

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.stored: asyncio.Future[None] = loop.create_future()
        self.confirmed: asyncio.Future[None] = loop.create_future()
        self.safe: asyncio.Future[None] = loop.create_future()

    def mark_stored(self, answer_after_s: float | None) -> None:
        _done(self.stored)
        if answer_after_s is not None:
            asyncio.get_running_loop().call_later(answer_after_s, _done, self.safe)

    def mark_confirmed(self) -> None:
        for future in (self.stored, self.confirmed, self.safe):
            _done(future)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An event that waits for its row. It belongs to the epoch in which it was submitted."""

    session: str
    epoch: int
    event: str
    data: orjson.Fragment
    time: datetime
    event_id: str | None
    causation_id: str | None
    journal: JournalRow | None
    also: tuple[Write, ...]
    awaited: bool
    ticket: Ticket


@dataclass(slots=True)
class _Lane:
    """The rows of one session on their way out.

    `spilled`: rows behind `cache` are only on disk. While it is set nothing is appended to the cache, so order is kept.
    """

    session: str
    epoch: int = 0
    cache: deque[OutboxRow] = field(default_factory=deque)
    rows: int = 0
    """Rows that are not confirmed, of this run."""
    tickets: dict[tuple[int, int], Ticket] = field(default_factory=dict)
    """Of the rows in the cache, and of those whose confirm somebody awaits."""
    ids: dict[str, Ticket] = field(default_factory=dict)
    """Event ids of the same, so that what WhatsApp repeats meanwhile does not get a second row."""
    confirmed: tuple[int, int] = (0, 0)
    """(epoch, sequence) of the last row confirmed."""
    position: tuple[int, int] = (0, 0)
    """(epoch, sequence) of the last row taken for publishing."""
    last: tuple[int, int] = (0, 0)
    """(epoch, sequence) of the last row in the outbox."""
    spilled: bool = False
    current: OutboxRow | None = None
    """The row that is being published: the oldest one without a confirm."""
    task: asyncio.Task[None] | None = None
    held: deque[_Entry] = field(default_factory=deque)
    """Events that the store does not take, and all that came after them."""
    holding: asyncio.Task[None] | None = None
    """Tries them again; there as long as any are held."""

    def append(self, row: OutboxRow, entry: _Entry) -> None:
        self.rows += 1
        self.last = (row.epoch, row.sequence)
        self.spilled = self.spilled or len(self.cache) >= LANE_CACHE
        if not self.spilled:
            self.cache.append(row)
        if not self.spilled or entry.awaited:
            self.tickets[row.epoch, row.sequence] = entry.ticket
        elif self.ids.get(row.event_id) is entry.ticket:
            del self.ids[row.event_id]

    @property
    def idle(self) -> bool:
        return self.task is None and not self.cache and not self.spilled and self.holding is None


class Delivery:
    """The way out for every event. Owns the sequence numbers of every session of this daemon."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        topology: Topology,
        options: DeliveryOptions,
        *,
        now: Callable[[], datetime],
        random01: Callable[[], float],
        disk_ok: Callable[[], bool],
        metrics: Metrics | None = None,
    ) -> None:
        self._bus, self._store, self._topology, self._options = bus, store, topology, options
        self._metrics = metrics or Metrics()
        self._now, self._random01, self._disk_ok = now, random01, disk_ok
        self._lanes: dict[str, _Lane] = {}
        self._sequences: dict[tuple[str, int], int] = {}
        self._waiting: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(options.publishes_at_once)
        self._committing = 0
        self._confirmed: list[tuple[str, int, int]] = []
        self._bytes = 0
        self._ephemeral: set[asyncio.Task[None]] = set()
        self._committer: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self.trouble = ""
        """Why events are not being stored right now; "" when they are."""

    # --- start and stop

    async def start(self) -> None:
        """Publish what an earlier run left, then take events."""
        self._bytes = await self._store.outbox_bytes()
        for session in await self._store.outbox_sessions():
            lane = self._lane(session)
            lane.spilled = True
            self._run(lane)
        self._committer = asyncio.create_task(self._commit_loop(), name="delivery.committer")

    async def drain(self) -> None:
        """Wait until nothing waits and every row is confirmed; the caller bounds it. What is left stays on disk."""
        while not self.empty:
            self._settled.clear()
            await self._settled.wait()

    async def stop(self) -> None:
        """Stop publishing. Rows without a confirm stay on disk for the next start."""
        of_lanes = [t for lane in self._lanes.values() for t in (lane.task, lane.holding)]
        tasks = [t for t in (self._committer, *of_lanes) if t is not None]
        tasks += self._ephemeral
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._forget_confirmed()

    @property
    def empty(self) -> bool:
        return not self._waiting and not self._committing and all(lane.idle for lane in self._lanes.values())

    @property
    def outbox_bytes(self) -> int:
        """Size of the events on disk that are not confirmed."""
        return self._bytes

    def backlog(self, session: str) -> int:
        """Rows of a session that are not confirmed, those from before the last start not counted."""
        lane = self._lanes.get(session)
        return 0 if lane is None else max(0, lane.rows)

    def waiting(self) -> int:
        """Events taken and not confirmed, those from before the last start not counted."""
        of_lanes = sum(max(0, lane.rows) + len(lane.held) for lane in self._lanes.values())
        return len(self._waiting) + self._committing + of_lanes

    def oldest(self) -> datetime | None:
        """When the oldest event that RabbitMQ has not confirmed happened; None when none waits."""
        times = [envelope.event_time(lane.current.body) for lane in self._lanes.values() if lane.current is not None]
        times += [lane.held[0].time for lane in self._lanes.values() if lane.held]
        return min([*times, *(entry.time for entry in list(self._waiting)[:1])], default=None)

    def serves(self, session: str) -> bool:
        """Whether the session's events are numbered here."""
        return session in self._lanes and self._lanes[session].epoch > 0

    # --- in

    def begin(self, record: SessionRecord) -> None:
        """Number the session's events from `record.sequence` on, in `record.epoch`."""
        lane = self._lane(record.session)
        lane.epoch = record.epoch
        self._sequences.setdefault((record.session, record.epoch), record.sequence)

    def submit(
        self,
        session: str,
        event: str,
        data: dict[str, Any],
        *,
        event_id: str | None = None,
        causation_id: str | None = None,
        journal: JournalRow | None = None,
        also: tuple[Write, ...] = (),
        awaited: bool = False,
    ) -> Ticket:
        """Queue an event with a sequence number. Events of a session leave in the order of the calls.

        `journal` and `also` are written in the same transaction as the event's row. `event_id` None: one of its own, from the
        sequence number. `awaited`: somebody needs `confirmed`; of other tickets only `stored` and `safe` are sure to be set.
        Never blocks: callers bound what they have in flight by waiting for the ticket. Raises TypeError for data that is no JSON.
        """
        lane, encoded = self._lane(session), orjson.Fragment(orjson.dumps(data))
        awaited = awaited or self._options.answer_after_s is None
        if event_id is not None and (repeated := lane.ids.get(event_id)) is not None and journal is None and not also:
            return repeated
        ticket = Ticket()
        if event_id is not None:
            lane.ids[event_id] = ticket
        self._waiting.append(
            _Entry(session, lane.epoch, event, encoded, self._now(), event_id, causation_id, journal, also, awaited, ticket)
        )
        self._wake.set()
        return ticket

    def ephemeral(self, session: str, event: str, data: dict[str, Any], *, event_id: str) -> None:
        """Publish now or never: for events that are worthless later. Dropped while RabbitMQ is away."""
        if not self._bus.connected.is_set() or len(self._ephemeral) >= MAX_EPHEMERAL:
            return
        self._metrics.events[event] += 1
        task = asyncio.create_task(self._publish_ephemeral(session, event, data, event_id))
        self._ephemeral.add(task)
        task.add_done_callback(self._ephemeral.discard)

    async def direct(self, session: str, event: str, data: dict[str, Any], *, event_id: str, causation_id: str | None) -> bool:
        """Publish the outcome of a command that concerns no session of ours (so it has no sequence). False: not confirmed."""
        body = self._envelope(session, event, data, event_id, causation_id)
        return await self._publish(session, event, event_id, body) is Published.CONFIRMED

    async def _publish_ephemeral(self, session: str, event: str, data: dict[str, Any], event_id: str) -> None:
        await self._publish(session, event, event_id, self._envelope(session, event, data, event_id, None))

    def _envelope(self, session: str, event: str, data: dict[str, Any], event_id: str, causation_id: str | None) -> bytes:
        return envelope.cloud_event(
            self._topology,
            event=event,
            event_id=event_id,
            session=session,
            instance=self._options.instance,
            time=self._now(),
            data=data,
            causation_id=causation_id,
        )

    def _lane(self, session: str) -> _Lane:
        return self._lanes.setdefault(session, _Lane(session))

    # --- to disk

    async def _commit_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._room()
                batch = self._batch()
                self._committing = len(batch)
                await self._commit(batch)
                self._committing = 0
            self._settled.set()

    def _batch(self) -> list[_Entry]:
        """What waits; the events of a session whose earlier ones are held join those."""
        batch: list[_Entry] = []
        for entry in [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]:
            lane = self._lane(entry.session)
            (batch if lane.holding is None else lane.held).append(entry)
        return batch

    async def _room(self) -> None:
        """Wait while the outbox is full. Nothing is answered meanwhile, so WhatsApp and RabbitMQ keep what they have."""
        waited = False
        while problem := self._full():
            waited = True
            if not self.trouble:
                logger.bind(action="outbox_full").error("{} Nothing more is taken until there is room.", problem)
                self.trouble = problem
            await asyncio.sleep(ROOM_POLL_S)
        if waited:
            self._recovered()

    def _full(self) -> str:
        if self._bytes >= self._options.max_bytes:
            return f"The outbox holds {self._bytes} bytes, its limit."
        return "" if self._disk_ok() else "The disk of the state directory is nearly full."

    def _recovered(self) -> None:
        if self.trouble:
            self.trouble = ""
            logger.bind(action="outbox_room").info("Events are stored again.")

    async def _commit(self, batch: list[_Entry]) -> None:
        """Store a batch: events that were taken are never given up. Trouble of the disk is everybody's, and waited out here;
        what else the store refuses is the trouble of the sessions that it is about.
        """
        confirmed = self._take_confirmed()
        attempt = 0
        while True:
            try:
                return await self._put(batch, *confirmed)
            except Exception as e:  # whatever it is: this loop must not end, and the batch is not given up
                if not (isinstance(e, WarrenError) and e.retryable):
                    break
                self._failed(e)
                await asyncio.sleep(self._pause_s(attempt))
                attempt += 1
        for write in confirmed:
            self._confirmed.extend(write.keys)
        await self._commit_apart(batch)

    async def _commit_apart(self, batch: list[_Entry]) -> None:
        """Store what can be stored, session by session, and hold the rest."""
        apart: dict[str, list[_Entry]] = {}
        for entry in batch:
            apart.setdefault(entry.session, []).append(entry)
        stored, error = False, None
        for session, entries in apart.items():
            try:
                await self._put(entries)
                stored = True
            except Exception as e:
                error = e
                logger.bind(action="events_held", session=session).opt(exception=not isinstance(e, StateError)).error(
                    "Events of session {} cannot be stored and wait; they are tried again: {}", session, e
                )
                lane = self._lane(session)
                lane.held.extend(entries)
                lane.holding = asyncio.create_task(self._hold(lane), name=f"delivery.held.{session}")
        if error is not None and not stored:
            self._failed(error)

    async def _hold(self, lane: _Lane) -> None:
        """Store a session's held events, one by one in their order, until none is left."""
        attempt = 0
        while lane.held:
            await asyncio.sleep(self._pause_s(attempt))
            try:
                while lane.held:
                    await self._room()
                    await self._put([lane.held[0]])
                    lane.held.popleft()
                    attempt = 0
            except Exception:  # told when they began to be held
                attempt += 1
        lane.holding = None
        self._settled.set()

    def _pause_s(self, attempt: int) -> float:
        return delay(attempt, base_s=0.5, cap_s=10.0, random01=self._random01())

    def _failed(self, error: Exception) -> None:
        if not self.trouble:
            logger.bind(action="store_failed").opt(exception=not isinstance(error, StateError)).error(
                "Events cannot be stored: {}", error
            )
            self.trouble = str(error)

    async def _put(self, batch: list[_Entry], *also: Write) -> None:
        """One commit, all or nothing. Raises what the store does."""
        rows, numbers = self._number(batch)
        writes = [*also, *(w for entry, row in zip(batch, rows, strict=True) for w in self._writes(entry, row))]
        await self._store.write(*writes)
        self._recovered()
        self._sequences.update(numbers)
        for entry, row in zip(batch, rows, strict=True):
            self._stored(entry, row)

    def _number(self, batch: list[_Entry]) -> tuple[list[OutboxRow], dict[tuple[str, int], int]]:
        numbers: dict[tuple[str, int], int] = {}
        rows = []
        for entry in batch:
            key = (entry.session, entry.epoch)
            sequence = numbers.get(key, self._sequences.get(key, 0)) + 1
            numbers[key] = sequence
            rows.append(self._row(entry, sequence))
        return rows, numbers

    def _row(self, entry: _Entry, sequence: int) -> OutboxRow:
        the_id = entry.event_id or event_id(entry.session, "event", entry.event, str(entry.epoch), str(sequence))
        body = envelope.cloud_event(
            self._topology,
            event=entry.event,
            event_id=the_id,
            session=entry.session,
            instance=self._options.instance,
            time=entry.time,
            data=entry.data,
            epoch=entry.epoch,
            sequence=sequence,
            causation_id=entry.causation_id,
        )
        return OutboxRow(entry.session, entry.epoch, sequence, the_id, entry.event, body)

    @staticmethod
    def _writes(entry: _Entry, row: OutboxRow) -> tuple[Write, ...]:
        journal: tuple[Write, ...] = () if entry.journal is None else (PutOutcome(entry.journal),)
        return (AddEvent(row), *journal, *entry.also)

    def _stored(self, entry: _Entry, row: OutboxRow) -> None:
        self._bytes += len(row.body)
        self._metrics.events[entry.event] += 1
        lane = self._lane(row.session)
        lane.append(row, entry)
        entry.ticket.mark_stored(self._options.answer_after_s)
        self._run(lane)

    # --- to RabbitMQ

    def _run(self, lane: _Lane) -> None:
        if lane.task is None:
            lane.task = asyncio.create_task(self._publish_lane(lane), name=f"delivery.{lane.session}")

    async def _publish_lane(self, lane: _Lane) -> None:
        try:
            while (row := await self._next(lane)) is not None:
                await self._until_confirmed(row)
                self._row_confirmed(lane, row)
        except Exception:
            # Begin again at the last confirmed row, which is still on disk: a bug must not silence a session.
            logger.bind(action="delivery_bug", session=lane.session).exception("Publishing met a bug.")
            lane.cache.clear()
            lane.spilled = True
            lane.position = lane.confirmed
            asyncio.get_running_loop().call_later(self._options.retry_cap_s, self._run, lane)
        finally:
            lane.task = None
            self._settled.set()

    async def _next(self, lane: _Lane) -> OutboxRow | None:
        while not lane.cache and lane.spilled:
            page = await self._page(lane)
            lane.cache.extend(page)
            # Rows stored while the page was read may be missing from it; only a page that reaches the last row ends the spill.
            end = (page[-1].epoch, page[-1].sequence) if page else lane.position
            lane.spilled = len(page) == LANE_CACHE or lane.last > end
        if not lane.cache:
            return None
        row = lane.current = lane.cache.popleft()
        lane.position = (row.epoch, row.sequence)
        return row

    async def _page(self, lane: _Lane) -> list[OutboxRow]:
        attempt = 0
        while True:
            try:
                return await self._store.outbox_page(lane.session, lane.position, LANE_CACHE)
            except StateError as e:
                logger.bind(action="store_failed", session=lane.session).error("The outbox cannot be read: {}", e)
                await asyncio.sleep(delay(attempt, base_s=1.0, cap_s=30.0, random01=self._random01()))
                attempt += 1

    async def _until_confirmed(self, row: OutboxRow) -> None:
        attempt = 0
        while True:
            await self._bus.connected.wait()
            async with self._slots:
                began = asyncio.get_running_loop().time()
                result = await self._publish(row.session, row.event, row.event_id, row.body)
                self._metrics.published(result.value, asyncio.get_running_loop().time() - began)
            if result is Published.CONFIRMED:
                return
            if result is Published.REFUSED:
                logger.bind(action="publish_refused", session=row.session).error(
                    "RabbitMQ refused event {} ({} bytes); it stays in the outbox and is tried again.",
                    row.event_id,
                    len(row.body),
                )
            options = self._options
            pause = delay(attempt, base_s=options.retry_base_s, cap_s=options.retry_cap_s, random01=self._random01())
            await asyncio.sleep(pause)
            attempt += 1

    async def _publish(self, session: str, event: str, event_id: str, body: bytes) -> Published:
        return await self._bus.publish(
            self._topology.out,
            event_routing_key(session, event),
            body,
            message_id=event_id,
            content_type=envelope.CLOUDEVENT,
            headers={},
        )

    def _row_confirmed(self, lane: _Lane, row: OutboxRow) -> None:
        self._bytes -= len(row.body)
        lane.rows -= 1
        lane.current = None
        lane.confirmed = (row.epoch, row.sequence)
        self._confirmed.append((row.session, row.epoch, row.sequence))
        if len(self._confirmed) == 1:
            # One delete for many rows: the next commit takes them along, or this does.
            asyncio.get_running_loop().call_later(0.05, self._forget_soon)
        ticket = lane.tickets.pop((row.epoch, row.sequence), None)
        if lane.ids.get(row.event_id) is ticket:
            lane.ids.pop(row.event_id, None)
        if ticket is not None:
            ticket.mark_confirmed()

    def _take_confirmed(self) -> tuple[RemoveEvents, ...]:
        keys, self._confirmed = tuple(self._confirmed), []
        return (RemoveEvents(keys),) if keys else ()

    def _forget_soon(self) -> None:
        keys = tuple(self._confirmed)
        if not keys:
            return
        self._confirmed = []

        def done(written: asyncio.Future[None]) -> None:
            if not written.cancelled() and written.exception() is not None:
                self._confirmed.extend(keys)  # a full disk: the next commit takes them along

        self._store.write(RemoveEvents(keys)).add_done_callback(done)

    async def _forget_confirmed(self) -> None:
        if writes := self._take_confirmed():
            try:
                await self._store.write(*writes)
            except StateError as e:
                logger.bind(action="store_failed").warning("Published events stay in the outbox and will repeat: {}", e)
