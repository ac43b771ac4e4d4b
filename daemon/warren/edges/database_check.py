"""Whether the bytes of a session's `state.db` are a whole database with a device in it."""

from __future__ import annotations

import contextlib
import sqlite3

_MAGIC = b"SQLite format 3\0"
_WRITE_VERSION, _READ_VERSION = 18, 19


def database_problem(database: bytes) -> str:
    """What is wrong, in words; "" when SQLite's own check finds nothing and there is exactly one device.

    Works in memory, on a copy. Takes some milliseconds per megabyte: not for the event loop.
    """
    if not database.startswith(_MAGIC):
        return "it is no SQLite database"
    copy = bytearray(database)
    # A database in memory has no write-ahead log; what these say is only how the next writer goes about it.
    copy[_WRITE_VERSION] = copy[_READ_VERSION] = 1
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        try:
            db.deserialize(bytes(copy))
            found = [row[0] for row in db.execute("PRAGMA integrity_check(5)")]
            if found != ["ok"]:
                return f"SQLite's check finds: {'; '.join(str(line) for line in found)[:300]}"
            (devices,) = db.execute("SELECT count(*) FROM whatsmeow_device").fetchone()
        except sqlite3.Error as e:
            return f"SQLite cannot read it ({e})"
    return "" if devices == 1 else f"it holds {devices} devices, and a session has one"
