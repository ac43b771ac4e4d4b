"""`warren import`: what it takes for what, what it refuses, and what it deletes. The engine's part is a stub here."""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from warren import cli_import
from warren.cli import main
from warren.cli_backup import Opened
from warren.cli_import import BAILEYS_FILE, ImportRefused, Plan, _delete, _format_of, report_lines
from warren.core.backup_names import Names
from warren.core.sealing import Keyring, MasterKey
from warren.edges.objects_directory import DirectoryObjects
from warren.edges.settings import load_settings
from warren.services.vault import Vault

REPORT: dict[str, Any] = {
    "format": "baileys",
    "jid": "15550001:3@s.whatsapp.net",
    "name": "Ana",
    "dry_run": True,
    "bytes": 253_952,
    "carried": {"device": 1, "pre_keys": 812},
    "not_carried": [{"kind": "sessions", "count": 3, "reason": "another library's format"}],
    "warnings": ["a warning\x1b[31m"],
}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("WARREN_") or name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of the engine: prints what is in `answer`, ends with `status`, notes its words."""
    program = tmp_path / "engine"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\n. {tmp_path}/answer\n')
    program.chmod(0o755)
    (tmp_path / "answer").write_text(f"cat <<'X'\n{orjson.dumps(REPORT).decode()}\nX\n")
    monkeypatch.setenv("WARREN_ENGINE__PATH", str(program))
    return program


def baileys(folder: Path) -> Path:
    folder.mkdir()
    for name in (
        "creds.json",
        "pre-key-1.json",
        "session-15550002.0.json",
        "app-state-sync-key-AAAA.json",
        "other.json",
        "creds.txt",
    ):
        (folder / name).write_text("{}")
    return folder


def whatsmeow(path: Path, devices: int = 1) -> Path:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE whatsmeow_device (jid TEXT)")
    db.executemany("INSERT INTO whatsmeow_device VALUES (?)", [(str(n),) for n in range(devices)])
    db.commit()
    db.close()
    return path


def plan(source: Path, kind: str) -> Plan:
    return Plan(load_settings(), "acme", source, kind, None)


def test_the_format_is_seen_from_the_source(tmp_path: Path) -> None:
    assert _format_of(baileys(tmp_path / "auth")) == "baileys"
    assert _format_of(whatsmeow(tmp_path / "store.db")) == "whatsmeow"
    (tmp_path / "profile").mkdir()
    (tmp_path / "text").write_text("hello")
    for source in ("profile", "text", "missing"):
        with pytest.raises(ImportRefused, match=r"neither a directory with a creds\.json") as told:
            _format_of(tmp_path / source)
        assert "docs/import.md" in told.value.hint


def test_without_execute_nothing_is_done(tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = baileys(tmp_path / "auth")
    assert main(["import", "--from", "auth", "--session", "acme"]) == 0
    out = capsys.readouterr().out
    assert "812  pre keys" in out
    assert "3  sessions: another library's format" in out
    assert "Nothing was done." in out
    assert "\x1b" not in out
    words = (tmp_path / "words").read_text()
    assert f"--format baileys --from {source} --to " in words
    assert "--dry-run" in words
    assert main(["import", "--from", "auth", "--session", "acme", "--json"]) == 0
    assert orjson.loads(capsys.readouterr().out) == {"report": REPORT, "executed": False}
    assert not (tmp_path / "var").exists()


def test_what_the_engine_refuses_is_told(tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baileys(tmp_path / "auth")
    (tmp_path / "answer").write_text("echo 'warren-engine import: creds.json: it is cut off' >&2; exit 65")
    assert main(["import", "--from", "auth", "--session", "acme"]) == 1
    said = capsys.readouterr().err
    assert "creds.json: it is cut off. hint: The source was not touched." in said


@pytest.mark.parametrize("more", [[], ["--delete-source"]])
def test_without_a_broker_nothing_is_imported(
    tmp_path: Path, engine: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether there is such a session already cannot be known then."""
    source = baileys(tmp_path / "auth")
    words = ["import", "--from", "auth", "--session", "acme", "--execute", "--url", "amqp://127.0.0.1:1/", *more]
    assert main(words) == 3
    assert "cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "var").exists()
    assert len(list(source.iterdir())) == 6


def test_in_local_mode_the_source_is_not_deleted_in_the_same_step(
    tmp_path: Path, engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WARREN_STORAGE__MODE", "local")
    baileys(tmp_path / "auth")
    assert main(["import", "--from", "auth", "--session", "acme", "--execute", "--delete-source"]) == 2
    assert "start the daemon, and run the command again" in capsys.readouterr().err


def test_a_database_that_is_not_whole_is_not_taken(
    tmp_path: Path, engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WARREN_STORAGE__MODE", "local")
    baileys(tmp_path / "auth")
    make = 'mkdir -p "$7"; echo "no database" > "$7/state.db"\n'
    (tmp_path / "answer").write_text(make + (tmp_path / "answer").read_text())
    assert main(["import", "--from", "auth", "--session", "acme", "--execute"]) == 1
    assert "not whole" in capsys.readouterr().err
    assert not (tmp_path / "var" / "sessions").exists()


def test_only_files_of_the_source_are_deleted(tmp_path: Path) -> None:
    source = baileys(tmp_path / "auth")
    assert _delete(plan(source, "baileys")) == [
        "app-state-sync-key-AAAA.json",
        "creds.json",
        "pre-key-1.json",
        "session-15550002.0.json",
    ]
    assert sorted(p.name for p in source.iterdir()) == ["creds.txt", "other.json"]
    for left in source.iterdir():
        left.unlink()
    (source / "creds.json").write_text("{}")
    _delete(plan(source, "baileys"))
    assert not source.exists()


def test_a_database_goes_with_its_journals_unless_others_live_in_it(tmp_path: Path) -> None:
    shared = whatsmeow(tmp_path / "shared.db", devices=2)
    with pytest.raises(ImportRefused, match="holds 2 devices"):
        _delete(plan(shared, "whatsmeow"))
    assert shared.exists()
    own = whatsmeow(tmp_path / "own db#1.db")
    (tmp_path / "own db#1.db-journal").write_text("")
    assert _delete(plan(own, "whatsmeow")) == ["own db#1.db", "own db#1.db-journal"]


@pytest.mark.parametrize("name", ["creds.json.bak", "package.json", "pre-key-.txt", "my-session-1.json", "credsXjson"])
def test_other_names_are_no_baileys_files(name: str) -> None:
    assert not BAILEYS_FILE.fullmatch(name)


def test_a_report_names_account_and_counts() -> None:
    lines = report_lines(REPORT)
    assert lines[0] == "baileys: 15550001:3@s.whatsapp.net (Ana)"
    assert [line.split()[:2] for line in lines[1:4]] == [["carried", "over"], ["carried", "over"], ["not", "carried"]]
    assert report_lines({"format": "whatsmeow", "jid": "x"}) == ["whatsmeow: x"]


def test_a_missing_engine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    baileys(tmp_path / "auth")
    monkeypatch.setenv("WARREN_ENGINE__PATH", str(tmp_path / "none"))
    assert main(["import", "--from", "auth", "--session", "acme"]) == 2
    assert "make engine" in capsys.readouterr().err


def test_an_import_that_is_cut_off_leaves_no_keys_in_a_temporary_place(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "answer").write_text(f'echo "$TMPDIR" > {tmp_path}/where; echo keys > "$TMPDIR/keys"; kill -9 $$\n')
    words = ["import", "--from", str(baileys(tmp_path / "auth")), "--session", "acme"]
    assert main(words) != 0
    where = Path((tmp_path / "where").read_text().strip())
    assert where.name.startswith("warren-import-")
    assert not where.exists()


def test_an_import_that_was_cut_before_its_backup_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it leaves then is a key, which opens nothing and serves the next one."""
    (tmp_path / "store").mkdir()
    objects, names = DirectoryObjects(tmp_path / "store"), Names("warren")
    keyring = Keyring(MasterKey.from_hex("00112233445566778899aabbccddeeff" * 2))

    @asynccontextmanager
    async def opened(_: object, *, writing: bool) -> AsyncIterator[Opened]:
        yield Opened(load_settings(), objects, names, keyring)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_import, "opened", opened)
    monkeypatch.setattr(cli_import, "_engine", lambda *_: REPORT)
    monkeypatch.setattr(cli_import, "_database", lambda _: b"a database")
    plan = Plan(load_settings(), "acme", tmp_path, "baileys", None)

    async def once() -> None:
        await cli_import._into_store(argparse.Namespace(), plan, tmp_path)

    with monkeypatch.context() as cut:
        cut.setattr(Vault, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(once())
    assert [listed.name for listed in asyncio.run(objects.list("warren/acme"))] == ["warren/acme/key"]
    asyncio.run(once())
    with pytest.raises(ImportRefused, match="has backups"):
        asyncio.run(once())


@pytest.mark.parametrize("cut", ["before the state", "before the row"])
def test_an_import_into_the_state_directory_that_was_cut_off_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    settings = load_settings().model_copy(update={"state_dir": tmp_path / "state"})
    settings.state_dir.mkdir(mode=0o700)
    plan = Plan(settings, "acme", tmp_path, "baileys", None)
    monkeypatch.setattr(cli_import, "_engine", lambda *_: REPORT)
    monkeypatch.setattr(cli_import, "_database", lambda _: b"a database")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def once() -> None:
        asyncio.run(cli_import._into_state_directory(plan, tmp_path))

    with monkeypatch.context() as at:
        at.setattr(cli_import, "_write_durably" if cut == "before the state" else "_record", killed)
        with pytest.raises(KeyboardInterrupt):
            once()
    once()
    (state,) = (settings.state_dir / "sessions" / "acme").glob("*/state.db")
    assert state.read_bytes() == b"a database"
    assert (state.parent.parent / "current").read_text().strip() == state.parent.name
    with pytest.raises(ImportRefused, match="already"):
        once()
    # A directory that nobody has on record may be a session whose registry was lost.
    (settings.state_dir / "sessions" / "other" / "1").mkdir(parents=True)
    with pytest.raises(ImportRefused, match="already"):
        asyncio.run(cli_import._into_state_directory(replace(plan, session="other"), tmp_path))
