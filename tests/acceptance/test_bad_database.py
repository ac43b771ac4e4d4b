"""The daemon's own database is damaged: sessions go on, and nobody scans a code again."""

from __future__ import annotations

import os
from pathlib import Path

from tests.acceptance.rig import Rig
from tests.conftest import Broker


def damage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


async def test_sessions_start_with_a_database_that_cannot_be_read(tmp_path: Path, broker: Broker) -> None:
    async with Rig(tmp_path, broker.url, "bad-db") as rig:
        before = await rig.pair("acme", "15550001991")
        qrs = len(rig.got.of("qr"))
        assert await rig.warrend.stop() == 0
        damage(rig.warrend.state / "warren.db")
        after = len(rig.got.events)
        await rig.restart()
        told = await rig.got.event("error", "acme", after=after)
        assert told["data"]["code"] == "registry_rebuilt"
        back = await rig.got.event("connected", "acme", after=after)
        assert back["epoch"] > before["epoch"]
        assert back["data"]["jid"] == before["data"]["jid"]
        assert len(rig.got.of("qr")) == qrs
        assert list(rig.warrend.state.glob("warren.db.bad-*"))
        # It can be repaired no further: the next start is an ordinary one.
        assert await rig.warrend.stop() == 0
        after = len(rig.got.events)
        await rig.restart()
        again = await rig.got.event("connected", "acme", after=after)
        assert again["epoch"] == back["epoch"]
        assert rig.got.sequence_faults == []
