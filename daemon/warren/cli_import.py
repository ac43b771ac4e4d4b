"""`warren import`: a session of what another program has (Baileys' files, a whatsmeow database), so that nobody scans again.

What is imported becomes the session's first backup, under the name that only a new session can have; `create` then brings it back
as it would after the loss of a disk. So there is one way in, and whoever else makes a session of that name at the same moment
loses nothing. Without a store (`mode = "local"`) it goes into the state directory, while no daemon has it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from warren.cli_backup import opened
from warren.cli_base import (
    CALL_TIMEOUT_S,
    EXIT_OK,
    Failed,
    UsageError,
    client_of,
    note,
    print_json,
    session_id,
    settings_of,
    timeout_of,
)
from warren.client import Client, NoAnswer
from warren.core.backup_names import Place
from warren.core.machine import State
from warren.core.names import Topology
from warren.edges.database_check import database_problem
from warren.edges.settings import Settings, find_engine_binary
from warren.edges.statedir import StateDirectory
from warren.edges.store import SqliteStore
from warren.edges.terminal import printable
from warren.errors import CommandError, ConfigError, StateError
from warren.ports import Desired, PutSession, SessionRecord
from warren.services.backup_keys import check_keys
from warren.services.session_record import Stored, encode

IMPORT_TIMEOUT_S = 300
CONNECT_TIMEOUT_S = 120.0
_SOURCE, _TARGET = 65, 73
"""Exit statuses of `warren-engine import`."""

BAILEYS_FILE = re.compile(
    r"(creds|(pre-key|session|sender-key|sender-key-memory|app-state-sync-key|app-state-sync-version|lid-mapping|device-list|"
    r"tctoken|identity-key)-.+)\.json"
)
"""Files of `useMultiFileAuthState`: what `--delete-source` deletes of a directory, and nothing else."""

Add = Callable[..., argparse.ArgumentParser]


class ImportRefused(CommandError):
    """Nothing was imported."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__("import_refused", message, hint=hint)


def add_command(commands: Any, add: Add) -> None:
    sub = add(
        commands,
        "import",
        _import,
        "make a session of Baileys' files or a whatsmeow database (docs/import.md); without --execute only tell what it would be",
        "warren import --from auth_info/ --session acme --execute",
    )
    sub.add_argument(
        "--from", dest="source", metavar="DIR|FILE", type=Path, required=True, help="what to import; it is only read"
    )
    sub.add_argument("--session", metavar="ID", type=session_id, required=True, help="the new session")
    sub.add_argument("--format", choices=("baileys", "whatsmeow"), help="default: by what it is")
    sub.add_argument("--jid", help="which device, where a whatsmeow database holds several: its JID or number")
    sub.add_argument("--execute", action="store_true", help="do it")
    sub.add_argument(
        "--delete-source", action="store_true", help="delete the source once the session is connected as the same account"
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, checked as far as can be from here."""

    settings: Settings
    session: str
    source: Path
    format: str
    jid: str | None

    @property
    def local(self) -> bool:
        return self.settings.storage.mode == "local"


def _import(args: argparse.Namespace) -> int:
    source = args.source.expanduser().absolute()
    plan = Plan(settings_of(args), args.session, source, args.format or _format_of(source), args.jid)
    if not args.execute:
        report = _engine(plan, None)
        if args.delete_source:
            return asyncio.run(_deleted(args, plan, report))
        _tell(args, report, {"executed": False})
        if not args.json:
            print(f"Nothing was done. With --execute this becomes the session {plan.session}.")
        return EXIT_OK
    if plan.local and args.delete_source:
        raise UsageError(
            'With [storage] mode "local" the daemon is not running now, so the source cannot be deleted in the same step.',
            hint="Import, start the daemon, and run the command again with --delete-source instead of --execute.",
        )
    return asyncio.run(_executed(args, plan))


def _format_of(source: Path) -> str:
    if source.is_dir() and (source / "creds.json").exists():
        return "baileys"
    with contextlib.suppress(OSError), source.open("rb") as file:
        if file.read(16) == b"SQLite format 3\0":
            return "whatsmeow"
    raise ImportRefused(
        f"{source} is neither a directory with a creds.json nor an SQLite database.",
        hint="docs/import.md says what can be imported, and why a browser's profile cannot.",
    )


def _engine(plan: Plan, to: Path | None) -> dict[str, Any]:
    """Run `warren-engine import`; `to` None: dry. Its report. Raises ImportRefused, ConfigError."""
    program = find_engine_binary(plan.settings.engine.path)
    with tempfile.TemporaryDirectory(prefix="warren-import-") as nowhere:
        words: list[str | Path] = [program, "import", "--format", plan.format, "--from", plan.source]
        words += ["--to", to] if to is not None else ["--to", Path(nowhere) / "state", "--dry-run"]
        words += ["--jid", plan.jid] if plan.jid else []
        # What it makes holds keys. If it is cut off (Ctrl-C, the time limit), that goes with our folder.
        env = {**os.environ, "TMPDIR": nowhere}
        try:
            ran = subprocess.run(words, capture_output=True, check=False, timeout=IMPORT_TIMEOUT_S, env=env)
        except (OSError, subprocess.SubprocessError) as e:
            raise ConfigError(f"{program} cannot be run: {e}.", hint="Run `make engine`.") from e
    if ran.returncode == 0:
        return dict(orjson.loads(ran.stdout))
    said = ran.stderr.decode(errors="replace").strip().rsplit("\n", maxsplit=1)[-1].removeprefix("warren-engine import: ")
    hint = {
        _SOURCE: "The source was not touched. docs/import.md says what it must be.",
        _TARGET: "Nothing was imported.",
    }.get(ran.returncode, "Nothing was imported.")
    raise ImportRefused(f"{said.rstrip('.')}.", hint=hint)


# --- doing it -----------------------------------------------------------------------------------------------------------


async def _executed(args: argparse.Namespace, plan: Plan) -> int:
    with tempfile.TemporaryDirectory(prefix="warren-import-") as place:
        made = Path(place) / "state"
        if plan.local:
            report = await _into_state_directory(plan, made)
            _tell(args, report, {"executed": True, "state": "stopped"})
            if not args.json:
                print(f"{plan.session} is in {plan.settings.state_dir}; start the daemon, which connects it.")
            return EXIT_OK
        async with client_of(args) as client:
            await _refuse_if_known(client, plan.session)
            report = await _into_store(args, plan, made)
            if not args.json:
                _tell(args, report, {})
                note(f"{plan.session}: imported; asking the daemon to connect it")
            outcome = await client.call("create", plan.session, timeout_s=timeout_of(args, CONNECT_TIMEOUT_S))
            if not outcome.ok:
                raise Failed(outcome)
            status = await _connected(client, plan.session, report, timeout_of(args, CONNECT_TIMEOUT_S))
    deleted = _delete(plan) if args.delete_source else []
    if args.json:
        _tell(args, report, {"executed": True, "state": status["state"], "deleted": deleted})
    else:
        print(
            f"{plan.session}: connected as {status.get('jid')}"
            + (f"; {len(deleted)} files of the source deleted" if deleted else "")
        )
    return EXIT_OK


async def _refuse_if_known(client: Client, session: str) -> None:
    outcome = await client.call("status", session, timeout_s=CALL_TIMEOUT_S)
    code = (outcome.error or {}).get("code")
    if outcome.ok:
        raise ImportRefused(
            f"There is a session {session} already, and it is {outcome.result.get('state')}.",
            hint="Choose another name; or `warren session logout` it first, if it is to be given up.",
        )
    if code != "session_not_found":
        raise Failed(outcome)


async def _into_store(args: argparse.Namespace, plan: Plan, made: Path) -> dict[str, Any]:
    """Seal it as the backup 1/1. Raises ImportRefused when the store has anything of that session."""
    async with opened(args, writing=True) as store:
        await check_keys(store.objects, store.names, store.keyring)
        vault = store.vault
        if await vault.listed(plan.session):  # a key alone is what a cut import leaves, and serves the next one
            raise _in_the_store(plan.session)
        report = await asyncio.to_thread(_engine, plan, made)
        database = await asyncio.to_thread(_database, made)
        record = encode(Stored(Topology(plan.settings.amqp.prefix).source, _record(plan.session, report)))
        sealed = await vault.seal_state(plan.session, Place(1, 1), record, database)
        if not await vault.create(plan.session, Place(1, 1), sealed):
            raise _in_the_store(plan.session)
    return report


def _in_the_store(session: str) -> ImportRefused:
    return ImportRefused(
        f"The store has backups of a session {session}.",
        hint=f"Choose another name; or `warren session create {session}` brings that one back.",
    )


def _database(made: Path) -> bytes:
    database = (made / "state.db").read_bytes()
    if problem := database_problem(database):
        raise StateError(f"What the engine made is not whole: {problem}.", hint="Nothing was imported. This is a bug: report it.")
    return database


def _record(session: str, report: dict[str, Any]) -> SessionRecord:
    account = {"jid": report["jid"], "lid": report.get("lid"), "push_name": report.get("name")}
    return SessionRecord(session, 1, Desired.RUNNING, account=account, paired=True)


async def _into_state_directory(plan: Plan, made: Path) -> dict[str, Any]:
    """Raises OwnershipError while a daemon has the directory, ImportRefused when it knows the session."""
    state = StateDirectory(plan.settings.state_dir)
    state.lock()
    try:
        store = await SqliteStore.open(plan.settings.state_dir / "warren.db")
        try:
            known = await store.session(plan.session)
            if known is not None and known.desired is Desired.REMOVING and await store.backup(plan.session) is None:
                await state.remove(plan.session)  # an import that was cut off, or a removal that has no more to do than this
            elif (known is not None and known.desired is not Desired.GONE) or await state.epochs(plan.session):
                raise ImportRefused(f"There is a session {plan.session} already.", hint="Choose another name.")
            report = await asyncio.to_thread(_engine, plan, made)
            database = await asyncio.to_thread(_database, made)
            epoch = known.epoch + 1 if known is not None else 1
            # Cut off from here on, what is left goes with the daemon's next start, or with the next import.
            await store.write(PutSession(SessionRecord(plan.session, epoch, Desired.REMOVING)))
            # The row that counts comes last: until it is there, nobody looks into the directory.
            folder = await state.prepare(plan.session, epoch)
            await asyncio.to_thread(_write_durably, folder / "state.db", database)
            record = _record(plan.session, report)
            await store.write(PutSession(SessionRecord(plan.session, epoch, record.desired, account=record.account, paired=True)))
        finally:
            await store.close()
    finally:
        state.unlock()
    return report


def _write_durably(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- connected ----------------------------------------------------------------------------------------------------------


async def _connected(client: Client, session: str, report: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The status once it is online. Raises CommandError when it will not be, NoAnswer when it takes too long."""
    try:
        async with asyncio.timeout(timeout_s), client.subscribe(f"{session}.*", tap=True) as events:
            while True:
                outcome = await client.call("status", session, timeout_s=CALL_TIMEOUT_S)
                if not outcome.ok:
                    raise Failed(outcome)
                status = outcome.result
                if status.get("state") == State.ONLINE.value:
                    return _same_account(session, report, status)
                if status.get("qr") or status.get("state") in _ENDS:
                    why = status.get("message") or "WhatsApp wants a new link."
                    raise CommandError(
                        str(status.get("code") or "not_connected"),
                        f"The imported session {session} is {status.get('state')}: {why}",
                        hint="The source was not touched. Is the program that used it still running, or the device unlinked?",
                    )
                await anext(events)
    except TimeoutError:
        raise NoAnswer(
            f"Session {session} was not connected within {timeout_s:g} s.",
            hint=f"It is imported, and the source was not touched. `warren session status {session}` tells how it fares.",
        ) from None


_ENDS = {s.value for s in (State.LOGGED_OUT, State.REPLACED, State.BLOCKED, State.QUARANTINED, State.STOPPED, State.PAIRING)}


def _same_account(session: str, report: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    if status.get("jid") != report["jid"]:
        raise CommandError(
            "other_account",
            f"The session {session} is connected as {status.get('jid')}, and the source is {report['jid']}.",
            hint="The source was not touched.",
        )
    return status


# --- deleting the source ------------------------------------------------------------------------------------------------


async def _deleted(args: argparse.Namespace, plan: Plan, report: dict[str, Any]) -> int:
    """`--delete-source` alone: for a session that was imported before."""
    async with client_of(args) as client:
        outcome = await client.call("status", plan.session, timeout_s=CALL_TIMEOUT_S)
    if not outcome.ok:
        raise Failed(outcome)
    if outcome.result.get("state") != State.ONLINE.value:
        raise CommandError(
            "not_connected",
            f"The session {plan.session} is {outcome.result.get('state')}: the source is kept until it is online.",
            hint=f"`warren session create {plan.session}` connects it.",
        )
    _same_account(plan.session, report, outcome.result)
    deleted = _delete(plan)
    if args.json:
        print_json({"deleted": deleted})
    else:
        print(f"{len(deleted)} files of the source deleted")
    return EXIT_OK


def _delete(plan: Plan) -> list[str]:
    """Only what is known to belong to the source. The names of what was deleted."""
    try:
        if plan.format == "baileys":
            files = sorted(p for p in plan.source.iterdir() if p.is_file() and BAILEYS_FILE.fullmatch(p.name))
        else:
            if (devices := _devices(plan.source)) != 1:
                raise ImportRefused(
                    f"{plan.source} holds {devices} devices, so it is not deleted.",
                    hint="Delete it when all of them are imported.",
                )
            files = [
                p for p in (plan.source, *(Path(f"{plan.source}{end}") for end in ("-wal", "-shm", "-journal"))) if p.exists()
            ]
        for path in files:
            path.unlink()
        if plan.format == "baileys" and not any(plan.source.iterdir()):
            plan.source.rmdir()
    except OSError as e:
        raise ImportRefused(
            f"The source cannot be deleted: {e}.", hint="The session is imported; delete the source yourself."
        ) from e
    return [path.name for path in files]


def _devices(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM whatsmeow_device").fetchone()[0])


# --- words --------------------------------------------------------------------------------------------------------------


def _tell(args: argparse.Namespace, report: dict[str, Any], more: dict[str, Any]) -> None:
    if args.json:
        print_json({"report": report, **more})
        return
    for line in report_lines(report):
        print(printable(line))


def report_lines(report: dict[str, Any]) -> list[str]:
    """The engine's report for a person."""
    name = f" ({report['name']})" if report.get("name") else ""
    lines = [f"{report['format']}: {report['jid']}{name}"]
    lines += [f"  carried over      {count:>6}  {_words(kind)}" for kind, count in report.get("carried", {}).items()]
    lines += [
        f"  not carried over  {left['count']:>6}  {_words(left['kind'])}: {left['reason']}"
        for left in report.get("not_carried", [])
    ]
    return lines + [f"  mind: {warning}" for warning in report.get("warnings", [])]


def _words(kind: str) -> str:
    return kind.replace("_", " ")
