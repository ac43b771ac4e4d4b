"""`warren dead` and `warren events` against a real RabbitMQ: nothing is lost, whenever it ends."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import orjson
import pytest
from aio_pika.abc import AbstractChannel
from tests.conftest import Broker

from warren.core.names import Topology
from warren.edges import amqp_topology

DEADLINE_S = 30.0


class Place:
    """A warren's exchanges and queues without a daemon, and the command line."""

    def __init__(self, url: str, channel: AbstractChannel, names: Topology, base: Path) -> None:
        self.url, self.channel, self.names, self.base = url, channel, names, base

    async def spawn(self, *words: str) -> asyncio.subprocess.Process:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WARREN_")}
        env = {**clean, "WARREN_AMQP__URL": self.url, "WARREN_AMQP__PREFIX": self.names.prefix}
        piped = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "warren.cli", *words, env=env, cwd=self.base, stdout=piped, stderr=piped
        )

    async def warren(self, *words: str, status: int = 0) -> dict[str, Any]:
        process = await self.spawn(*words, "--json")
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == status, (out, err)
        return dict(orjson.loads(out))

    async def publish(self, exchange: str, key: str, body: bytes, **properties: Any) -> None:
        target = await self.channel.get_exchange(exchange, ensure=False)
        await target.publish(aio_pika.Message(body, **properties), key)

    async def bury(self, n: int) -> None:
        """As the daemon buries a command that it gave up."""
        headers = {"x-warren-reason": "gave_up", "x-warren-message": "No.", "x-warren-exchange": self.names.commands}
        headers["x-warren-message-id"] = f"order-{n}"
        body = {"command": "send", "session": "acme", "args": {"to": "+15551234567", "text": str(n)}}
        await self.publish(self.names.dead, "acme", orjson.dumps(body), headers=headers, message_id=f"dead-{n}")

    async def taken(self, queue: str) -> list[aio_pika.abc.AbstractIncomingMessage]:
        source, got = await self.channel.declare_queue(queue, passive=True), []
        while (message := await source.get(fail=False, no_ack=True)) is not None:
            got.append(message)
        return got

    async def count(self, queue: str) -> int:
        return (await self.channel.declare_queue(queue, passive=True)).declaration_result.message_count or 0


@pytest.fixture
async def place(broker: Broker, tmp_path: Path) -> AsyncIterator[Place]:
    names = Topology(f"q{uuid.uuid4().hex[:8]}")
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        await amqp_topology.declare(channel, names, unrouted_ttl_s=60, unrouted_max=10_000, dead_max=10_000)
        yield Place(broker.url, channel, names, tmp_path)


async def test_dead_commands_are_looked_at_replayed_and_dropped(place: Place) -> None:
    for n in range(3):
        await place.bury(n)
    await place.publish(place.names.dead, "acme", b"\xff not JSON", headers={"x-warren-reason": "invalid_json"})
    listed = await place.warren("dead", "list")
    assert listed["count"] == 4
    keys = [command["key"] for command in listed["commands"]]
    assert [command["reason"] for command in listed["commands"]] == ["gave_up"] * 3 + ["invalid_json"]
    assert [command["id"] for command in listed["commands"][:3]] == ["order-0", "order-1", "order-2"]
    assert (await place.warren("dead", "show", keys[1]))["body"]["args"]["text"] == "1"
    assert await place.count(place.names.dead) == 4, "looking takes nothing"

    assert (await place.warren("dead", "replay", keys[1]))["replayed"] == [keys[1]]
    (again,) = await place.taken(place.names.unclaimed)
    assert (again.exchange, again.routing_key, again.message_id) == (place.names.commands, "acme", "order-1")
    assert orjson.loads(again.body)["args"]["text"] == "1"
    assert "x-warren-reason" not in again.headers

    left = await place.warren("dead", "replay", "--all", status=1)
    assert (left["replayed"], left["left"]) == ([keys[0], keys[2]], [keys[3]]), "nobody knows where the last one came from"
    assert (await place.warren("dead", "drop", "--all", status=2))["error"]["code"] == "usage"
    assert (await place.warren("dead", "drop", keys[3]))["dropped"] == [keys[3]]
    assert (await place.warren("dead", "drop", keys[3], status=1))["left"] == [keys[3]]
    assert await place.count(place.names.dead) == 0


async def test_what_rabbitmq_itself_buried_goes_back_where_it_was(place: Place) -> None:
    # Nobody serves the session: it expires in the queue of unclaimed commands.
    body = orjson.dumps({"command": "status", "session": "acme", "id": "s-1"})
    forged = {"x-warren-exchange": "elsewhere", "x-warren-reason": "forged"}
    await place.publish(place.names.control, "acme", body, expiration=0.05, headers=forged, message_id="m-1")
    async with asyncio.timeout(DEADLINE_S):
        while not await place.count(place.names.dead):
            await asyncio.sleep(0.05)
    (command,) = (await place.warren("dead", "list"))["commands"]
    assert (command["exchange"], command["routing_key"], command["reason"]) == (place.names.control, "acme", "expired")
    await place.warren("dead", "replay", "--all")
    (again,) = await place.taken(place.names.unclaimed)
    assert (again.exchange, again.routing_key, again.body, again.message_id) == (place.names.control, "acme", body, "m-1")


async def test_a_replay_that_is_killed_loses_nothing(place: Place) -> None:
    total = 400
    for n in range(total):
        await place.bury(n)
    for enough in (20, 150):
        running = await place.spawn("dead", "replay", "--all")
        async with asyncio.timeout(DEADLINE_S):
            while await place.count(place.names.unclaimed) < enough:
                await asyncio.sleep(0.005)
        running.kill()
        await running.communicate()
    async with asyncio.timeout(DEADLINE_S):  # RabbitMQ has to notice that what they held is free again
        while await place.count(place.names.dead) + await place.count(place.names.unclaimed) < total:
            await asyncio.sleep(0.05)
    assert await place.count(place.names.dead) > 0, "they were killed in the middle"
    await place.warren("dead", "replay", "--all")
    got = Counter(message.message_id for message in await place.taken(place.names.unclaimed))
    assert set(got) == {f"order-{n}" for n in range(total)}
    assert got.total() <= total + 2, "at most the one in hand comes twice"
    assert await place.count(place.names.dead) == 0


async def test_events_go_to_who_subscribes_now_and_the_rest_comes_back(place: Place) -> None:
    for n in range(10):
        session = "acme" if n % 2 else "other"
        event = {"type": "warren.message", "session": session, "time": "2030-11-20T11:42:00.120Z", "data": {"n": n}}
        await place.publish(place.names.events, f"{session}.message", orjson.dumps(event), message_id=f"e-{n}")
    listed = await place.warren("events", "list", "--limit", "3")
    assert (listed["count"], [e["data"]["n"] for e in listed["events"]]) == (10, [0, 1, 2])
    queue = await place.channel.declare_queue(exclusive=True)
    await queue.bind(place.names.events, "acme.*")
    assert await place.warren("events", "replay") == {"replayed": 10, "came_back": 5}
    assert [message.message_id for message in await place.taken(queue.name)] == ["e-1", "e-3", "e-5", "e-7", "e-9"]
    assert await place.warren("events", "replay") == {"replayed": 5, "came_back": 5}
    await queue.bind(place.names.events, "#")
    assert await place.warren("events", "replay") == {"replayed": 5, "came_back": 0}
    assert [message.message_id for message in await place.taken(queue.name)] == ["e-0", "e-2", "e-4", "e-6", "e-8"]
    assert await place.warren("events", "replay") == {"replayed": 0, "came_back": 0}
