"""Hundreds of commands wait for their turn, and nothing else waits with them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.acceptance.rig import Rig, until
from tests.conftest import Broker
from tests.faults.world import row

PEER = "15559990000"
QUEUED = 500
A_MINUTE = 30
STATUS_S, LOGOUT_S = 1.0, 10.0
ASKED = 20


@pytest.mark.timeout(300)
async def test_queued_sends_hold_up_nobody(tmp_path: Path, broker: Broker, report: Callable[[str, list[str]], None]) -> None:
    async with Rig(tmp_path, broker.url, "queued", WARREN_PACING__MESSAGES_PER_MINUTE=str(A_MINUTE)) as rig:
        await rig.pair("acme", "15550005001")
        await rig.sim.add_phone(PEER, "Peer")
        began = time.monotonic()
        await rig.publish_sends("acme", PEER, QUEUED)

        async def shown() -> int:
            return len((await rig.sim.received(PEER))["shown"])

        async def burst() -> bool:
            return await shown() >= A_MINUTE

        await until(burst, "the first minute's messages", 120)
        status_s = []
        for _ in range(ASKED):
            asked = time.monotonic()
            assert (await rig.call("status", "acme")).result["state"] == "online"
            status_s.append(time.monotonic() - asked)
        sent = await shown()
        minutes = math.ceil((time.monotonic() - began) / 60)
        asked = time.monotonic()
        assert (await rig.call("logout", "acme")).ok
        logout_s = time.monotonic() - asked

        def outcomes() -> Counter[str]:
            ended = rig.got.of("command_completed") + rig.got.of("command_failed")
            return Counter(e["data"]["id"] for e in ended if str(e["data"]["id"]).startswith("acme-"))

        await until(lambda: len(outcomes()) == QUEUED, "an outcome of every command", 90)
        assert set(outcomes().values()) == {1}
        lines = [
            row(f"sent within {minutes} min", sent, f"at most {A_MINUTE * minutes}"),
            row("seconds of the slowest `status`", round(max(status_s), 2), f"of {ASKED}, must be under {STATUS_S:g}"),
            row("seconds of `logout`", round(logout_s, 2), f"must be under {LOGOUT_S:g}"),
        ]
        report(f"{QUEUED} queued sends at {A_MINUTE} a minute", lines)
        assert sent <= A_MINUTE * minutes
        assert max(status_s) < STATUS_S
        assert logout_s < LOGOUT_S
