"""Publishing: confirms with a deadline, never cancelled; and replies, on a connection of their own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Final

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel, AbstractExchange, HeadersType
from aiormq import spec
from loguru import logger

from warren.core.backoff import delay
from warren.edges.amqp_link import BusOptions, Link, LinkLost, Repeats, describe, is_cancelled, jitter, object_of
from warren.ports import Published

WATCH_S: Final = 1.0
ENDED_S: Final = 1.0
"""How long publishes may take to end by themselves after their connection ended."""
SHORT_BYTES: Final = 255
"""AMQP's limit for exchange names, routing keys, message ids and content types."""
PATIENCE: Final = 10
"""So many times `watchdog_s` may a publish wait on a connection that is otherwise alive."""
REPLY_WAIT_S: Final = 1.0
REPLIES_MAX: Final = 500
"""Replies on their way; more are dropped (a reply is best effort, the outcome event is not)."""

_TOO_LARGE: Final = re.compile(r"message size \d+.*?max size (\d+)", re.IGNORECASE)


class _Lane:
    """A publishing channel, opened when needed and again after RabbitMQ closed it. One per connection.

    Counts publishes in the order of the wire, so that after a channel error it can be told whose message is certainly
    not stored.
    """

    def __init__(self, link: Link, repair: Callable[[], Awaitable[None]]) -> None:
        self.link = link
        self._repair = repair
        self._channel: AbstractChannel | None = None
        self._opening = asyncio.Lock()
        self._exchanges: dict[str, AbstractExchange] = {}
        self._count = 0
        self._newest: dict[str, int] = {}
        self._broken_by: BaseException | None = None

    async def exchange(self, name: str) -> AbstractExchange:
        async with self._opening:
            if self._channel is None or self._channel.is_closed:
                await self._open()
        if (exchange := self._exchanges.get(name)) is None:
            assert self._channel is not None
            exchange = self._exchanges[name] = await self._channel.get_exchange(name, ensure=False)
        return exchange

    async def _open(self) -> None:
        if isinstance(self._broken_by, aiormq.exceptions.ChannelNotFoundEntity):
            await self._repair()
        self._channel = await self.link.channel(confirms=True)
        self._channel.close_callbacks.add(self._closed)
        self._exchanges.clear()
        self._broken_by = None

    def _closed(self, _: object, why: BaseException | None) -> None:
        self._broken_by = why
        if not self.link.closed.is_set():
            logger.bind(action="bus.publish_channel_closed").warning("RabbitMQ closed the publishing channel: {}", why)

    def take_number(self, exchange: str) -> int:
        self._count += 1
        self._newest[exchange] = self._count
        return self._count

    def is_newest(self, exchange: str, number: int) -> bool:
        return self._newest.get(exchange) == number


class _Pending:
    """A publish that has not ended yet."""

    __slots__ = ("body", "exchange", "lane", "routing_key", "since", "task")

    def __init__(self, lane: _Lane, exchange: str, routing_key: str, body: bytes, since: float) -> None:
        self.lane = lane
        self.exchange = exchange
        self.routing_key = routing_key
        self.body = body
        self.since = since
        self.task: asyncio.Task[Published]

    def is_same(self, exchange: str, routing_key: str, body: bytes) -> bool:
        return (self.exchange, self.routing_key, self.body) == (exchange, routing_key, body)


class Publisher:
    """Publishes with confirms on the connection it is given with `use`, one message per message id at a time."""

    def __init__(self, options: BusOptions, repair: Callable[[], Awaitable[None]]) -> None:
        self._options = options
        self._repair = repair
        self._lane: _Lane | None = None
        self._pending: dict[str, _Pending] = {}
        self._watch: asyncio.Task[None] | None = None
        self._enders: set[asyncio.Task[None]] = set()
        self._unconfirmed = Repeats("bus.unconfirmed")
        self.blocked = False

    def use(self, link: Link) -> None:
        """Publish on `link` from now on, until it is gone."""
        lane = self._lane = _Lane(link, self._repair)
        self._watch = asyncio.create_task(self._watch_over(link), name="bus.watchdog")
        link.on_closed(lambda: self._lost(lane))

    def _lost(self, lane: _Lane) -> None:
        if self._lane is lane:
            self._lane, self.blocked = None, False
            if self._watch is not None:
                self._watch.cancel()
        ender = asyncio.create_task(self._end(lane), name="bus.end_publishes")
        self._enders.add(ender)
        ender.add_done_callback(self._enders.discard)

    async def _end(self, lane: _Lane) -> None:
        """Publishes of a dead connection end by themselves, but for those stuck in aiormq's write queue."""
        tasks = {pending.task for pending in self._pending.values() if pending.lane is lane}
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=ENDED_S)
            for task in stuck:
                task.cancel()

    async def publish(
        self, exchange: str, routing_key: str, body: bytes, *, message_id: str, content_type: str, headers: dict[str, str]
    ) -> Published:
        """See `ports.Bus.publish`. Cancelling the caller leaves the publish to go on in the background."""
        if any(len(text.encode()) > SHORT_BYTES for text in (exchange, routing_key, message_id, content_type)):
            logger.bind(action="bus.publish_refused").error(
                "Not published to {}: exchange, routing key, message id and content type are limited to {} bytes each.",
                exchange,
                SHORT_BYTES,
            )
            return Published.REFUSED
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.publish_timeout_s
        while (earlier := self._pending.get(message_id)) is not None:
            result = await _result(earlier.task, deadline - loop.time())
            if not earlier.task.done():
                return Published.UNKNOWN
            if result is Published.CONFIRMED and earlier.is_same(exchange, routing_key, body):
                return result
        if self._lane is None:
            # A caller that repeats at once must not starve the loop that brings the connection back.
            await asyncio.sleep(0)
            return Published.UNKNOWN
        message = aio_pika.Message(
            body,
            content_type=content_type,
            message_id=message_id,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            headers=_headers(headers),
        )
        pending = _Pending(self._lane, exchange, routing_key, body, loop.time())
        pending.task = asyncio.create_task(self._send(pending, message), name="bus.publish")
        self._pending[message_id] = pending
        pending.task.add_done_callback(lambda _: self._pending.pop(message_id, None))
        return await _result(pending.task, deadline - loop.time())

    async def _send(self, pending: _Pending, message: aio_pika.Message) -> Published:
        number = 0
        try:
            exchange = await pending.lane.exchange(pending.exchange)
            number = pending.lane.take_number(pending.exchange)
            # No `mandatory`: a Return that crosses a timeout wedges the connection, and two Returns with one message
            # id become a false confirm (aiormq 7.2.4, measured). Alternate exchanges do its work.
            confirm = await exchange.publish(message, pending.routing_key, mandatory=False)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            return Published.UNKNOWN
        except aiormq.exceptions.DeliveryError:
            return Published.REFUSED
        except aiormq.exceptions.AMQPChannelError as error:
            return Published.REFUSED if _is_culprit(error, pending, number) else Published.UNKNOWN
        except Exception as error:
            logger.bind(action="bus.publish_unknown").debug("A publish to {} ended with {!r}", pending.exchange, error)
            return Published.UNKNOWN
        return Published.CONFIRMED if isinstance(confirm, spec.Basic.Ack) else Published.UNKNOWN

    async def _watch_over(self, link: Link) -> None:
        """Give up a connection that confirms nothing any more, unless RabbitMQ said that it blocks us."""
        loop = asyncio.get_running_loop()
        free_since = loop.time()
        log = logger.bind(action="bus.blocked")
        while True:
            await asyncio.sleep(min(WATCH_S, self._options.watchdog_s / 4))
            if await link.blocked() and not link.closed.is_set():
                free_since = loop.time()
                if not self.blocked:
                    log.warning("RabbitMQ blocks publishers (memory or disk alarm): events wait here until it is over.")
                self.blocked = True
                continue
            if self.blocked:
                log.info("RabbitMQ takes messages again.")
            self.blocked = False
            await self._watch_oldest(link, free_since)

    async def _watch_oldest(self, link: Link, free_since: float) -> None:
        now = asyncio.get_running_loop().time()
        oldest = min((pending.since for pending in self._pending.values() if pending.lane.link is link), default=now)
        age_s = now - max(oldest, free_since)
        if age_s <= self._options.watchdog_s:
            self._unconfirmed.clear()
            return
        watchdog = logger.bind(action="bus.watchdog")
        if age_s < self._options.watchdog_s * PATIENCE and await link.answers(self._options.watchdog_s / 2):
            # Starting over would only send everything twice, to all other subscribers too.
            self._unconfirmed(
                "RabbitMQ answers but does not confirm what we publish: a subscriber's queue is probably without leader."
            )
        elif not link.closed.is_set():
            watchdog.error("RabbitMQ has not confirmed a publish for {:.0f} s: starting over.", age_s)
            link.abort()

    async def drain(self, timeout_s: float) -> None:
        """Wait for pending confirms, at most `timeout_s`."""
        if tasks := {pending.task for pending in self._pending.values()}:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def stop(self) -> None:
        """End what is left, after the connection was closed."""
        tasks: list[asyncio.Task[None] | asyncio.Task[Published]] = [*self._enders]
        tasks += [pending.task for pending in self._pending.values()]
        if self._watch is not None:
            tasks.append(self._watch)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _headers(headers: dict[str, str]) -> HeadersType:
    return dict(headers)


async def _result(task: asyncio.Task[Published], timeout_s: float) -> Published:
    await asyncio.wait({task}, timeout=max(0.0, timeout_s))
    if not task.done() or task.cancelled():
        return Published.UNKNOWN
    return task.result()


def _is_culprit(error: aiormq.exceptions.AMQPChannelError, pending: _Pending, number: int) -> bool:
    """Whether RabbitMQ certainly did not store this message when it closed the channel.

    It closes the channel for one message and ignores all after it, but names only the exchange. So of those for that
    exchange only the newest is certain: it is the one, or came after it.
    """
    if limit := _TOO_LARGE.search(str(error)):
        return len(pending.body) > int(limit.group(1))
    return object_of(error) == pending.exchange and pending.lane.is_newest(pending.exchange, number)


class Replier:
    """Replies, unconfirmed, to the default exchange, on a third connection that is opened with the first reply.

    A connection of its own because a channel is not enough: RabbitMQ 3.10 answers a malformed `amq.rabbitmq.reply-to.…`
    by closing the whole connection (541 INTERNAL_ERROR, measured), and whoever sends a command chooses its reply_to.
    """

    def __init__(self, options: BusOptions) -> None:
        self._options = options
        self._link: Link | None = None
        self._channel: AbstractChannel | None = None
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._attempt = 0
        self._not_before = 0.0
        self._trouble = Repeats("bus.reply_lost")

    async def reply(self, reply_to: str, correlation_id: str | None, body: bytes) -> None:
        """See `ports.Bus.reply`. Waits a second at most, then goes on in the background."""
        if not 0 < len(reply_to.encode()) <= SHORT_BYTES:
            self._trouble("A reply was not sent: its reply_to is no queue name.")
            await asyncio.sleep(0)
            return
        if len(self._tasks) >= REPLIES_MAX:
            self._trouble(f"More than {REPLIES_MAX} replies wait for RabbitMQ: dropping replies.")
            await asyncio.sleep(0)
            return
        task = asyncio.create_task(self._send(reply_to, correlation_id, body), name="bus.reply")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait({task}, timeout=REPLY_WAIT_S)

    async def _send(self, reply_to: str, correlation_id: str | None, body: bytes) -> None:
        try:
            async with asyncio.timeout(self._options.publish_timeout_s):
                channel = await self._ready()
                message = aio_pika.Message(body, content_type="application/json", correlation_id=correlation_id)
                await channel.default_exchange.publish(message, reply_to, mandatory=False)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            self._trouble("A reply was lost: its connection to RabbitMQ went away.")
        except Exception as error:
            self._trouble(f"A reply was lost: {describe(error, self._options).message}")

    async def _ready(self) -> AbstractChannel:
        async with self._opening:
            if self._link is not None and not self._link.closed.is_set() and self._channel and not self._channel.is_closed:
                return self._channel
            loop = asyncio.get_running_loop()
            if loop.time() < self._not_before:
                raise LinkLost("The connection for replies was lost and is not open again yet.")
            self._not_before = loop.time() + delay(self._attempt, base_s=0.1, cap_s=self._options.claim_cap_s, random01=jitter())
            self._attempt += 1
            if self._link is None or self._link.closed.is_set():
                await self.close(0.0)
                self._link = await Link.open(self._options, "reply")
            self._channel = await self._link.channel()
            self._attempt = 0
            return self._channel

    async def close(self, timeout_s: float) -> None:
        """Close the connection if there is one; later replies open another."""
        link, self._link, self._channel = self._link, None, None
        if link is not None:
            await link.close(timeout_s)

    async def stop(self, timeout_s: float) -> None:
        """Give replies on their way `timeout_s`, then close."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in self._tasks:
            task.cancel()
        await self.close(timeout_s)
