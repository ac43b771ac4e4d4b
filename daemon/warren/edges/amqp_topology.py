"""Declares the exchanges and queues that all daemons share (DESIGN, "The contract on RabbitMQ")."""

from __future__ import annotations

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel
from pamqp.common import FieldTable

from warren.core.names import Topology

DELIVERY_LIMIT = 1_000_000
"""RabbitMQ 4 drops a quorum queue's message after 20 deliveries unless told otherwise."""


def work_queue_arguments(names: Topology) -> FieldTable:
    """Of `warren.session.<id>`. Not `x-dead-letter-strategy: at-least-once`: with it RabbitMQ 3.10.8 crashes the leaders of such
    queues when it recovers from a kill (noproc of rabbit_fifo_dlx_sup, measured), and they stay down.
    """
    return {"x-queue-type": "quorum", "x-dead-letter-exchange": names.dead, "x-delivery-limit": DELIVERY_LIMIT}


async def declare(channel: AbstractChannel, names: Topology, *, unrouted_ttl_s: int, unrouted_max: int, dead_max: int) -> None:
    """Declare everything but the queues of sessions and instances. Repeating it changes nothing.

    Raises aiormq's ChannelPreconditionFailed when something exists with other properties (and closes the channel).
    """
    nobody: FieldTable = {"alternate-exchange": names.unclaimed}
    await channel.declare_exchange(names.unclaimed, ExchangeType.FANOUT, durable=True)
    await channel.declare_exchange(names.dead, ExchangeType.FANOUT, durable=True)
    await channel.declare_exchange(names.unrouted, ExchangeType.FANOUT, durable=True)
    await channel.declare_exchange(names.queries, ExchangeType.FANOUT, durable=True)
    await channel.declare_exchange(names.control, ExchangeType.DIRECT, durable=True, arguments=nobody)
    await channel.declare_exchange(names.commands, ExchangeType.DIRECT, durable=True, arguments=nobody)
    events = await channel.declare_exchange(
        names.events, ExchangeType.TOPIC, durable=True, arguments={"alternate-exchange": names.unrouted}
    )
    tap = await channel.declare_exchange(names.tap, ExchangeType.TOPIC, durable=True)

    unclaimed = await channel.declare_queue(names.unclaimed, durable=True, arguments={"x-dead-letter-exchange": names.dead})
    await unclaimed.bind(names.unclaimed)
    dead = await channel.declare_queue(names.dead, durable=True, arguments={"x-max-length": dead_max, "x-overflow": "drop-head"})
    await dead.bind(names.dead)
    # Not bounded: each of these is a command that still needs its outcome, as it did in the queue that it comes from.
    notices = await channel.declare_queue(names.notices, durable=True)
    await notices.bind(names.dead)
    unrouted = await channel.declare_queue(
        names.unrouted,
        durable=True,
        arguments={
            "x-message-ttl": unrouted_ttl_s * 1000,
            "x-max-length": unrouted_max,
            "x-overflow": "drop-head",
        },
    )
    await unrouted.bind(names.unrouted)

    # Last: what daemons publish to leads on only when there is something to lead to.
    await channel.declare_exchange(names.out, ExchangeType.FANOUT, durable=True)
    await events.bind(names.out)
    await tap.bind(names.out)
