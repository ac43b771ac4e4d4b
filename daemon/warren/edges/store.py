"""`warren.db` on SQLite: registry, outbox and journal behind one writer thread with group commit.

Everything runs on one thread of our own: it takes whatever is queued, writes and reads alike, and does it in the order of the
calls in one transaction. So a read sees every write asked for before it, a commit (one fsync) is shared by all that waited
for the one before, and nobody else's executor can hold it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from warren.errors import OwnershipError, StateError, WarrenError
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
    Write,
)

T = TypeVar("T")

SCHEMA_VERSION = 1
BATCH_UNITS = 500
"""Most units and reads in one transaction: bounds how long the first of them waits for the last."""
BATCH_BYTES = 8 << 20
"""Most bytes of bodies in one transaction; a batch goes over it by one unit at most."""
BUSY_TIMEOUT_S = 1.0
JOURNAL_KEEP_S = 7 * 86_400.0
JOURNAL_KEEP_ROWS = 1_000
"""Rows of a session that are kept however old they are."""
PRUNE_EVERY = 256
"""Outcomes of one session between two looks at what of its journal can go."""
PRUNE_ROWS = 1_024
"""Most rows that one look deletes: four times what was put since, so it catches up, in short transactions."""
SPARE_BYTES = 16 << 20
"""Free pages kept in the file for reuse; what is over goes back to the file system (see `_give_back`)."""
GIVE_BACK_PAGES = 1_024

# The outbox and the journal are rowid tables: their rows may be large, and in a WITHOUT ROWID table the rows *are* the search
# tree. Measured with 200 KB bodies 2.1 times, with 8 KB 1.7 times, with 700 B 1.3 times faster in batches than WITHOUT ROWID.
_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE sessions (
        session TEXT PRIMARY KEY, epoch INTEGER NOT NULL, desired TEXT NOT NULL, sequence INTEGER NOT NULL,
        settings TEXT NOT NULL, account TEXT NOT NULL,
        halted TEXT NOT NULL, paired INTEGER NOT NULL, until TEXT NOT NULL DEFAULT '') WITHOUT ROWID""",
    """CREATE TABLE outbox (
        session TEXT NOT NULL, epoch INTEGER NOT NULL, sequence INTEGER NOT NULL, event_id TEXT NOT NULL,
        event TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (session, epoch, sequence))""",
    """CREATE TABLE journal (
        session TEXT NOT NULL, command_id TEXT NOT NULL, fingerprint TEXT NOT NULL, outcome BLOB NOT NULL,
        at INTEGER NOT NULL, PRIMARY KEY (session, command_id))""",
    "CREATE INDEX journal_by_age ON journal (session, at)",
    f"INSERT INTO meta VALUES ('schema_version', '{SCHEMA_VERSION}')",  # noqa: S608 (a number of our own)
)

_ADDED = (
    """CREATE TABLE IF NOT EXISTS backups (
        session TEXT PRIMARY KEY, epoch INTEGER NOT NULL, sequence INTEGER NOT NULL, at REAL NOT NULL, size INTEGER NOT NULL,
        digest TEXT NOT NULL, attempts TEXT NOT NULL, idle_since REAL NOT NULL) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS pacing (session TEXT PRIMARY KEY, stamps TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE IF NOT EXISTS starts (
        session TEXT NOT NULL, command_id TEXT NOT NULL, count INTEGER NOT NULL,
        PRIMARY KEY (session, command_id)) WITHOUT ROWID""",
)
"""Tables that came later. A warren that does not know them leaves them alone, so they need no schema version."""

# With a single file the WAL may grow to SQLite's usual 1,000 pages (4 MB): measured 1.4
# times faster in batches than 100, which is for hundreds of files.
_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "wal_autocheckpoint=1000",
    f"journal_size_limit={16 << 20}",
    "temp_store=MEMORY",
    "cache_size=-8000",
)


_SELECT_SESSION = "SELECT session, epoch, desired, sequence, settings, account, halted, paired, until FROM sessions"


@dataclass(slots=True)
class _Item:
    """Something for the writer thread: `run` is called inside a transaction, perhaps twice (the first time rolled back)."""

    run: Callable[[], Any]
    future: asyncio.Future[Any]
    size: int = 0
    last: bool = False


@dataclass(slots=True)
class _Outcome:
    item: _Item
    value: Any = None
    error: Exception | None = None


class DamagedError(StateError):
    """What is in the file is damaged or not warren's: nothing is lost by setting it aside (see `store_rebuild`)."""


class SqliteStore:
    """Implements `ports.Store`. Made by `open`; belongs to the event loop it was opened in."""

    commits: int
    """Transactions committed since `open`."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self.commits = 0
        self._path = path
        self._loop = loop
        self._clock = clock
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._closed: asyncio.Future[None] | None = None
        # A daemon thread: a process that dies without `close` must not wait for it. What is committed is on disk anyway.
        self._thread = threading.Thread(target=self._main, name="warren-store", daemon=True)
        self._opened: asyncio.Future[None] = loop.create_future()
        self._db: sqlite3.Connection
        self._file: io.FileIO | None = None
        self._outbox_bytes = 0
        self._puts: dict[str, int] = {}
        self._removed = False

    @classmethod
    async def open(cls, path: Path, *, clock: Callable[[], float] = time.time) -> SqliteStore:
        """Open or create the database (0600); its directory must exist. Checks the whole file, 1 to 4 s per GB.

        `clock` gives seconds since 1970, for the age of journal rows. Raises OwnershipError when another process has it open,
        DamagedError when it is damaged or not ours, StateError when it is from a newer warren or cannot be used. When cancelled,
        it is closed again by itself.
        """
        store = cls(path, asyncio.get_running_loop(), clock)
        store._thread.start()
        try:
            await asyncio.shield(store._opened)
        except asyncio.CancelledError:
            store._begin_close()
            raise
        except Exception:
            store._thread.join()  # its last act was to tell us
            raise
        return store

    # --- what the services call, in the event loop --------------------------------------------------------------------

    def write(self, *writes: Write) -> asyncio.Future[None]:
        """See `ports.Store.write`. Cancelling the future does not take the unit back."""
        size = sum(len(w.row.body) for w in writes if isinstance(w, AddEvent))
        return self._submit(lambda: self._apply(writes), size)

    async def sessions(self) -> list[SessionRecord]:
        """Every row of the registry, by session."""
        rows = await self._submit(lambda: self._db.execute(f"{_SELECT_SESSION} ORDER BY session").fetchall())
        return [record_of(row) for row in rows]

    async def session(self, session: str) -> SessionRecord | None:
        """One row of the registry."""
        row = await self._submit(lambda: self._db.execute(f"{_SELECT_SESSION} WHERE session = ?", (session,)).fetchone())
        return None if row is None else record_of(row)

    async def outcome(self, session: str, command_id: str) -> JournalRow | None:
        """The journal's row of a command, while it is kept: 7 days, and the last 1,000 of a session for longer."""
        sql = "SELECT session, command_id, fingerprint, outcome FROM journal WHERE session = ? AND command_id = ?"
        row = await self._submit(lambda: self._db.execute(sql, (session, command_id)).fetchone())
        return None if row is None else JournalRow(*row)

    async def last_outcomes(self, session: str, limit: int) -> list[JournalRow]:
        """The last `limit` outcomes of a session, oldest first."""
        sql = """SELECT session, command_id, fingerprint, outcome FROM journal
            WHERE session = ? ORDER BY at DESC, rowid DESC LIMIT ?"""
        rows = await self._submit(lambda: self._db.execute(sql, (session, limit)).fetchall())
        return [JournalRow(*row) for row in reversed(rows)]

    async def backup(self, session: str) -> BackupRow | None:
        """How far a session is backed up; None: never begun."""
        sql = "SELECT session, epoch, sequence, at, size, digest, attempts, idle_since FROM backups WHERE session = ?"
        row = await self._submit(lambda: self._db.execute(sql, (session,)).fetchone())
        if row is None:
            return None
        name, epoch, sequence, at, size, digest, attempts, idle_since = row
        return BackupRow(name, epoch, sequence, at, size, digest, tuple(orjson.loads(attempts)), idle_since)

    async def pacing(self, session: str) -> tuple[int, ...]:
        """See `ports.Store.pacing`."""
        sql = "SELECT stamps FROM pacing WHERE session = ?"
        row = await self._submit(lambda: self._db.execute(sql, (session,)).fetchone())
        return () if row is None else tuple(orjson.loads(row[0]))

    async def starts(self, session: str, command_id: str) -> int:
        """See `ports.Store.starts`."""
        sql = "SELECT count FROM starts WHERE session = ? AND command_id = ?"
        row = await self._submit(lambda: self._db.execute(sql, (session, command_id)).fetchone())
        return 0 if row is None else int(row[0])

    async def outbox_sessions(self) -> list[str]:
        """The sessions that have rows in the outbox, sorted; costs one look-up per session however many rows they have."""
        # DISTINCT would read the whole index.
        sql = """WITH RECURSIVE s(x) AS (
            SELECT min(session) FROM outbox
            UNION ALL SELECT (SELECT min(session) FROM outbox WHERE session > x) FROM s WHERE x IS NOT NULL
        ) SELECT x FROM s WHERE x IS NOT NULL"""
        rows = await self._submit(lambda: self._db.execute(sql).fetchall())
        return [row[0] for row in rows]

    async def outbox_page(self, session: str, after: tuple[int, int], limit: int) -> list[OutboxRow]:
        """Rows of one session after (epoch, sequence), in order, at most `limit`."""
        sql = """SELECT session, epoch, sequence, event_id, event, body FROM outbox
            WHERE session = ? AND (epoch, sequence) > (?, ?) ORDER BY epoch, sequence LIMIT ?"""
        rows = await self._submit(lambda: self._db.execute(sql, (session, *after, limit)).fetchall())
        return [OutboxRow(*row) for row in rows]

    async def outbox_bytes(self) -> int:
        """The sum of the bodies in the outbox, in bytes; counted along, not computed."""
        return await self._submit(lambda: self._outbox_bytes)

    async def close(self) -> None:
        """Finish what is queued, checkpoint, close. Idempotent; when cancelled it still happens, unwatched."""
        await asyncio.shield(self._begin_close())
        self._thread.join()  # its last act was to tell us

    def _begin_close(self) -> asyncio.Future[None]:
        if self._closed is None:
            self._closed = self._loop.create_future()
            self._queue.put(_Item(run=lambda: None, future=self._closed, last=True))
        return self._closed

    def _submit(self, run: Callable[[], T], size: int = 0) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed is not None:
            future.set_exception(StateError(f"{self._path} is closed.", hint="The daemon is stopping."))
        else:
            self._queue.put(_Item(run, future, size))
        return future

    # --- the writer thread --------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._open()
        except Exception as e:
            self._tell([_Outcome(_Item(lambda: None, self._opened), error=self._explain(e))])
            return
        self._tell([_Outcome(_Item(lambda: None, self._opened))])
        while (last := self._work()) is None:
            pass
        self._close()
        self._tell([_Outcome(last)])

    def _work(self) -> _Item | None:
        """One batch. Returns the order to close when it came."""
        batch, last = self._take()
        if batch:
            self._tell(self._run(batch))
            self._tidy()
        return last

    def _take(self) -> tuple[list[_Item], _Item | None]:
        """What is queued, at least one item (waits for it), at most a batch; and the order to close if it came."""
        batch: list[_Item] = []
        size = 0
        item = self._queue.get()
        while not item.last:
            batch.append(item)
            size += item.size
            if len(batch) >= BATCH_UNITS or size >= BATCH_BYTES:
                return batch, None
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return batch, None
        return batch, item

    def _run(self, batch: Sequence[_Item]) -> list[_Outcome]:
        """One transaction for all; if any of them fails, one for each, so that a failure is nobody else's."""
        try:
            values = self._transaction(batch)
        except Exception as e:
            if len(batch) == 1:
                return [_Outcome(batch[0], error=self._explain(e))]
            return [outcome for item in batch for outcome in self._run([item])]
        return [_Outcome(item, value) for item, value in zip(batch, values, strict=True)]

    def _transaction(self, batch: Sequence[_Item]) -> list[Any]:
        outbox_bytes = self._outbox_bytes
        try:
            self._db.execute("BEGIN IMMEDIATE")
            values = [item.run() for item in batch]
            self._db.execute("COMMIT")
        except BaseException:
            self._outbox_bytes = outbox_bytes
            self._roll_back()
            raise
        self.commits += 1
        return values

    def _roll_back(self) -> None:
        # SQLite has already rolled back by itself after some errors (disk full is one).
        if self._db.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")

    def _tell(self, outcomes: list[_Outcome]) -> None:
        # RuntimeError: the loop is closed; the daemon ended without `close` and nobody waits any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_resolve, outcomes)

    # --- writes -------------------------------------------------------------------------------------------------------

    def _apply(self, writes: Sequence[Write]) -> None:
        for write in writes:
            match write:
                case AddEvent(row):
                    self._add_event(row)
                case RemoveEvents(keys):
                    self._remove_events(keys)
                case PutOutcome(outcome):
                    self._put_outcome(outcome)
                case PutSession(record):
                    self._put_session(record)
                case PutPacing(session, stamps):
                    self._db.execute("REPLACE INTO pacing VALUES (?, ?)", (session, orjson.dumps(stamps).decode()))
                case PutStarts(session, command_id, 0):
                    self._db.execute("DELETE FROM starts WHERE session = ? AND command_id = ?", (session, command_id))
                case PutStarts(session, command_id, count):
                    self._db.execute("REPLACE INTO starts VALUES (?, ?, ?)", (session, command_id, count))
                case KeepOutcome(outcome):
                    self._keep_outcome(outcome)
                case PutBackup(backup):
                    self._put_backup(backup)
                case RemoveBackup(session):
                    self._db.execute("DELETE FROM backups WHERE session = ?", (session,))

    def _add_event(self, row: OutboxRow) -> None:
        self._db.execute(
            "INSERT INTO outbox (session, epoch, sequence, event_id, event, body) VALUES (?, ?, ?, ?, ?, ?)",
            (row.session, row.epoch, row.sequence, row.event_id, row.event, row.body),
        )
        # In the same transaction, so that after a crash a sequence is neither used twice nor left out.
        self._db.execute(
            "UPDATE sessions SET sequence = max(sequence, ?) WHERE session = ? AND epoch = ?",
            (row.sequence, row.session, row.epoch),
        )
        self._outbox_bytes += len(row.body)

    def _remove_events(self, keys: Sequence[tuple[str, int, int]]) -> None:
        where = "FROM outbox WHERE session = ? AND epoch = ? AND sequence = ?"
        for key in keys:
            # length() of a blob is read from the row's header; RETURNING would read the body.
            found = self._db.execute(f"SELECT rowid, length(body) {where}", key).fetchone()
            if found is not None:
                self._db.execute("DELETE FROM outbox WHERE rowid = ?", (found[0],))
                self._outbox_bytes -= found[1]
        self._removed = True

    def _put_outcome(self, row: JournalRow) -> None:
        self._db.execute(
            """INSERT INTO journal (session, command_id, fingerprint, outcome, at) VALUES (?, ?, ?, ?, ?)
            ON CONFLICT (session, command_id) DO UPDATE
            SET fingerprint = excluded.fingerprint, outcome = excluded.outcome, at = excluded.at""",
            (row.session, row.command_id, row.fingerprint, row.outcome, int(self._clock())),
        )
        self._puts[row.session] = self._puts.get(row.session, 0) + 1

    def _keep_outcome(self, row: JournalRow) -> None:
        self._db.execute(
            "INSERT OR IGNORE INTO journal (session, command_id, fingerprint, outcome, at) VALUES (?, ?, ?, ?, ?)",
            (row.session, row.command_id, row.fingerprint, row.outcome, int(self._clock())),
        )

    def _put_backup(self, row: BackupRow) -> None:
        attempts = orjson.dumps(row.attempts).decode()
        self._db.execute(
            "INSERT OR REPLACE INTO backups VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (row.session, row.epoch, row.sequence, row.at, row.size, row.digest, attempts, row.idle_since),
        )

    def _put_session(self, record: SessionRecord) -> None:
        self._db.execute(
            """INSERT INTO sessions (session, epoch, desired, sequence, settings, account, halted, paired, until)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
            ON CONFLICT (session) DO UPDATE
            SET desired = excluded.desired, settings = excluded.settings, account = excluded.account, halted = excluded.halted,
                paired = excluded.paired, until = excluded.until,
                sequence = CASE epoch WHEN excluded.epoch THEN sequence ELSE excluded.sequence END,
                epoch = excluded.epoch""",
            (
                record.session,
                record.epoch,
                record.desired.value,
                record.sequence,
                orjson.dumps(record.settings).decode(),
                orjson.dumps(record.account).decode(),
                record.halted,
                record.paired,
                record.until,
            ),
        )
        if record.desired is Desired.GONE:
            self._db.execute("DELETE FROM pacing WHERE session = ?", (record.session,))
            self._db.execute("DELETE FROM starts WHERE session = ?", (record.session,))

    # --- housekeeping: after a batch was answered, in transactions of its own, never a reason to fail -------------------

    def _tidy(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if due := [session for session, puts in self._puts.items() if puts >= PRUNE_EVERY]:
                for session in due:
                    self._prune(session)
                    del self._puts[session]
            if self._removed:
                self._removed = False
                self._give_back()

    def _prune(self, session: str) -> None:
        """Delete the oldest outcomes that are neither young nor among the session's last."""
        self._db.execute(
            """DELETE FROM journal WHERE rowid IN (
                SELECT rowid FROM journal WHERE session = :session AND at < min(:cutoff, coalesce((
                    SELECT at FROM journal WHERE session = :session ORDER BY at DESC LIMIT 1 OFFSET :keep - 1
                ), 0)) ORDER BY at LIMIT :rows)""",
            {
                "session": session,
                "cutoff": int(self._clock() - JOURNAL_KEEP_S),
                "keep": JOURNAL_KEEP_ROWS,
                "rows": PRUNE_ROWS,
            },
        )

    def _prune_all(self) -> None:
        sql = "SELECT session FROM journal GROUP BY session HAVING count(*) > ? AND min(at) < ?"
        due = self._db.execute(sql, (JOURNAL_KEEP_ROWS, int(self._clock() - JOURNAL_KEEP_S))).fetchall()
        for (session,) in due:
            self._prune(session)

    def _give_back(self) -> None:
        """Shrink the file after a backlog: else a disk that the outbox filled stays full when the outbox is empty."""
        free = self._number("PRAGMA freelist_count")
        if free * self._number("PRAGMA page_size") > SPARE_BYTES:
            # Not execute(): it would stop after the first page (the statement yields a row without columns for each).
            self._db.executescript(f"PRAGMA incremental_vacuum({GIVE_BACK_PAGES})")

    # --- open and close -----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        _make_private(self._path)
        self._db = sqlite3.connect(self._path, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        try:
            self._configure()
            self._db.execute("BEGIN EXCLUSIVE")
            self._read_ahead()
            self._check()
            self._db.execute("COMMIT")
        except BaseException:
            self._roll_back()
            self._close_files()
            raise
        with contextlib.suppress(sqlite3.Error):  # a full disk: what is old can wait
            self._prune_all()
        self._outbox_bytes = self._number("SELECT coalesce(sum(length(body)), 0) FROM outbox")

    def _configure(self) -> None:
        # First of all: then the WAL needs no shared memory (so that it opens on a full disk too), and a second process is
        # refused.
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        if self._number("PRAGMA page_count") == 0:
            self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # is only possible before the first page is written
        for pragma in _PRAGMAS:
            self._db.execute(f"PRAGMA {pragma}").fetchall()

    def _read_ahead(self) -> None:
        """Read the file once from end to end. The check walks its pages in tree order: measured 20 s for a GB on a cold disk,
        3 s after this.

        The descriptor stays open as long as the database: closing any one drops all locks this process has on the file (POSIX).
        """
        self._file = self._path.open("rb", buffering=0)
        while self._file.read(1 << 20):
            pass

    def _check(self) -> None:
        problems = [row[0] for row in self._db.execute("PRAGMA quick_check(3)")]
        if problems != ["ok"]:
            raise _damaged(self._path, "; ".join(str(p) for p in problems))
        tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not tables:
            for statement in _SCHEMA:
                self._db.execute(statement)
        elif "meta" not in tables:
            raise DamagedError(
                f"{self._path} is an SQLite database, but not one of warren's.",
                hint="Check `state_dir`; nothing was changed.",
            )
        elif lost := {"sessions", "outbox", "journal"} - tables:
            raise _damaged(self._path, f"it has no table {', '.join(sorted(lost))}")
        self._check_version()
        for statement in _ADDED:
            self._db.execute(statement)
        if "until" not in {row[1] for row in self._db.execute("PRAGMA table_info(sessions)")}:
            self._db.execute("ALTER TABLE sessions ADD COLUMN until TEXT NOT NULL DEFAULT ''")

    def _check_version(self) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
        if row is None or not str(row[0]).isdecimal():
            raise _damaged(self._path, "it does not say its schema version")
        if int(row[0]) > SCHEMA_VERSION:
            raise StateError(
                f"{self._path} has schema version {row[0]}, this warren knows up to {SCHEMA_VERSION}.",
                hint="It was written by a newer warren: install that version or a later one.",
            )

    def _close(self) -> None:
        # A checkpoint that fails (disk full) leaves everything in the WAL, where the next `open` finds it.
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._close_files()

    def _close_files(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        if self._file is not None:
            self._file.close()

    def _number(self, sql: str) -> int:
        return int(self._db.execute(sql).fetchone()[0])

    def _explain(self, error: Exception) -> Exception:
        """The error for people; what is neither SQLite's nor the file system's is a bug and stays as it is."""
        if isinstance(error, WarrenError) or not isinstance(error, sqlite3.Error | OSError):
            return error
        explained = explain(error, self._path)
        explained.__cause__ = error
        return explained


def _resolve(outcomes: list[_Outcome]) -> None:
    for outcome in outcomes:
        future = outcome.item.future
        if future.done():  # whoever waited was cancelled
            continue
        if outcome.error is None:
            future.set_result(outcome.value)
        else:
            future.set_exception(outcome.error)


def _make_private(path: Path) -> None:
    """Create the file with 0600, or make an existing one so. The WAL gets its permissions from it.

    An existing file is not opened here: closing it would drop the locks this process holds on it (POSIX), were it open twice.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        path.chmod(0o600)


def record_of(row: tuple[Any, ...]) -> SessionRecord:
    """A row of the registry. Raises StateError when it is none."""
    session, epoch, desired, sequence, settings, account, halted, paired, until = row
    try:
        return SessionRecord(
            session, epoch, Desired(desired), sequence, orjson.loads(settings), orjson.loads(account), halted, bool(paired), until
        )
    except ValueError as e:
        raise StateError(
            f"The registry row of session {session} cannot be read: {e}.", hint="Was warren.db edited by hand?"
        ) from e


def _damaged(path: Path, what: str) -> StateError:
    return DamagedError(f"{path} is damaged: {what}.", hint="Move it away (with its -wal file) and start again.")


def explain(error: sqlite3.Error | OSError, path: Path) -> WarrenError:
    """The same in words: what is wrong with the database, and what to do."""
    if isinstance(error, OSError):
        return StateError(
            f"{path} cannot be used: {error.strerror}.", hint="Check `state_dir`, its free space and its owner.", retryable=True
        )
    if isinstance(error, sqlite3.IntegrityError | sqlite3.DataError | sqlite3.InterfaceError | sqlite3.ProgrammingError):
        return StateError(f"{path} does not take a row: {error}.", hint="This is a bug of warren: please report it.")
    # The low byte is the primary code; the rest refines it.
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return OwnershipError(f"{path} is in use by another process.", hint="Only one warrend may run per state directory.")
        case sqlite3.SQLITE_FULL:
            return StateError(
                f"The disk of {path} is full.", hint="Free some space; the daemon goes on by itself.", retryable=True
            )
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return _damaged(path, str(error))
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return StateError(
                f"{path} cannot be used: {error}.",
                hint="Check `state_dir`, its owner, and whether its file system is mounted read-only.",
                retryable=True,
            )
        case _:
            return StateError(f"{path}: {error}.", hint="Look at the system log for errors of the disk.", retryable=True)
