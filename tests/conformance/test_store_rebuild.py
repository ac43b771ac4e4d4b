"""A damaged warren.db: what is kept of it, what the directories tell, and that nothing good is ever replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from warren.edges.statedir import StateDirectory
from warren.edges.store import SqliteStore
from warren.edges.store_rebuild import Rebuilt, open_database
from warren.errors import OwnershipError, StateError
from warren.ports import AddEvent, Desired, JournalRow, OutboxRow, PutOutcome, PutSession, SessionRecord

SESSIONS, EVENTS = 40, 60


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "warren.db"


def event(session: str, sequence: int, epoch: int = 3) -> OutboxRow:
    told = {"id": f"{session}/{sequence}", "type": "warren.message", "session": session, "epoch": epoch}
    body = orjson.dumps({**told, "sequence": f"{sequence:010d}", "data": {"text": "x" * 600}})
    return OutboxRow(session, epoch, sequence, f"{session}/{sequence}", "message", body)


def record(session: str) -> SessionRecord:
    return SessionRecord(session, 3, Desired.STOPPED, settings={"proxy": "http://p:1"}, account={"jid": "1@x"}, paired=True)


async def fill(path: Path, sessions: int = SESSIONS) -> None:
    store = await SqliteStore.open(path)
    for n in range(sessions):
        await store.write(PutSession(record(f"s{n:03}")))
    await asyncio.gather(*(store.write(AddEvent(event("s001", n))) for n in range(1, EVENTS + 1)))
    for n in range(EVENTS):
        await store.write(PutOutcome(JournalRow("s001", f"order-{n}", "f", orjson.dumps({"ok": True, "x": "y" * 600}))))
    await store.close()


def directory(state: StateDirectory, session: str, epoch: int, *, current: int | str | None = None, size: int = 100) -> None:
    folder = state.path / "sessions" / session / str(epoch)
    folder.mkdir(parents=True)
    (folder / "state.db").write_bytes(bytes(size))
    if current is not None:
        (folder.parent / "current").write_text(f"{current}\n")


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def pages_of(path: Path, table: str) -> list[int]:
    """The leaf pages of a table, by number."""
    with sqlite3.connect(path) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    db.close()
    data, found, todo = path.read_bytes(), [], [root]
    while todo:
        page = todo.pop()
        head = data[(page - 1) * 4096 :]
        if head[0] in {2, 5}:  # an interior page: its children
            count = int.from_bytes(head[3:5], "big")
            cells = [int.from_bytes(head[12 + 2 * n : 14 + 2 * n], "big") for n in range(count)]
            todo += [int.from_bytes(head[c : c + 4], "big") for c in cells] + [int.from_bytes(head[8:12], "big")]
        else:
            found.append(page)
    return sorted(found)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


async def rebuilt(path: Path, state: StateDirectory) -> tuple[SqliteStore, Rebuilt]:
    store, told = await open_database(path, state)
    assert told is not None
    assert told.bad.exists()
    assert [n for n in names(path.parent) if "building" in n or "rebuilt" in n] == []
    return store, told


async def test_a_good_database_is_just_opened(path: Path, state: StateDirectory) -> None:
    await fill(path)
    store, told = await open_database(path, state)
    assert told is None
    assert len(await store.sessions()) == SESSIONS
    await store.close()


@pytest.mark.parametrize("what", ["garbage", "half", "another database", "emptied table"])
async def test_without_a_readable_row_the_directories_tell(what: str, path: Path, state: StateDirectory) -> None:
    directory(state, "paired", 4, current=4)
    directory(state, "older", 5)
    directory(state, "older", 2, current=2)
    directory(state, "unpaired", 1, current=1, size=0)
    directory(state, "unreadable", 6, current="?")
    directory(state, ".removed-gone", 1, current=1)
    if what == "another database":
        with sqlite3.connect(path) as db:
            db.executescript("PRAGMA journal_mode=WAL; CREATE TABLE theirs (x)")
        db.close()
    elif what == "emptied table":
        await fill(path, 0)
        with sqlite3.connect(path) as db:
            db.execute("DROP TABLE sessions")
        db.close()
    else:
        path.write_bytes(os.urandom(100_000) if what == "garbage" else b"SQLite format 3\0" + bytes(50))
    before = path.read_bytes()
    store, told = await rebuilt(path, state)
    assert {(r.session, r.epoch, r.desired, r.paired) for r in await store.sessions()} - {("s001", 3, Desired.GONE, False)} == {
        ("paired", 5, Desired.RUNNING, True),
        ("older", 6, Desired.RUNNING, True),
        ("unpaired", 2, Desired.RUNNING, False),
        ("unreadable", 7, Desired.RUNNING, True),
    }
    assert told.from_directories == len(told.sessions) == 4
    assert told.events == len(await store.outbox_page("s001", (0, 0), 1000)) == (EVENTS if what == "emptied table" else 0)
    assert told.bad.read_bytes() == before
    await store.close()
    again, told_again = await open_database(path, state)
    assert told_again is None
    await again.close()


@pytest.mark.parametrize("table", ["sessions", "outbox", "journal"])
async def test_rows_around_a_broken_page_are_kept(table: str, path: Path, state: StateDirectory) -> None:
    await fill(path, 300)
    for n in range(300):
        directory(state, f"s{n:03}", 3, current=3)
    pages = pages_of(path, table)
    assert len(pages) > 4
    overwrite(path, (pages[2] - 1) * 4096, os.urandom(4096))
    store, told = await rebuilt(path, state)
    assert not told.complete
    records = await store.sessions()
    assert [r.session for r in records] == [f"s{n:03}" for n in range(300)]
    assert {(r.epoch, r.sequence, r.paired) for r in records} == {(4, 0, True)}
    by_row = [r for r in records if r.settings]
    assert {(r.desired, str(r.account)) for r in by_row} == {(Desired.STOPPED, "{'jid': '1@x'}")}
    assert told.from_directories == len(records) - len(by_row)
    assert (300 if table != "sessions" else 200) <= len(by_row) <= 300 - (table == "sessions")
    events = await store.outbox_page("s001", (0, 0), 1000)
    assert len(events) == told.events
    assert events == [event("s001", row.sequence) for row in events]
    assert (EVENTS if table != "outbox" else EVENTS - 10) <= len(events) <= EVENTS - (table == "outbox")
    outcomes = [n for n in range(EVENTS) if await store.outcome("s001", f"order-{n}")]
    assert len(outcomes) == told.outcomes
    assert (EVENTS if table != "journal" else EVENTS - 10) <= len(outcomes) <= EVENTS - (table == "journal")
    assert str(told.bad) in str(told)
    await store.close()


async def test_what_is_only_in_the_log_is_kept_too(path: Path, state: StateDirectory) -> None:
    """Killed, with the last commits not in the file yet; and the file is damaged."""
    writer = subprocess.Popen(  # noqa: ASYNC220 (it only starts it)
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert await asyncio.to_thread(writer.stdout.readline) == "written\n"
    writer.send_signal(signal.SIGKILL)
    await asyncio.to_thread(writer.wait)
    writer.stdout.close()
    assert Path(f"{path}-wal").stat().st_size > 0
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'journal'").fetchone()
    db.close()
    overwrite(path, (root - 1) * 4096, os.urandom(4096))
    store, told = await rebuilt(path, state)
    assert told.events == EVENTS
    assert [(r.session, r.epoch) for r in await store.sessions()] == [("s001", 4)]
    await store.close()


WRITER = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.conformance.test_store_rebuild import EVENTS, event, record
from warren.edges.store import SqliteStore
from warren.ports import AddEvent, JournalRow, PutOutcome, PutSession
async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    await store.close()
    store = await SqliteStore.open(Path(sys.argv[1]))
    await store.write(PutSession(record("s001")), *(AddEvent(event("s001", n)) for n in range(1, EVENTS + 1)))
    print("written", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_rows_that_were_not_written_so_are_left_out(path: Path, state: StateDirectory) -> None:
    await fill(path)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE sessions SET desired = 'perhaps' WHERE session = 's000'")
        db.execute("UPDATE sessions SET settings = '[]' WHERE session = 's002'")
        db.execute("UPDATE outbox SET body = x'00' WHERE sequence = 5")
        db.execute("UPDATE outbox SET sequence = 1000 WHERE sequence = 6")
        db.execute("UPDATE journal SET outcome = 'no json' WHERE command_id = 'order-7'")
    db.close()
    store, told = await rebuilt(path, state)
    assert "session s000" in told.why
    assert {r.session for r in await store.sessions()} == {f"s{n:03}" for n in range(SESSIONS)} - {"s000", "s002"}
    assert told.events == EVENTS - 2
    assert told.outcomes == EVENTS - 1
    await store.close()


async def test_a_session_that_was_removed_stays_so(path: Path, state: StateDirectory) -> None:
    store = await SqliteStore.open(path)
    await store.write(PutSession(SessionRecord("gone", 7, Desired.GONE)), PutSession(SessionRecord("going", 2, Desired.REMOVING)))
    await store.write(PutSession(record("here")))
    await store.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE sessions SET desired = 'perhaps' WHERE session = 'here'")
    db.close()
    store, told = await rebuilt(path, state)
    assert [(r.session, r.epoch, r.desired) for r in await store.sessions()] == [
        ("going", 2, Desired.REMOVING),
        ("gone", 7, Desired.GONE),
    ]
    assert told.sessions == ()
    await store.close()


async def test_what_is_good_is_never_replaced(path: Path, state: StateDirectory) -> None:
    await fill(path)
    before = path.read_bytes()
    holder = await SqliteStore.open(path)
    with pytest.raises(OwnershipError):
        await open_database(path, state)
    await holder.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '999'")
    db.close()
    with pytest.raises(StateError, match="schema version 999"):
        await open_database(path, state)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '1'")
    db.close()
    assert len(path.read_bytes()) == len(before)
    assert [n for n in names(path.parent) if n.startswith("warren.db.")] == []


async def test_a_disk_that_fails_for_a_moment_is_no_damage(
    path: Path, state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(path, 2)

    def failing(store: SqliteStore) -> asyncio.Future[None]:
        def read() -> None:
            raise sqlite3.OperationalError("disk I/O error")

        return store._submit(read)

    monkeypatch.setattr(SqliteStore, "sessions", failing)
    with pytest.raises(StateError):
        await open_database(path, state)
    assert not list(path.parent.glob("warren.db.bad-*"))


async def test_when_it_cannot_be_made_again_nothing_changes(
    path: Path, state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"garbage" * 1000)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("warren.edges.store_rebuild._sync", full)
        with pytest.raises(StateError, match="No space left"):
            await open_database(path, state)
    assert names(path.parent) == ["warren.db"]
    store, _ = await rebuilt(path, state)
    await store.close()


KILLED = f"""
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from warren.edges.statedir import StateDirectory
from warren.edges import store_rebuild
path, left = Path(sys.argv[1]), int(sys.argv[2])
def counted(function):
    def step(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return step
for name in ("rename", "replace", "unlink"):
    setattr(Path, name, counted(getattr(Path, name)))
for name in ("_sync", "_registry"):
    setattr(store_rebuild, name, counted(getattr(store_rebuild, name)))
async def main():
    store, _ = await store_rebuild.open_database(path, StateDirectory(path.parent))
    await store.close()
    print("done")
asyncio.run(main())
"""


async def test_killed_at_any_step_it_is_finished_by_the_next_start(path: Path, state: StateDirectory) -> None:
    for step in range(1, 30):
        for old in path.parent.glob("warren.db*"):
            old.unlink()
        await fill(path, 3)
        with sqlite3.connect(path) as db:
            db.execute("UPDATE sessions SET desired = 'perhaps' WHERE session = 's000'")
        db.close()
        Path(f"{path}-wal").write_bytes(b"a log that must not be played into the new file")
        ran = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", KILLED, str(path), str(step)], capture_output=True, text=True, check=False
        )
        store, _ = await open_database(path, state)
        assert [(r.session, r.epoch) for r in await store.sessions()] == [("s001", 4), ("s002", 4)]
        assert len(await store.outbox_page("s001", (0, 0), 1000)) == EVENTS
        await store.close()
        assert any(name.startswith("warren.db.bad-") for name in names(path.parent))
        assert not {"warren.db.rebuilt", "warren.db.building"} & set(names(path.parent))
        if ran.returncode == 0:
            assert ran.stdout == "done\n", ran.stderr
            assert step > 8
            return
        assert ran.returncode == -signal.SIGKILL, ran.stderr
    pytest.fail("the rebuild never came to its end")
