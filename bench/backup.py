"""Backup and restore of many sessions through the daemon's own services: time, CPU and memory.

    .venv/bin/python bench/backup.py [SESSIONS] [CONCURRENCY]

One session is paired with the simulated WhatsApp; the others are copies of its state under other names (nothing connects). The
engine copies them as it would in daily life; the objects go to a directory. On a real store, add its round trip per object.
"""

from __future__ import annotations

import asyncio
import random
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fakes import MemoryBus

from warren.core.backup_names import Names
from warren.core.frames import EngineEvent
from warren.core.names import Topology
from warren.core.sealing import Keyring, MasterKey
from warren.edges.engine_pipe import start_engine
from warren.edges.logs import configure_logging
from warren.edges.objects_directory import DirectoryObjects
from warren.edges.settings import find_engine_binary
from warren.edges.statedir import StateDirectory
from warren.edges.store import SqliteStore
from warren.ports import Desired, PutSession, SessionRecord
from warren.services.backup import BackupOptions, Backups
from warren.services.delivery import Delivery, DeliveryOptions
from warren.services.engines import EngineOptions, Engines
from warren.services.restore import RestoreOptions, Restorer
from warren.services.vault import Vault
from warren.simulator import Simulator

NUMBER = "15550000001"
MASTER = MasterKey.from_hex("8d969eef6ecad3c29a3a629280e686cf0c3f5d5a86aff3ca12020c923adc6c92")


async def paired_state(base: Path, sim: Simulator, engines: Engines) -> bytes:
    """A `state.db` of a device that was paired just now."""
    heard: asyncio.Queue[EngineEvent] = asyncio.Queue()
    directory = base / "one"
    directory.mkdir(mode=0o700)
    await sim.add_phone(NUMBER, "Ana")

    async def until(event: str) -> dict[str, Any]:
        while (told := await asyncio.wait_for(heard.get(), 30)).event != event:
            pass
        return told.data

    await engines.open("one", 1, heard.put_nowait, dir=str(directory), create=True, device_name="bench")
    await sim.scan(NUMBER, (await until("qr"))["code"])
    await until("disconnected")
    engines.forget("one", 1)
    await engines.open("one", 2, heard.put_nowait, dir=str(directory), create=False, device_name="bench")
    await until("connected")
    await asyncio.sleep(2)  # the pre-keys are uploaded
    await engines.request("close", "one", 2, timeout_s=12)
    engines.forget("one", 2)
    return (directory / "state.db").read_bytes()


class Owner:
    def __init__(self, record: SessionRecord) -> None:
        self.id, self.record = record.session, record

    def superseded(self) -> None:
        raise AssertionError(self.id)


class Bench:
    """The services that a daemon would have, over one machine's directory."""

    def __init__(self, base: Path, bucket: Path, engines: Engines, concurrency: int) -> None:
        self._base, self._engines, self._concurrency = base, engines, concurrency
        self._objects = DirectoryObjects(bucket, make=True)

    async def open(self) -> None:
        self.states = StateDirectory(self._base)
        self.states.lock()
        (self._base / "sessions").mkdir(mode=0o700)
        self.store = await SqliteStore.open(self._base / "warren.db")
        now, topology = lambda: datetime.now(UTC), Topology("bench")
        self._delivery = Delivery(
            cast(Any, MemoryBus()),
            self.store,
            topology,
            DeliveryOptions("bench"),
            now=now,
            random01=random.random,
            disk_ok=lambda: True,
        )
        vault = Vault(self._objects, Names("bench"), Keyring(MASTER))
        self.backups = Backups(
            vault,
            self.store,
            self.states,
            self._engines,
            delivery=self._delivery,
            options=BackupOptions("bench", topology.source, interval_s=0, concurrency=self._concurrency),
            now=now,
            random01=random.random,
        )
        options = RestoreOptions("bench", topology.source, concurrency=self._concurrency)
        self.restorer = Restorer(vault, self.store, self.states, self.backups, options=options, now=now, random01=random.random)

    async def close(self) -> None:
        await self.backups.close()
        await self.store.close()
        self.states.unlock()
        await self._objects.close()

    async def serve(self, records: list[SessionRecord]) -> None:
        await asyncio.gather(*(self.store.write(PutSession(record)) for record in records))
        for record in records:
            self.backups.begin(Owner(record))


def engine_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def peak_mb(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


async def measured(what: str, count: int, engine: int, work: Awaitable[object]) -> None:
    began, cpu, theirs = time.monotonic(), time.process_time(), engine_cpu_s(engine)
    await work
    took = time.monotonic() - began
    used, theirs = time.process_time() - cpu, engine_cpu_s(engine) - theirs
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{what:<28} {took:6.1f} s  {count / took:6.0f}/s   CPU daemon {used:5.1f} s, engine {theirs:5.1f} s"
        f"   peak memory daemon {own:4.0f} MB, engine {peak_mb(engine):4.0f} MB",
        flush=True,
    )


async def run(count: int, concurrency: int) -> None:
    configure_logging("error", "human", redact=True)
    pids: list[int] = []
    async with Simulator(find_engine_binary(None, "warren-sim")) as sim:
        trust = ["--endpoint", sim.endpoint.endpoint, "--root-key", sim.endpoint.root_key, "--ca-file", sim.endpoint.ca_file]

        async def start() -> Any:
            process = await start_engine(find_engine_binary(None), trust)
            pids.append(process.pid)
            return process

        engines = Engines(start, EngineOptions(), random01=random.random)
        await engines.start()
        with tempfile.TemporaryDirectory() as place:
            base = Path(place)
            state = await paired_state(base, sim, engines)
            records = [SessionRecord(f"s{n}", 1, Desired.RUNNING, paired=True) for n in range(count)]
            print(f"{count} sessions, {len(state):,} bytes of state each, {concurrency} at once")
            await backup_and_restore(base, engines, pids[0], state=state, records=records, concurrency=concurrency)
        await engines.stop(10)


async def backup_and_restore(
    base: Path, engines: Engines, engine: int, *, state: bytes, records: list[SessionRecord], concurrency: int
) -> None:
    (base / "a").mkdir(mode=0o700)
    a = Bench(base / "a", base / "bucket", engines, concurrency)
    await a.open()
    for record in records:
        directory = await a.states.prepare(record.session, 1)
        (directory / "state.db").write_bytes(state)
    await a.serve(records)

    async def check_all(bench: Bench) -> None:
        restored = await asyncio.gather(*(bench.restorer.check(record, lambda *_: None) for record in records))
        assert (None not in restored) == (bench is not a)

    await measured("compared with the store", len(records), engine, check_all(a))
    await measured("backed up, the first time", len(records), engine, a.backups.finish())
    for record in records:
        a.backups.changed(record.session)
    await measured("looked at, unchanged", len(records), engine, a.backups.finish())
    await a.close()
    objects = [path for path in (base / "bucket").rglob("*") if path.is_file() and path.name.isdecimal()]
    assert len(objects) == len(records), "one object per backup"
    print(f"{sum(path.stat().st_size for path in objects) / len(objects):,.0f} bytes per backup")

    (base / "b").mkdir(mode=0o700)
    b = Bench(base / "b", base / "bucket", engines, concurrency)
    await b.open()
    await b.serve(records)
    await measured("restored, empty machine", len(records), engine, check_all(b))
    await b.close()


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]) if len(sys.argv) > 1 else 500, int(sys.argv[2]) if len(sys.argv) > 2 else 4))
