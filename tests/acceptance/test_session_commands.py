"""`settings` and `delete`, with a real engine, RabbitMQ and backups."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import aio_pika
import orjson
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
        assert files_of("acme", backups)
        assert (await rig.call("delete", "acme", id="D1")).ok
        gone = await rig.got.event("logout", "acme")
        assert gone["data"]["code"] == "deleted"
        await until(lambda: not state.exists(), "no directory")
        await until(lambda: not files_of("acme", backups), "no backup, no key")
        names = Topology("cmd1")
        for queue in (names.control_queue("acme"), names.work_queue("acme"), names.owner_queue("acme")):
            await until(lambda queue=queue: missing(broker.url, queue), f"no queue {queue}")  # type: ignore[misc]
        await rig.warrend.stop()
        await rig.restart()
        assert await rig.client.list_sessions() == []
        assert (await rig.call("delete", "acme", id="D1")).ok, "a repetition is answered from the journal"


async def test_the_command_line_beside_a_daemon_that_runs(tmp_path: Path, broker: Broker) -> None:
    async with Rig(tmp_path, broker.url, "cmd2") as rig:
        await rig.pair("acme", "15550610002")
        found = {(f["check"], f["level"]): f["message"] for f in (await warren(rig, "doctor"))["checks"]}
        assert {check for check, level in found if level == "fail"} == set()
        assert "runs with it" in found["lock", "ok"]
        assert "it has 1 sessions" in found["state", "ok"]
        assert ("permissions", "ok") in found
        assert ("topology", "ok") in found
        told = await warren(
            rig, "session", "settings", "acme", "--set", "messages_per_minute=5", "--set", "proxy=http://127.0.0.1:1"
        )
        assert told["result"]["waiting"] == ["proxy"]
        told = await warren(rig, "session", "settings", "acme", "--reset", "proxy")
        assert told["result"]["settings"]["proxy"] is None
        assert (await warren(rig, "session", "delete", "acme", "--yes"))["ok"]
        await until(lambda: nobody(rig), "no session")


async def warren(rig: Rig, *words: str) -> dict[str, Any]:
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("WARREN_")}, **rig._environment}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "warren.cli", *words, "--json", env=env, cwd=rig.base, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, out
    return dict(orjson.loads(out))


async def nobody(rig: Rig) -> bool:
    return await rig.client.list_sessions() == []


def files_of(session: str, folder: Path) -> list[str]:
    """`os.walk` passes over a directory that goes away under it."""
    return [name for at, _, files in os.walk(folder) for name in files if session in Path(at).parts or session in name]


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
