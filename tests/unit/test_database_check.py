"""Whether a state.db is whole."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from warren.edges.database_check import database_problem


def database(path: Path, devices: int = 1, journal: str = "wal") -> bytes:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA journal_mode={journal}")
    db.execute("CREATE TABLE whatsmeow_device (jid TEXT PRIMARY KEY, noise_key BLOB)")
    db.executemany("INSERT INTO whatsmeow_device VALUES (?, ?)", [(f"{n}@s.whatsapp.net", bytes(32)) for n in range(devices)])
    db.execute("CREATE TABLE pre_keys (id INTEGER PRIMARY KEY, key BLOB)")
    db.executemany("INSERT INTO pre_keys VALUES (?, ?)", [(n, bytes(100)) for n in range(800)])
    db.execute("CREATE INDEX by_key ON pre_keys (key, id)")
    db.commit()
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    return path.read_bytes()


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_whole_database_has_no_problem(tmp_path: Path, journal: str) -> None:
    assert database_problem(database(tmp_path / "state.db", journal=journal)) == ""


@pytest.mark.parametrize("devices", [0, 2])
def test_a_session_has_one_device(tmp_path: Path, devices: int) -> None:
    assert f"{devices} devices" in database_problem(database(tmp_path / "state.db", devices))


def test_damage_is_found(tmp_path: Path) -> None:
    whole = database(tmp_path / "state.db")
    pages = len(whole) // 4_096
    for page in range(1, pages):
        damaged = bytearray(whole)
        damaged[page * 4_096 : page * 4_096 + 200] = bytes(200)
        assert database_problem(bytes(damaged)), page
    for length in (0, 10, 100, 4_096, len(whole) - 4_096):
        assert database_problem(whole[:length]), length


def test_another_database_is_none(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE t (a)")
    db.close()
    assert "no such table" in database_problem(path.read_bytes())
    assert database_problem(b"nonsense" * 1_000) == "it is no SQLite database"
