"""Consuming: channels that are set up again when lost, and the claims that live on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol

import aiormq.exceptions
from aio_pika.abc import AbstractChannel
from aiormq import spec
from aiormq.abc import AbstractChannel as RawChannel
from aiormq.abc import DeliveredMessage
from loguru import logger

from warren.core.backoff import delay
from warren.edges.amqp_link import (
    BusOptions,
    Link,
    LinkLost,
    Repeats,
    bounded,
    describe,
    end,
    is_cancelled,
    jitter,
    raise_if_cancelled,
)
from warren.edges.amqp_topology import work_queue_arguments
from warren.errors import BrokerUnavailable, OwnershipError
from warren.ports import OnMessage

TURNS: Final = 32
"""Channels set up at the same time: a thousand sessions come back quickly, and no request waits behind all of them."""
DISCARD_S: Final = 2.0
UNBOUND_S: Final = 0.1
"""A message that RabbitMQ routed just before an unbind may reach its queue just after it."""
POLL_S: Final = 0.02


class Gate:
    """Where consuming channels get their connection: open while it is up and the topology is declared."""

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(TURNS)
        self._link: Link | None = None
        self._opened = asyncio.Event()

    def open(self, link: Link) -> None:
        self._link = link
        self._opened.set()
        link.on_closed(self.shut)

    def shut(self) -> None:
        self._link = None
        self._opened.clear()

    @property
    def current(self) -> Link | None:
        return self._link

    async def link(self) -> Link:
        """The connection; waits until there is one."""
        while (link := self._link) is None:
            await self._opened.wait()
        return link


class Delivery:
    """An unsettled message (`ports.Incoming`)."""

    __slots__ = (
        "_intake", "_settled", "_tag", "body", "correlation_id", "exchange", "headers", "message_id", "redelivered", "reply_to",
        "routing_key",
    )  # fmt: skip

    def __init__(self, intake: Intake, message: DeliveredMessage) -> None:
        delivery, properties = message.delivery, message.header.properties
        assert isinstance(delivery, spec.Basic.Deliver | spec.Basic.GetOk)
        self._intake = intake
        self._tag = delivery.delivery_tag or 0
        self._settled = False
        self.body: bytes = message.body
        # Also for what came over an alternate exchange RabbitMQ names the exchange of the publisher (measured, 3.10).
        self.exchange: str = delivery.exchange or ""
        self.routing_key: str = delivery.routing_key or ""
        self.message_id: str | None = properties.message_id
        self.reply_to: str | None = properties.reply_to
        self.correlation_id: str | None = properties.correlation_id
        self.redelivered: bool = bool(delivery.redelivered)
        self.headers: Mapping[str, object] = properties.headers or {}

    def died(self) -> str:
        """Why RabbitMQ ended this message, in its own word ("expired", ...); "" when it was not RabbitMQ.

        From then on `exchange` is the one that the client published to.
        """
        match self.headers.get("x-death"):
            case [{"reason": str(reason), "exchange": str(exchange)}, *_]:  # the last death comes first
                self.exchange = exchange
                return reason
        return ""

    async def ack(self) -> None:
        await self._settle(requeue=False)

    async def requeue(self) -> None:
        await self._settle(requeue=True)

    async def _settle(self, *, requeue: bool) -> None:
        if self._settled:
            logger.bind(action="bus.settled_twice").error("A message from {} was settled twice.", self.exchange)
            return
        self._settled = True
        try:
            await self._intake.settle(self._tag, requeue=requeue)
        except asyncio.CancelledError:
            self._settled = False
            raise


class Intake:
    """What one channel handed over, until it is settled."""

    def __init__(self, channel: RawChannel, lose: Callable[[BaseException], None], timeout_s: float) -> None:
        self.channel = channel
        self.unsettled = 0
        self._lose = lose
        self._timeout_s = timeout_s

    async def consume(self, queue: str, on_message: OnMessage, *, prefetch: int) -> str:
        """Hand over everything from `queue`, at most `prefetch` unsettled ones. Returns the consumer's tag."""
        await self.channel.basic_qos(prefetch_count=prefetch, timeout=self._timeout_s)

        # aiormq runs this in a task of its own that it cancels when the channel goes: so it does nothing but hand over.
        async def deliver(message: DeliveredMessage) -> None:
            self.hand_over(message, on_message)

        started = await self.channel.basic_consume(queue, deliver, timeout=self._timeout_s)
        return started.consumer_tag or ""

    async def cancel(self, tag: str) -> None:
        await self.channel.basic_cancel(tag, timeout=self._timeout_s)

    async def get(self, queue: str, on_message: OnMessage) -> bool:
        """Hand over one message of `queue`; False when it has none."""
        message = await self.channel.basic_get(queue, timeout=self._timeout_s)
        if isinstance(message.delivery, spec.Basic.GetEmpty):
            return False
        self.hand_over(message, on_message)
        return True

    def hand_over(self, message: DeliveredMessage, on_message: OnMessage) -> None:
        self.unsettled += 1
        try:
            on_message(Delivery(self, message))
        except Exception as error:  # a caller's bug; it must not end aiormq's reader
            logger.bind(action="bus.handler_failed").opt(exception=error).error("A message could not be handed over.")

    async def settle(self, tag: int, *, requeue: bool) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                if requeue:
                    await self.channel.basic_reject(tag, requeue=True, wait=False)
                else:
                    await self.channel.basic_ack(tag, wait=False)
        except TimeoutError as error:
            self._lose(error)  # a message that can not be settled would hold its place in the prefetch for ever
        except asyncio.CancelledError:
            if is_cancelled():
                raise
        except Exception as error:
            logger.bind(action="bus.settle_lost").debug("Not settled, RabbitMQ redelivers: {!r}", error)
        self.unsettled -= 1


class SetUp(Protocol):
    async def __call__(self, link: Link, channel: AbstractChannel, intake: Intake) -> None: ...


class KeptChannel:
    """A channel on the consuming connection that is opened and set up again, with backoff, whenever it is lost.

    `on_failed` hears every failed try and every loss but those by the loss of the connection; `on_down` is called when
    a channel that was set up is gone.
    """

    def __init__(
        self,
        gate: Gate,
        options: BusOptions,
        set_up: SetUp,
        *,
        name: str,
        on_failed: Callable[[BaseException], None],
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        self._gate = gate
        self._options = options
        self._set_up = set_up
        self._name = name
        self._on_failed = on_failed
        self._on_down = on_down
        self._lost = asyncio.Event()
        self._why: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self._quiet = False
        self.up = asyncio.Event()
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the first try is over, with its error if it failed."""

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"bus.{self._name}")

    def lose(self, why: BaseException | None) -> None:
        """Give up the channel as it is; another one is set up."""
        self._lose(self._lost, why)

    def _lose(self, lost: asyncio.Event, why: BaseException | None) -> None:
        if lost is self._lost and not lost.is_set():
            self._why = why
            lost.set()

    async def stop(self, *, quiet: bool = False) -> None:
        """Close the channel for good. `quiet`: without a word to RabbitMQ, because the connection is closed next."""
        self._quiet = quiet
        if self._task is not None:
            await end(self._task)
        if not self.first.done():
            self.first.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            link = await self._gate.link()
            began = loop.time()
            error: BaseException | None
            try:
                error = await self._hold(link)
            except (Exception, asyncio.CancelledError) as caught:
                raise_if_cancelled(caught)
                error = caught
            self._finish_first(error)
            if link.closed.is_set():
                attempt = 0  # the bus has its own backoff for connections
                continue
            self._on_failed(error or LinkLost("RabbitMQ closed a channel."))
            if loop.time() - began > self._options.stable_s:
                attempt = 0
            await asyncio.sleep(
                delay(
                    attempt,
                    base_s=self._options.backoff_base_s,
                    cap_s=self._options.claim_cap_s,
                    random01=jitter(),
                )
            )
            attempt += 1

    def _finish_first(self, error: BaseException | None) -> None:
        if self.first.done():
            return
        if error is None:
            self.first.set_result(None)
        else:
            self.first.set_exception(error if isinstance(error, Exception) else LinkLost("RabbitMQ went away."))
            self.first.exception()  # nobody may be waiting

    async def _hold(self, link: Link) -> BaseException | None:
        """Open and set up, then wait until the channel is lost. Returns why it was."""
        self._lost = asyncio.Event()
        self._why = None
        lose = partial(self._lose, self._lost)  # a callback of an earlier channel may come late
        channel: AbstractChannel | None = None
        try:
            async with self._gate.turns:
                channel = await link.channel()
                raw = await channel.get_underlay_channel()
                channel.close_callbacks.add(lambda _, why: lose(why))
                # aio-pika's plain channel is silent when RabbitMQ ends a consumer (its queue was deleted).
                raw.on_consumer_cancel_callbacks.add(lambda frame: lose(LinkLost("RabbitMQ ended a consumer.")))
                intake = Intake(raw, lose, self._options.request_timeout_s)
                await bounded(self._set_up(link, channel, intake), self._options.request_timeout_s * 2)
            self.up.set()
            self._finish_first(None)
            await self._lost.wait()
            return self._why
        finally:
            self.up.clear()
            self._on_down()
            if channel is not None and not self._quiet:
                await _discard(channel)


async def _discard(channel: AbstractChannel) -> None:
    """Close a channel, in a task of its own so that nobody waits for it longer than a moment."""
    task = asyncio.ensure_future(channel.close())
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait({task}, timeout=DISCARD_S)


class AmqpClaim:
    """One session's lock, queues and consumers (`ports.Claim`)."""

    def __init__(
        self,
        session: str,
        gate: Gate,
        options: BusOptions,
        *,
        on_control: OnMessage,
        on_work: OnMessage,
        on_lock_lost: Callable[[str], None],
        on_released: Callable[[AmqpClaim], None],
    ) -> None:
        self.session = session
        self._gate = gate
        self._options = options
        self._on_control = on_control
        self._on_work = on_work
        self._on_lock_lost = on_lock_lost
        self._on_released = on_released
        names = options.topology
        self._owner = names.owner_queue(session)
        self._control = names.control_queue(session)
        self._work = names.work_queue(session)
        self._new = names.new_queue(session)
        self._log = logger.bind(session=session)
        self._trouble = Repeats("claim.failed")
        self._kept = KeptChannel(gate, options, self._set_up, name=f"claim.{session}", on_failed=self._failed, on_down=self._down)
        self._mutex = asyncio.Lock()
        """Guards consuming and removing: one request at a time decides what is consumed."""
        self._releasing = asyncio.Lock()
        self._intake: Intake | None = None
        self._control_tag: str | None = None
        self._ripe = False
        """The work queue has no marker (any more): it may hold commands."""
        self._ripening: asyncio.Task[None] | None = None
        self._working: KeptChannel | None = None
        """A channel of its own for the work queue, there while its messages are wanted. Closing it returns what is unsettled
        all at once, in order; a cancelled consumer would not (RabbitMQ gives back what crosses the cancel before the rest)."""
        self._work_consumer: tuple[Intake | None, str | None] = (None, None)
        self._lock_link: Link | None = None
        self._locked_out_since: float | None = None
        self._told_lost = False
        self.released = asyncio.Event()

    @property
    def held(self) -> bool:
        """See `ports.Claim`. The lock is the connection's: losing only the channel does not lose it."""
        return self._lock_link is not None and self._lock_link is self._gate.current

    async def wait_held(self) -> None:
        """See `ports.Claim`."""
        await self._kept.up.wait()

    @property
    def releasing(self) -> bool:
        """Whether a `release` is under way."""
        return self._releasing.locked()

    def start(self) -> None:
        """Begin to take the lock and to keep it."""
        self._kept.start()

    async def first_try(self) -> None:
        """Wait for the first try; on failure give the claim up. Raises OwnershipError or BrokerUnavailable."""
        try:
            await asyncio.shield(self._kept.first)
        except asyncio.CancelledError:
            await self._give_up()
            raise
        except OwnershipError:
            await self._give_up()
            raise
        except Exception as error:
            await self._give_up()
            raise describe(error, self._options) from error

    # --- setting up ---------------------------------------------------------------------------------------------------

    async def _set_up(self, link: Link, channel: AbstractChannel, intake: Intake) -> None:
        await self._take_lock(link, channel)
        names = self._options.topology
        control = await channel.declare_queue(self._control, durable=True, arguments={"x-dead-letter-exchange": names.dead})
        await control.bind(names.control, self.session)
        new = await self._is_new(link, intake)
        if new:
            self._ripe = False  # also when it was before: a marker that is left behind has the next daemon delete commands
            await channel.declare_queue(self._new, durable=True)
            await intake.channel.queue_delete(self._work, timeout=self._options.request_timeout_s)
        work = await channel.declare_queue(self._work, durable=True, arguments=work_queue_arguments(names))
        if not new:
            if not self._ripe:
                await intake.channel.queue_delete(self._new, timeout=self._options.request_timeout_s)
            await work.bind(names.commands, self.session)
            self._ripe = True
        async with self._mutex:
            self._control_tag = await intake.consume(self._control, self._on_control, prefetch=self._options.control_prefetch)
            self._intake = intake
        if new:
            self._ripening = asyncio.create_task(self._ripen(intake), name=f"ripen.{self.session}")
        self._trouble.clear()
        self._log.bind(action="claim.held").info("Session {} is claimed.", self.session)

    # A quorum queue of RabbitMQ that is killed within a second of the queue's birth comes back without leader and without what it
    # had confirmed, for good (see docs/adr/0003-bus.md). So a work queue is bound only when it is older than that; until then a
    # second queue stands beside it that says so. What has that beside it is empty, and is simply made again.

    async def _is_new(self, link: Link, intake: Intake) -> bool:
        if self._ripe or await self._messages(link, self._new) is None:
            return await self._messages(link, self._work) is None
        if await self._messages(link, self._work) is None:
            return True
        # Were the marker's deletion forgotten, there could be commands in the queue: it is deleted only when it is seen empty.
        names, timeout_s = self._options.topology, self._options.request_timeout_s
        await intake.channel.queue_unbind(self._work, names.commands, self.session, timeout=timeout_s)
        await asyncio.sleep(UNBOUND_S)
        return not await self._messages(link, self._work)

    async def _messages(self, link: Link, queue: str) -> int | None:
        """How many wait in a queue; also 0 for one without leader. None: there is no such queue."""
        channel = await link.channel()  # one of its own: RabbitMQ closes it when there is no such queue
        try:
            declared = await channel.declare_queue(queue, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity as error:
            if "no queue" in str(error):
                return None
            raise  # it is there, but the node of the cluster that has it is down
        await _discard(channel)
        return declared.declaration_result.message_count or 0

    async def _ripen(self, intake: Intake) -> None:
        """Let commands into the work queue when it is old enough."""
        timeout_s = self._options.request_timeout_s
        try:
            await asyncio.sleep(self._options.ripe_s)
            async with self._mutex:
                await intake.channel.queue_delete(self._new, timeout=timeout_s)
                self._ripe = True
                await intake.channel.queue_bind(self._work, self._options.topology.commands, self.session, timeout=timeout_s)
        except (Exception, asyncio.CancelledError) as error:
            raise_if_cancelled(error)
            self._kept.lose(error)

    async def _stop_ripening(self) -> None:
        ripening, self._ripening = self._ripening, None
        if ripening is not None:
            await end(ripening)

    async def _take_lock(self, link: Link, channel: AbstractChannel) -> None:
        try:
            await channel.declare_queue(self._owner, exclusive=True)
        except aiormq.exceptions.ChannelLockedResource:
            if self._lock_link is link:
                # Our connection lives, so its queue was deleted by hand, and somebody else was quicker.
                self._tell_lost()
            self._lock_link = None
            raise OwnershipError(
                f"Session {self.session} is served by somebody else.",
                hint=f"Its lock is the queue '{self._owner}'; the connection that holds it is named after its daemon "
                "(rabbitmqctl list_connections client_properties).",
            ) from None
        self._lock_link = link
        self._locked_out_since = None
        self._told_lost = False

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, OwnershipError):
            self._locked_out()
        self._trouble(str(error if isinstance(error, OwnershipError) else describe(error, self._options)))

    def _locked_out(self) -> None:
        """Somebody holds the lock. For a while that may be our own dead connection, which RabbitMQ has not given up."""
        now = asyncio.get_running_loop().time()
        if self._locked_out_since is None:
            self._locked_out_since = now
        elif now - self._locked_out_since > self._options.lock_grace_s:
            self._tell_lost()

    def _tell_lost(self) -> None:
        if not self._told_lost:
            self._told_lost = True
            self._log.bind(action="claim.lost").error("Session {} is held by somebody else.", self.session)
            self._on_lock_lost(self.session)

    def _down(self) -> None:
        if self._ripening is not None:
            self._ripening.cancel()
        self._intake = None
        self._control_tag = None

    # --- consuming ----------------------------------------------------------------------------------------------------

    async def consume_work(self) -> None:
        """See `ports.Claim`. Consuming begins when the claim is held."""
        if self._working is None and not self.released.is_set():
            self._working = KeptChannel(
                self._gate, self._options, self._set_up_work, name=f"work.{self.session}", on_failed=self._work_failed
            )
            self._working.start()
        if (ripening := self._ripening) is not None:
            await asyncio.wait({ripening}, timeout=self._options.ripe_s * 2)

    async def pause_work(self) -> None:
        """See `ports.Claim`."""
        working, self._working = self._working, None
        if working is not None:
            await working.stop()

    async def _set_up_work(self, link: Link, channel: AbstractChannel, intake: Intake) -> None:
        if not self._kept.up.is_set():
            raise LinkLost(f"Session {self.session} is not claimed yet.")
        tag = await intake.consume(self._work, self._on_work, prefetch=self._options.work_prefetch)
        self._work_consumer = (intake, tag)

    def _work_failed(self, error: BaseException) -> None:
        if not self._kept.up.is_set():
            return  # the claim tells of its own trouble
        if isinstance(error, aiormq.exceptions.ChannelNotFoundEntity):
            self._kept.lose(error)  # somebody deleted the queue: the claim declares it again
            return
        if isinstance(error, TimeoutError):
            error = LinkLost(
                f"RabbitMQ does not let us consume '{self._work}'.",
                hint="It has no leader. In a cluster, bring back the nodes that are down. On a single node it is lost with what "
                "was in it: delete it (rabbitmqctl delete_queue), and warren makes it again.",
            )
        self._trouble(str(describe(error, self._options)))

    def hush(self) -> None:
        """Ask RabbitMQ to send nothing more, without waiting for its answer (the connection is closed soon)."""
        consumers = [(self._intake, self._control_tag)]
        if self._working is not None:
            consumers.append(self._work_consumer)
        for intake, tag in consumers:
            if intake is not None and tag is not None:
                _forget(asyncio.ensure_future(intake.channel.basic_cancel(tag, nowait=True)))

    # --- letting go ---------------------------------------------------------------------------------------------------

    async def release(self, *, remove: bool = False) -> None:
        """See `ports.Claim`; the second time it does nothing.

        With `remove`, raises BrokerUnavailable when RabbitMQ is away or messages handed over were not settled in time;
        the claim is then still held, nothing is lost, and `release` may be called again (with or without `remove`).
        """
        async with self._releasing:
            if self.released.is_set():
                return
            if remove:
                try:
                    await self._remove()
                except (Exception, asyncio.CancelledError) as error:
                    raise_if_cancelled(error)
                    raise describe(error, self._options) from error
            await self._give_up()
            self._log.bind(action="claim.released").info("Session {} is released.", self.session)

    async def abandon(self) -> None:
        """Stop without a word to RabbitMQ: the connection is closed next, and the lock goes with it."""
        working, self._working = self._working, None
        if working is not None:
            await working.stop(quiet=True)
        await self._kept.stop(quiet=True)
        await self._stop_ripening()
        self.released.set()

    async def _give_up(self) -> None:
        # The channels first: what is unsettled is back in its queue before anybody else can take the lock.
        await self.pause_work()
        await self._kept.stop()
        await self._stop_ripening()
        link, self._lock_link = self._lock_link, None
        if link is not None and not link.closed.is_set():
            await self._drop_lock(link)
        self.released.set()
        self._on_released(self)

    async def _drop_lock(self, link: Link) -> None:
        try:
            channel = await link.channel()
            await channel.queue_delete(self._owner, timeout=self._options.request_timeout_s)
            await _discard(channel)
        except (Exception, asyncio.CancelledError) as error:
            raise_if_cancelled(error)
            self._log.bind(action="claim.release_failed").warning(
                "The lock of session {} stays until the connection ends: {!r}", self.session, error
            )

    async def unbind(self) -> None:
        """See `ports.Claim`."""
        async with self._mutex:
            if (intake := self._intake) is None:
                return
            try:
                await self._stop_ripening()
                await self._unbind(intake)
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and is_cancelled():
                    raise
                self._kept.lose(error)

    async def _unbind(self, intake: Intake) -> None:
        names, timeout_s = self._options.topology, self._options.request_timeout_s
        await intake.channel.queue_unbind(self._control, names.control, self.session, timeout=timeout_s)
        await intake.channel.queue_unbind(self._work, names.commands, self.session, timeout=timeout_s)

    async def _remove(self) -> None:
        """Unbind, hand over what is left, wait until it is settled, delete the queues."""
        async with self._mutex:
            if (intake := self._intake) is None:
                raise BrokerUnavailable(
                    f"The queues of session {self.session} cannot be removed now: the session is not held.",
                    hint="Try again when RabbitMQ is back.",
                )
            timeout_s = self._options.request_timeout_s
            await self._stop_ripening()
            await self._unbind(intake)
            await self.pause_work()
            if self._control_tag is not None:
                await intake.cancel(self._control_tag)
            self._control_tag = None
            await asyncio.sleep(UNBOUND_S)
            await self._drain(intake)
            await intake.channel.queue_delete(self._control, if_empty=True, timeout=timeout_s)
            deleted = await intake.channel.queue_delete(self._work, timeout=timeout_s)  # quorum queues know no `if_empty`
            if deleted.message_count:
                self._log.bind(action="claim.commands_deleted").error(
                    "{} commands came to session {} while it was removed, and went with its queue.",
                    deleted.message_count,
                    self.session,
                )
            await intake.channel.queue_delete(self._new, timeout=timeout_s)

    async def _drain(self, intake: Intake) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.remove_timeout_s
        while True:
            left = False
            for queue, on_message in ((self._control, self._on_control), (self._work, self._on_work)):
                while intake.unsettled < self._options.work_prefetch and await intake.get(queue, on_message):
                    left = True
            if not left and not intake.unsettled:
                return
            if loop.time() > deadline:
                raise BrokerUnavailable(
                    f"{intake.unsettled} commands of session {self.session} are not answered yet.",
                    hint="Its queues are kept; remove it again later.",
                )
            await asyncio.sleep(POLL_S)


def _forget(task: asyncio.Future[object]) -> None:
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
