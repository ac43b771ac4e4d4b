"""Numbered messages both ways, all the time: phones that write, and a service that publishes commands and survives RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from functools import partial

import aio_pika
import orjson
from aio_pika.abc import AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS
from tests.faults.ledger import Ledger

from warren.edges.amqp_link import QuietConnection, bounded
from warren.errors import BrokerUnavailable
from warren.simulator import Simulator

TROUBLE = (*CONNECTION_EXCEPTIONS, BrokerUnavailable, TimeoutError)
CONNECT_S, CONFIRM_S, CLOSE_S = 5.0, 10.0, 2.0
PAUSE_S = 0.3

Url = Callable[[], str]


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[AbstractConnection]:
    """A connection that is given up without much ado when it is dead already."""
    connection = await bounded(aio_pika.connect(url, timeout=CONNECT_S, connection_class=QuietConnection), CONNECT_S + 1)
    try:
        yield connection
    finally:
        await give_up(connection)


async def give_up(connection: AbstractConnection) -> None:
    with contextlib.suppress(*TROUBLE):
        await bounded(connection.close(), CLOSE_S)


class Service:
    """Publishes commands with confirm, and repeats each, with the same id, until RabbitMQ has confirmed it."""

    def __init__(self, url: Url, prefix: str) -> None:
        self._url, self._exchange_name = url, f"{prefix}.commands"
        self._connection: AbstractConnection | None = None
        self._exchange: AbstractExchange | None = None
        self._opening = asyncio.Lock()
        self.repeated = 0

    async def publish(self, body: dict[str, object], session: str) -> None:
        message = aio_pika.Message(orjson.dumps(body), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        while True:
            exchange = None
            try:
                exchange = await self._open()
                await bounded(exchange.publish(message, session, mandatory=False), CONFIRM_S)
            except TROUBLE:
                self.repeated += exchange is not None
                await self._lost(exchange)
            else:
                return

    async def close(self) -> None:
        if self._connection is not None:
            await give_up(self._connection)

    async def _open(self) -> AbstractExchange:
        async with self._opening:
            if self._exchange is None:
                connect = aio_pika.connect(self._url(), timeout=CONNECT_S, connection_class=QuietConnection)
                self._connection = await bounded(connect, CONNECT_S + 1)
                channel = await bounded(self._connection.channel(publisher_confirms=True), CONNECT_S)
                self._exchange = await channel.get_exchange(self._exchange_name, ensure=False)
            return self._exchange

    async def _lost(self, exchange: AbstractExchange | None) -> None:
        async with self._opening:
            if self._exchange is exchange and self._connection is not None:
                self._exchange, lost, self._connection = None, self._connection, None
                await give_up(lost)
        await asyncio.sleep(PAUSE_S)


async def subscribe(url: Url, prefix: str, ledger: Ledger) -> None:
    """Take everything from a durable queue, for ever; over every death of RabbitMQ."""
    while True:
        with contextlib.suppress(*TROUBLE):
            async with connected(url()) as connection:
                channel = await bounded(connection.channel(), CONNECT_S)
                await bounded(channel.set_qos(prefetch_count=500), CONNECT_S)
                queue = await bounded(channel.declare_queue(f"{prefix}-ledger", durable=True), CONNECT_S)
                await bounded(queue.bind(f"{prefix}.events", "#"), CONNECT_S)
                gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                channel.close_callbacks.add(partial(_set, gone))
                await bounded(queue.consume(partial(_take, ledger)), CONNECT_S)
                await gone
        await asyncio.sleep(PAUSE_S)


async def _take(ledger: Ledger, message: AbstractIncomingMessage) -> None:
    ledger.take(orjson.loads(message.body))
    with contextlib.suppress(*TROUBLE):  # it is delivered again, then
        await message.ack()


def _set(future: asyncio.Future[None], *_: object) -> None:
    if not future.done():
        future.set_result(None)


class Traffic:
    """For each session, one numbered message to it and one command for it every `period_s`, until `stop`.

    `written` and `asked` are the highest numbers that WhatsApp, or RabbitMQ, has taken over. Who is `window` numbers ahead of the
    subscriber waits: what a busy machine cannot pass on at this pace is not piled up.
    """

    def __init__(
        self,
        sim: Simulator,
        service: Service,
        peer: str,
        numbers: dict[str, str],
        ledger: Ledger,
        *,
        period_s: float,
        window: float = math.inf,
    ) -> None:
        self._sim, self._service, self._peer, self._numbers = sim, service, peer, numbers
        self._ledger, self._period_s, self._window = ledger, period_s, window
        self.written: dict[str, int] = defaultdict(int)
        self.asked: dict[str, int] = defaultdict(int)
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, *, commands: bool = True) -> None:
        for n, session in enumerate(self._numbers):
            offset_s = self._period_s * n / len(self._numbers)
            self._tasks.append(asyncio.create_task(self._write(session, offset_s)))
            if commands:
                self._tasks.append(asyncio.create_task(self._ask(session, offset_s + self._period_s / 2)))

    async def stop(self) -> None:
        """No further number is begun; returns when those under way are through."""
        self._over.set()
        tasks, self._tasks = self._tasks, []
        await asyncio.gather(*tasks)

    async def abort(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Raise what ended a task before its time."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def burst(self, session: str, messages: int, commands: int) -> None:
        """So many at once instead of one every `period_s`."""
        await self._sim.send(self._peer, self._numbers[session], f"in {session}", count=messages)
        self.written[session] += messages
        for number in range(1, commands + 1):
            await self._publish(session, number)

    async def _write(self, session: str, offset_s: float) -> None:
        async for number in self._numbers_from(offset_s, session, self._ledger.last):
            await self._sim.send(self._peer, self._numbers[session], f"in {session} {number}")
            self.written[session] = number

    async def _ask(self, session: str, offset_s: float) -> None:
        async for number in self._numbers_from(offset_s, session, self._ledger.ended):
            await self._publish(session, number)

    async def _publish(self, session: str, number: int) -> None:
        args = {"to": f"+{self._peer}", "text": f"out {session} {number}"}
        body: dict[str, object] = {"command": "send", "session": session, "id": f"{session}-{number}", "args": args}
        await self._service.publish(body, session)
        self.asked[session] = number

    async def _numbers_from(self, offset_s: float, session: str, arrived: dict[str, int]) -> AsyncIterator[int]:
        loop = asyncio.get_running_loop()
        due, number = loop.time() + offset_s, 0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), max(0.0, due - loop.time()))
            while number - arrived[session] >= self._window and not self._over.is_set():
                await asyncio.sleep(PAUSE_S)
            if self._over.is_set():
                return
            number += 1
            yield number
            # Who was held up goes on at the usual pace: no burst of what could not be said meanwhile.
            due = max(due, loop.time() - self._period_s) + self._period_s
