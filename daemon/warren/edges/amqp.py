"""RabbitMQ: connects, declares, reconnects; gives the services `ports.Bus`.

Two connections carry everything that matters, one to publish and one to consume, because a memory alarm blocks the
first and must not block the second; a third one carries replies (see `amqp_publish.Replier`). Reconnecting is ours:
aio-pika's robust restore wedges the whole connection when one lock is taken. See docs/adr/0003-bus.md.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Final

from aio_pika.abc import AbstractChannel
from loguru import logger

from warren.core.backoff import delay
from warren.edges.amqp_claim import AmqpClaim, Delivery, Gate, Intake, KeptChannel
from warren.edges.amqp_link import BusOptions, Link, LinkLost, Repeats, bounded, describe, end, jitter, raise_if_cancelled
from warren.edges.amqp_publish import Publisher, Replier
from warren.edges.amqp_topology import declare
from warren.errors import BrokerUnavailable, OwnershipError
from warren.ports import Incoming, OnDead, OnMessage, Published

__all__ = ["AmqpBus", "BusOptions"]


POLITE_S: Final = 1.0
"""How long a connection may take to close before it is cut off, when the other one is lost."""


class AmqpBus:
    """`ports.Bus` on RabbitMQ. `start` and `close` once each, in one event loop.

    `on_unclaimed` gets commands for sessions nobody serves, `on_query` those of the queries exchange, `on_dead` copies of what
    goes to the dead queue; `on_lock_lost` hears, once, that somebody else verifiably holds a session claimed here (the claim goes
    on trying). All are called in the event loop and must not block or raise.
    """

    def __init__(
        self,
        options: BusOptions,
        *,
        on_unclaimed: OnMessage,
        on_query: OnMessage,
        on_dead: OnDead,
        on_lock_lost: Callable[[str], None],
    ) -> None:
        self._options = options
        self._endpoint = options.endpoint  # fails here for a URL that is none
        self._on_unclaimed = on_unclaimed
        self._on_query = on_query
        self._on_dead = on_dead
        self._on_lock_lost = on_lock_lost
        self._connected = asyncio.Event()
        self._gate = Gate()
        self._publisher = Publisher(options, self._repair)
        self._replier = Replier(options)
        self._common = KeptChannel(self._gate, options, self._set_up_common, name="common", on_failed=self._common_failed)
        self._claims: dict[str, AmqpClaim] = {}
        self._links: list[Link] = []
        self._supervisor: asyncio.Task[None] | None = None
        self._closing = False
        self._trouble = ""
        self._log = logger.bind(action="bus.connection")
        self._repeats = Repeats("bus.disconnected")

    @property
    def connected(self) -> asyncio.Event:
        """See `ports.Bus`."""
        return self._connected

    @property
    def trouble(self) -> str:
        """What is wrong with RabbitMQ right now, in a sentence with a hint; empty when nothing is."""
        if not self._trouble and self._publisher.blocked:
            return "RabbitMQ blocks publishers. Free memory or disk space on its host (rabbitmqctl status)."
        return self._trouble

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to connect; returns at once. Wait for `connected` where it matters."""
        self._common.start()
        self._supervisor = asyncio.create_task(self._supervise(), name="bus.supervisor")

    async def close(self) -> None:
        """Stop consuming, give pending confirms a moment, release all locks by closing the connections.

        Bounded by `close_timeout_s`, also when RabbitMQ does not answer. Unsettled messages go back to their queues.
        """
        self._closing = True
        step_s = self._options.close_timeout_s / 4
        for claim in self._claims.values():
            claim.hush()
        await asyncio.gather(self._publisher.drain(step_s), self._replier.stop(step_s))
        if self._supervisor is not None:
            await end(self._supervisor)
        stops = [asyncio.ensure_future(claim.abandon()) for claim in self._claims.values()]
        stops.append(asyncio.ensure_future(self._common.stop(quiet=True)))
        self._claims.clear()
        # What does not stop by itself does when its connection is gone.
        await asyncio.wait(stops, timeout=step_s)
        await self._disconnect(step_s)
        await asyncio.gather(*stops)
        await self._publisher.stop()
        self._log.info("The connection to RabbitMQ at {} is closed.", self._endpoint)

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            began = loop.time()
            try:
                error = await self._serve()
            except (Exception, asyncio.CancelledError) as caught:
                raise_if_cancelled(caught)
                error = caught
            self._connected.clear()
            self._gate.shut()
            trouble = describe(error, self._options)
            self._trouble = str(trouble)
            self._repeats(self._trouble)
            await self._disconnect(POLITE_S)
            if loop.time() - began > self._options.stable_s:
                attempt = 0
                self._repeats.clear()
            wait_s = delay(
                attempt,
                base_s=self._options.backoff_base_s,
                cap_s=self._options.backoff_cap_s,
                random01=jitter(),
            )
            attempt += 1
            await asyncio.sleep(wait_s)

    async def _serve(self) -> BaseException:
        """Connect and stay connected; returns why a connection was lost, or raises why there was none."""
        lost = asyncio.Event()
        for role in ("publish", "consume"):
            link = await Link.open(self._options, role)
            self._links.append(link)
            link.on_closed(lost.set)
        publish, consume = self._links
        await self._declare(consume)
        self._publisher.use(publish)
        self._gate.open(consume)
        await self._wait_common(lost)
        if not lost.is_set():
            self._trouble = ""
            self._connected.set()
            self._log.info("Connected to RabbitMQ at {}.", self._endpoint)
        await lost.wait()
        self._connected.clear()
        why = next((link.why for link in self._links if link.closed.is_set()), None)
        return why or LinkLost(f"The connection to RabbitMQ at {self._endpoint} was lost.")

    async def _wait_common(self, lost: asyncio.Event) -> None:
        waits = {asyncio.ensure_future(self._common.up.wait()), asyncio.ensure_future(lost.wait())}
        try:
            done, _ = await asyncio.wait(waits, timeout=self._options.request_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not done:
            raise BrokerUnavailable(
                self._trouble or "RabbitMQ does not let us consume.", hint="See the log of RabbitMQ for the reason."
            )

    async def _disconnect(self, timeout_s: float) -> None:
        links, self._links = self._links, []
        await asyncio.gather(*(link.close(timeout_s) for link in links))

    # --- what all daemons share ---------------------------------------------------------------------------------------

    async def _declare(self, link: Link) -> None:
        channel = await link.channel()
        options = self._options
        work = declare(
            channel,
            options.topology,
            unrouted_ttl_s=options.unrouted_ttl_s,
            unrouted_max=options.unrouted_max,
            dead_max=options.dead_max,
        )
        await bounded(work, options.request_timeout_s)
        await bounded(channel.close(), options.request_timeout_s)

    async def _repair(self) -> None:
        """Declare everything again: an exchange we publish to is gone."""
        if (link := self._gate.current) is not None:
            await self._declare(link)

    async def _set_up_common(self, link: Link, channel: AbstractChannel, intake: Intake) -> None:
        options, names = self._options, self._options.topology
        await intake.consume(names.unclaimed, self._on_unclaimed, prefetch=options.control_prefetch)
        await intake.consume(names.notices, self._on_notice, prefetch=options.control_prefetch)
        # A name for each connection: an exclusive queue of our own half-open last one would lock us out for half a minute.
        queries = await channel.declare_queue(
            names.queries_queue(f"{options.instance}.{uuid.uuid4().hex[:8]}"), exclusive=True, auto_delete=True
        )
        await queries.bind(names.queries)
        await intake.consume(queries.name, self._on_query, prefetch=options.control_prefetch)

    def _on_notice(self, notice: Incoming) -> None:
        assert isinstance(notice, Delivery)
        self._on_dead(notice, notice.died())

    def _common_failed(self, error: BaseException) -> None:
        trouble = describe(error, self._options)
        self._repeats(f"Commands that nobody serves are not consumed: {trouble}")
        if not self._connected.is_set():
            self._trouble = str(trouble)

    # --- ports.Bus ----------------------------------------------------------------------------------------------------

    async def publish(
        self, exchange: str, routing_key: str, body: bytes, *, message_id: str, content_type: str, headers: dict[str, str]
    ) -> Published:
        """See `ports.Bus.publish`."""
        return await self._publisher.publish(
            exchange, routing_key, body, message_id=message_id, content_type=content_type, headers=headers
        )

    async def reply(self, reply_to: str, correlation_id: str | None, body: bytes) -> None:
        """See `ports.Bus.reply`."""
        if self._closing or not self._connected.is_set():
            await asyncio.sleep(0)
            return
        await self._replier.reply(reply_to, correlation_id, body)

    async def claim(self, session: str, *, on_control: OnMessage, on_work: OnMessage) -> AmqpClaim:
        """See `ports.Bus.claim`. A claim of the same session that is being released here is waited for."""
        if (earlier := self._claims.get(session)) is not None and earlier.releasing:
            await earlier.released.wait()
        if self._gate.current is None:
            raise BrokerUnavailable(
                self._trouble or f"RabbitMQ at {self._endpoint} is not connected.", hint="Try again when it is back."
            )
        claim = self._new_claim(session, on_control, on_work)
        await claim.first_try()
        return claim

    def keep_claim(self, session: str, *, on_control: OnMessage, on_work: OnMessage) -> AmqpClaim:
        """See `ports.Bus.keep_claim`. Raises OwnershipError when this bus has a claim of the session already."""
        return self._new_claim(session, on_control, on_work)

    def _new_claim(self, session: str, on_control: OnMessage, on_work: OnMessage) -> AmqpClaim:
        if session in self._claims:
            raise OwnershipError(f"Session {session} is claimed by this daemon already.")
        claim = AmqpClaim(
            session,
            self._gate,
            self._options,
            on_control=on_control,
            on_work=on_work,
            on_lock_lost=self._on_lock_lost,
            on_released=self._forget,
        )
        self._claims[session] = claim
        claim.start()
        return claim

    def _forget(self, claim: AmqpClaim) -> None:
        if self._claims.get(claim.session) is claim:
            del self._claims[claim.session]
