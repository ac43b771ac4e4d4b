"""An unmodified Baileys, from npm, against the simulator: an independent judge, because it shares no code with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.node import INSTALL_S, RUN_S, run_baileys

from warren.edges.settings import find_engine_binary
from warren.simulator import Simulator

STEPS = [
    "paired by QR",
    "paired by code",
    "direct message from a phone by pn, with delivery and read receipt",
    "direct message from a phone by lid, with delivery and read receipt",
    "direct message to a phone, with delivery and read receipt",
    "direct messages between two Baileys",
    "group messages from a phone",
    "group messages from Baileys, with receipts",
    "150 messages that waited, after a new login",
    "a message refused with 463, a connection replaced, a login refused with 402",
    "logout",
    "unlinked by the phone",
]


@pytest.mark.timeout(INSTALL_S + RUN_S + 30)
async def test_baileys_accepts_the_simulator(tmp_path: Path) -> None:
    async with Simulator(find_engine_binary(None, "warren-sim"), log=tmp_path / "sim.log") as sim:
        lines = await run_baileys("check.mjs", sim, tmp_path, what="whether the simulator is faithful")
    assert lines == [*(f"ok {step}" for step in STEPS), "all ok"]
