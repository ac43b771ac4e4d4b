"""The state directory's part in backup and restore, on a real file system."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from warren.edges.statedir import StateDirectory
from warren.errors import SealError, StateError


def database(text: str, *, wal: bool = False) -> bytes:
    """A small SQLite database as bytes."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE whatsmeow_device (jid TEXT)")
    db.execute("INSERT INTO whatsmeow_device VALUES ('1:2@s.whatsapp.net')")
    db.execute("CREATE TABLE t (text TEXT)")
    db.execute("CREATE INDEX i ON t (text)")
    db.executemany("INSERT INTO t VALUES (?)", [(f"{text} {n}",) for n in range(300)])
    db.commit()
    data = bytearray(db.serialize())
    db.close()
    if wal:
        data[18:20] = b"\x02\x02"  # what a database says of itself whose journal mode is WAL
    return bytes(data)


@pytest.fixture
def states(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "state")


async def started(states: StateDirectory, epoch: int, content: bytes) -> Path:
    states.path.mkdir(mode=0o700, exist_ok=True)
    (states.path / "sessions").mkdir(mode=0o700, exist_ok=True)
    directory = await states.prepare("acme", epoch)
    (directory / "state.db").write_bytes(content)
    return directory


@pytest.mark.parametrize("wal", [False, True])
async def test_a_restored_state_is_the_current_one_and_the_old_one_stays(states: StateDirectory, wal: bool) -> None:
    old = await started(states, 1, b"old")
    restored = database("new", wal=wal)
    await states.stage("acme", restored)
    assert await states.current_epoch("acme") == 1, "staging changes nothing"
    await states.install("acme", 4)
    assert await states.current_epoch("acme") == 4
    folder = states.path / "sessions" / "acme"
    assert (folder / "4" / "state.db").read_bytes() == restored
    assert sorted(p.name for p in (folder / "4").iterdir()) == ["state.db"]
    assert (folder / "4" / "state.db").stat().st_mode & 0o777 == 0o600
    assert (folder / "4").stat().st_mode & 0o777 == 0o700
    assert (old / "state.db").read_bytes() == b"old"
    assert sorted(p.name for p in folder.iterdir()) == ["1", "4", "current"]


async def test_restored_without_anything_there(states: StateDirectory) -> None:
    states.path.mkdir(mode=0o700)
    await states.stage("acme", database("x"))
    await states.install("acme", 2)
    assert await states.has_state("acme", 2)


async def test_what_is_no_whole_database_is_refused(states: StateDirectory) -> None:
    await started(states, 1, b"old")
    whole = database("x")
    torn = whole[: len(whole) // 2]
    scribbled = bytearray(whole)
    scribbled[-4096:] = bytes(4096)
    for broken in (torn, bytes(scribbled), b"", b"nonsense" * 1000):
        with pytest.raises(SealError):
            await states.stage("acme", broken)
    assert await states.current_epoch("acme") == 1
    assert not await states.has_state("acme", 2)


async def test_nothing_is_restored_over_a_state(states: StateDirectory) -> None:
    directory = await started(states, 3, b"here")
    await states.stage("acme", database("x"))
    with pytest.raises(StateError, match="has a state already"):
        await states.install("acme", 3)
    assert (directory / "state.db").read_bytes() == b"here"


async def test_old_epochs_go_but_not_what_could_not_be_read(states: StateDirectory) -> None:
    for epoch in (1, 2, 3, 5):
        await started(states, epoch, b"x")
    await states.keep("acme", 2)
    await states.prepare("acme", 3)
    await states.tidy("acme")
    assert await states.epochs("acme") == [2, 3, 5], "what is newer than the current one is not ours to judge"
    await states.tidy("acme")
    assert await states.epochs("acme") == [2, 3, 5]


async def test_a_copy_is_read_and_gone(states: StateDirectory) -> None:
    directory = await started(states, 1, b"state")
    (directory / "backup.db").write_bytes(b"from before a crash")

    async def copy(source: Path, target: Path) -> str:
        assert not target.exists()
        target.write_bytes((source / "state.db").read_bytes() + b"!")
        return "told"

    assert await states.copied("acme", copy) == ("told", b"state!")
    assert sorted(p.name for p in directory.iterdir()) == ["state.db"]

    async def fails(source: Path, target: Path) -> str:
        target.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        await states.copied("acme", fails)
    assert sorted(p.name for p in directory.iterdir()) == ["state.db"]
    assert await states.copied("other", copy) is None
