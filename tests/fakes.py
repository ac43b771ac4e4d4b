"""Edges in memory, for unit tests of the services. What they promise is what `ports.py` says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import orjson

from warren.errors import StateError
from warren.ports import (
    AddEvent,
    JournalRow,
    OutboxRow,
    Published,
    PutOutcome,
    PutSession,
    RemoveEvents,
    SessionRecord,
    Write,
)


class MemoryStore:
    """`ports.Store`; passes the same conformance tests as the real one. `failing`: how many further writes fail, as a full
    disk would.
    """

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int], OutboxRow] = {}
        self.journal: dict[tuple[str, str], JournalRow] = {}
        self.records: dict[str, SessionRecord] = {}
        self.failing = 0
        self._queued: list[tuple[tuple[Write, ...], asyncio.Future[None]]] = []
        self._closed = False

    def write(self, *writes: Write) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if self._closed:
            future.set_exception(StateError("The store is closed."))
        else:
            self._queued.append((writes, future))
            loop.call_soon(self._flush)
        return future

    def _flush(self) -> None:
        """Write what is queued, in order."""
        queued, self._queued = self._queued, []
        for writes, future in queued:
            error = self._unit(writes)
            if future.cancelled():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _unit(self, writes: tuple[Write, ...]) -> Exception | None:
        """All of a unit or nothing of it."""
        if self.failing:
            self.failing -= 1
            return StateError("The disk is full.")
        before = dict(self.rows), dict(self.journal), dict(self.records)
        try:
            for write in writes:
                self._apply(write)
        except (StateError, TypeError) as e:
            self.rows, self.journal, self.records = before
            return e
        return None

    def _apply(self, write: Write) -> None:
        match write:
            case AddEvent(row):
                self._add(row)
            case RemoveEvents(keys):
                for key in keys:
                    self.rows.pop(key, None)
            case PutOutcome(outcome):
                self.journal[outcome.session, outcome.command_id] = outcome
            case PutSession(record):
                orjson.dumps(record.settings)  # raises TypeError for what cannot be stored
                old = self.records.get(record.session)
                if old is not None and old.epoch == record.epoch:
                    record = replace(record, sequence=old.sequence)
                self.records[record.session] = record

    def _add(self, row: OutboxRow) -> None:
        key = (row.session, row.epoch, row.sequence)
        if key in self.rows:
            raise StateError(f"There is an event {key} already.")
        self.rows[key] = row
        record = self.records.get(row.session)
        if record is not None and record.epoch == row.epoch:
            self.records[row.session] = replace(record, sequence=max(record.sequence, row.sequence))

    async def _read(self) -> None:
        """Reads see every write asked for before them."""
        if self._closed:
            raise StateError("The store is closed.")
        self._flush()
        await asyncio.sleep(0)

    async def sessions(self) -> list[SessionRecord]:
        await self._read()
        return [self.records[session] for session in sorted(self.records)]

    async def session(self, session: str) -> SessionRecord | None:
        await self._read()
        return self.records.get(session)

    async def outcome(self, session: str, command_id: str) -> JournalRow | None:
        await self._read()
        return self.journal.get((session, command_id))

    async def outbox_sessions(self) -> list[str]:
        await self._read()
        return sorted({session for session, _, _ in self.rows})

    async def outbox_page(self, session: str, after: tuple[int, int], limit: int) -> list[OutboxRow]:
        await self._read()
        mine = sorted((k, r) for k, r in self.rows.items() if k[0] == session and k[1:] > after)
        return [row for _, row in mine[:limit]]

    async def outbox_bytes(self) -> int:
        await self._read()
        return sum(len(r.body) for r in self.rows.values())

    async def close(self) -> None:
        self._flush()
        self._closed = True


class MemoryBus:
    """The publishing half of `ports.Bus`. `answers` decides each publish; by default everything is confirmed."""

    def __init__(self) -> None:
        self.connected = asyncio.Event()
        self.connected.set()
        self.published: list[tuple[str, str]] = []
        """(message id, routing key), each try."""
        self.in_flight: dict[str, int] = {}
        self.most_in_flight = 0
        self.answers: Callable[[str], Published] = lambda _: Published.CONFIRMED
        self.gate = asyncio.Event()
        self.gate.set()
        self.replies: list[tuple[str, str | None, bytes]] = []

    async def reply(self, reply_to: str, correlation_id: str | None, body: bytes) -> None:
        self.replies.append((reply_to, correlation_id, body))

    async def publish(
        self, exchange: str, routing_key: str, body: bytes, *, message_id: str, content_type: str, headers: dict[str, str]
    ) -> Published:
        session = routing_key.split(".", maxsplit=1)[0]
        self.in_flight[session] = self.in_flight.get(session, 0) + 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight[session])
        await self.gate.wait()
        await asyncio.sleep(0)
        self.in_flight[session] -= 1
        self.published.append((message_id, routing_key))
        return self.answers(message_id)
