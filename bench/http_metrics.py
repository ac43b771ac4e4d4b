"""`/metrics` and `/sessions` of a real daemon with many sessions: time and size.

    .venv/bin/python bench/http_metrics.py [sessions]

The sessions are put on record as stopped, and taken up (claimed on a private RabbitMQ, but not connected). What is asked of
`/metrics` is under 50 ms and under 1 MB with 500 of them; the status of this program says whether it was, by the daemon's CPU
time for one answer: the rest is what else this machine does.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from warren.demo import Warrend
from warren.edges.settings import find_engine_binary
from warren.edges.store import SqliteStore
from warren.ports import Desired, PutSession, SessionRecord
from warren.simulator import Simulator

READY_S = 120.0
REQUESTS = 100
MAX_S, MAX_BYTES = 0.05, 1_000_000


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def put_on_record(state: Path, sessions: int) -> None:
    store = await SqliteStore.open(state / "warren.db")
    await store.write(*(PutSession(SessionRecord(f"s{n}", epoch=1, desired=Desired.STOPPED)) for n in range(sessions)))
    await store.close()


async def ready(http: aiohttp.ClientSession, base: str) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                async with http.get(f"{base}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


async def cpu_seconds(http: aiohttp.ClientSession, base: str) -> float:
    """What the daemon has used since its start."""
    async with http.get(f"{base}/metrics") as response:
        lines = (await response.text()).splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("process_cpu_seconds_total")))


async def at_rest(http: aiohttp.ClientSession, base: str) -> None:
    """Until the sessions are claimed: the daemon uses hardly any CPU time."""
    before = -1.0
    async with asyncio.timeout(READY_S):
        while (used := await cpu_seconds(http, base)) - before > 0.1:
            before = used
            await asyncio.sleep(1.0)


async def measure(http: aiohttp.ClientSession, base: str, path: str) -> tuple[float, int]:
    """Prints one line; returns the daemon's CPU time for one request in seconds, and the size in bytes."""
    times, size, used = [], 0, await cpu_seconds(http, base)
    for _ in range(REQUESTS):
        began = time.perf_counter()
        async with http.get(base + path) as response:
            size = len(await response.read())
        times.append(time.perf_counter() - began)
    cpu = (await cpu_seconds(http, base) - used) / REQUESTS
    best, median, worst = (f"{t * 1e3:6.1f} ms" for t in (min(times), statistics.median(times), max(times)))
    print(f"{path:10} {cpu * 1e3:5.1f} ms of CPU   best {best}   median {median}   worst {worst}   {size:7} bytes")
    return cpu, size


async def main() -> int:
    sessions, port = int(sys.argv[1]) if len(sys.argv) > 1 else 500, free_port()
    base = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        state.mkdir(mode=0o700)
        await put_on_record(state, sessions)
        async with Simulator(find_engine_binary(None, "warren-sim")) as sim, aiohttp.ClientSession() as http:
            settings = {"WARREN_STATE_DIR": str(state), "WARREN_HTTP__PORT": str(port)}
            warrend = Warrend(state, {**sim.endpoint.environment(), **settings})
            await warrend.start()
            try:
                await ready(http, base)
                await at_rest(http, base)
                cpu, size = await measure(http, base, "/metrics")
                await measure(http, base, "/sessions")
            finally:
                await warrend.stop()
    return 0 if cpu < MAX_S and size < MAX_BYTES else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
