"""Around a logout: what is queued behind it, what comes right after it, and repeated commands of a session that is gone."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from pathlib import Path

import pytest
from tests.acceptance.rig import Rig, until
from tests.acceptance.test_life import PEER
from tests.conftest import Broker

prefixes = itertools.count(1)


@pytest.fixture
def prefix() -> str:
    return f"out{next(prefixes)}"


async def test_what_is_behind_a_logout_is_answered_and_holds_up_nobody(tmp_path: Path, broker: Broker, prefix: str) -> None:
    count = 300
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.pair("acme", "15550600001")
        await rig.sim.add_phone(PEER, "Peer")
        await rig.publish_sends("acme", PEER, count)
        out, off, again, other = await asyncio.gather(
            rig.call("logout", "acme", id="L1"),
            rig.call("disconnect", "acme", id="D1"),
            rig.call("create", "acme", id="C1"),
            rig.call("create", "other", id="C2"),
        )
        assert out.ok
        assert other.ok, "a session's removal is nobody else's trouble"
        assert off.ok or (off.error or {})["code"] == "session_not_found"
        assert again.ok or (again.error or {})["code"] == "session_not_found"
        ids = {f"acme-{n}" for n in range(1, count + 1)}

        def answered() -> list[str]:
            ended = rig.got.of("command_completed") + rig.got.of("command_failed")
            return [e["data"]["id"] for e in ended if e["data"]["id"] in ids]

        if not again.ok:
            # Nothing executes what was left in the queues: each command is answered.
            await until(lambda: len(answered()) >= count, "an outcome for every send")
            assert sorted(answered()) == sorted(ids)
            again = await rig.call("create", "acme", id="C3")
        assert again.ok
        assert rig.got.sequence_faults == []


async def test_disconnect_and_logout_of_a_session_without_a_phone(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        assert (await rig.call("create", "acme")).ok
        await rig.got.event("qr", "acme")
        off, out = await asyncio.gather(rig.call("disconnect", "acme"), rig.call("logout", "acme"))
        assert off.ok
        assert out.ok


async def test_repeated_commands_of_a_session_that_is_gone(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """They are answered from the journal: nothing comes back to life, and no number is given out that nobody counts."""
    async with Rig(tmp_path, broker.url, prefix) as rig:
        created = await rig.call("create", "acme", id="C1")
        assert (await rig.call("logout", "acme", id="L1")).ok
        await rig.warrend.stop()
        await rig.restart()
        after = len(rig.got.events)
        assert await rig.call("create", "acme", id="C1") == created
        assert (await rig.call("logout", "acme", id="L1")).ok
        assert await rig.client.list_sessions() == []
        assert [e for e in rig.got.events[after:] if e.get("epoch") == 0] == []


async def test_lost_state_is_never_replaced_and_can_be_given_up(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix, WARREN_STORAGE__MODE="local") as rig:
        await rig.pair("acme", "15550600002")
        await rig.warrend.stop()
        shutil.rmtree(rig.warrend.state / "sessions" / "acme")
        await rig.restart()
        error = await rig.got.event("error", "acme")
        assert (error["data"]["state"], error["data"]["code"]) == ("quarantined", "state_missing")
        assert error["data"]["hint"]
        assert len(rig.got.of("qr")) == 1, "no new identity in place of a lost one"
        assert (await rig.call("logout", "acme")).ok


async def test_create_right_after_logout(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        for epoch in range(1, 21):
            created = await rig.call("create", "acme")
            assert created.ok, created
            assert created.result["epoch"] == epoch
            assert (await rig.call("logout", "acme")).ok
