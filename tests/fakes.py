"""Edges in memory, for unit tests of the services. What they promise is what `ports.py` says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import orjson

from warren.errors import StateError, StorageError
from warren.ports import (
    AddEvent,
    BackupRow,
    Desired,
    Found,
    JournalRow,
    KeepOutcome,
    Listed,
    OutboxRow,
    Published,
    PutBackup,
    PutOutcome,
    PutPacing,
    PutSession,
    PutStarts,
    RemoveBackup,
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
        self.backups: dict[str, BackupRow] = {}
        self.windows: dict[str, tuple[int, ...]] = {}
        self.started: dict[tuple[str, str], int] = {}
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
            return StateError("The disk is full.", retryable=True)
        before = (
            dict(self.rows),
            dict(self.journal),
            dict(self.records),
            dict(self.backups),
            dict(self.windows),
            dict(self.started),
        )
        try:
            for write in writes:
                self._apply(write)
        except (StateError, TypeError) as e:
            self.rows, self.journal, self.records, self.backups, self.windows, self.started = before
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
                # Behind the others, as its time says.
                self.journal.pop((outcome.session, outcome.command_id), None)
                self.journal[outcome.session, outcome.command_id] = outcome
            case KeepOutcome(outcome):
                self.journal.setdefault((outcome.session, outcome.command_id), outcome)
            case PutBackup(backup):
                self.backups[backup.session] = backup
            case RemoveBackup(session):
                self.backups.pop(session, None)
            case PutSession(record):
                orjson.dumps(record.settings)  # raises TypeError for what cannot be stored
                old = self.records.get(record.session)
                if old is not None and old.epoch == record.epoch:
                    record = replace(record, sequence=old.sequence)
                self.records[record.session] = record
                if record.desired is Desired.GONE:
                    self.windows.pop(record.session, None)
                    self.started = {key: count for key, count in self.started.items() if key[0] != record.session}
            case PutPacing(session, stamps):
                self.windows[session] = stamps
            case PutStarts(session, command_id, count):
                self.started[session, command_id] = count
                if not count:
                    del self.started[session, command_id]

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

    async def last_outcomes(self, session: str, limit: int) -> list[JournalRow]:
        await self._read()
        return [row for row in self.journal.values() if row.session == session][-limit:]

    async def backup(self, session: str) -> BackupRow | None:
        await self._read()
        return self.backups.get(session)

    async def pacing(self, session: str) -> tuple[int, ...]:
        await self._read()
        return self.windows.get(session, ())

    async def starts(self, session: str, command_id: str) -> int:
        await self._read()
        return self.started.get((session, command_id), 0)

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
        self.trouble = ""
        self.published: list[tuple[str, str]] = []
        """(message id, routing key), each try."""
        self.headers: dict[str, dict[str, str]] = {}
        """The last ones, by exchange (its name without the prefix)."""
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
        self.headers[exchange.partition(".")[2]] = headers
        return self.answers(message_id)


class MemoryObjects:
    """`ports.ObjectStore`; passes the same conformance tests as the real ones. Its faults:

    - `failing`: how many further calls fail without any effect;
    - `losing_answers`: how many further puts take effect and are then reported as failed;
    - `truncating`: how many further gets bring only half of the object;
    - `denied`: every call fails like wrong credentials;
    - `gate`: while cleared, calls wait.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.objects: dict[str, tuple[bytes, str, float]] = {}
        """name -> (data, version, modified)."""
        self.calls: list[tuple[str, str]] = []
        """(verb, name), each try."""
        self.failing = 0
        self.losing_answers = 0
        self.truncating = 0
        self.denied = False
        self.gate = asyncio.Event()
        self.gate.set()
        self._clock = clock
        self._versions = 0

    async def create(self, name: str, data: bytes) -> bool:
        await self._called("create", name)
        if name in self.objects:
            return False
        self._put(name, data)
        return True

    async def replace(self, name: str, data: bytes, expected: str) -> bool:
        await self._called("replace", name)
        if name not in self.objects or self.objects[name][1] != expected:
            return False
        self._put(name, data)
        return True

    async def get(self, name: str) -> Found | None:
        await self._called("get", name)
        if name not in self.objects:
            return None
        data, version, _ = self.objects[name]
        if self.truncating:
            self.truncating -= 1
            data = data[: len(data) // 2]
        return Found(data, version)

    async def list(self, prefix: str) -> list[Listed]:
        await self._called("list", prefix)
        below = f"{prefix}/" if prefix else ""
        return [Listed(n, len(d), at) for n, (d, _, at) in sorted(self.objects.items()) if n.startswith(below)]

    async def delete(self, name: str) -> None:
        await self._called("delete", name)
        self.objects.pop(name, None)

    async def close(self) -> None: ...

    async def _called(self, verb: str, name: str) -> None:
        self.calls.append((verb, name))
        await self.gate.wait()
        await asyncio.sleep(0)
        if self.denied:
            raise StorageError("The store refuses the credentials.", kind="denied")
        if self.failing:
            self.failing -= 1
            raise StorageError("The store does not answer.", kind="unavailable")

    def _put(self, name: str, data: bytes) -> None:
        self._versions += 1
        self.objects[name] = (bytes(data), str(self._versions), self._clock())
        if self.losing_answers:
            self.losing_answers -= 1
            raise StorageError("The answer of the store was lost.", kind="unavailable")
