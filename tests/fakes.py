"""Edges in memory, for unit tests of the services. What they promise is what `ports.py` says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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
    """`ports.Store`. `failing`: how many further writes fail, as a full disk would."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int], OutboxRow] = {}
        self.journal: dict[tuple[str, str], JournalRow] = {}
        self.records: dict[str, SessionRecord] = {}
        self.failing = 0

    def write(self, *writes: Write) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(self._apply, writes, future)
        return future

    def _apply(self, writes: tuple[Write, ...], future: asyncio.Future[None]) -> None:
        if self.failing:
            self.failing -= 1
            future.set_exception(StateError("The disk is full."))
            return
        for write in writes:
            match write:
                case AddEvent(row):
                    self.rows[row.session, row.epoch, row.sequence] = row
                case RemoveEvents(keys):
                    for key in keys:
                        self.rows.pop(key, None)
                case PutOutcome(row):
                    self.journal[row.session, row.command_id] = row
                case PutSession(record):
                    self.records[record.session] = record
        if not future.cancelled():
            future.set_result(None)

    async def sessions(self) -> list[SessionRecord]:
        return list(self.records.values())

    async def session(self, session: str) -> SessionRecord | None:
        return self.records.get(session)

    async def outcome(self, session: str, command_id: str) -> JournalRow | None:
        return self.journal.get((session, command_id))

    async def outbox_sessions(self) -> list[str]:
        return sorted({session for session, _, _ in self.rows})

    async def outbox_page(self, session: str, after: tuple[int, int], limit: int) -> list[OutboxRow]:
        await asyncio.sleep(0)
        mine = sorted((k, r) for k, r in self.rows.items() if k[0] == session and k[1:] > after)
        return [row for _, row in mine[:limit]]

    async def outbox_bytes(self) -> int:
        return sum(len(r.body) for r in self.rows.values())

    async def close(self) -> None:
        return


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
