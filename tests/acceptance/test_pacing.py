"""A session that may send less than it is asked to, and states that end with time: real processes."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.acceptance.rig import Rig, until
from tests.acceptance.test_life import PEER
from tests.conftest import Broker

prefixes = itertools.count(1)
QUEUED = 500


@pytest.fixture
def prefix() -> str:
    return f"pace{next(prefixes)}"


async def test_a_long_queue_holds_up_neither_status_nor_logout(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix, WARREN_PACING__MESSAGES_PER_MINUTE="30") as rig:
        await rig.pair("acme", "15550600001")
        await rig.sim.add_phone(PEER, "Peer")
        await rig.publish_sends("acme", PEER, QUEUED)
        await until(lambda: len(rig.got.of("command_completed", "acme")) > 30, "the messages of one minute")  # and `create`
        began = time.monotonic()
        status = await rig.call("status", "acme")
        assert status.result["state"] == "online"
        assert time.monotonic() - began < 1.0
        began = time.monotonic()
        assert (await rig.call("logout", "acme", timeout_s=30.0)).ok
        assert time.monotonic() - began < 10.0

        def outcomes() -> Counter[str]:
            told = [*rig.got.of("command_completed", "acme"), *rig.got.of("command_failed", "acme")]
            return Counter(e["data"]["id"] for e in told if e["data"]["command"] == "send")

        await until(lambda: len(outcomes()) == QUEUED, "an outcome of every command")
        assert set(outcomes().values()) == {1}
        refused = [e["data"]["error"]["code"] for e in rig.got.of("command_failed", "acme")]
        assert set(refused) == {"session_not_found"}
        assert len(refused) == QUEUED - 30


async def test_a_restart_is_no_new_minute(tmp_path: Path, broker: Broker, prefix: str) -> None:
    limit = {"WARREN_PACING__MESSAGES_PER_MINUTE": "3", "WARREN_PACING__ON_LIMIT": "refuse"}
    async with Rig(tmp_path, broker.url, prefix, **limit) as rig:
        await rig.pair("acme", "15550600002")
        await rig.sim.add_phone(PEER, "Peer")
        for n in range(3):
            assert (await rig.call("send", "acme", {"to": f"+{PEER}", "text": f"{n}"})).ok
        after = len(rig.got.events)
        assert await rig.warrend.stop() == 0
        await rig.restart()
        await rig.got.event("connected", "acme", after=after)
        refused = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "too many"})
        assert refused.error is not None
        assert refused.error["code"] == "rate_limited"
        assert 0 < refused.error["retry_after"] <= 60
        # A session's own limit goes over the daemon's, at once.
        assert (await rig.call("create", "acme", {"messages_per_minute": 4})).ok
        assert (await rig.call("send", "acme", {"to": f"+{PEER}", "text": "the fourth"})).ok


async def test_a_time_lock_and_a_ban_end_by_themselves_also_over_a_restart(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix, WARREN_RECONNECT__BASE_S="0.2") as rig:
        number = "15550600003"
        await rig.pair("acme", number)
        await rig.sim.add_phone(PEER, "Peer")
        after = len(rig.got.events)
        await rig.sim.timelock(number, active=True, seconds=6)
        locked = await rig.got.event("error", "acme", lambda data: data["code"] == "time_lock", after=after)
        assert (locked["data"]["state"], locked["data"]["hint"] != "") == ("time_locked", True)
        assert (await rig.call("status", "acme")).result["until"] == locked["data"]["until"]
        await rig.sim.send(PEER, number, "still arrives")
        await rig.got.event("message", "acme", lambda data: data["text"] == "still arrives", after=after)
        await rig.got.event("connected", "acme", lambda data: data["previous"] == "time_locked", after=after)

        after = len(rig.got.events)
        await rig.sim.request("POST", "/faults", {"kind": "login_failure", "phone": number, "code": 402, "expire_s": 8})
        await rig.sim.request("POST", f"/phones/{number}/stream-error", {"code": 503})
        banned = await rig.got.event("disconnected", "acme", lambda data: data["code"] == "temporary_ban", after=after)
        assert await rig.warrend.stop() == 0
        await rig.restart()
        assert (await rig.call("create", "acme")).result["state"] == "blocked"
        assert (await rig.call("status", "acme")).result["until"] == banned["data"]["until"]
        await rig.got.event("connected", "acme", after=after)
        assert datetime.now(UTC) > datetime.fromisoformat(banned["data"]["until"])


async def test_an_engine_above_its_ceiling_is_replaced_and_its_session_comes_back(
    tmp_path: Path, broker: Broker, prefix: str
) -> None:
    """Every engine is above a megabyte, so every one is replaced."""
    ceiling = {"WARREN_ENGINE__MEMORY_CEILING_MB": "1", "WARREN_ENGINE__PING_INTERVAL_S": "3"}
    async with Rig(tmp_path, broker.url, prefix, **ceiling) as rig:
        await rig.pair("acme", "15550600004")
        await rig.sim.add_phone(PEER, "Peer")
        after = len(rig.got.events)
        lost = await rig.got.event("disconnected", "acme", lambda data: data["code"] == "engine_replaced", after=after)
        assert lost["data"]["retry_in_s"] <= 1.0
        await rig.got.event("connected", "acme", after=after)
        assert (await rig.call("send", "acme", {"to": f"+{PEER}", "text": "hello again"})).ok
