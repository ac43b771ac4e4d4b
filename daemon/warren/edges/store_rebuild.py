"""A damaged `warren.db` is set aside and made again: from the rows that can still be read, and from the sessions' directories.

Nothing is overwritten: the bad file stays beside the new one. A crash at any moment leaves the bad file where it was, to be read
again, or the new one, whole (`_put_in_place` is repeated by the next start):

    warren.db.building    being filled; worth nothing
    warren.db.rebuilt     complete; takes the place of warren.db
    warren.db.bad-<UTC>   what was there before, with its -wal
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
from loguru import logger

from warren.core.names import is_session_id
from warren.edges.statedir import StateDirectory
from warren.edges.store import DamagedError, SqliteStore, explain, record_of
from warren.errors import StateError
from warren.ports import Desired, SessionRecord

PATIENCE: Final = 20_000
"""Unreadable places of one table that are searched around; then the rest of the table is given up."""
LAST_ROWID: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What became of a damaged database. `complete`: every table could be read to its end."""

    why: str
    bad: Path
    sessions: tuple[str, ...]
    """Those that go on, each in a new epoch: what they had published last is not known for sure."""
    from_directories: int
    """Of these, those whose row was lost: their settings are, too."""
    events: int
    outcomes: int
    complete: bool

    def __str__(self) -> str:
        lost = "Everything in it could be read." if self.complete else "Some rows could not be read."
        return (
            f"{self.why} It was set aside as {self.bad} and made again. {lost} Kept: {len(self.sessions)} sessions "
            f"({self.from_directories} known by their directories only, without their settings), {self.events} events for "
            f"RabbitMQ, {self.outcomes} outcomes of commands."
        )


async def open_database(path: Path, state: StateDirectory) -> tuple[SqliteStore, Rebuilt | None]:
    """Open `warren.db`; when what is in it is damaged, or not warren's, set it aside and make it again, in the locked `state`.

    Raises what `SqliteStore.open` raises for everything else (a newer schema, no permission, in use, no disk): replacing the
    file would then destroy something good.
    """
    await asyncio.to_thread(_put_in_place, path)
    try:
        return await _opened(path), None
    except DamagedError as error:
        damage = error
    logger.bind(action="store_damaged").error("{} Reading what can be read.", damage.message)
    sessions = [await _found(state, session) for session in await state.sessions()]
    try:
        rebuilt = await asyncio.to_thread(_rebuild, path, sessions, damage.message)
    except (sqlite3.Error, OSError) as error:
        await asyncio.to_thread(_clear, _beside(path, "building"))
        raise StateError(
            f"{damage.message} It could not be made again: {explain(error, path)}",
            hint="Mend that and start again; nothing was changed.",
        ) from error
    store = await _opened(path)
    logger.bind(action="store_rebuilt", sessions=len(rebuilt.sessions), events=rebuilt.events).error("{}", rebuilt)
    return store, rebuilt


async def _opened(path: Path) -> SqliteStore:
    store = await SqliteStore.open(path)
    try:
        await store.sessions()
    except StateError as error:  # a row that SQLite can read and we cannot
        await store.close()
        if error.retryable:
            raise  # the disk's trouble says nothing about what is on it
        raise DamagedError(error.message, hint=error.hint) from error
    except BaseException:
        await store.close()
        raise
    return store


# --- what the directories know ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """A session's directory. `epoch`: the highest it knows of; `paired`: its current database is not empty, or may not be."""

    session: str
    epoch: int
    paired: bool


async def _found(state: StateDirectory, session: str) -> _Found:
    epochs = await state.epochs(session)
    try:
        current = await state.current_epoch(session)
    except StateError:
        # Taken for paired, its opening will meet the same error and put it into QUARANTINED, which tells what to do.
        return _Found(session, max(epochs, default=0), paired=True)
    if current is None:
        return _Found(session, max(epochs, default=0), paired=False)
    paired = bool(await state.state_size(session, current))
    return _Found(session, max(current, *epochs) if epochs else current, paired)


# --- making it again --------------------------------------------------------------------------------------------------


def _rebuild(path: Path, found: Sequence[_Found], why: str) -> Rebuilt:
    building = _beside(path, "building")
    _clear(building)
    asyncio.run(_empty(building))
    with contextlib.closing(_reader(path)) as old, contextlib.closing(sqlite3.connect(building, isolation_level=None)) as new:
        new.execute("PRAGMA synchronous=FULL")
        new.execute("BEGIN")
        salvage = _Salvage(old, new)
        salvage.read()
        records, from_directories = _registry(salvage, found)
        for record in records:
            salvage.put("sessions", _row(record))
        new.execute("COMMIT")
        new.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        new.execute("PRAGMA journal_mode=DELETE").fetchall()  # one file, to be renamed as a whole
    _sync(building)
    rebuilt = _beside(path, "rebuilt")
    building.rename(rebuilt)  # from here on the new one counts
    _sync(path.parent)
    bad = _bad(path, rebuilt)
    _put_in_place(path)
    alive = tuple(r.session for r in records if r.desired not in {Desired.GONE, Desired.REMOVING})
    return Rebuilt(why, bad, alive, from_directories, salvage.kept["outbox"], salvage.kept["journal"], not salvage.unreadable)


def _clear(building: Path) -> None:
    for suffix in ("", "-wal", "-journal"):
        Path(f"{building}{suffix}").unlink(missing_ok=True)


async def _empty(path: Path) -> None:
    await (await SqliteStore.open(path)).close()


def _put_in_place(path: Path) -> None:
    """Finish a rebuild, also one that was cut by a crash."""
    rebuilt = _beside(path, "rebuilt")
    if not rebuilt.exists():
        return
    bad = _bad(path, rebuilt)
    for suffix in ("", "-wal", "-shm", "-journal"):
        # The log, too: it would be played into the new file.
        if (old := Path(f"{path}{suffix}")).exists():
            old.rename(f"{bad}{suffix}")
    _sync(path.parent)
    rebuilt.replace(path)
    _sync(path.parent)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _bad(path: Path, rebuilt: Path) -> Path:
    """The same name for every try of one rebuild."""
    at = datetime.fromtimestamp(rebuilt.stat().st_mtime, UTC)
    return _beside(path, f"bad-{at:%Y%m%dT%H%M%S.%fZ}")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _registry(salvage: _Salvage, found: Sequence[_Found]) -> tuple[list[SessionRecord], int]:
    """The registry as far as it is known, and how many of it only by their directory."""
    folders = {f.session: f for f in found}
    records: list[SessionRecord] = []
    lost = 0
    for session in sorted({*salvage.records, *folders, *salvage.epochs}):
        record, folder = salvage.records.get(session), folders.get(session)
        epoch = max(record.epoch if record else 0, folder.epoch if folder else 0, salvage.epochs.get(session, 0))
        if record is not None and record.desired in {Desired.GONE, Desired.REMOVING}:
            records.append(replace(record, epoch=epoch))
        elif record is not None:
            records.append(replace(record, epoch=epoch + 1, sequence=0))
        elif folder is not None:
            lost += 1
            records.append(SessionRecord(session, epoch + 1, Desired.RUNNING, paired=folder.paired))
        else:
            records.append(SessionRecord(session, epoch, Desired.GONE))  # only events of it are left
    return records, lost


def _row(record: SessionRecord) -> tuple[object, ...]:
    return (
        record.session,
        record.epoch,
        record.desired.value,
        record.sequence,
        orjson.dumps(record.settings).decode(),
        orjson.dumps(record.account).decode(),
        record.halted,
        record.paired,
        record.until,
    )


# --- reading what can be read -----------------------------------------------------------------------------------------

_COLUMNS: Final = {
    "sessions": ("session", "epoch", "desired", "sequence", "settings", "account", "halted", "paired", "until"),
    "outbox": ("session", "epoch", "sequence", "event_id", "event", "body"),
    "journal": ("session", "command_id", "fingerprint", "outcome", "at"),
    "pacing": ("session", "stamps"),
    "starts": ("session", "command_id", "count"),
    "backups": ("session", "epoch", "sequence", "at", "size", "digest", "attempts", "idle_since"),
}


def _reader(path: Path) -> sqlite3.Connection:
    """The damaged file, with its log. Not `mode=ro`, which cannot read a log without a -shm beside it."""
    db = sqlite3.connect(path, isolation_level=None)
    with contextlib.suppress(sqlite3.Error):
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA query_only=ON")
        db.execute("PRAGMA cell_size_check=ON")  # finds a broken page before it is taken for rows
    return db


class _Salvage:
    """Copies rows from a damaged database into a new one, looking at each."""

    def __init__(self, old: sqlite3.Connection, new: sqlite3.Connection) -> None:
        self._old, self._new = old, new
        self.records: dict[str, SessionRecord] = {}
        self.epochs: dict[str, int] = {}
        """The highest epoch of a session in the outbox."""
        self.kept = dict.fromkeys(_COLUMNS, 0)
        self.unreadable = 0

    def read(self) -> None:
        """Everything but the registry's rows, which are kept in `records`, goes into the new database."""
        for row in self._by_key("sessions"):
            self._take("sessions", row, self._take_session)
        for row in self._by_rowid("outbox"):
            self._take("outbox", row, self._take_event)
        for row in self._by_rowid("journal"):
            self._take("journal", row, _check_outcome)
        there = {row[0] for row in self._old_rows("SELECT name FROM sqlite_schema", ())}
        for table in {"pacing", "starts", "backups"} & there:  # they came later
            for row in self._by_key(table):
                self._take(table, row, _check_session)

    def put(self, table: str, row: Sequence[object]) -> None:
        columns = _COLUMNS[table]
        marks = ", ".join("?" * len(columns))
        self._new.execute(f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({marks})", row)  # noqa: S608 (ours)
        self.kept[table] += 1

    def _take(self, table: str, row: tuple[Any, ...], check: Callable[[tuple[Any, ...]], None]) -> None:
        try:
            check(row)
            if table != "sessions":
                self.put(table, row)
        except (ValueError, TypeError, sqlite3.IntegrityError, StateError):
            self.unreadable += 1  # a row, but not one that was written so

    def _take_session(self, row: tuple[Any, ...]) -> None:
        _check_session(row)
        _, epoch, _, sequence, settings, account, *_ = row
        if not (_is_object(settings) and _is_object(account) and _is_count(epoch) and _is_count(sequence)):
            raise ValueError("no record")
        self.records[row[0]] = record_of(row)

    def _take_event(self, row: tuple[Any, ...]) -> None:
        _check_session(row)
        session, epoch, sequence, event_id, event, body = row
        told = orjson.loads(body)
        if (told["session"], told["epoch"], int(told["sequence"]), told["id"], told["type"]) != (
            session, epoch, sequence, event_id, f"warren.{event}",
        ):  # fmt: skip
            raise ValueError("an event that is not the row's")
        self.epochs[session] = max(epoch, self.epochs.get(session, 0))

    def _by_key(self, table: str) -> Iterator[tuple[Any, ...]]:
        """A table without rowids: from its beginning to the first unreadable place, then from its end to the last one."""
        select = f"SELECT {', '.join(_COLUMNS[table])} FROM {table}"  # noqa: S608 (names of our own)
        key = "session, command_id" if table == "starts" else "session"
        for order in ("ASC", "DESC"):
            ordered = ", ".join(f"{column} {order}" for column in key.split(", "))
            if not (yield from self._old_rows(f"{select} ORDER BY {ordered}", ())):
                return
            self.unreadable += 1

    def _by_rowid(self, table: str) -> Iterator[tuple[Any, ...]]:
        """A table with rowids: around every unreadable place, by halving what is left."""
        select = f"SELECT rowid, {', '.join(_COLUMNS[table])} FROM {table} WHERE rowid BETWEEN ? AND ? ORDER BY rowid"  # noqa: S608
        ranges, patience = [(1, LAST_ROWID)], PATIENCE
        while ranges and patience:
            low, high = ranges.pop()
            failed, last = False, low - 1
            rows = self._old_rows(select, (low, high))
            while True:
                try:
                    row = next(rows)
                except StopIteration as end:
                    failed = end.value
                    break
                last = row[0]
                yield row[1:]
            if failed:
                patience -= 1
                self.unreadable += 1
                low = last + 1
                if low < high:
                    middle = (low + high) // 2
                    ranges += [(middle + 1, high), (low, middle)]

    def _old_rows(self, sql: str, parameters: Iterable[object]) -> Generator[tuple[Any, ...], None, bool]:
        """The rows until one cannot be read; returns whether that happened."""
        try:
            yield from self._old.execute(sql, tuple(parameters))
        except (sqlite3.Error, UnicodeDecodeError):
            return True
        return False


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _is_object(text: Any) -> bool:
    return isinstance(orjson.loads(text), dict)


def _check_session(row: tuple[Any, ...]) -> None:
    if not isinstance(row[0], str) or not is_session_id(row[0]):
        raise ValueError("no session")


def _check_outcome(row: tuple[Any, ...]) -> None:
    _check_session(row)
    if not (_is_object(row[3]) and _is_count(row[4])):
        raise ValueError("no outcome")
