"""Group commit of `warren.db`: units per second and latency, over how many callers wait at once.

    .venv/bin/python bench/store_commit.py [folder]

One unit is what an inbound message costs: add its row to the outbox, and remove the row once confirmed (two units, so two
commits for a single caller). `folder` chooses the disk; the default is the working directory's.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from warren.edges.store import SqliteStore
from warren.ports import AddEvent, Desired, OutboxRow, PutSession, RemoveEvents, SessionRecord

BODY_BYTES = 700
SECONDS = 2.0


async def caller(store: SqliteStore, session: str, until: float, latencies: list[float]) -> None:
    """One session's messages, one after the other, until the clock says `until`; notes how long each unit took."""
    body = os.urandom(BODY_BYTES)
    sequence = 0
    while (start := time.perf_counter()) < until:
        sequence += 1
        await store.write(AddEvent(OutboxRow(session, 1, sequence, f"{session}/{sequence}", "message", body)))
        added = time.perf_counter()
        await store.write(RemoveEvents(((session, 1, sequence),)))
        latencies += [added - start, time.perf_counter() - added]


async def measure(folder: Path, callers: int) -> str:
    """One line of the table for so many callers at once."""
    store = await SqliteStore.open(folder / f"{callers}.db")
    names = [f"session-{n}" for n in range(callers)]
    await store.write(*[PutSession(SessionRecord(name, 1, Desired.RUNNING)) for name in names])
    latencies: list[float] = []
    commits, start = store.commits, time.perf_counter()
    await asyncio.gather(*[caller(store, name, start + SECONDS, latencies) for name in names])
    took, commits = time.perf_counter() - start, store.commits - commits
    await store.close()
    latencies.sort()
    p50, p99 = (1000 * latencies[int(len(latencies) * share)] for share in (0.50, 0.99))
    return f"{callers:7} {len(latencies) / took:9.0f} {commits / took:9.0f} {p50:8.2f} {p99:8.2f}"


async def main() -> None:
    """Print the table."""
    print("callers   units/s commits/s   p50 ms   p99 ms")
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else ".") as folder:
        for callers in (1, 10, 100, 1000):
            print(await measure(Path(folder), callers))


if __name__ == "__main__":
    asyncio.run(main())
