"""Many sessions, and what a long absence leaves behind."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import pytest
from tests.acceptance.rig import Rig, until
from tests.acceptance.test_life import PEER, check_traffic, traffic
from tests.conftest import Broker

prefixes = itertools.count(1)


@pytest.fixture
def prefix() -> str:
    return f"fleet{next(prefixes)}"


@pytest.mark.timeout(300)
async def test_fifty_sessions_at_once(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """All are created at the same moment; then 1,000 messages each way over them."""
    sessions = [f"f{n}" for n in range(50)]
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        began = time.monotonic()
        await asyncio.gather(*(rig.pair(s, f"1555030{n:04}") for n, s in enumerate(sessions)))
        paired = time.monotonic() - began
        listed = await rig.client.list_sessions()
        assert {s["state"] for s in listed} == {"online"}
        assert len(listed) == len(sessions)
        began = time.monotonic()
        await traffic(rig, sessions, 20)
        await check_traffic(rig, sessions, 20)
        print(f"50 sessions paired in {paired:.1f} s; 1,000 messages each way in {time.monotonic() - began:.1f} s")


@pytest.mark.timeout(300)
async def test_an_offline_burst_of_5000_loses_nothing(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """Above 2,048 queued nodes whatsmeow itself gives up the order; nothing may be missing or doubled."""
    count = 5_000
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await rig.pair("acme", "15550400001")
        assert (await rig.call("disconnect", "acme")).ok
        await rig.sim.send(PEER, rig.number("acme"), "in", count=count)
        began = time.monotonic()
        assert (await rig.call("create", "acme")).ok
        await until(lambda: len(rig.got.of("message", "acme")) >= count, "the whole burst", 200)
        took = time.monotonic() - began
        numbers = [int(e["data"]["text"].split()[1]) for e in rig.got.of("message", "acme")]
        assert sorted(numbers) == list(range(1, count + 1))
        inversions = sum(a > b for a, b in itertools.pairwise(numbers))
        assert rig.got.sequence_faults == []
        await until(lambda: _none_pending(rig), "WhatsApp to have every receipt", 60)
        print(f"burst of {count} in {took:.1f} s; inversions: {inversions}")


async def _none_pending(rig: Rig) -> bool:
    return await rig.sim.pending(rig.number("acme")) == 0
