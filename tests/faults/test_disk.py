"""A disk that is full, read-only or slow, under traffic."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.acceptance.rig import until
from tests.conftest import Broker
from tests.faults.disk import Disk, damaged
from tests.faults.world import RECOVERY_S, World, row

SESSIONS = 4
PERIOD_S = 0.5
WRITTEN_MEANWHILE = 10
FSYNC_MS = 5.0
BURST_IN, BURST_OUT = 100, 25


def errors(world: World, offset: int) -> list[dict[str, object]]:
    """The errors that the daemon has logged behind `offset`."""
    lines = [line for line in world.logged(offset).splitlines() if line.startswith(b"{") and line.endswith(b"}")]
    return [entry for entry in map(json.loads, lines) if entry.get("level") == "error"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("mood", "words"), [("full", "full"), ("readonly", "read-only")])
async def test_disk_that_takes_nothing(
    tmp_path: Path, own_broker: Broker, report: Callable[[str, list[str]], None], mood: str, words: str
) -> None:
    """A clear error, WhatsApp keeps the messages, and when there is space again nothing was lost."""
    disk = Disk(tmp_path, tmp_path / "state")
    async with World(tmp_path, own_broker, f"disk-{mood}", sessions=SESSIONS, **disk.environment) as world:
        traffic = world.traffic(PERIOD_S)
        traffic.start()
        await world.recovered(traffic)
        logged = world.warrend.log.stat().st_size
        before = dict(traffic.written)
        {"full": disk.fill, "readonly": disk.make_readonly}[mood]()
        await until(lambda: errors(world, logged) != [], "an error in the log", RECOVERY_S)

        def written(more: int) -> bool:
            return all(traffic.written[s] >= before[s] + more for s in world.numbers)

        await until(lambda: written(WRITTEN_MEANWHILE), "people to write on", RECOVERY_S)
        # The first may have been on disk a moment before.
        for session, number in world.numbers.items():
            pending = await world.sim.pending(number)
            assert pending >= WRITTEN_MEANWHILE - 2, f"{session}: WhatsApp keeps only {pending}"
        said = errors(world, logged)
        assert any(words in str(e["message"]).lower() for e in said), said
        disk.heal()
        began = time.monotonic()
        await world.recovered(traffic)
        took = time.monotonic() - began
        await traffic.stop()
        await world.settled(traffic)
        counts = await world.count(traffic)
        recovered = row("seconds until all sessions passed on messages both ways", round(took, 1))
        report(f"disk {words} for a while, {SESSIONS} sessions", [*counts.lines(world.ledger), recovered])
        assert counts.offenders() == {}, f"see {world.warrend.log}"
        # Told as what it is, and not as damaged state.
        assert set(world.ledger.ends) <= {"disk_trouble", "restart_required"}, world.ledger.ends
        assert world.ledger.ends["disk_trouble"] > 0
    assert damaged(tmp_path / "state") == []


@pytest.mark.timeout(300)
async def test_start_on_a_readonly_disk(tmp_path: Path, own_broker: Broker) -> None:
    """The daemon says what is wrong and ends, for whoever started it to see; then all is as it was."""
    disk = Disk(tmp_path, tmp_path / "state")
    async with World(tmp_path, own_broker, "disk-start", sessions=2, **disk.environment) as world:
        assert await world.warrend.stop() == 0
        logged = world.warrend.log.stat().st_size
        disk.make_readonly()
        await world.warrend.start()
        await until(lambda: not world.warrend.running, "the daemon to give up", RECOVERY_S)
        assert b"read-only" in world.logged(logged).lower()
        disk.heal()
        await world.warrend.start()
        await until(world.all_online, "every session to be online", RECOVERY_S)
        assert world.ledger.types["qr"] == world.qrs
    assert damaged(tmp_path / "state") == []


@pytest.mark.timeout(300)
async def test_start_on_a_full_disk(tmp_path: Path, own_broker: Broker) -> None:
    """The daemon waits for space, and goes on by itself."""
    disk = Disk(tmp_path, tmp_path / "state")
    async with World(tmp_path, own_broker, "disk-full-start", sessions=2, **disk.environment) as world:
        await world.warrend.kill()
        logged = world.warrend.log.stat().st_size
        disk.fill()
        await world.warrend.start()
        await until(lambda: any("full" in str(e["message"]) for e in errors(world, logged)), "an error in the log", RECOVERY_S)
        assert world.warrend.running
        disk.heal()
        await until(world.all_online, "every session to be online", RECOVERY_S)
        assert world.ledger.types["qr"] == world.qrs
    assert damaged(tmp_path / "state") == []


@pytest.mark.timeout(600)
async def test_slow_disk(tmp_path: Path, own_broker: Broker, report: Callable[[str, list[str]], None]) -> None:
    """Every fsync takes 5 ms more: slower, but nothing times out."""
    disk = Disk(tmp_path, tmp_path / "state")
    async with World(tmp_path, own_broker, "disk-slow", sessions=20, **disk.environment) as world:
        disk.slow_down(FSYNC_MS)
        traffic = world.traffic(0.0)
        await asyncio.gather(*(traffic.burst(s, BURST_IN, BURST_OUT) for s in world.numbers))
        began = time.monotonic()
        arrived: dict[str, float] = {}

        def everything() -> bool:
            now = time.monotonic() - began
            if all(len(world.ledger.messages[s]) == BURST_IN for s in world.numbers):
                arrived.setdefault("in", now)
            if all(len(world.ledger.outcomes[s]) == BURST_OUT for s in world.numbers):
                arrived.setdefault("out", now)
            return len(arrived) == 2

        await until(everything, "all messages and outcomes", 300)
        counts = await world.count(traffic)
        lines = [
            *counts.lines(world.ledger),
            row("messages in, a second", round(20 * BURST_IN / arrived["in"])),
            row("commands, a second", round(20 * BURST_OUT / arrived["out"])),
        ]
        report(f"disk with {FSYNC_MS:g} ms more for each fsync, 20 sessions", lines)
        assert counts.offenders() == {}, f"see {world.warrend.log}"
        assert world.ledger.types["disconnected"] == world.ledger.types["health_check_failed"] == 0
    assert damaged(tmp_path / "state") == []
