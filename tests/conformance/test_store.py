"""The Store: what `ports.Store` promises, held on the real SQLite file and on the fake of the unit tests (`any_store`)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes import MemoryStore

from warren.edges import store as module
from warren.edges.store import SqliteStore
from warren.errors import OwnershipError, StateError
from warren.ports import (
    AddEvent,
    BackupRow,
    Desired,
    JournalRow,
    KeepOutcome,
    OutboxRow,
    PutBackup,
    PutOutcome,
    PutPacing,
    PutSession,
    PutStarts,
    RemoveBackup,
    RemoveEvents,
    SessionRecord,
    Store,
    Write,
)

DAY_S = 86_400.0


def event(session: str, sequence: int, *, epoch: int = 1, body: bytes = b"{}") -> OutboxRow:
    return OutboxRow(session, epoch, sequence, f"{session}/{epoch}/{sequence}", "message", body)


def outcome(session: str, command_id: str, body: bytes = b'{"ok":true}') -> JournalRow:
    return JournalRow(session, command_id, f"fingerprint of {command_id}", body)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "warren.db"


@pytest.fixture
async def store(path: Path, clock: Clock) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(path, clock=clock)
    yield store
    await store.close()
    assert not [t for t in threading.enumerate() if t.name == "warren-store"]


@pytest.fixture(params=["sqlite", "memory"])
async def any_store(request: pytest.FixtureRequest, path: Path) -> AsyncIterator[Store]:
    store: Store = await opened(request.param, path)
    yield store
    await store.close()


async def opened(kind: str, path: Path) -> Store:
    return await SqliteStore.open(path) if kind == "sqlite" else MemoryStore()


def size(path: Path) -> int:
    return path.stat().st_size


def read(path: Path) -> bytes:
    return path.read_bytes()


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


async def commits_during(store: SqliteStore, units: list[tuple[Write, ...]]) -> int:
    await store.sessions()  # whatever was queued before is through
    before = store.commits
    await asyncio.gather(*[store.write(*unit) for unit in units])
    return store.commits - before


# --- registry ---------------------------------------------------------------------------------------------------------


async def test_a_session_is_kept_as_it_was_put(any_store: Store) -> None:
    record = SessionRecord("acme", 3, Desired.RUNNING, 7, {"proxy": "ö", "n": [1]}, {"jid": "1@s.whatsapp.net"}, "replaced", True)
    await any_store.write(PutSession(record))
    assert await any_store.session("acme") == record
    assert await any_store.sessions() == [record]
    assert await any_store.session("other") is None


async def test_put_session_does_not_turn_the_sequence_back(any_store: Store) -> None:
    record = SessionRecord("acme", 1, Desired.RUNNING, sequence=0)
    await any_store.write(PutSession(record))
    await any_store.write(AddEvent(event("acme", 1)), AddEvent(event("acme", 2)))
    await any_store.write(PutSession(dataclasses.replace(record, desired=Desired.STOPPED)))
    assert await any_store.session("acme") == dataclasses.replace(record, desired=Desired.STOPPED, sequence=2)


async def test_a_new_epoch_starts_with_the_sequence_it_was_put_with(any_store: Store) -> None:
    await any_store.write(PutSession(SessionRecord("acme", 1, Desired.RUNNING)), AddEvent(event("acme", 9)))
    await any_store.write(PutSession(SessionRecord("acme", 2, Desired.RUNNING)))
    found = await any_store.session("acme")
    assert found is not None
    assert (found.epoch, found.sequence) == (2, 0)
    # A late row of the old epoch leaves the new one's sequence alone.
    await any_store.write(AddEvent(event("acme", 10, epoch=1)))
    found = await any_store.session("acme")
    assert found is not None
    assert found.sequence == 0


# --- outbox -----------------------------------------------------------------------------------------------------------


async def test_outbox_pages_go_through_a_session_in_order(any_store: Store) -> None:
    rows = [event("acme", n, epoch=e, body=bytes(n)) for e in (1, 2) for n in (1, 2, 3)]
    for row in random.Random(1).sample(rows, len(rows)):
        await any_store.write(AddEvent(row))
    await any_store.write(AddEvent(event("acme2", 1)))
    got: list[OutboxRow] = []
    after = (0, 0)
    while page := await any_store.outbox_page("acme", after, 2):
        got += page
        after = (page[-1].epoch, page[-1].sequence)
    assert got == rows


async def test_outbox_sessions_are_those_with_rows(any_store: Store) -> None:
    assert await any_store.outbox_sessions() == []
    await any_store.write(*[AddEvent(event(s, n)) for s in ("b", "a", "c") for n in (1, 2)])
    assert await any_store.outbox_sessions() == ["a", "b", "c"]
    await any_store.write(RemoveEvents((("b", 1, 1), ("b", 1, 2))))
    assert await any_store.outbox_sessions() == ["a", "c"]


async def test_outbox_bytes_count_the_bodies_also_after_reopening(path: Path) -> None:
    store = await SqliteStore.open(path)
    await store.write(AddEvent(event("acme", 1, body=bytes(100_000))), AddEvent(event("acme", 2, body=bytes(10))))
    assert await store.outbox_bytes() == 100_010
    await store.write(RemoveEvents((("acme", 1, 1), ("acme", 1, 1), ("acme", 1, 99))))
    assert await store.outbox_bytes() == 10
    await store.close()
    store = await SqliteStore.open(path)
    assert await store.outbox_bytes() == 10
    assert await store.outbox_page("acme", (0, 0), 10) == [event("acme", 2, body=bytes(10))]
    await store.close()


async def test_a_backlog_that_is_gone_gives_the_disk_back(store: SqliteStore, path: Path) -> None:
    keys = [("acme", 1, n) for n in range(1, 401)]
    body = os.urandom(100_000)
    await asyncio.gather(*[store.write(AddEvent(event("acme", key[2], body=body))) for key in keys])
    for key in keys:
        await store.write(RemoveEvents((key,)))
    await store.close()
    assert size(path) < 20_000_000 < len(keys) * len(body)


# --- journal ----------------------------------------------------------------------------------------------------------


async def test_an_outcome_is_found_by_session_and_command(any_store: Store) -> None:
    await any_store.write(PutOutcome(outcome("acme", "order-1")))
    assert await any_store.outcome("acme", "order-1") == outcome("acme", "order-1")
    assert await any_store.outcome("acme", "order-2") is None
    assert await any_store.outcome("other", "order-1") is None
    await any_store.write(PutOutcome(outcome("acme", "order-1", b"later")))
    assert await any_store.outcome("acme", "order-1") == outcome("acme", "order-1", b"later")


async def test_the_last_outcomes_come_oldest_first(any_store: Store) -> None:
    for n in range(5):
        await any_store.write(PutOutcome(outcome("acme", f"order-{n}")))
    await any_store.write(PutOutcome(outcome("other", "order-9")))
    assert [row.command_id for row in await any_store.last_outcomes("acme", 3)] == ["order-2", "order-3", "order-4"]
    assert await any_store.last_outcomes("acme", 9) == [outcome("acme", f"order-{n}") for n in range(5)]


async def test_what_comes_back_with_a_backup_overwrites_no_outcome(any_store: Store) -> None:
    await any_store.write(PutOutcome(outcome("acme", "order-1", b"here")))
    await any_store.write(KeepOutcome(outcome("acme", "order-1", b"old")), KeepOutcome(outcome("acme", "order-0", b"old")))
    assert await any_store.outcome("acme", "order-1") == outcome("acme", "order-1", b"here")
    assert await any_store.outcome("acme", "order-0") == outcome("acme", "order-0", b"old")


async def test_pacing_and_starts_are_kept_until_the_session_is_gone(any_store: Store) -> None:
    assert (await any_store.pacing("a"), await any_store.starts("a", "c")) == ((), 0)
    await any_store.write(PutPacing("a", (1, 2)), PutStarts("a", "c", 1), PutStarts("a", "d", 4), PutPacing("b", (7,)))
    await any_store.write(PutPacing("a", (2, 1_800_000_000_000)), PutStarts("a", "c", 2), PutStarts("a", "d", 0))
    assert await any_store.pacing("a") == (2, 1_800_000_000_000)
    assert (await any_store.starts("a", "c"), await any_store.starts("a", "d")) == (2, 0)
    await any_store.write(PutSession(SessionRecord("a", 1, Desired.GONE)))
    assert (await any_store.pacing("a"), await any_store.starts("a", "c")) == ((), 0)
    assert await any_store.pacing("b") == (7,)


async def test_until_is_kept_also_in_a_file_that_knew_no_such_column(path: Path) -> None:
    await (await SqliteStore.open(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE sessions DROP COLUMN until")
        db.execute("DROP TABLE pacing")
        db.commit()
    record = SessionRecord("a", 1, Desired.RUNNING, halted="blocked", until="2026-11-21T12:00:00.000Z")
    store = await SqliteStore.open(path)
    await store.write(PutSession(record), PutPacing("a", (1,)))
    assert await store.sessions() == [record]
    await store.close()


async def test_how_far_a_session_is_backed_up_is_kept(path: Path) -> None:
    row = BackupRow("acme", 3, 7, 1700000000.25, 4096, "ab" * 32, ("cd" * 32, "ef" * 32), 12.5)
    store = await SqliteStore.open(path)
    assert await store.backup("acme") is None
    await store.write(PutBackup(BackupRow("acme", 3, 6)), PutBackup(BackupRow("other", 1, 1)))
    await store.write(PutBackup(row), RemoveBackup("other"))
    await store.close()
    store = await SqliteStore.open(path)
    assert await store.backup("acme") == row
    assert await store.backup("other") is None
    await store.close()


async def journal_ids(path: Path) -> set[str]:
    with sqlite3.connect(path) as db:
        ids = {row[0] for row in db.execute("SELECT command_id FROM journal WHERE session = 'acme'")}
    db.close()
    return ids


async def test_old_outcomes_go_but_the_last_of_a_session_stay(path: Path, clock: Clock) -> None:
    store = await SqliteStore.open(path, clock=clock)
    await store.write(PutOutcome(outcome("quiet", "only")))
    await store.write(*[PutOutcome(outcome("acme", f"old-{n}")) for n in range(600)])
    clock.now += 7 * DAY_S
    await store.write(*[PutOutcome(outcome("acme", f"mid-{n}")) for n in range(600)])
    clock.now += DAY_S
    await store.write(*[PutOutcome(outcome("acme", f"new-{n}")) for n in range(600)])
    # 1,200 are younger than 7 days: all of those stay, and what is older goes.
    assert await store.outcome("acme", "old-0") is None
    assert await store.outcome("acme", "mid-0") is not None
    assert await store.outcome("quiet", "only") is not None
    clock.now += 365 * DAY_S
    await store.close()
    await (await SqliteStore.open(path, clock=clock)).close()
    ids = await journal_ids(path)
    # All old now, so the last 1,000 stay; rows of the same second are not told apart, and stay with them.
    assert ids == {f"{kind}-{n}" for kind in ("mid", "new") for n in range(600)}


# --- units: order, atomicity, grouping --------------------------------------------------------------------------------


async def test_a_read_sees_the_writes_asked_for_before_it(any_store: Store) -> None:
    for n in range(1, 50):
        future = any_store.write(AddEvent(event("acme", n)))
        assert len(await any_store.outbox_page("acme", (0, 0), 100)) == n
        assert future.done()


async def test_a_failing_unit_changes_nothing_and_fails_alone(any_store: Store) -> None:
    await any_store.write(PutSession(SessionRecord("acme", 1, Desired.RUNNING)), AddEvent(event("acme", 1, body=b"first")))
    good = any_store.write(AddEvent(event("acme", 2, body=b"22")))
    bad = any_store.write(
        AddEvent(event("acme", 9, body=b"999")),
        PutOutcome(outcome("acme", "order-1")),
        AddEvent(event("acme", 1, body=b"again")),  # the key is taken
    )
    unstorable = any_store.write(PutSession(SessionRecord("acme", 1, Desired.STOPPED, settings={"x": object()})))
    later = any_store.write(AddEvent(event("acme", 3, body=b"3")))
    results = await asyncio.gather(good, bad, unstorable, later, return_exceptions=True)
    assert [type(r) for r in results] == [type(None), StateError, TypeError, type(None)]
    assert not getattr(results[1], "retryable", True), "it is the row's trouble, not the disk's"
    assert [r.sequence for r in await any_store.outbox_page("acme", (0, 0), 10)] == [1, 2, 3]
    assert await any_store.outcome("acme", "order-1") is None
    assert await any_store.outbox_bytes() == len(b"first") + 3
    assert await any_store.session("acme") == SessionRecord("acme", 1, Desired.RUNNING, sequence=3)


async def test_what_waits_is_committed_together(store: SqliteStore) -> None:
    units: list[tuple[Write, ...]] = [(AddEvent(event("acme", n)),) for n in range(1, 1001)]
    commits = await commits_during(store, units)
    # The first may go alone, the rest was queued by then.
    assert commits <= 2 + len(units) // module.BATCH_UNITS


async def test_a_batch_is_bounded_in_bytes(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1_000)
    units: list[tuple[Write, ...]] = [(AddEvent(event("acme", n, body=bytes(500))),) for n in range(1, 101)]
    assert await commits_during(store, units) >= 50


async def test_a_cancelled_waiter_does_not_take_the_write_back(any_store: Store) -> None:
    futures = [any_store.write(AddEvent(event("acme", n))) for n in range(1, 101)]
    for future in futures[::2]:
        future.cancel()
    await asyncio.gather(*futures[1::2])
    assert len(await any_store.outbox_page("acme", (0, 0), 1000)) == 100


async def test_a_closed_store_has_written_what_was_queued_and_refuses_more(any_store: Store) -> None:
    future = any_store.write(AddEvent(event("acme", 1)))
    await any_store.close()
    assert future.done()
    assert future.exception() is None
    with pytest.raises(StateError, match="closed"):
        await any_store.write(AddEvent(event("acme", 2)))
    with pytest.raises(StateError, match="closed"):
        await any_store.sessions()


async def test_close_writes_what_is_queued_and_refuses_what_comes_later(path: Path) -> None:
    store = await SqliteStore.open(path)
    futures = [store.write(AddEvent(event("acme", n))) for n in range(1, 1001)]
    await asyncio.gather(store.close(), store.close())
    assert all(f.done() and f.exception() is None for f in futures)
    with pytest.raises(StateError, match="closed"):
        await store.write(AddEvent(event("acme", 1001)))
    with pytest.raises(StateError, match="closed"):
        await store.sessions()
    assert not path.with_name("warren.db-wal").exists()
    store = await SqliteStore.open(path)
    assert len(await store.outbox_page("acme", (0, 0), 2000)) == 1000
    await store.close()


async def test_a_cancelled_open_closes_by_itself(path: Path) -> None:
    opening = asyncio.ensure_future(SqliteStore.open(path))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    for thread in threading.enumerate():
        if thread.name == "warren-store":
            await asyncio.to_thread(thread.join, 10)
    await (await SqliteStore.open(path)).close()


# --- property: any list of units, against a model ---------------------------------------------------------------------

sessions = st.sampled_from(["a", "b"])
small = st.integers(1, 4)
writes = st.one_of(
    st.builds(lambda s, e, n, b: AddEvent(event(s, n, epoch=e, body=b)), sessions, small, small, st.binary(max_size=9)),
    st.builds(lambda k: RemoveEvents(tuple(k)), st.lists(st.tuples(sessions, small, small), max_size=3)),
    st.builds(lambda s, c, b: PutOutcome(outcome(s, f"c{c}", b)), sessions, small, st.binary(max_size=9)),
    st.builds(
        lambda s, e, d, n, p: PutSession(SessionRecord(s, e, d, n, {"p": p}, {"jid": "j" * p}, "blocked" * p, p)),
        sessions,
        small,
        st.sampled_from(Desired),
        small,
        st.booleans(),
    ),
)


@dataclasses.dataclass
class Model:
    sessions: dict[str, SessionRecord] = dataclasses.field(default_factory=dict)
    outbox: dict[tuple[str, int, int], OutboxRow] = dataclasses.field(default_factory=dict)
    journal: dict[tuple[str, str], JournalRow] = dataclasses.field(default_factory=dict)

    def after(self, unit: list[Write]) -> Model | None:
        """The model after the unit, None when it must fail."""
        new = Model(dict(self.sessions), dict(self.outbox), dict(self.journal))
        return new if all(new.apply(write) for write in unit) else None

    def apply(self, write: Write) -> bool:
        match write:
            case AddEvent(row):
                key = (row.session, row.epoch, row.sequence)
                if key in self.outbox:
                    return False
                self.outbox[key] = row
                record = self.sessions.get(row.session)
                if record is not None and record.epoch == row.epoch:
                    raised = dataclasses.replace(record, sequence=max(record.sequence, row.sequence))
                    self.sessions[row.session] = raised
            case RemoveEvents(keys):
                for key in keys:
                    self.outbox.pop(key, None)
            case PutOutcome(row):
                self.journal[row.session, row.command_id] = row
            case PutSession(record):
                old = self.sessions.get(record.session)
                if old is not None and old.epoch == record.epoch:
                    record = dataclasses.replace(record, sequence=old.sequence)
                self.sessions[record.session] = record
        return True


async def content(store: Store) -> Model:
    names = await store.outbox_sessions()
    rows = [row for name in names for row in await store.outbox_page(name, (0, 0), 1000)]
    found = [await store.outcome(s, f"c{c}") for s in ("a", "b") for c in range(1, 5)]
    assert await store.outbox_bytes() == sum(len(row.body) for row in rows)
    return Model(
        {r.session: r for r in await store.sessions()},
        {(r.session, r.epoch, r.sequence): r for r in rows},
        {(r.session, r.command_id): r for r in found if r is not None},
    )


@pytest.mark.parametrize("kind", ["sqlite", "memory"])
@given(units=st.lists(st.lists(writes, min_size=1, max_size=4), max_size=12))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_units_leave_what_the_model_says(kind: str, units: list[list[Write]]) -> None:
    async def run(path: Path) -> None:
        store = await opened(kind, path)
        results = await asyncio.gather(*[store.write(*unit) for unit in units], return_exceptions=True)
        model = Model()
        for unit, result in zip(units, results, strict=True):
            after = model.after(unit)
            assert (after is None) == isinstance(result, StateError), result
            model = model if after is None else after
        assert await content(store) == model
        await store.close()
        if kind == "sqlite":
            store = await opened(kind, path)
            assert await content(store) == model
            await store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder) / "warren.db"))


# --- faults -----------------------------------------------------------------------------------------------------------

WRITER = """
import asyncio, os, sys
from pathlib import Path
from warren.edges.store import SqliteStore
from warren.ports import *

async def writer(store, session, say):
    record = await store.session(session)
    sequence = record.sequence
    while True:
        sequence += 1
        await store.write(AddEvent(OutboxRow(session, 1, sequence, "id", "message", b"x" * 300)),
                          PutOutcome(JournalRow(session, str(sequence), "f", b"done")))
        say("+", session, sequence)
        if sequence % 3 == 0:
            say("?", session, sequence)
            await store.write(RemoveEvents(((session, 1, sequence),)))
            say("-", session, sequence)

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    say = lambda *words: os.write(1, (" ".join(map(str, words)) + "\\n").encode())
    async with asyncio.TaskGroup() as tasks:
        for n in range(20):
            tasks.create_task(writer(store, f"s{n}", say))

asyncio.run(main())
"""


def run_writer_and_kill(path: Path, lines: int) -> list[list[str]]:
    """Start the writer, kill -9 it after it said so many lines; every line it said."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.readlines()
    assert len(said) >= lines
    return [line.decode().split() for line in said if line.endswith(b"\n")]


async def test_kill_9_loses_nothing_that_was_answered(path: Path) -> None:
    store = await SqliteStore.open(path)
    await store.write(*[PutSession(SessionRecord(f"s{n}", 1, Desired.RUNNING)) for n in range(20)])
    await store.close()
    chance = random.Random(20)
    answered: dict[str, set[int]] = {f"s{n}": set() for n in range(20)}
    asked: dict[str, set[int]] = {f"s{n}": set() for n in range(20)}
    removed: dict[str, set[int]] = {f"s{n}": set() for n in range(20)}
    for _ in range(12):
        for sign, session, sequence in await asyncio.to_thread(run_writer_and_kill, path, chance.randrange(50, 1500)):
            {"+": answered, "?": asked, "-": removed}[sign][session].add(int(sequence))
        store = await SqliteStore.open(path)
        for session, said in answered.items():
            there = {row.sequence for row in await store.outbox_page(session, (0, 0), 1_000_000)}
            assert said - asked[session] <= there
            assert not removed[session] & there
            record = await store.session(session)
            assert record is not None
            # No gap and no sequence used twice: the registry knows exactly what was written, answered or not.
            journal = [n for n in range(1, record.sequence + 2) if await store.outcome(session, str(n)) is not None]
            assert journal == list(range(1, record.sequence + 1))
            assert record.sequence >= max(said, default=0)
        await store.close()
    assert sum(map(len, answered.values())) > 1_000


async def test_a_second_process_is_refused(store: SqliteStore, path: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from warren.edges.store import SqliteStore;"
        "asyncio.run(SqliteStore.open(Path(sys.argv[1])))"
    )
    run = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 1
    assert "OwnershipError" in run.stderr
    assert "in use by another process" in run.stderr
    with pytest.raises(OwnershipError, match="Only one warrend"):
        await SqliteStore.open(path)
    # ... and the first is none the worse.
    await store.write(AddEvent(event("acme", 1)))


def try_mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "warren-test", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 4 MB; None where it may not be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not try_mount(folder):
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def failure(future: asyncio.Future[None]) -> BaseException | None:
    return (await asyncio.gather(future, return_exceptions=True))[0]


async def fill(store: SqliteStore, first: int) -> int:
    """Add events until one fails; how many there are then."""
    sequence = first
    while (error := await failure(store.write(AddEvent(event("acme", sequence, body=bytes(50_000)))))) is None:
        sequence += 1
        assert sequence < first + 1_000
    assert isinstance(error, StateError)
    assert "is full" in error.message
    assert "Free some space" in error.hint
    return sequence - 1


async def test_a_full_file_system_fails_writes_until_there_is_room(small_disk: Path | None) -> None:
    if small_disk is None:
        return  # not root: the next test covers the full database without a file system of its own
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2 << 20))
    store = await SqliteStore.open(small_disk / "warren.db")
    await store.write(PutSession(SessionRecord("acme", 1, Desired.RUNNING)))
    count = await fill(store, 1)
    failing = [store.write(AddEvent(event("acme", 500 + n, body=bytes(50_000)))) for n in range(20)]
    assert {type(r) for r in await asyncio.gather(*failing, return_exceptions=True)} == {StateError}
    assert len(await store.outbox_page("acme", (0, 0), 1000)) == count
    assert await store.outbox_bytes() == count * 50_000
    ballast.unlink()
    assert await fill(store, count + 1) > count
    await store.close()
    store = await SqliteStore.open(small_disk / "warren.db")
    record = await store.session("acme")
    assert record is not None
    assert record.sequence == len(await store.outbox_page("acme", (0, 0), 1000))
    await store.close()


async def test_a_store_opens_on_a_full_disk_though_there_is_something_to_tidy(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await SqliteStore.open(path, clock=clock)
    await store.write(PutSession(SessionRecord("acme", 1, Desired.RUNNING)))
    await store.close()

    def full(_: SqliteStore) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(SqliteStore, "_prune_all", full)
    store = await SqliteStore.open(path, clock=clock)
    assert [record.session for record in await store.sessions()] == ["acme"]
    await store.close()


async def test_a_full_database_fails_writes_until_there_is_room(store: SqliteStore) -> None:
    async def limit(pages: int) -> None:
        await store._submit(lambda: store._db.execute(f"PRAGMA max_page_count={pages}").fetchall())

    await limit(100)
    count = await fill(store, 1)
    assert await store.outbox_bytes() == count * 50_000
    await store.write(RemoveEvents((("acme", 1, 1),)))  # deleting needs no room
    await limit(1_000_000)
    await store.write(AddEvent(event("acme", 700, body=bytes(1_000_000))))
    assert len(await store.outbox_page("acme", (0, 0), 1000)) == count


async def expect_refusal(path: Path, match: str) -> None:
    before = read(path)
    with pytest.raises(StateError, match=match) as caught:
        await SqliteStore.open(path)
    assert caught.value.hint
    assert read(path) == before
    assert not [t for t in threading.enumerate() if t.name == "warren-store"]


async def test_what_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    overwrite(path, b"these are not the bytes you are looking for\n" * 1000)
    await expect_refusal(path, "damaged")


async def test_a_damaged_database_is_refused(path: Path) -> None:
    store = await SqliteStore.open(path)
    await store.write(*[AddEvent(event("acme", n, body=bytes(500))) for n in range(1, 500)])
    await store.close()
    data = bytearray(read(path))
    for page in range(4, len(data) // 4096, 3):
        data[page * 4096 : page * 4096 + 200] = os.urandom(200)
    overwrite(path, bytes(data))
    await expect_refusal(path, "damaged")


def edit(path: Path, sql: str) -> None:
    db = sqlite3.connect(path)
    db.executescript(sql)
    db.close()


async def test_a_foreign_database_is_refused(path: Path) -> None:
    edit(path, "PRAGMA journal_mode=WAL; PRAGMA auto_vacuum=INCREMENTAL; CREATE TABLE theirs (x)")
    await expect_refusal(path, "not one of warren's")


async def test_a_newer_schema_is_refused(path: Path) -> None:
    await (await SqliteStore.open(path)).close()
    edit(path, "UPDATE meta SET value = '2' WHERE key = 'schema_version'")
    await expect_refusal(path, "schema version 2")


async def test_a_missing_directory_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be used"):
        await SqliteStore.open(tmp_path / "nowhere" / "warren.db")


async def test_an_unreadable_registry_row_is_named(path: Path) -> None:
    store = await SqliteStore.open(path)
    await store.write(PutSession(SessionRecord("acme", 1, Desired.RUNNING)))
    await store.close()
    edit(path, "UPDATE sessions SET desired = 'perhaps'")
    store = await SqliteStore.open(path)
    with pytest.raises(StateError, match="session acme"):
        await store.session("acme")
    await store.close()


async def test_the_files_are_private(path: Path) -> None:
    overwrite(path, b"")
    old = os.umask(0)
    try:
        store = await SqliteStore.open(path)
        await store.write(AddEvent(event("acme", 1)))
        modes: dict[str, Any] = {p.name: oct(p.stat().st_mode & 0o777) for p in path.parent.iterdir()}
        await store.close()
    finally:
        os.umask(old)
    assert modes == {"warren.db": "0o600", "warren.db-wal": "0o600"}


def test_an_error_that_nobody_awaited_does_not_end_the_writer(path: Path) -> None:
    async def run() -> None:
        reported: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        store = await SqliteStore.open(path)
        await store.write(AddEvent(event("acme", 1)))
        store.write(AddEvent(event("acme", 1)))
        await store.write(AddEvent(event("acme", 2)))
        await store.close()
        gc.collect()  # the error, its traceback and the future refer to each other
        assert ["never retrieved" in context["message"] for context in reported] == [True]

    asyncio.run(run())
