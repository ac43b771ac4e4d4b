"""One connection to RabbitMQ: opened, watched and closed within bounds; and what its errors mean."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from loguru import logger
from yarl import URL

from warren.core.names import Topology
from warren.edges.amqp_frames import FrameReader
from warren.errors import BrokerUnavailable, ConfigError

T = TypeVar("T")

# aiormq tells each failed try of ours, with a traceback for a lost connection. We tell it once, in words.
logging.getLogger("aiormq").setLevel(logging.CRITICAL)

REPEAT_S: Final = 60.0
"""A trouble that stays the same is logged again after this time."""
PEEK_S: Final = 0.05
ABORT_S: Final = 0.5
AGAIN_S: Final = 0.5
END_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class BusOptions:
    """How to reach and use RabbitMQ. Times in seconds.

    A dead peer is noticed after 3 x (`heartbeat_s` + 1). `watchdog_s`: the age of an unconfirmed publish at which the
    connection is given up. `stable_s`: how long things must go well before backoffs start from the beginning. `ripe_s`: how old
    a session's work queue must be before it takes commands.
    """

    url: str
    topology: Topology
    instance: str
    heartbeat_s: int = 10
    connect_timeout_s: float = 5.0
    request_timeout_s: float = 10.0
    publish_timeout_s: float = 10.0
    work_prefetch: int = 10
    control_prefetch: int = 20
    watchdog_s: float = 30.0
    backoff_base_s: float = 0.5
    backoff_cap_s: float = 30.0
    claim_cap_s: float = 5.0
    stable_s: float = 10.0
    ripe_s: float = 1.5
    unrouted_ttl_s: int = 86_400
    unrouted_max: int = 100_000
    dead_max: int = 100_000
    remove_timeout_s: float = 30.0
    close_timeout_s: float = 5.0

    @property
    def lock_grace_s(self) -> float:
        """How long RabbitMQ may take to notice that the connection which held a lock is dead."""
        return 3.0 * (self.heartbeat_s + 1)

    @property
    def endpoint(self) -> str:
        """Host, port and virtual host, without credentials. Raises ConfigError for a URL that is none."""
        try:
            parts = urlsplit(self.url)
            port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
        except ValueError as error:
            raise ConfigError(f"The RabbitMQ URL cannot be read: {error}.") from None
        if parts.scheme not in {"amqp", "amqps"} or not parts.hostname:
            raise ConfigError(
                "The RabbitMQ URL must begin with amqp:// or amqps:// and name a host.",
                hint="For example amqp://user:password@127.0.0.1:5672/",
            )
        return f"{parts.hostname}:{port}{parts.path or '/'}"


class LinkLost(BrokerUnavailable):
    """The connection or channel went away under a request."""


def jitter() -> float:
    """In [0, 1): spreads what would otherwise come back all at once."""
    return random.random()  # noqa: S311 (nothing to guess)


def is_cancelled() -> bool:
    """Whether somebody cancels the running task. aiormq ends waiters of a dead connection with a bare CancelledError."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def raise_if_cancelled(caught: BaseException) -> None:
    """In a handler that goes on after any error: but not if somebody cancels the running task.

    Whatever was caught: a cancellation that meets a closing channel comes out of aiormq as some other error.
    """
    if is_cancelled():
        raise asyncio.CancelledError from caught


async def end(task: asyncio.Task[None]) -> None:
    """Cancel `task` until it has ended, and again if aiormq swallowed it; at most `END_S`."""
    give_up = time.monotonic() + END_S
    while not task.done() and time.monotonic() < give_up:
        task.cancel()
        await asyncio.wait({task}, timeout=AGAIN_S)


async def bounded(awaitable: Awaitable[T], timeout_s: float) -> T:
    """Await RabbitMQ. Raises what aiormq raises, TimeoutError, or LinkLost where aiormq raises a bare CancelledError.

    A request given up (timeout, cancellation) costs its channel: aiormq closes it.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await awaitable
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        raise LinkLost("The connection to RabbitMQ went away.") from None


class _Streams(TransportFactory):
    """Opens sockets like aiormq does, makes frames readable, and keeps the writer: the only way to close without asking."""

    def __init__(self, inner: TransportFactory) -> None:
        self._inner = inner
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self.writer = await self._inner.create(url, **kwargs)
        return FrameReader(reader), self.writer


class QuietConnection(aio_pika.Connection):
    """aio-pika's connection, without the close that it begins when it is forgotten.

    After a failed connect there is nothing to close, and forgotten outside a running loop that close is never awaited, which
    Python warns about. A connection that did open must be closed by whoever opened it.
    """

    def __del__(self) -> None:
        pass


class _Connection(QuietConnection):
    def __init__(self, url: URL, *args: Any, **kwargs: Any) -> None:
        super().__init__(url, *args, **kwargs)
        self.streams = _Streams(TLSTransportFactory() if self.url.scheme == "amqps" else TCPTransportFactory())
        self.kwargs["transport_factory"] = self.streams


class Link:
    """One open connection. `closed` is set as soon as it is gone, for whatever reason; `why` then tells."""

    def __init__(self, options: BusOptions, connection: _Connection, role: str) -> None:
        self.role = role
        self.closed = asyncio.Event()
        self.why: BaseException | None = None
        self._options = options
        self._connection = connection
        self._last_number = 0
        self._opening: set[int] = set()
        self._on_closed: list[Callable[[], None]] = []
        connection.close_callbacks.add(self._gone)

    @classmethod
    async def open(cls, options: BusOptions, role: str) -> Link:
        """Connect. Raises what aiormq raises (see `describe`), TimeoutError or LinkLost."""
        connect = aio_pika.connect(
            options.url,
            timeout=options.connect_timeout_s,
            heartbeat=options.heartbeat_s,
            client_properties={"connection_name": f"warren {options.instance} {role}"},
            connection_class=_Connection,
        )
        return cls(options, await bounded(connect, options.connect_timeout_s + 1.0), role)

    def on_closed(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when the connection is gone; at once if it is already."""
        if self.closed.is_set():
            callback()
        else:
            self._on_closed.append(callback)

    def _gone(self, _: object, why: BaseException | None) -> None:
        if self.closed.is_set():
            return
        self.why = why
        self.closed.set()
        for callback in self._on_closed:
            callback()

    async def channel(self, *, confirms: bool = False) -> AbstractChannel:
        """Open a channel. Raises BrokerUnavailable when the connection has no room for one more."""
        number = self._number()
        self._opening.add(number)
        try:
            channel = self._connection.channel(channel_number=number, publisher_confirms=confirms)
            await bounded(channel.initialize(), self._options.request_timeout_s)
        finally:
            self._opening.discard(number)
        return channel

    def _number(self) -> int:
        """A free channel number, as long as possible after its last use.

        aiormq counts past `channel_max` (2,047 by default), and RabbitMQ answers that by closing the connection. A
        number is not taken again soon because aiormq frees it a moment before its close is acknowledged.
        """
        transport = self._connection.transport
        if transport is None or self.closed.is_set():
            raise LinkLost("The connection to RabbitMQ is closed.")
        limit = transport.connection.connection_tune.channel_max or 0xFFFF
        taken = transport.connection.channels.keys() | self._opening
        for step in range(1, limit + 1):
            number = (self._last_number + step - 1) % limit + 1
            if number not in taken:
                self._last_number = number
                return number
        raise BrokerUnavailable(
            f"All {limit} channels of the connection to RabbitMQ are in use.",
            hint="Each session needs up to two: raise channel_max in rabbitmq.conf, or run the sessions in several daemons.",
        )

    async def blocked(self) -> bool:
        """Whether RabbitMQ has stopped reading from this connection (memory or disk alarm)."""
        transport = self._connection.transport
        if transport is None:
            return False
        try:
            await bounded(transport.ready(), PEEK_S)
        except TimeoutError:
            return True
        except LinkLost:
            return False
        return False

    async def answers(self, timeout_s: float) -> bool:
        """Whether a request on this connection is answered: it is alive, whatever else is slow."""
        try:
            async with asyncio.timeout(timeout_s):
                await (await self.channel()).close()
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            return False
        except Exception:  # however it failed, it is no answer
            return False
        return True

    def abort(self) -> None:
        """Close the socket without a word. Everything that waits on this connection ends."""
        if (writer := self._connection.streams.writer) is not None:
            writer.transport.abort()

    async def close(self, timeout_s: float) -> None:
        """Close politely within `timeout_s`, else by force (half a second more)."""
        task = asyncio.ensure_future(self._connection.close())
        try:
            await asyncio.wait({task}, timeout=timeout_s)
            if not task.done():
                self.abort()
                await asyncio.wait({task}, timeout=ABORT_S)
        finally:
            self.abort()
            task.add_done_callback(_retrieve)
            if not task.done():
                task.cancel()
            self._gone(None, None)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """How a connection ended that we gave up interests nobody, but asyncio warns when nobody looks."""
    if not task.cancelled():
        task.exception()


_OBJECT: Final = re.compile(r"(?:exchange|queue) '([^']*)'")


def object_of(error: BaseException) -> str | None:
    """The exchange or queue that RabbitMQ names in an error."""
    found = _OBJECT.search(str(error))
    return found.group(1) if found else None


def describe(error: BaseException, options: BusOptions) -> BrokerUnavailable:
    """The same trouble in words for the operator: what, where, what to do. Never holds credentials."""
    where = options.endpoint
    name = object_of(error)
    match error:
        case BrokerUnavailable():
            return error
        case aiormq.exceptions.ProbableAuthenticationError() | aiormq.exceptions.AuthenticationError():
            return BrokerUnavailable(
                f"RabbitMQ at {where} refused the login.", hint="Check user and password in the RabbitMQ URL."
            )
        case aiormq.exceptions.InvalidFrameError() if "Connection.OpenOk" in str(error):
            # All that aiormq tells when RabbitMQ answers the opening of a virtual host by closing.
            return BrokerUnavailable(
                f"RabbitMQ did not open the virtual host of {where}.",
                hint="Check that the virtual host exists and that the user may use it (rabbitmqctl list_permissions).",
            )
        case aiormq.exceptions.ConnectionClosed():
            return BrokerUnavailable(f"RabbitMQ at {where} closed the connection: {_text(error)}.")
        case aiormq.exceptions.ChannelPreconditionFailed() if name is not None:
            return BrokerUnavailable(
                f"'{name}' exists in RabbitMQ with other properties than warren's: {_text(error)}.",
                hint="Somebody declared it differently. Delete it (rabbitmqctl delete_queue, after draining it), or give "
                "this warren another prefix.",
            )
        case aiormq.exceptions.ChannelAccessRefused():
            return BrokerUnavailable(
                f"RabbitMQ refused access to '{name}': {_text(error)}.",
                hint="Give the user configure, write and read permission on the prefix (rabbitmqctl set_permissions).",
            )
        case asyncio.CancelledError():  # what aiormq says when no heartbeat comes
            return BrokerUnavailable(f"RabbitMQ at {where} has gone silent.", hint="Check the network.")
        case TimeoutError():
            return BrokerUnavailable(f"RabbitMQ at {where} did not answer in time.", hint="Check host, port and network.")
        case OSError() if "[SSL" in _text(error):  # aiormq wraps what ssl raises
            return BrokerUnavailable(
                f"RabbitMQ at {where} and this machine do not agree about certificates: {_text(error)}.",
                hint="Check [amqp] ca_file, which RabbitMQ's certificate is checked with, its host name in `url`, and cert_file.",
            )
        case OSError():
            return BrokerUnavailable(
                f"RabbitMQ at {where} cannot be reached: {_text(error)}.", hint="Is it running, and reachable from here?"
            )
        case _:
            return BrokerUnavailable(f"Trouble with RabbitMQ at {where}: {type(error).__name__} {_text(error)}".rstrip() + ".")


def _text(error: BaseException) -> str:
    return " ".join(str(part) for part in error.args) or type(error).__name__


class Repeats:
    """Logs a trouble when it is new and then once a minute, with how often it came."""

    def __init__(self, action: str) -> None:
        self._log = logger.bind(action=action)
        self._last = ""
        self._at = 0.0
        self._count = 0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        self._count += 1
        if text == self._last and now - self._at < REPEAT_S:
            return
        again = f" ({self._count} times)" if text == self._last and self._count > 1 else ""
        self._last, self._at, self._count = text, now, 0
        self._log.warning("{}{}", text, again)

    def clear(self) -> None:
        """Things go well again: the next trouble is new."""
        self._last, self._count = "", 0
