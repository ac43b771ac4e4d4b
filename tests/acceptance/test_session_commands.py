"""`settings` and `delete`, with a real engine, RabbitMQ and backups."""

from __future__ import annotations

from pathlib import Path

import aio_pika
from tests.acceptance.rig import Rig, until
from tests.conftest import Broker

from warren.core.names import Topology


async def test_settings_and_then_the_session_is_deleted(tmp_path: Path, broker: Broker) -> None:
    """Nothing of it is left, and it does not come back with the daemon."""
    async with Rig(tmp_path, broker.url, "cmd1") as rig:
        await rig.pair("acme", "15550610001")
        told = await rig.call("settings", "acme", {"messages_per_minute": 3, "mark_online": True})
        assert told.result["settings"]["messages_per_minute"] == 3
        assert told.result["waiting"] == ["mark_online"]
        await rig.warrend.stop()
        await rig.restart()
        assert (await rig.call("settings", "acme")).result["settings"]["messages_per_minute"] == 3, "kept over a restart"
        await until(lambda: online(rig), "the session online again")
        assert (await rig.call("backup", "acme")).ok

        state, backups = rig.warrend.state / "sessions" / "acme", rig.warrend.state / "backups"
        assert state.exists()
        assert list(backups.rglob("*acme*"))
        assert (await rig.call("delete", "acme", id="D1")).ok
        gone = await rig.got.event("logout", "acme")
        assert gone["data"]["code"] == "deleted"
        await until(lambda: not state.exists(), "no directory")
        await until(lambda: not [p for p in backups.rglob("*") if "acme" in str(p) and p.is_file()], "no backup, no key")
        names = Topology("cmd1")
        for queue in (names.control_queue("acme"), names.work_queue("acme"), names.owner_queue("acme")):
            await until(lambda queue=queue: missing(broker.url, queue), f"no queue {queue}")  # type: ignore[misc]
        await rig.warrend.stop()
        await rig.restart()
        assert await rig.client.list_sessions() == []
        assert (await rig.call("delete", "acme", id="D1")).ok, "a repetition is answered from the journal"


async def online(rig: Rig) -> bool:
    return bool((await rig.call("status", "acme")).result["state"] == "online")


async def missing(url: str, queue: str) -> bool:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        try:
            await channel.declare_queue(queue, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return True
        except aio_pika.exceptions.ChannelLockedResource:
            return False
        return False
