"""The bus against a real RabbitMQ: routes, confirms, locks, and what is left of them when things break."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import pamqp.frame
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aiormq.abc import ChannelFrame
from loguru import logger
from pamqp import commands as spec
from pamqp.body import ContentBody
from tests.conftest import Broker
from tests.proxy import Proxy

from warren.core.backoff import delay
from warren.core.names import Topology
from warren.edges.amqp import AmqpBus, BusOptions
from warren.edges.amqp_claim import AmqpClaim
from warren.edges.amqp_publish import PATIENCE, _Pending
from warren.errors import BrokerUnavailable, ConfigError, OwnershipError
from warren.ports import Incoming, Published

DEADLINE_S = 60.0
RIPE_S = 1.5
"""As in production; most tests do not wait for it."""
prefixes = itertools.count(1)


async def until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.01)


async def until_async(condition: Callable[[], Awaitable[bool]], deadline_s: float = DEADLINE_S) -> None:
    async with asyncio.timeout(deadline_s):
        while not await condition():
            await asyncio.sleep(0.02)


@dataclass
class Station:
    """A bus with ears."""

    bus: AmqpBus
    names: Topology
    heard: dict[str, list[Incoming]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    dead: list[tuple[Incoming, str]] = field(default_factory=list)

    def ear(self, name: str) -> Callable[[Incoming], None]:
        return self.heard.setdefault(name, []).append

    def ids(self, name: str) -> list[str | None]:
        return [message.message_id for message in self.heard.get(name, [])]

    async def connected(self, deadline_s: float = DEADLINE_S) -> None:
        await asyncio.wait_for(self.bus.connected.wait(), deadline_s)

    async def claim(self, session: str) -> AmqpClaim:
        """A claim whose queues take commands."""
        claim = await self.bus.claim(session, on_control=self.ear(f"{session}.control"), on_work=self.ear(f"{session}.work"))
        await until(lambda: claim._ripe)
        return claim

    def keep(self, session: str) -> AmqpClaim:
        return self.bus.keep_claim(session, on_control=self.ear(f"{session}.control"), on_work=self.ear(f"{session}.work"))

    async def publish(self, exchange: str, key: str, message_id: str, body: bytes = b"{}") -> Published:
        return await self.bus.publish(
            exchange, key, body, message_id=message_id, content_type="application/json", headers={"h": "v"}
        )

    async def tell(self, session: str, message_id: str) -> None:
        assert await self.publish(self.names.control, session, message_id) is Published.CONFIRMED

    async def order(self, session: str, message_id: str) -> None:
        assert await self.publish(self.names.commands, session, message_id) is Published.CONFIRMED


MakeStation = Callable[..., Awaitable[Station]]


@pytest.fixture
def names() -> Topology:
    return Topology(f"t{next(prefixes)}")


@pytest.fixture
async def station(broker: Broker, names: Topology) -> AsyncIterator[MakeStation]:
    """Makes connected buses; afterwards all are closed, and nothing of them runs on."""
    before = asyncio.all_tasks()
    made: list[Station] = []

    async def make(url: str | None = None, *, connect: bool = True, **options: Any) -> Station:
        settings = BusOptions(
            **{
                "url": url or broker.url,
                "topology": names,
                "instance": f"i{len(made)}",
                "backoff_base_s": 0.05,
                "backoff_cap_s": 0.5,
                "claim_cap_s": 0.3,
                "ripe_s": 0.02,
            }
            | options
        )
        heard: dict[str, list[Incoming]] = {"unclaimed": [], "query": []}
        lost: list[str] = []
        dead: list[tuple[Incoming, str]] = []
        bus = AmqpBus(
            settings,
            on_unclaimed=heard["unclaimed"].append,
            on_query=heard["query"].append,
            on_dead=lambda incoming, reason: dead.append((incoming, reason)),
            on_lock_lost=lost.append,
        )
        one = Station(bus, names, heard, lost, dead)
        await bus.start()
        made.append(one)
        if connect:
            await one.connected()
        return one

    yield make
    for one in made:
        began = time.monotonic()
        await one.bus.close()
        assert time.monotonic() - began < 5.5
    await until(lambda: not [task for task in asyncio.all_tasks() - before if task.get_name().startswith("bus.")], 3)


@pytest.fixture
async def peer(broker: Broker) -> AsyncIterator[AbstractChannel]:
    """Somebody else on the same RabbitMQ."""
    async with await aio_pika.connect(broker.url) as connection:
        yield await connection.channel()


async def depth(peer: AbstractChannel, queue: str) -> int:
    declared = await peer.declare_queue(queue, passive=True)
    return declared.declaration_result.message_count or 0


async def bound_queue(peer: AbstractChannel, exchange: str, key: str = "#", *, durable: bool = False) -> Any:
    queue = await peer.declare_queue(None if not durable else f"{exchange}.test", exclusive=not durable, durable=durable)
    await queue.bind(exchange, key)
    return queue


async def drained(queue: Any) -> list[str]:
    found = []
    while (message := await queue.get(no_ack=True, fail=False)) is not None:
        found.append(message.message_id)
    return found


# --- routes -----------------------------------------------------------------------------------------------------------


async def test_events_reach_subscribers_and_taps_and_are_kept_when_nobody_listens(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station()
    tap = await bound_queue(peer, names.tap)
    assert await one.publish(names.out, "acme.message", "nobody") is Published.CONFIRMED
    assert await depth(peer, names.unrouted) == 1, "a tap is no subscriber"
    subscriber = await bound_queue(peer, names.events, "*.message")
    assert await one.publish(names.out, "acme.message", "somebody") is Published.CONFIRMED
    message = await subscriber.get()
    assert (message.message_id, message.body, message.delivery_mode) == ("somebody", b"{}", 2)
    assert (message.content_type, message.headers) == ("application/json", {"h": "v"})
    assert await drained(tap) == ["nobody", "somebody"]
    assert await depth(peer, names.unrouted) == 1


async def test_what_nobody_serves_is_unclaimed_and_queries_reach_everybody(station: MakeStation, names: Topology) -> None:
    one, two = await station(), await station()
    assert await one.publish(names.control, "nobody", "c") is Published.CONFIRMED
    assert await one.publish(names.commands, "nobody", "w") is Published.CONFIRMED
    assert await one.publish(names.queries, "", "q") is Published.CONFIRMED
    await until(lambda: len(one.ids("unclaimed") + two.ids("unclaimed")) == 2)
    heard = {m.message_id: m for s in (one, two) for m in s.heard.get("unclaimed", [])}
    # The exchange that the client published to, though the message came over the alternate exchange.
    assert (heard["c"].exchange, heard["c"].routing_key) == (names.control, "nobody")
    assert (heard["w"].exchange, heard["w"].routing_key) == (names.commands, "nobody")
    await until(lambda: one.ids("query") == two.ids("query") == ["q"])


async def test_a_rejected_declaration_names_the_object_and_heals(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    await peer.declare_exchange(names.out, "topic", durable=True)
    one = await station(connect=False)
    await until(lambda: names.out in one.bus.trouble and "Delete it" in one.bus.trouble)
    assert not one.bus.connected.is_set()
    assert await one.publish(names.out, "a.b", "x") is Published.UNKNOWN
    with pytest.raises(BrokerUnavailable, match=names.out):
        await one.claim("acme")
    await peer.exchange_delete(names.out)
    await one.connected()
    assert one.bus.trouble == ""


async def test_trouble_never_shows_the_password(broker: Broker, station: MakeStation) -> None:
    parts = urlsplit(broker.url)
    one = await station(f"amqp://{parts.username}:wrong-secret@{parts.hostname}:{parts.port}/", connect=False)
    await until(lambda: "refused the login" in one.bus.trouble)
    two = await station(f"amqp://{parts.username}:{parts.password}@{parts.hostname}:{parts.port}/nowhere", connect=False)
    await until(lambda: "virtual host" in two.bus.trouble)
    three = await station("amqp://u:wrong-secret@127.0.0.1:1/", connect=False)
    await until(lambda: "cannot be reached" in three.bus.trouble)
    assert "secret" not in one.bus.trouble + three.bus.trouble
    assert str(parts.password) not in two.bus.trouble
    with pytest.raises(ConfigError):
        await station("http://127.0.0.1/", connect=False)


async def test_a_server_that_accepts_and_closes_is_tried_at_most_nine_times_in_the_first_minute(names: Topology) -> None:
    """And four times in each later one. The test's minute has three seconds."""
    accepted: list[float] = []

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(time.monotonic())
        writer.close()

    production = BusOptions("amqp://127.0.0.1/", names, "i")
    pauses = [delay(n, base_s=production.backoff_base_s, cap_s=production.backoff_cap_s, random01=0.0) for n in range(20)]
    assert sum(pauses[:8]) < 60 < sum(pauses[:9])  # behind the first try
    assert sum(pauses[15:19]) >= 60
    faster = 20
    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        options = dataclasses.replace(
            production,
            url=f"amqp://u:p@127.0.0.1:{server.sockets[0].getsockname()[1]}/",
            backoff_base_s=production.backoff_base_s / faster,
            backoff_cap_s=production.backoff_cap_s / faster,
        )
        bus = AmqpBus(options, on_unclaimed=print, on_query=print, on_dead=print, on_lock_lost=print)
        await bus.start()
        await until(lambda: bool(accepted) and time.monotonic() - accepted[0] > 60 / faster)
        await bus.close()
    assert 2 <= len([at for at in accepted if at - accepted[0] < 60 / faster]) <= 9


async def test_changed_credentials_are_told_once_and_heal_when_they_are_right_again(
    broker: Broker, station: MakeStation, names: Topology
) -> None:
    parts = urlsplit(broker.url)
    user = f"user-{names.prefix}"
    await broker.ctl("add_user", user, "first")
    await broker.ctl("set_permissions", user, ".*", ".*", ".*")
    told: list[str] = []
    sink = logger.add(lambda line: told.append(str(line)), level="WARNING", format="{message}")
    try:
        one = await station(f"amqp://{user}:first@{parts.hostname}:{parts.port}/")
        claim = await one.claim("acme")
        await broker.ctl("change_password", user, "second")
        await broker.ctl("close_all_user_connections", user, "rotated")
        await until(lambda: "refused the login" in one.bus.trouble)
        since = time.monotonic()
        await until(lambda: time.monotonic() - since > 2.0)  # several tries
        assert not claim.held
        assert len([line for line in told if "refused the login" in line]) == 1
        await broker.ctl("change_password", user, "first")
        await one.connected()
        await until(lambda: claim.held)
        await one.tell("acme", "back")
        await until(lambda: one.ids("acme.control") == ["back"])
        assert one.bus.trouble == ""
    finally:
        logger.remove(sink)
        await broker.ctl("delete_user", user)


# --- publishing -------------------------------------------------------------------------------------------------------


async def test_confirmed_is_stored_refused_is_not_and_later_publishes_go_on(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station()
    kept = await bound_queue(peer, names.events)
    ids = [f"m{i}" for i in range(200)]
    results = await asyncio.gather(*(one.publish(names.out, "acme.message", i) for i in ids))
    assert set(results) == {Published.CONFIRMED}
    assert await drained(kept) == ids
    assert await one.publish(f"{names.prefix}.nope", "k", "lost") is Published.REFUSED
    assert await one.publish(names.out, "k" * 300, "long") is Published.REFUSED
    full = await peer.declare_queue(exclusive=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    assert await one.publish("", full.name, "first") is Published.CONFIRMED
    assert await one.publish("", full.name, "second") is Published.REFUSED
    assert await one.publish(names.out, "acme.message", "later") is Published.CONFIRMED
    assert await drained(kept) == ["later"]
    assert one.bus.connected.is_set()


async def test_an_exchange_that_was_deleted_is_declared_again(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station()
    await peer.exchange_delete(names.out)
    tries = [await one.publish(names.out, "acme.message", f"m{i}") for i in range(3)]
    assert tries[0] is not Published.CONFIRMED
    assert tries[-1] is Published.CONFIRMED


async def test_a_cancelled_caller_leaves_the_publish_going_on(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station()
    kept = await bound_queue(peer, names.events)
    caller = asyncio.create_task(one.publish(names.out, "acme.message", "same"))
    await asyncio.sleep(0)
    caller.cancel()
    again = asyncio.create_task(one.publish(names.out, "acme.message", "same"))
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await again is Published.CONFIRMED
    assert await drained(kept) == ["same"], "the second waited for the first and took its confirm"


async def test_an_alarm_blocks_publishing_but_not_consuming(
    broker: Broker, station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station(publish_timeout_s=0.5, watchdog_s=1.5)
    claim = await one.claim("acme")
    kept = await bound_queue(peer, names.events)
    await asyncio.gather(*(one.order("acme", f"w{i}") for i in range(3)))
    await broker.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        assert await one.publish(names.out, "acme.message", "late") is Published.UNKNOWN
        await until(lambda: "blocks publishers" in one.bus.trouble)
        again = [asyncio.create_task(one.publish(names.out, "acme.message", "late")) for _ in range(2)]
        await claim.consume_work()
        await until(lambda: one.ids("acme.work") == ["w0", "w1", "w2"])
        for message in one.heard["acme.work"]:
            await message.ack()
        assert set(await asyncio.gather(*again)) == {Published.UNKNOWN}
        # Longer blocked than the watchdog waits: it knows that this is not a dead connection.
        blocked_since = time.monotonic()
        await until(lambda: time.monotonic() - blocked_since > 2.0)
        assert one.bus.connected.is_set()
        waiting = asyncio.create_task(
            one.bus.publish(names.out, "acme.message", b"{}", message_id="late", content_type="application/json", headers={})
        )
    finally:
        await broker.ctl("set_vm_memory_high_watermark", "absolute", "2GiB")
    await waiting
    await until_async(lambda: _is_confirmed(one, names, "late"))
    await until(lambda: one.bus.trouble == "")
    assert set(await drained(kept)) == {"late"}
    assert claim.held


async def _is_confirmed(one: Station, names: Topology, message_id: str) -> bool:
    return await one.publish(names.out, "acme.message", message_id) is Published.CONFIRMED


async def test_a_live_connection_that_confirms_nothing_gets_more_patience(station: MakeStation, names: Topology) -> None:
    one = await station(watchdog_s=0.3)
    publisher = one.bus._publisher
    assert publisher._lane is not None
    began = asyncio.get_running_loop().time()
    # As if a subscriber's queue had no leader: RabbitMQ cannot be brought to that on one node.
    stuck = _Pending(publisher._lane, names.out, "acme.message", b"{}", began)
    stuck.task = asyncio.create_task(_never(), name="bus.stuck")
    publisher._pending["stuck"] = stuck
    await until(lambda: publisher._unconfirmed._last != "")
    assert await one.publish(names.out, "acme.message", "other") is Published.CONFIRMED
    assert one.bus.connected.is_set()
    await until(lambda: not one.bus.connected.is_set())
    assert asyncio.get_running_loop().time() - began > 0.3 * PATIENCE
    await until(stuck.task.done)
    del publisher._pending["stuck"]
    await one.connected()


async def _never() -> Published:
    await asyncio.Event().wait()
    return Published.UNKNOWN


# --- replies ----------------------------------------------------------------------------------------------------------


async def test_replies_reach_their_queue_and_bad_ones_disturb_nothing(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station()
    await one.claim("acme")
    direct = await peer.declare_queue("amq.rabbitmq.reply-to", passive=True)
    replies: list[tuple[bytes, str | None]] = []

    async def on_reply(message: AbstractIncomingMessage) -> None:
        replies.append((message.body, message.correlation_id))

    await direct.consume(on_reply, no_ack=True)
    request = aio_pika.Message(b"{}", reply_to="amq.rabbitmq.reply-to", correlation_id="c1")
    await (await peer.get_exchange(names.control)).publish(request, "acme")
    await until(lambda: len(one.heard["acme.control"]) == 1)
    incoming = one.heard["acme.control"][0]
    assert incoming.reply_to is not None
    await one.bus.reply(incoming.reply_to, incoming.correlation_id, b"yes")
    await until(lambda: replies == [(b"yes", "c1")])

    # The fourth makes RabbitMQ 3.10 close the connection it comes on.
    for bad in ("nobody", "", "x" * 300, "amq.rabbitmq.reply-to.!!.x", "amq.rabbitmq.reply-to.garbage"):
        await one.bus.reply(bad, None, b"?")
        assert await one.publish(names.out, "acme.message", f"after {bad[:9]}") is Published.CONFIRMED
    assert one.bus.connected.is_set()

    async def answered() -> bool:
        await one.bus.reply(str(incoming.reply_to), "c2", b"again")
        return (b"again", "c2") in replies

    await until_async(answered)


async def test_what_rabbitmq_ends_itself_is_told_with_its_reason(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station(dead_max=2)
    await one.claim("acme")

    async def publish(exchange: str, key: str, message_id: str, **more: Any) -> None:
        message = aio_pika.Message(b"{}", message_id=message_id, delivery_mode=2, reply_to="me", **more)
        await (await peer.get_exchange(exchange, ensure=False)).publish(message, key, mandatory=False)

    await publish(names.commands, "acme", "work", expiration=0.05, headers={"x-death": "forged", "x-warren-reason": "forged"})
    await until(lambda: len(one.dead) == 1)
    (notice, reason) = one.dead[0]
    assert reason == "expired"
    assert (notice.exchange, notice.routing_key, notice.message_id, notice.reply_to) == (names.commands, "acme", "work", "me")
    # What one of us buries has no death of RabbitMQ's.
    assert await one.publish(names.dead, "acme", "buried") is Published.CONFIRMED
    await publish(names.dead, "acme", "strange", headers={"x-death": [{"reason": 1}, "?"]})
    await until(lambda: len(one.dead) == 3)
    assert [(n.message_id, n.exchange, reason) for n, reason in one.dead[1:]] == [
        ("buried", names.dead, ""),
        ("strange", names.dead, ""),
    ]
    for notice, _ in one.dead[:2]:
        await notice.ack()
    await one.bus.close()
    assert await depth(peer, names.dead) == 2, "bounded"
    # What was not settled comes again.
    again = await station(dead_max=2)
    await until(lambda: [n.message_id for n, _ in again.dead] == ["strange"])


# --- claims -----------------------------------------------------------------------------------------------------------


async def test_a_claim_locks_others_out_until_it_is_closed(station: MakeStation, names: Topology) -> None:
    one, two = await station(heartbeat_s=1), await station(heartbeat_s=1)
    first = await one.claim("acme")
    assert first.held
    with pytest.raises(OwnershipError, match="acme"):
        await two.claim("acme")
    with pytest.raises(OwnershipError):
        await one.claim("acme")
    kept = two.keep("acme")
    await until(lambda: two.lost == ["acme"])  # after the time in which a dead connection of our own could hold it
    assert not kept.held
    await one.tell("acme", "for the first")
    await until(lambda: one.ids("acme.control") == ["for the first"])
    await one.bus.close()
    await until(lambda: kept.held)
    # What the first left unsettled is the second's now, before anything newer.
    await two.tell("acme", "for the second")
    await until(lambda: two.ids("acme.control") == ["for the first", "for the second"])
    assert two.heard["acme.control"][0].redelivered
    assert two.lost == ["acme"]


async def test_release_frees_the_lock_and_the_session_can_be_claimed_again(station: MakeStation) -> None:
    one, two = await station(), await station()
    for _ in range(3):
        claim = await one.claim("acme")
        await claim.release()
        await claim.release()
        assert not claim.held
        other = await two.claim("acme")
        await other.release()


async def test_work_is_paused_and_resumed_in_order(station: MakeStation) -> None:
    one = await station(work_prefetch=3)
    claim = await one.claim("acme")
    for i in range(6):
        await one.order("acme", f"w{i}")
    await one.tell("acme", "c0")
    await until(lambda: one.ids("acme.control") == ["c0"])
    assert one.ids("acme.work") == [], "work waits until it is wanted"
    await claim.consume_work()
    await claim.consume_work()
    await until(lambda: one.ids("acme.work") == ["w0", "w1", "w2"])
    await claim.pause_work()
    await claim.pause_work()
    for message in one.heard["acme.work"]:
        await message.ack()  # too late: it is back in its queue
    await one.heard["acme.control"][0].ack()
    await claim.consume_work()
    await until(lambda: one.ids("acme.work")[3:] == ["w0", "w1", "w2"])
    for message in one.heard["acme.work"][3:]:
        await message.ack()
        await message.ack()  # only logged
    await until(lambda: one.ids("acme.work")[6:] == ["w3", "w4", "w5"])


async def test_a_pause_in_the_middle_of_deliveries_keeps_the_order(station: MakeStation) -> None:
    """RabbitMQ is delivering while we pause, again and again; nobody may overtake."""
    one = await station(work_prefetch=4)
    claim = await one.claim("acme")
    orders = [f"w{i}" for i in range(80)]
    for order in orders:
        await one.order("acme", order)
    acked: list[str | None] = []
    heard = one.heard["acme.work"]
    while len(acked) < len(orders):
        heard.clear()
        await claim.consume_work()
        for n in range(min(7, len(orders) - len(acked))):
            await until(lambda n=n: len(heard) > n)  # type: ignore[misc]
            await heard[n].ack()
            acked.append(heard[n].message_id)
        await claim.pause_work()
    assert acked == orders


async def test_a_channel_error_concerns_one_session_only(station: MakeStation, peer: AbstractChannel, names: Topology) -> None:
    one = await station()
    bad, good = await one.claim("bad"), await one.claim("good")
    await bad.consume_work()
    await one.tell("bad", "b0")
    await one.tell("good", "g0")
    await until(lambda: one.ids("bad.control") == ["b0"] and one.ids("good.control") == ["g0"])
    assert bad._intake is not None
    await bad._intake.channel.basic_ack(4711)  # unknown delivery tag: RabbitMQ closes the channel
    await until(lambda: one.ids("bad.control") == ["b0", "b0"])
    old, new = one.heard["bad.control"]
    await old.ack()  # its channel is gone: nothing happens
    await new.ack()
    await one.heard["good.control"][0].ack()
    await one.tell("good", "g1")
    await until(lambda: one.ids("good.control") == ["g0", "g1"])
    assert bad.held
    assert good.held

    # A consumer ended by RabbitMQ, because somebody deleted the queue.
    await peer.queue_delete(names.work_queue("bad"))
    await until_async(lambda: _is_served(one, "bad"))
    assert one.ids("good.control") == ["g0", "g1"]
    assert one.bus.connected.is_set()


async def _is_served(one: Station, session: str) -> bool:
    count = len(one.ids(f"{session}.work"))
    await one.order(session, f"again{count}")
    try:
        await until(lambda: len(one.ids(f"{session}.work")) > count, 0.3)
    except TimeoutError:
        return False
    return True


async def test_removing_hands_over_what_is_left_and_deletes(station: MakeStation, peer: AbstractChannel, names: Topology) -> None:
    one = await station(work_prefetch=2, remove_timeout_s=0.3)
    claim = await one.claim("acme")
    for i in range(5):
        await one.order("acme", f"w{i}")
    await one.tell("acme", "c0")
    await until(lambda: one.ids("acme.control") == ["c0"])
    with pytest.raises(BrokerUnavailable, match="not answered"):
        await claim.release(remove=True)
    assert claim.held

    async def answer() -> None:
        for lane, count in (("acme.control", 1), ("acme.work", 5)):
            for number in range(count):
                await until(lambda: len(one.heard[lane]) > number)  # noqa: B023 (awaited here)
                await one.heard[lane][number].ack()

    answering = asyncio.create_task(answer())
    await claim.release(remove=True)
    await answering
    assert one.ids("acme.work") == [f"w{i}" for i in range(5)]
    assert not claim.held
    listed = [names.control_queue("acme"), names.work_queue("acme"), names.owner_queue("acme")]
    for queue in listed:
        with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
            await peer.declare_queue(queue, passive=True)
        await peer.reopen()
    assert await one.publish(names.control, "acme", "late") is Published.CONFIRMED
    await until(lambda: one.ids("unclaimed") == ["late"])
    await (await one.claim("acme")).release()


async def test_closing_while_sessions_are_being_claimed(station: MakeStation) -> None:
    for pause_s in (0.0, 0.02, 0.1):
        one = await station()
        claims = [one.keep(f"s{i}") for i in range(60)]
        await asyncio.sleep(pause_s)
        await asyncio.gather(*(claim.consume_work() for claim in claims))
        await asyncio.sleep(pause_s)
        async with asyncio.timeout(5):
            await one.bus.close()
        assert not any(claim.held for claim in claims)


async def test_channels_running_out_concerns_only_who_asks(station: MakeStation) -> None:
    one = await station()
    link = one.bus._gate.current
    assert link is not None
    assert link._connection.transport is not None
    link._connection.transport.connection.connection_tune.channel_max = 5  # one of them asks for queues
    claims = [await one.claim(f"s{i}") for i in range(3)]
    with pytest.raises(BrokerUnavailable, match="channels"):
        await one.claim("s3")
    await claims[1].release()
    await (await one.claim("s3")).release()
    assert claims[0].held
    assert one.bus.connected.is_set()


# --- malformed messages -----------------------------------------------------------------------------------------------


def _short(raw: bytes) -> bytes:
    return bytes([len(raw)]) + raw


POISON = {
    "microseconds": (1 << 6, struct.pack(">Q", 1_700_000_000_000_000)),
    "reply_to not UTF-8": (1 << 9, _short(b"\xff\xfe")),
    "date in headers": (1 << 13, struct.pack(">I", 11) + _short(b"a") + b"T" + struct.pack(">Q", 2**63 - 1)),
}


@pytest.mark.parametrize("name", POISON)
async def test_a_malformed_message_is_delivered_and_costs_nothing(
    name: str, broker: Broker, station: MakeStation, names: Topology
) -> None:
    one = await station()
    await one.claim("acme")
    flags, raw = POISON[name]
    flags, raw = flags | 1 << 7, raw + _short(b"m1") if flags > 1 << 7 else _short(b"m1") + raw
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        for key in (b"acme", b"\xff\xfe"):
            await _publish_raw(channel, names.control, key, flags, raw)
        await until(lambda: one.ids("acme.control") == ["m1"] and one.ids("unclaimed") == ["m1"])
    assert one.heard["acme.control"][0].body == b"body"
    assert one.heard["unclaimed"][0].routing_key == "??"
    await one.heard["acme.control"][0].ack()
    await one.heard["unclaimed"][0].ack()
    assert one.bus.connected.is_set()


async def _publish_raw(channel: AbstractChannel, exchange: str, key: bytes, flags: int, properties: bytes) -> None:
    """As a publisher in another language may: aio-pika would refuse to write these properties."""
    raw = await channel.get_underlay_channel()
    method = b"\x00\x3c\x00\x28\x00\x00" + _short(exchange.encode()) + _short(key) + b"\x00"
    header = struct.pack(">HHQH", 60, 0, 4, flags) + properties
    frames = b"".join(
        struct.pack(">BHI", kind, raw.number, len(payload)) + payload + b"\xce" for kind, payload in ((1, method), (2, header))
    )
    frames += pamqp.frame.marshal(ContentBody(b"body"), raw.number)
    frame = ChannelFrame(payload=frames, should_close=False, drain_future=None)
    await raw.connection.write_queue.put(frame)
    assert spec.Basic.Publish.frame_id == 40


# --- faults -----------------------------------------------------------------------------------------------------------


async def test_a_killed_broker_loses_nothing_that_was_confirmed(
    broker: Broker, station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station(ripe_s=RIPE_S)
    sessions = [f"s{i}" for i in range(5)]
    claims = [await one.claim(session) for session in sessions]
    await asyncio.gather(*(claim.consume_work() for claim in claims))
    await bound_queue(peer, names.events, durable=True)
    confirmed: list[str] = []
    running = True

    async def feed(session: str) -> None:
        """Publish one after the other; the same id again until it is confirmed."""
        for number in itertools.count():
            message_id = f"{session}/{number}"
            while await one.publish(names.out, f"{session}.message", message_id) is not Published.CONFIRMED:
                await asyncio.sleep(0.01)
            confirmed.append(message_id)
            if not running:
                return

    feeders = [asyncio.create_task(feed(session)) for session in sessions]
    await until(lambda: len(confirmed) > 200)
    broker.kill()
    await until(lambda: not one.bus.connected.is_set(), 2)
    assert not any(claim.held for claim in claims)
    before = len(confirmed)
    await broker.start()
    await one.connected()
    await until(lambda: all(claim.held for claim in claims))
    await until(lambda: len(confirmed) > before + 200)
    running = False
    await asyncio.gather(*feeders)
    for session in sessions:
        await one.order(session, f"{session}-w")
    await until(lambda: all(one.ids(f"{session}.work") == [f"{session}-w"] for session in sessions))
    async with await aio_pika.connect(broker.url) as connection:
        stored = await drained(await (await connection.channel()).get_queue(f"{names.events}.test"))
    assert set(confirmed) - set(stored) == set()
    assert len(stored) - len(set(stored)) <= len(sessions), "at most the one publish in flight of each session is repeated"


@pytest.mark.parametrize("daemon", ["lives", "dies too"])
async def test_a_session_whose_queue_was_just_made_survives_the_death_of_rabbitmq(
    daemon: str, broker: Broker, station: MakeStation, names: Topology
) -> None:
    """RabbitMQ forgets the leader of a quorum queue that is younger than a second, and what it had confirmed."""
    one = await station(ripe_s=RIPE_S)
    young = await asyncio.gather(
        *(one.bus.claim(f"s{i}", on_control=one.ear(f"s{i}.control"), on_work=one.ear(f"s{i}.work")) for i in range(5))
    )
    await one.order("s0", "early")
    await until(lambda: one.ids("unclaimed") == ["early"])  # and so it is answered
    broker.kill()
    if daemon == "dies too":
        await one.bus.close()
    await broker.start()
    if daemon == "dies too":
        one = await station(ripe_s=RIPE_S)
        young = [one.keep(f"s{i}") for i in range(5)]
    await one.connected()
    await until(lambda: all(claim.held for claim in young))
    await asyncio.gather(*(claim.wait_held() for claim in young))
    await asyncio.gather(*(claim.consume_work() for claim in young))  # returns when the queues take commands
    for i in range(5):
        await one.order(f"s{i}", f"w{i}")
    await until(lambda: all(one.ids(f"s{i}.work") == [f"w{i}"] for i in range(5)))
    left = [queue for queue in (await broker.ctl("-q", "list_queues", "name")).split() if queue.startswith(f"{names.prefix}.")]
    assert not [queue for queue in left if queue.endswith(".new")]


async def test_a_queue_made_again_is_not_taken_for_new_at_the_next_start(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station(ripe_s=RIPE_S)
    claim = await one.claim("acme")
    await claim.consume_work()
    first = claim._ripening
    await peer.queue_delete(names.work_queue("acme"))
    await until(lambda: claim._ripening is not first)  # it is made again,
    await peer.queue_delete(names.control_queue("acme"))  # and before it takes commands its channel is lost
    second = claim._ripening
    assert second is not None
    await until(second.done)
    await until(claim._kept.up.is_set)
    await claim.consume_work()
    await one.order("acme", "w")
    await until(lambda: one.ids("acme.work") == ["w"])
    await one.bus.close()
    two = await station(ripe_s=RIPE_S)
    await two.keep("acme").consume_work()
    await until(lambda: two.ids("acme.work") == ["w"])


async def test_a_queue_that_holds_commands_is_never_taken_for_new(
    station: MakeStation, peer: AbstractChannel, names: Topology
) -> None:
    one = await station()
    await one.claim("acme")
    await one.order("acme", "w0")
    await one.bus.close()
    await peer.declare_queue(names.new_queue("acme"), durable=True)  # as if RabbitMQ had forgotten that it was deleted
    two = await station()
    await two.keep("acme").consume_work()
    await until(lambda: two.ids("acme.work") == ["w0"])
    await two.order("acme", "w1")
    await until(lambda: two.ids("acme.work") == ["w0", "w1"])
    with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
        await peer.declare_queue(names.new_queue("acme"), passive=True)


async def test_a_broker_that_comes_back_empty_gets_everything_again(
    broker: Broker, station: MakeStation, names: Topology
) -> None:
    one = await station(ripe_s=RIPE_S)
    claims = [await one.claim(f"s{i}") for i in range(3)]
    await claims[0].consume_work()
    await _until_confirmed(one, "before")
    for step in ("stop_app", "reset", "start_app"):
        await broker.ctl(step)
    await one.connected(30)
    await until(lambda: all(claim.held for claim in claims))
    await asyncio.gather(*(claim.wait_held() for claim in claims))
    await asyncio.gather(*(claim.consume_work() for claim in claims))
    two = await station()
    with pytest.raises(OwnershipError):
        await two.claim("s0")
    for i in range(3):
        await one.tell(f"s{i}", f"c{i}")
        await one.order(f"s{i}", f"w{i}")
    await until(lambda: all(one.ids(f"s{i}.control") == [f"c{i}"] and one.ids(f"s{i}.work") == [f"w{i}"] for i in range(3)))
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        await _until_confirmed(one, "nobody listens")
        assert await depth(channel, names.unrouted) == 1
        queue = await bound_queue(channel, names.events)
        await _until_confirmed(one, "somebody does")
        assert await drained(queue) == ["somebody does"]
    await one.tell("nobody", "lost")
    await until(lambda: "lost" in one.ids("unclaimed") + two.ids("unclaimed"))


async def _until_confirmed(one: Station, message_id: str) -> None:
    while not await _is_confirmed(one, one.names, message_id):
        await asyncio.sleep(0.01)


@pytest.fixture
async def proxy(broker: Broker) -> AsyncIterator[Proxy]:
    parts = urlsplit(broker.url)
    async with Proxy("127.0.0.1", parts.port or 0) as between:
        yield between


def through(proxy: Proxy, broker: Broker) -> str:
    parts = urlsplit(broker.url)
    return f"amqp://{parts.username}:{parts.password}@127.0.0.1:{proxy.port}/"


async def test_cut_connections_come_back(broker: Broker, proxy: Proxy, station: MakeStation, names: Topology) -> None:
    one = await station(through(proxy, broker))
    claim = await one.claim("acme")
    await claim.consume_work()
    for round_ in range(5):
        pending = [asyncio.create_task(one.publish(names.out, "acme.message", f"{round_}/{i}")) for i in range(20)]
        await asyncio.sleep(0)
        proxy.cut()
        assert await asyncio.wait_for(asyncio.gather(*pending), 3)
        await until(lambda: not one.bus.connected.is_set() or not claim.held)
        await one.connected()
        await until(lambda: claim.held)
        await one.order("acme", f"w{round_}")
        await until(lambda: one.ids("acme.work")[-1:] == [f"w{round_}"])  # noqa: B023 (awaited here)
        await one.heard["acme.work"][-1].ack()
    assert one.lost == []


async def test_a_black_hole_is_noticed_and_the_half_open_lock_is_taken_again(
    broker: Broker, proxy: Proxy, station: MakeStation, names: Topology
) -> None:
    one = await station(through(proxy, broker), heartbeat_s=2, publish_timeout_s=0.5)
    watched = await station(through(proxy, broker), watchdog_s=1.0, publish_timeout_s=0.2)
    doomed = await station(through(proxy, broker))
    claim = await one.claim("acme")
    await doomed.claim("other")
    proxy.black_hole()
    began = time.monotonic()
    assert await one.publish(names.out, "acme.message", "unknown") is Published.UNKNOWN
    assert await watched.publish(names.out, "acme.message", "watched") is Published.UNKNOWN
    lost = asyncio.create_task(doomed.publish(names.out, "acme.message", "doomed"))
    await until(lambda: not watched.bus.connected.is_set(), 3)  # the watchdog; its heartbeat would take 33 s
    closing = time.monotonic()
    await doomed.bus.close()
    assert time.monotonic() - closing < 5.0
    assert await lost is Published.UNKNOWN
    await until(lambda: not one.bus.connected.is_set(), 12)
    assert 6 < time.monotonic() - began < 12
    assert not claim.held
    proxy.heal()
    await one.connected()
    await until(lambda: claim.held)
    assert one.lost == []
    await one.tell("acme", "back")
    await until(lambda: one.ids("acme.control") == ["back"])
