"""Servers that pretend: a connection that is dead and looks alive, and listeners that accept and close."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.acceptance.rig import Rig, until
from tests.conftest import Broker
from tests.faults.bounds import attempts_within
from tests.faults.world import row
from tests.proxy import Proxy

PEER = "15559990000"
FOUND_S = 90.0
STORM_S = 60.0


@pytest.mark.timeout(600)
async def test_frozen_connections_are_found(tmp_path: Path, broker: Broker, report: Callable[[str, list[str]], None]) -> None:
    """Ten connections freeze; each is found, told of and replaced, and what was written meanwhile arrives."""
    frozen, healthy = [f"f{n}" for n in range(10)], "fine"
    async with Rig(tmp_path, broker.url, "frozen", WARREN_RECONNECT__BASE_S="0.5", WARREN_RECONNECT__CAP_S="5") as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await asyncio.gather(*(rig.pair(s, f"1555030{n:04}") for n, s in enumerate([*frozen, healthy])))
        faults = {s: await rig.sim.add_fault("freeze", rig.number(s)) for s in frozen}
        began = time.monotonic()
        for s in frozen:
            await rig.sim.send(PEER, rig.number(s), f"while {s} is frozen")
        found: dict[str, float] = {}

        async def all_found() -> bool:
            for s in frozen:
                if s not in found and rig.got.of("health_check_failed", s):
                    found[s] = time.monotonic() - began
                    await rig.sim.lift_fault(faults[s])
            return len(found) == len(frozen)

        await until(all_found, "every frozen connection to be found", 2 * FOUND_S)
        for s in frozen:
            await until(lambda s=s: len(rig.got.of("connected", s)) == 2, f"{s} to be online again", 120)  # type: ignore[misc]
            arrived = await rig.got.event("message", s)
            assert arrived["data"]["text"] == f"while {s} is frozen"
            assert (await rig.call("send", s, {"to": f"+{PEER}", "text": "alive"})).ok
        assert rig.got.of("health_check_failed", healthy) == rig.got.of("disconnected", healthy) == []
        assert rig.got.sequence_faults == []
        seconds = sorted(found.values())
        times = f"p50 {statistics.median(seconds):.0f} s, max {seconds[-1]:.0f} s, must be under {FOUND_S:g} s"
        report("frozen connections to WhatsApp", [row("found", len(seconds), times)])
        assert seconds[-1] < FOUND_S


@pytest.mark.timeout(300)
async def test_accept_and_close_makes_no_storm(tmp_path: Path, broker: Broker, report: Callable[[str, list[str]], None]) -> None:
    """WhatsApp and RabbitMQ both accept connections and close them, for a minute; with the default settings."""
    sessions = [f"a{n}" for n in range(10)]
    parts = urlsplit(broker.url)
    assert parts.hostname is not None
    assert parts.port is not None
    async with Proxy(parts.hostname, parts.port) as proxy:
        through_proxy = broker.url.replace(f":{parts.port}", f":{proxy.port}")
        async with Rig(tmp_path, broker.url, "storm", WARREN_AMQP__URL=through_proxy) as rig:
            await asyncio.gather(*(rig.pair(s, f"1555040{n:04}") for n, s in enumerate(sessions)))
            storm = await rig.sim.add_fault("accept_close", stage="tcp", seconds=3600)
            accepted = proxy.accepted
            proxy.refusing = True
            proxy.cut()
            for s in sessions:
                await rig.sim.drop(rig.number(s), (await rig.sim.devices(rig.number(s)))[0]["id"])
            await asyncio.sleep(STORM_S)
            strikes = next(f["strikes"] for f in await rig.sim.faults() if f["id"] == storm)
            attempts = proxy.accepted - accepted
            most = len(sessions) * attempts_within(STORM_S, base_s=5.0, cap_s=300.0)
            most_amqp = attempts_within(STORM_S, base_s=0.5, cap_s=30.0)
            whatsapp = row(f"connections to WhatsApp by {len(sessions)} sessions", strikes, f"at most {most}")
            report(
                f"accept-and-close for {STORM_S:g} s",
                [whatsapp, row("connections to RabbitMQ", attempts, f"at most {most_amqp}")],
            )
            assert len(sessions) <= strikes <= most
            assert 1 <= attempts <= most_amqp
            await rig.sim.lift_fault(storm)
            proxy.refusing = False
            after = len(rig.got.events)
            # Nobody has to wait for the backoff: `create` connects at once.
            assert all(o.ok for o in await asyncio.gather(*(rig.call("create", s, timeout_s=90) for s in sessions)))
            await asyncio.gather(*(rig.got.event("connected", s, after=after) for s in sessions))
            assert rig.got.sequence_faults == []
