"""A client for programs and for the command line: commands with their replies, and events, over RabbitMQ alone.

    async with Client("amqp://…") as warren:
        outcome = await warren.call("send", "acme", {"to": "+15551234567", "text": "Shipped."}, id="order-4711")
        async for event in warren.events("acme.message", queue="my-service"):
            ...

One plain connection, which is not made again when it is lost: every call and subscription then raises BrokerUnavailable, and the
caller starts over (commands are safe to repeat with the same id). A Client belongs to one event loop; calls may run side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aio_pika
import orjson
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelNotFoundEntity, DeliveryError
from loguru import logger

from warren.core.envelope import COMMANDS, JSON, Outcome, timestamp
from warren.core.names import SESSION_ID, Topology, is_session_id
from warren.edges.amqp_link import QuietConnection
from warren.errors import BrokerUnavailable, CommandError, WarrenError

CONNECT_TIMEOUT_S = 10.0
QUIET_S = 0.3
"""How long no further daemon may answer before a query counts as complete."""
PREFETCH = 50
TAP_MAX_LENGTH = 10_000
"""Events that RabbitMQ keeps for a tap whose reader is slow; the oldest are dropped then."""

_Answers = asyncio.Queue[bytes | None]
"""Bodies of replies; None says that no more can come."""


class NoAnswer(WarrenError):
    """Nobody replied in time. Whether the command runs, ran or will run is unknown."""

    code = "no_answer"
    retryable = True


def broker_address(url: str) -> str:
    """Host and port of an AMQP URL: what may be shown of it."""
    try:
        parts = urlsplit(url)
        port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
    except ValueError:
        return "an address that is not a URL"
    return f"{parts.hostname or 'localhost'}:{port}"


class Client:
    """See the module's text. `prefix` is the daemon's `[amqp] prefix`."""

    def __init__(self, url: str, prefix: str = "warren", *, name: str = "warren-client") -> None:
        self._url, self._name, self._topology = url, name, Topology(prefix)
        self._connection: AbstractConnection | None = None
        self._calls: AbstractChannel | None = None
        self._reply_to = ""
        self._opening = asyncio.Lock()
        self._waiting: dict[str, _Answers] = {}

    async def __aenter__(self) -> Self:
        """Connect. Raises BrokerUnavailable."""
        address = broker_address(self._url)
        try:
            self._connection = await aio_pika.connect(
                self._url,
                timeout=CONNECT_TIMEOUT_S,
                client_properties={"connection_name": self._name},
                connection_class=QuietConnection,
            )
        except aio_pika.exceptions.ProbableAuthenticationError as e:
            raise BrokerUnavailable(
                f"RabbitMQ at {address} refuses user or password.", hint="Check the URL's user, password, vhost."
            ) from e
        except (*CONNECTION_EXCEPTIONS, TimeoutError, ValueError) as e:
            raise BrokerUnavailable(
                f"RabbitMQ at {address} cannot be reached ({type(e).__name__}).",
                hint="Check that it runs and that the URL is right.",
            ) from e
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._connection is not None:
            with contextlib.suppress(*CONNECTION_EXCEPTIONS, TimeoutError):
                await asyncio.wait_for(self._connection.close(), CONNECT_TIMEOUT_S)

    # --- commands

    async def call(
        self,
        command: str,
        session: str,
        args: dict[str, Any] | None = None,
        *,
        id: str | None = None,
        timeout_s: float = 30.0,
        expires_in_s: float | None = None,
    ) -> Outcome:
        """Publish a command and wait for its outcome, which may be a failure: look at `ok`.

        Without `id` a command with an effect gets one of its own, so repeating the call repeats the effect. `expires_in_s`: the
        daemon refuses it later than that. Raises NoAnswer (it may still run), BrokerUnavailable, CommandError for what cannot
        even be addressed. Cancelling stops the waiting, not the command.
        """
        spec = COMMANDS.get(command)
        if spec is None or spec.exchange == "queries":
            raise CommandError(
                "unknown_command", f"There is no command `{command}` for a session.", hint=f"Known: {', '.join(COMMANDS)}."
            )
        if not is_session_id(session):
            raise CommandError("invalid_session", f"`{session}` is no session id.", hint=f"It matches ^{SESSION_ID.pattern}$.")
        if id is None and spec.effect:
            id = f"cli-{uuid.uuid4().hex}"
        body: dict[str, Any] = {"command": command, "session": session, "args": args or {}}
        if id is not None:
            body["id"] = id
        if expires_in_s is not None:
            body["expires_at"] = timestamp(datetime.now(UTC) + timedelta(seconds=expires_in_s))
        is_it = "Is warrend running, and the session online?" if command == "send" else "Is warrend running?"
        again = f"; repeat it with the same id ({id}) to learn its outcome." if id else "."
        late = NoAnswer(
            f"No answer to `{command}` for session {session} within {timeout_s:g} s.",
            hint=f"{is_it} The command stays queued and may still run{again}",
        )
        async with self._asked(f"{self._topology.prefix}.{spec.exchange}", session, body, timeout_s, late) as (answers, deadline):
            try:
                return Outcome.parse(await _next(answers, deadline, late))
            except ValueError as e:
                raise WarrenError(
                    "The reply to the command is no outcome.", hint="Do daemon and client have the same version?"
                ) from e

    async def list_sessions(self, timeout_s: float = 2.0) -> list[dict[str, Any]]:
        """The sessions of all daemons, by name; each is a status plus the `instance` that serves it.

        Complete when no daemon answered for 300 ms after the one before, at most `timeout_s`. Raises NoAnswer when none did.
        """
        late = NoAnswer(f"No daemon answered within {timeout_s:g} s.", hint="Is warrend running, with the same `[amqp] prefix`?")
        sessions: list[dict[str, Any]] = []
        async with self._asked(self._topology.queries, "", {"command": "list"}, timeout_s, late) as (answers, deadline):
            sessions += _sessions(await _next(answers, deadline, late))
            with contextlib.suppress(NoAnswer):
                while True:
                    quiet = asyncio.get_running_loop().time() + QUIET_S
                    sessions += _sessions(await _next(answers, min(quiet, deadline), late))
        return sorted(sessions, key=lambda s: str(s.get("session")))

    @contextlib.asynccontextmanager
    async def _asked(
        self, exchange: str, routing_key: str, body: dict[str, Any], timeout_s: float, late: NoAnswer
    ) -> AsyncIterator[tuple[_Answers, float]]:
        """Publish with confirm, and collect the replies until the block ends. The block gets them and the deadline."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        correlation_id = uuid.uuid4().hex
        answers = self._waiting[correlation_id] = asyncio.Queue()
        try:
            async with asyncio.timeout_at(deadline):
                await self._publish(exchange, routing_key, body, correlation_id)
            yield answers, deadline
        except TimeoutError:
            # The channel may have an unconfirmed publish for ever (a blocked RabbitMQ): the next call gets a new one.
            self._calls = None
            raise late from None
        finally:
            del self._waiting[correlation_id]

    async def _publish(self, exchange: str, routing_key: str, body: dict[str, Any], correlation_id: str) -> None:
        try:
            channel = await self._channel()
            message = aio_pika.Message(
                orjson.dumps(body),
                content_type=JSON,
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                message_id=body.get("id"),
                correlation_id=correlation_id,
                reply_to=self._reply_to,
            )
            await (await channel.get_exchange(exchange, ensure=False)).publish(message, routing_key, mandatory=False)
        except ChannelNotFoundEntity:
            raise _no_daemon(exchange) from None
        except DeliveryError as e:
            raise BrokerUnavailable("RabbitMQ did not take the command.", hint="It was not queued. See RabbitMQ's log.") from e
        except CONNECTION_EXCEPTIONS as e:
            raise _lost() from e

    async def _channel(self) -> AbstractChannel:
        """The channel for commands with its reply queue, opened again after RabbitMQ closed it."""
        async with self._opening:
            if self._calls is None or self._calls.is_closed:
                channel = await self._open().channel(publisher_confirms=True)
                replies = await channel.declare_queue(exclusive=True, auto_delete=True)
                await replies.consume(self._on_reply, no_ack=True)
                channel.close_callbacks.add(self._on_closed)
                self._calls, self._reply_to = channel, replies.name
            return self._calls

    def _open(self) -> AbstractConnection:
        if self._connection is None or self._connection.is_closed:
            raise _lost()
        return self._connection

    async def _on_reply(self, message: AbstractIncomingMessage) -> None:
        if (answers := self._waiting.get(message.correlation_id or "")) is not None:
            answers.put_nowait(message.body)

    def _on_closed(self, channel: object, _error: BaseException | None) -> None:
        for answers in self._waiting.values():
            answers.put_nowait(None)

    # --- events

    async def events(self, binding: str = "#", *, queue: str | None = None, tap: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Decoded CloudEvents, from the first `anext` on; `subscribe` can tell that moment, and ends when its context does."""
        async with self.subscribe(binding, queue=queue, tap=tap) as subscription:
            async for event in subscription:
                yield event

    def subscribe(self, binding: str = "#", *, queue: str | None = None, tap: bool = False) -> Subscription:
        """Events whose routing key (`<session>.<event>`) matches `binding`; bound when the `async with` is entered.

        With `queue`, a durable queue of that name, which keeps what comes while nobody reads. Without, one that is gone with
        this connection. `tap`: what people watch, without any promise, and without counting as a subscriber.
        """
        exchange = self._topology.tap if tap else self._topology.events
        return Subscription(self._open, exchange, binding, None if tap else queue)


class Subscription:
    """Events of one binding: an async context manager, and an async iterator inside it.

    An event is acked when the next one is asked for: one that was not finished is delivered again, to whoever reads the queue
    then. Ends only by leaving the context, or with BrokerUnavailable. Cancelling an `anext` loses nothing.
    """

    def __init__(self, connection: Callable[[], AbstractConnection], exchange: str, binding: str, queue: str | None) -> None:
        self._connection, self._exchange, self._binding, self._queue = connection, exchange, binding, queue
        self._channel: AbstractChannel | None = None
        self._incoming: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
        self._current: AbstractIncomingMessage | None = None

    async def __aenter__(self) -> Self:
        try:
            channel = self._channel = await self._connection().channel()
            await channel.set_qos(prefetch_count=PREFETCH)
            if self._queue is None:
                queue = await channel.declare_queue(exclusive=True, auto_delete=True, arguments={"x-max-length": TAP_MAX_LENGTH})
            else:
                queue = await channel.declare_queue(self._queue, durable=True)
            await queue.bind(self._exchange, self._binding)
            channel.close_callbacks.add(lambda *_: self._incoming.put_nowait(None))
            await queue.consume(self._incoming.put)
        except ChannelNotFoundEntity:
            raise _no_daemon(self._exchange) from None
        except CONNECTION_EXCEPTIONS as e:
            raise BrokerUnavailable(f"RabbitMQ refused the subscription: {e}", hint="Is the queue used in another way?") from e
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._channel is not None:
            with contextlib.suppress(*CONNECTION_EXCEPTIONS, TimeoutError):
                await asyncio.wait_for(self._channel.close(), CONNECT_TIMEOUT_S)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while True:
            await self._settle()
            message = await self._incoming.get()
            if message is None:
                self._incoming.put_nowait(None)
                raise _lost()
            self._current = message
            if (event := _event(message)) is not None:
                return event

    async def _settle(self) -> None:
        done, self._current = self._current, None
        if done is not None:
            with contextlib.suppress(*CONNECTION_EXCEPTIONS):  # a lost ack means: delivered again
                await done.ack()


def _event(message: AbstractIncomingMessage) -> dict[str, Any] | None:
    with contextlib.suppress(orjson.JSONDecodeError):
        if isinstance(event := orjson.loads(message.body), dict) and isinstance(event.get("type"), str):
            return event
    logger.bind(action="event_skipped").warning("Skipped a message on {} that is no event.", message.routing_key)
    return None


def _sessions(body: bytes) -> list[dict[str, Any]]:
    outcome = Outcome.parse(body)
    return [{**session, "instance": outcome.result.get("instance")} for session in outcome.result.get("sessions", [])]


async def _next(answers: _Answers, deadline: float, late: NoAnswer) -> bytes:
    try:
        async with asyncio.timeout_at(deadline):
            body = await answers.get()
    except TimeoutError:
        raise late from None
    if body is None:
        raise _lost()
    return body


def _lost() -> BrokerUnavailable:
    return BrokerUnavailable("The connection to RabbitMQ was lost.", hint="Check RabbitMQ, then try again.")


def _no_daemon(exchange: str) -> NoAnswer:
    return NoAnswer(
        f"RabbitMQ has no exchange `{exchange}`: no daemon with this prefix has ever run there.",
        hint="Start warrend, or check `[amqp] prefix` and the URL. Nothing was sent.",
    )
