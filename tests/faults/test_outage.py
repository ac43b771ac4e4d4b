"""RabbitMQ away for a long time, while people go on writing."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.acceptance.rig import until
from tests.conftest import Broker
from tests.faults.plan import plan
from tests.faults.world import RECOVERY_S, World, row

PLAN = plan()
SESSIONS = 20
PERIOD_S = 0.5
SAMPLES = 20


@pytest.mark.timeout(900 + 4 * PLAN.outage_s)
async def test_outage(tmp_path: Path, own_broker: Broker, report: Callable[[str, list[str]], None]) -> None:
    """0 lost, in order, and memory stays flat: what waits is on disk."""
    async with World(tmp_path, own_broker, "outage", sessions=SESSIONS) as world:
        traffic = world.traffic(PERIOD_S)
        traffic.start(commands=False)
        await until(lambda: world.ledger.types["message"] >= SESSIONS * 10, "some traffic", RECOVERY_S)
        own_broker.kill()
        before = world.ledger.types["message"]
        memory = await sampled(world, PLAN.outage_s)
        await world.broker_back()
        began = time.monotonic()
        behind = sum(traffic.written.values())
        await until(lambda: world.ledger.types["message"] >= behind, "the daemon to catch up", 300 + 2 * PLAN.outage_s)
        took = time.monotonic() - began
        await traffic.stop()
        await world.settled(traffic)
        counts = await world.count(traffic)
        kept = behind - before
        lines = [
            *counts.lines(world.ledger),
            row("messages that waited on disk", kept),
            row("seconds until all of them were at the subscriber", round(took, 1), f"{kept / took:.0f} a second"),
            *(row(f"MB of {who} in the beginning", round(mb[0]), f"at the end {mb[-1]:.0f}") for who, mb in memory.items()),
        ]
        report(f"RabbitMQ away for {PLAN.outage_s:g} s, {SESSIONS} sessions", lines)
        assert counts.offenders() == {}, f"see {world.warrend.log}"
        for who, mb in memory.items():
            assert growth(mb) < allowed_growth_mb(mb), (who, mb)


async def sampled(world: World, seconds: float) -> dict[str, list[float]]:
    """Resident megabytes, in even steps over a time that passes meanwhile."""
    daemon, engines = [], []
    for _ in range(SAMPLES):
        await asyncio.sleep(seconds / SAMPLES)
        one, others = world.rss_mb()
        daemon.append(one)
        engines.append(others)
    return {"daemon": daemon, "engines": engines}


def growth(samples: list[float]) -> float:
    """From the second quarter, when caches and pools are warm, to the last."""
    quarter = len(samples) // 4
    return statistics.mean(samples[-quarter:]) - statistics.mean(samples[quarter : 2 * quarter])


def allowed_growth_mb(samples: list[float]) -> float:
    """A quarter: ten minutes of messages would take more if they were kept in memory with all that belongs to them."""
    return max(20.0, 0.25 * samples[0])
