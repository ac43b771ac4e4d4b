"""`warren backup …` and `warren keys …`.

`list`, `verify`, `prune`, `stats` and `keys` work on the store that the configuration names and need no daemon; `now` and
`restore` ask the daemon that serves the session.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from warren.cli_base import (
    EXIT_FAILED,
    EXIT_OK,
    LIST_TIMEOUT_S,
    Failed,
    Progress,
    UsageError,
    client_of,
    note,
    print_json,
    session_id,
    settings_of,
    timeout_of,
)
from warren.cli_text import columns
from warren.client import Client, NoAnswer
from warren.core.backup_names import KEY_CHECK, Names, Place
from warren.core.envelope import Outcome, timestamp
from warren.core.sealing import KEY_BYTES, Keyring
from warren.edges.database_check import database_problem
from warren.edges.objects import open_store
from warren.edges.settings import Settings
from warren.edges.storage_keys import load_keyring
from warren.edges.terminal import printable
from warren.errors import BrokerUnavailable, CommandError, ConfigError, WarrenError
from warren.ports import ObjectStore
from warren.services import backup_keys, backup_report
from warren.services.backup_report import Inventory
from warren.services.vault import Vault

BACKUP_TIMEOUT_S = 120.0
RESTORE_TIMEOUT_S = 300.0
ASKED_AT_ONCE = 8

Add = Callable[..., argparse.ArgumentParser]


def add_commands(backup: Any, keys: Any, add: Add) -> None:
    """The sub-commands of `warren backup` and `warren keys`."""
    with_sessions(add(backup, "list", _list, "backups in the store, by session", "warren backup list"))
    with_sessions(
        add(
            backup,
            "verify",
            _verify,
            "open and check every backup, without restoring: status 1 when one is not whole",
            "warren backup verify acme",
        )
    )
    now = add(backup, "now", _now, "back up at once what has changed, and wait for it", "warren backup now acme")
    now.add_argument("session", metavar="SESSION", type=session_id, nargs="?")
    now.add_argument("--all", action="store_true", help="every session of every daemon")
    restore = add(
        backup, "restore", _restore, "bring a session's state back from a backup", "warren backup restore acme --at 3/17"
    )
    restore.add_argument("session", metavar="SESSION", type=session_id)
    restore.add_argument("--at", metavar="EPOCH/SEQUENCE", type=_place, help="which one (`warren backup list acme`; the newest)")
    prune = with_sessions(
        add(backup, "prune", _prune, "delete old backups ([storage] keep_last, keep_days)", "warren backup prune --dry-run")
    )
    prune.add_argument("--dry-run", action="store_true", help="only tell what would be deleted")
    add(backup, "stats", _stats, "how much is stored, how old it is, and how the daemons fare", "warren backup stats --json")
    add(keys, "generate", _generate, "make a key for [storage] key; it is printed and kept nowhere", "warren keys generate > key")
    add(keys, "check", _check, "whether the store can be used and [storage] key is the right one", "warren keys check")
    add(
        keys,
        "rotate",
        _rotate,
        "encrypt every session's key with [storage] key, the former one being in old_keys; backups stay as they are",
        "warren keys rotate",
    )


def with_sessions(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("session", metavar="SESSION", type=session_id, nargs="*", help="only these (default: all)")
    return sub


def _place(text: str) -> str:
    try:
        return str(Place.parse(text))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


# --- the store ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """The store as the configuration names it."""

    settings: Settings
    objects: ObjectStore
    names: Names
    keyring: Keyring

    @property
    def vault(self) -> Vault:
        """To read from."""
        return Vault(self.objects, self.names, self.keyring, checked=True)


@asynccontextmanager
async def opened(args: argparse.Namespace, *, writing: bool = False) -> AsyncIterator[Opened]:
    """`writing` refuses to leave files that the daemon's user cannot read. Raises ConfigError, StorageError."""
    settings = settings_of(args)
    storage = settings.storage
    keyring = load_keyring(storage, settings.state_dir)
    folder = Path(urlsplit(storage.url).path) if storage.url else settings.state_dir / "backups"
    if writing and storage.scheme == "file" and folder.exists() and folder.stat().st_uid != os.geteuid():
        raise ConfigError(
            f"The directory {folder} belongs to user {folder.stat().st_uid}, and this is user {os.geteuid()}.",
            hint="Run this as the user that the daemon runs as: it could not read what another one writes.",
        )
    objects = open_store(storage if storage.url else storage.model_copy(update={"url": f"file://{folder}"}), settings.state_dir)
    try:
        yield Opened(settings, objects, Names(storage.prefix), keyring)
    finally:
        await objects.close()


# --- list, stats --------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    return asyncio.run(_listed(args))


async def _listed(args: argparse.Namespace) -> int:
    async with opened(args) as store:
        found = await backup_report.inventory(store.objects, store.names, args.session)
        restored = await backup_report.last_restores(store.vault, found, concurrency=store.settings.storage.concurrency)
    rows = [_row(of, restored.get(of.session)) for of in found]
    if args.json:
        detail = [{**row, "objects": _objects(of)} for row, of in zip(rows, found, strict=True)] if args.session else rows
        print_json({"sessions": detail})
    elif args.session:
        for of in found:
            _print_objects(of)
    elif not found:
        print("No backups.")
    else:
        print("\n".join(_table(rows)))
    return EXIT_OK


def _row(of: Inventory, restored_at: float | None) -> dict[str, Any]:
    newest = of.objects[of.newest] if of.newest else None
    return {
        "session": of.session,
        "objects": len(of.objects),
        "bytes": of.size,
        "newest": str(of.newest) if of.newest else None,
        "newest_at": _time(newest.modified) if newest else None,
        "newest_bytes": newest.size if newest else None,
        "age_s": round(max(0.0, time.time() - newest.modified), 1) if newest else None,
        "last_restore_at": None if restored_at is None else _time(restored_at),
        "has_key": of.has_key,
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    table: list[tuple[str, ...]] = [("SESSION", "NEWEST", "AGE", "SIZE", "OBJECTS", "TOTAL", "LAST RESTORE", "")]
    for row in rows:
        note_ = "" if row["has_key"] else "no key: unreadable"
        table.append((
            row["session"], row["newest"] or "-", _age(row["age_s"]), _size(row["newest_bytes"]), str(row["objects"]),
            _size(row["bytes"]), row["last_restore_at"] or "-", note_,
        ))  # fmt: skip
    return columns(table)


def _objects(of: Inventory) -> list[dict[str, Any]]:
    return [{"position": str(p), "bytes": o.size, "at": _time(o.modified)} for p, o in of.objects.items()]


def _print_objects(of: Inventory) -> None:
    print(f"{of.session}: {len(of.objects)} objects, {_size(of.size)}" + ("" if of.has_key else "; its key is missing"))
    lines: list[tuple[str, ...]] = [
        (f"  {place}", _time(listed.modified), _size(listed.size)) for place, listed in reversed(of.objects.items())
    ]
    if lines:
        print("\n".join(columns(lines)))


def _stats(args: argparse.Namespace) -> int:
    return asyncio.run(_stats_told(args))


async def _stats_told(args: argparse.Namespace) -> int:
    async with opened(args) as store:
        found = await backup_report.inventory(store.objects, store.names)
        restored = await backup_report.last_restores(store.vault, found, concurrency=store.settings.storage.concurrency)
        where = store.settings.storage.url or str(store.settings.state_dir / "backups")
    ages = sorted(time.time() - of.objects[of.newest].modified for of in found if of.newest)
    told: dict[str, Any] = {
        "store": where,
        "sessions": len(found),
        "objects": sum(len(of.objects) for of in found),
        "bytes": sum(of.size for of in found),
        "newest_age_s": round(ages[0], 1) if ages else None,
        "oldest_newest_age_s": round(ages[-1], 1) if ages else None,
        "last_restore_at": _time(max(restored.values())) if restored else None,
        "without_key": [of.session for of in found if not of.has_key],
        "daemons": await _daemons(args),
    }
    if args.json:
        print_json(told)
        return EXIT_OK
    for name, value in {
        "store": where,
        "sessions": told["sessions"],
        "objects": f"{told['objects']}, {_size(told['bytes'])}",
        "newest backup": f"{_age(told['newest_age_s'])} ago" if ages else "none",
        "session whose newest is oldest": f"{_age(told['oldest_newest_age_s'])} ago" if ages else "none",
        "last restore": told["last_restore_at"] or "none known",
        "without a key": ", ".join(told["without_key"]) or "none",
        "now failing": "no daemon answers" if told["daemons"] is None else _failing(told["daemons"]),
    }.items():
        print(f"{name:<32}{value}")
    return EXIT_OK


async def _daemons(args: argparse.Namespace) -> dict[str, Any] | None:
    """How backups go at this moment, as the daemons say; None: none can be asked. The store's figures do not depend on it."""
    try:
        async with client_of(args) as client:
            sessions = await client.list_sessions(timeout_s=timeout_of(args, LIST_TIMEOUT_S))
    except (BrokerUnavailable, NoAnswer):
        return None
    backups = {s["session"]: s["backup"] for s in sessions if s.get("backup")}
    return {
        "sessions": len(backups),
        "pending": sum(bool(b.get("pending")) for b in backups.values()),
        "failing": {session: b.get("message") or "" for session, b in sorted(backups.items()) if b.get("failures")},
    }


def _failing(daemons: dict[str, Any]) -> str:
    failing = daemons["failing"]
    return f"{len(failing)} of {daemons['sessions']} sessions" + "".join(
        f"\n  {printable(f'{session}: {message}')}" for session, message in failing.items()
    )


# --- verify, prune ------------------------------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    return asyncio.run(_verified(args))


async def _verified(args: argparse.Namespace) -> int:
    progress = Progress("verify")
    started = time.monotonic()
    async with opened(args) as store:
        found = await backup_report.inventory(store.objects, store.names, args.session)
        checked = await backup_report.verify(
            store.vault, found, database_problem, concurrency=store.settings.storage.concurrency, tell=progress
        )
    progress.end()
    bad = [c for c in checked if c.problems]
    if args.json:
        print_json({"clean": not bad, "sessions": [asdict(c) for c in checked]})
    else:
        for c in bad:
            print(
                f"{c.session}: {len(c.problems)} problems; "
                + (f"{c.restorable} can be restored" if c.restorable else "nothing can be restored")
            )
            print("\n".join(printable(f"  {problem}") for problem in c.problems))
        states, seals = sum(c.states for c in checked), sum(c.seals for c in checked)
        print(
            f"{len(checked)} sessions: {states} states and {seals} seals are whole, {_size(sum(c.bytes for c in checked))} in "
            f"{time.monotonic() - started:.1f} s; {len(bad)} sessions have problems"
        )
    return EXIT_FAILED if bad else EXIT_OK


def _prune(args: argparse.Namespace) -> int:
    return asyncio.run(_pruned(args))


async def _pruned(args: argparse.Namespace) -> int:
    progress = Progress("prune")
    async with opened(args) as store:
        s = store.settings.storage
        found = await backup_report.inventory(store.objects, store.names, args.session)
        what = backup_report.doomed(
            found, time.time(), keep_last=s.keep_last, keep_days=s.keep_days, forget_after_days=s.forget_after_days
        )
        if not args.dry_run:
            await backup_report.delete(store.objects, what, concurrency=s.concurrency, tell=progress)
    progress.end()
    if args.json:
        print_json({"dry_run": args.dry_run, "sessions": [asdict(d) for d in what]})
        return EXIT_OK
    for d in what:
        print(f"{d.session}: {len(d.names)} objects, {_size(d.bytes)} ({d.reason})")
    total = f"{sum(len(d.names) for d in what)} objects, {_size(sum(d.bytes for d in what))}"
    print(f"would be deleted: {total}" if args.dry_run else f"deleted: {total}")
    return EXIT_OK


# --- now, restore -------------------------------------------------------------------------------------------------------


def _now(args: argparse.Namespace) -> int:
    if args.all == (args.session is not None):
        raise UsageError("Name a session, or give --all.", hint="See `warren backup now --help`.")
    return asyncio.run(_backed_up(args))


async def _backed_up(args: argparse.Namespace) -> int:
    async with client_of(args) as client:
        if args.session is not None:
            return _tell_backup(args, args.session, await _ask_backup(args, client, args.session))
        listed = await client.list_sessions(timeout_s=LIST_TIMEOUT_S)
        sessions = [s["session"] for s in listed]
        outcomes = await _ask_all(args, client, sessions)
    failed = {session: told for session, told in outcomes.items() if not (isinstance(told, Outcome) and told.ok)}
    if args.json:
        print_json({"sessions": {session: _body(told) for session, told in outcomes.items()}})
    else:
        for session, told in failed.items():
            error = told.message if isinstance(told, WarrenError) else (told.error or {}).get("message", "")
            print(printable(f"{session}: {error}"))
        print(f"{len(outcomes) - len(failed)} of {len(outcomes)} sessions are backed up")
    return EXIT_FAILED if failed else EXIT_OK


async def _ask_backup(args: argparse.Namespace, client: Client, session: str) -> Outcome:
    return await client.call("backup", session, timeout_s=timeout_of(args, BACKUP_TIMEOUT_S))


async def _ask_all(args: argparse.Namespace, client: Client, sessions: list[str]) -> dict[str, Outcome | WarrenError]:
    gate, progress = asyncio.Semaphore(ASKED_AT_ONCE), Progress("backup")
    outcomes: dict[str, Outcome | WarrenError] = {}

    async def one(session: str) -> None:
        async with gate:
            try:
                outcomes[session] = await _ask_backup(args, client, session)
            except (NoAnswer, CommandError) as e:
                outcomes[session] = e
        progress(len(outcomes), len(sessions))

    async with asyncio.TaskGroup() as group:
        for session in sessions:
            group.create_task(one(session))
    progress.end()
    return dict(sorted(outcomes.items()))


def _body(told: Outcome | WarrenError) -> dict[str, Any]:
    if isinstance(told, Outcome):
        return told.body()
    return {"ok": False, "error": {"code": told.code, "message": told.message, "hint": told.hint}}


def _tell_backup(args: argparse.Namespace, session: str, outcome: Outcome) -> int:
    if not outcome.ok:
        raise Failed(outcome)
    if args.json:
        print_json(outcome.body())
    else:
        r = outcome.result
        print(f"{session}: backup {r.get('position')} of {r.get('at')}, {_size(r.get('size'))}")
    return EXIT_OK


def _restore(args: argparse.Namespace) -> int:
    return asyncio.run(_restored(args))


async def _restored(args: argparse.Namespace) -> int:
    arguments = {} if args.at is None else {"at": args.at}
    timeout_s = timeout_of(args, RESTORE_TIMEOUT_S)
    async with client_of(args) as client:
        if not args.json:
            note(f"{args.session}: restoring {args.at or 'the newest backup'}, at most {timeout_s:g} s")
        outcome = await client.call("restore", args.session, arguments, timeout_s=timeout_s)
    if not outcome.ok:
        raise Failed(outcome)
    if args.json:
        print_json(outcome.body())
    else:
        r = outcome.result
        print(f"{args.session}: restored {r.get('position')}, now epoch {r.get('epoch')}")
    return EXIT_OK


# --- keys ---------------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    key = secrets.token_hex(KEY_BYTES)
    if args.json:
        print_json({"key": key})
    else:
        print(key)
        note("Put it into a file of mode 0600 that [storage] key_file names, with a copy elsewhere: it alone opens the backups.")
    return EXIT_OK


def _check(args: argparse.Namespace) -> int:
    return asyncio.run(_checked(args))


async def _checked(args: argparse.Namespace) -> int:
    async with opened(args, writing=True) as store:
        await backup_keys.check_keys(store.objects, store.names, store.keyring)
        where, key = (
            store.settings.storage.url or str(store.settings.state_dir / "backups"),
            backup_keys.short(store.keyring.write.id),
        )
    if args.json:
        print_json({"store": where, "key": key})
    else:
        print(f"{where} can be used, and the key {key} is the right one")
    return EXIT_OK


def _rotate(args: argparse.Namespace) -> int:
    return asyncio.run(_rotated(args))


async def _rotated(args: argparse.Namespace) -> int:
    progress = Progress("rotate")
    async with opened(args, writing=True) as store:
        done = await backup_keys.rotate(
            store.objects, store.names, store.keyring, concurrency=store.settings.storage.concurrency, progress=progress
        )
        key = backup_keys.short(store.keyring.write.id)
    progress.end()
    if args.json:
        print_json({"key": key, **asdict(done)})
        return EXIT_FAILED if done.failed else EXIT_OK
    for session, why in done.failed.items():
        print(printable(f"{'the check object' if session == KEY_CHECK else session}: {why}"))
    print(
        f"key {key}: {len(done.rewrapped)} sessions changed to it, {len(done.current)} had it already, {len(done.failed)} failed"
    )
    print("Keep the old keys listed, and run this again." if done.failed else "The old keys are no longer needed.")
    return EXIT_FAILED if done.failed else EXIT_OK


# --- words --------------------------------------------------------------------------------------------------------------


def _time(at: float) -> str:
    return timestamp(datetime.fromtimestamp(at, UTC))


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1_000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1_000
    return f"{size:.1f} GB"
