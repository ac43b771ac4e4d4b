"""Nothing is lost, doubled or out of order while everything is killed, round after round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.acceptance.rig import until
from tests.conftest import Broker
from tests.faults.plan import plan
from tests.faults.world import RECOVERY_S, Disturbances, Recoveries, World

Progress = Callable[[str], None]
Report = Callable[[str, list[str]], None]

PLAN = plan()
SESSIONS = 20
PERIOD_S = 1.0
WINDOW = 30
"""So many messages, and so many commands, of each session may be on their way at once."""


@pytest.mark.timeout(600 + 180 * PLAN.rounds)
async def test_rounds(tmp_path: Path, own_broker: Broker, progress: Progress, report: Report) -> None:
    chance = random.Random(PLAN.seed)
    recoveries = Recoveries()
    progress(f"\nfaults: {PLAN.rounds} rounds, {SESSIONS} sessions, SEED={PLAN.seed}")
    async with World(tmp_path, own_broker, "faults", sessions=SESSIONS) as world:
        disturbances = Disturbances(world, chance)
        traffic = world.traffic(PERIOD_S, window=WINDOW)
        traffic.start()
        await world.recovered(traffic)
        began, number = time.monotonic(), 0
        while number < PLAN.rounds and time.monotonic() - began < PLAN.minutes * 60:
            number += 1
            kinds = disturbances.of_a_round()
            for kind, strike in kinds:
                # A moment that nobody can foresee, counted in messages.
                moment = world.ledger.deliveries + chance.randrange(1, SESSIONS * 4)
                await until(lambda moment=moment: world.ledger.deliveries >= moment, "some traffic", RECOVERY_S)  # type: ignore[misc]
                with recoveries.timed(kind):
                    await strike()
                    await world.recovered(traffic)
            took = ", ".join(f"{kind} {recoveries.last(kind):.0f} s" for kind, _ in kinds)
            so_far = f"{sum(traffic.written.values())} messages in, {sum(traffic.asked.values())} commands"
            progress(f"round {number}: {took}; {so_far}; {sum(world.rss_mb()):.0f} MB")
        await traffic.stop()
        await world.settled(traffic)
        counts = await world.count(traffic)
        title = f"{number} rounds of disturbances, {SESSIONS} sessions, messages both ways"
        report(title, [*counts.lines(world.ledger), *recoveries.lines()])
        assert counts.offenders() == {}, f"SEED={PLAN.seed}; see {world.warrend.log}"
