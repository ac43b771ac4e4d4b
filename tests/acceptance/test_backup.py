"""Sessions outlive their disk and their machine: the daemon, the engine and RabbitMQ as they are, backups in a directory."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from tests.acceptance.rig import Rig, until
from tests.conftest import Broker

prefixes = itertools.count(1)
PEER = "15559990000"


@pytest.fixture
def prefix() -> str:
    return f"backup{next(prefixes)}"


async def saved(rig: Rig, *sessions: str) -> None:
    """Wait until nothing of these sessions waits for a backup that comes by itself."""

    async def all_saved() -> bool:
        listed = {s["session"]: s["backup"] for s in await rig.client.list_sessions()}
        return all(listed[s]["position"] is not None and not listed[s]["failures"] for s in sessions)

    await until(all_saved, "the first backups")


async def test_a_session_outlives_its_disk(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.pair("acme", "15550005001")
        await saved(rig, "acme")
        outcome = await rig.call("backup", "acme")
        assert outcome.ok, outcome
        print(outcome.result)
        await rig.warrend.kill()
        shutil.rmtree(rig.warrend.state / "sessions")
        after = len(rig.got.events)
        await rig.restart()
        connected = await rig.got.event("connected", "acme", after=after)
        assert connected["epoch"] == 2
        assert len(rig.got.of("qr", "acme")) >= 1
