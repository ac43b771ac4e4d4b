"""Publishes per second through the bus, one in flight per session, to a quorum queue: `python bench/bus_publish.py [url]`.

Without a URL it starts a private RabbitMQ in a temporary directory.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import aio_pika
from loguru import logger

from warren.core.names import Topology
from warren.edges.amqp import AmqpBus, BusOptions
from warren.edges.broker_node import BrokerNode
from warren.ports import Published

SESSIONS = 50
SECONDS = 5.0
ROUNDS = 3
BODY = b"x" * 1024


async def measure(bus: AmqpBus, names: Topology, round_: int) -> tuple[int, list[float]]:
    """Confirmed publishes and their latencies in seconds."""
    end = time.perf_counter() + SECONDS
    latencies: list[float] = []

    async def session(number: int) -> None:
        count = 0
        while (began := time.perf_counter()) < end:
            result = await bus.publish(
                names.out,
                f"s{number}.message",
                BODY,
                message_id=f"{round_}/{number}/{count}",
                content_type="application/cloudevents+json",
                headers={},
            )
            assert result is Published.CONFIRMED, result
            latencies.append(time.perf_counter() - began)
            count += 1

    await asyncio.gather(*(session(number) for number in range(SESSIONS)))
    return len(latencies), sorted(latencies)


async def run(url: str) -> None:
    names = Topology("bench")
    options = BusOptions(url=url, topology=names, instance="bench")
    bus = AmqpBus(options, on_unclaimed=print, on_query=print, on_dead=print, on_lock_lost=print)
    await bus.start()
    await asyncio.wait_for(bus.connected.wait(), 10)
    async with await aio_pika.connect(url) as peer:
        channel = await peer.channel()
        queue = await channel.declare_queue("bench", durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind(names.events, "#")
        for round_ in range(ROUNDS):
            count, latencies = await measure(bus, names, round_)
            p50, p99 = (latencies[int(len(latencies) * q)] * 1000 for q in (0.5, 0.99))
            print(f"{count / SECONDS:,.0f} publishes/s, {SESSIONS} in flight, latency p50 {p50:.1f} ms, p99 {p99:.1f} ms")
            await queue.purge()
        await queue.delete(if_unused=False, if_empty=False)
    began = time.perf_counter()
    claims = [bus.keep_claim(f"s{i}", on_control=print, on_work=print) for i in range(500)]
    while not all(claim.held for claim in claims):
        await asyncio.sleep(0.01)
    print(f"{len(claims)} sessions claimed in {time.perf_counter() - began:.1f} s")
    await bus.close()


async def main() -> None:
    logger.remove()
    if len(sys.argv) > 1:
        await run(sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        node = BrokerNode(Path(folder) / "broker")
        try:
            await run((await node.start()).url)
        finally:
            await node.stop()


if __name__ == "__main__":
    asyncio.run(main())
