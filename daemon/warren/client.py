"""A client for programs and for the command line: commands with their replies, and events, over RabbitMQ alone.

    async with Client("amqp://…") as warren:
        await warren.connect("acme", tell=lambda what, data: print(what, data.get("code")))
        await warren.send("acme", "+15551234567", "Shipped.", id="order-4711")
        async for event in warren.events("acme.message", queue="my-service"):
            ...

One connection, made again when it is lost: a command is then published again with the same id, which has its effect once, until
its time is up; a subscription goes on as soon as RabbitMQ is back. What trying again does not mend (a refused password, a missing
permission) is raised at once. A Client belongs to one event loop; calls may run side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import aio_pika
import orjson
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, ChannelNotFoundEntity, ChannelPreconditionFailed, DeliveryError
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource
from loguru import logger

from warren.core.backoff import delay
from warren.core.envelope import COMMANDS, JSON, Outcome, timestamp
from warren.core.machine import State
from warren.core.names import SESSION_ID, Topology, is_session_id
from warren.edges.amqp_link import QuietConnection, raise_if_cancelled
from warren.errors import BrokerUnavailable, CommandError, WarrenError

CONNECT_TIMEOUT_S = 10.0
QUIET_S = 0.3
"""How long no further daemon may answer before a query counts as complete."""
PREFETCH = 50
TAP_MAX_LENGTH = 10_000
"""Events that RabbitMQ keeps for a tap whose reader is slow; the oldest are dropped then."""

RECONNECT_BASE_S, RECONNECT_CAP_S = 0.2, 10.0
CREATE_TIMEOUT_S = 30.0

T = TypeVar("T")
Tell = Callable[[str, dict[str, Any]], None]
"""Hears how a session gets on: `qr`, `pairing_code` or `state`, and the data of that event (or, at first, of the status)."""

_Answers = asyncio.Queue["bytes | BrokerUnavailable"]
"""Bodies of replies; an error says that no more can come."""

_ON_THE_WAY = {s.value for s in (State.RESTORING, State.CONNECTING, State.PAIRING, State.BACKING_OFF, State.STOPPING)}
"""States from which a session gets on without anybody doing anything but scan."""
_CONNECTED = {State.ONLINE.value, State.TIME_LOCKED.value}


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


async def open_connection(url: str, name: str) -> AbstractConnection:
    """Connect, within 10 s. Raises BrokerUnavailable in words, with no secret of the URL; `retryable` unless we are refused."""
    address = broker_address(url)
    try:
        return await aio_pika.connect(
            url,
            timeout=CONNECT_TIMEOUT_S,
            client_properties={"connection_name": name},
            connection_class=QuietConnection,
        )
    except aio_pika.exceptions.ProbableAuthenticationError as e:
        raise _for_good(
            BrokerUnavailable(f"RabbitMQ at {address} refuses user or password.", hint="Check the URL's user, password, vhost.")
        ) from e
    except (*CONNECTION_EXCEPTIONS, TimeoutError, ValueError) as e:
        raise BrokerUnavailable(
            f"RabbitMQ at {address} cannot be reached ({type(e).__name__}).",
            hint="Check that it runs and that the URL is right.",
        ) from e


async def close_connection(connection: AbstractConnection) -> None:
    with contextlib.suppress(*CONNECTION_EXCEPTIONS, TimeoutError):
        await asyncio.wait_for(connection.close(), CONNECT_TIMEOUT_S)


class Client:
    """See the module's text. `prefix` is the daemon's `[amqp] prefix`."""

    def __init__(self, url: str, prefix: str = "warren", *, name: str = "warren-client") -> None:
        self._url, self._name, self._topology = url, name, Topology(prefix)
        self._connection: AbstractConnection | None = None
        self._calls: AbstractChannel | None = None
        self._reply_to = ""
        self._connecting, self._opening = asyncio.Lock(), asyncio.Lock()
        self._waiting: dict[str, _Answers] = {}

    async def __aenter__(self) -> Self:
        """Connect. Raises BrokerUnavailable: what cannot be reached at first is a mistake more often than an outage."""
        self._connection = await open_connection(self._url, self._name)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await close_connection(connection)

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
        daemon refuses it later than that. Raises NoAnswer (it may still run), BrokerUnavailable when it certainly was not
        published, CommandError for what cannot even be addressed. Cancelling stops the waiting, not the command.
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
        exchange = f"{self._topology.prefix}.{spec.exchange}"

        async def once(deadline: float) -> Outcome:
            async with self._asked(exchange, session, body, deadline, late) as answers:
                try:
                    return Outcome.parse(await _next(answers, deadline, late))
                except ValueError as e:
                    raise WarrenError(
                        "The reply to the command is no outcome.", hint="Do daemon and client have the same version?"
                    ) from e

        return await _within(timeout_s, once, late)

    async def send(
        self,
        session: str,
        to: str,
        text: str,
        *,
        id: str | None = None,
        timeout_s: float = 30.0,
        expires_in_s: float | None = None,
    ) -> str:
        """Send one text and wait until WhatsApp's server has it; its message id. Raises CommandError when it failed, and what
        `call` raises.
        """
        args = {"to": to, "text": text}
        outcome = await self.call("send", session, args, id=id, timeout_s=timeout_s, expires_in_s=expires_in_s)
        return str(_result(outcome)["message_id"])

    async def connect(
        self, session: str, args: dict[str, Any] | None = None, *, tell: Tell | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Create the session (`args` are those of `create`) and wait until it is connected; see `wait_connected`."""
        async with asyncio.timeout(timeout_s):
            _result(await self.call("create", session, args, timeout_s=timeout_s or CREATE_TIMEOUT_S))
            return await self.wait_connected(session, tell)

    async def wait_connected(self, session: str, tell: Tell | None = None) -> dict[str, Any]:
        """Wait until the session is connected: its status, or the data of `connected`. `tell` gets the codes to scan or to type.

        Without end: put a timeout around it. Raises CommandError when the session will not connect by itself (nobody scanned,
        banned, logged out …).
        """
        attempt = 0
        while True:
            try:
                # Bound first, then asked: nothing can fall between the answer and the first event.
                async with self.subscribe(f"{session}.*", tap=True, reconnect=False) as subscription:
                    status = _result(await self.call("status", session))
                    attempt = 0
                    return await _connected(subscription, session, status, tell or (lambda what, data: None))
            except BrokerUnavailable as e:
                await _pause(attempt, e)
                attempt += 1

    async def list_sessions(self, timeout_s: float = 2.0) -> list[dict[str, Any]]:
        """The sessions of all daemons, by name; each is a status plus the `instance` that serves it.

        Complete when no daemon answered for 300 ms after the one before, at most `timeout_s`. Raises NoAnswer when none did.
        """
        late = NoAnswer(f"No daemon answered within {timeout_s:g} s.", hint="Is warrend running, with the same `[amqp] prefix`?")

        async def once(deadline: float) -> list[dict[str, Any]]:
            async with self._asked(self._topology.queries, "", {"command": "list"}, deadline, late) as answers:
                sessions = _sessions(await _next(answers, deadline, late))
                with contextlib.suppress(NoAnswer):
                    while True:
                        quiet = asyncio.get_running_loop().time() + QUIET_S
                        sessions += _sessions(await _next(answers, min(quiet, deadline), late))
            return sorted(sessions, key=lambda s: str(s.get("session")))

        return await _within(timeout_s, once, late)

    @contextlib.asynccontextmanager
    async def _asked(
        self, exchange: str, routing_key: str, body: dict[str, Any], deadline: float, late: NoAnswer
    ) -> AsyncIterator[_Answers]:
        """Publish with confirm, and collect the replies until the block ends, which gets them."""
        correlation_id = uuid.uuid4().hex
        answers = self._waiting[correlation_id] = asyncio.Queue()
        try:
            async with asyncio.timeout_at(deadline):
                await self._publish(exchange, routing_key, body, correlation_id)
            yield answers
        except TimeoutError:
            # The channel may have an unconfirmed publish for ever (a blocked RabbitMQ): the next call gets a new one.
            self._calls = None
            raise late from None
        finally:
            del self._waiting[correlation_id]

    async def _publish(self, exchange: str, routing_key: str, body: dict[str, Any], correlation_id: str) -> None:
        with in_words(exchange):
            channel = await self._channel()
        message = aio_pika.Message(
            orjson.dumps(body),
            content_type=JSON,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=body.get("id"),
            correlation_id=correlation_id,
            reply_to=self._reply_to,
        )
        with in_words(exchange, maybe=True):
            await (await channel.get_exchange(exchange, ensure=False)).publish(message, routing_key, mandatory=False)

    async def _channel(self) -> AbstractChannel:
        """The channel for commands with its reply queue, opened again after RabbitMQ closed it."""
        async with self._opening:
            if self._calls is None or self._calls.is_closed:
                channel = await (await self._open()).channel(publisher_confirms=True)
                replies = await channel.declare_queue(exclusive=True, auto_delete=True)
                await replies.consume(self._on_reply, no_ack=True)
                channel.close_callbacks.add(self._on_closed)
                self._calls, self._reply_to = channel, replies.name
            return self._calls

    async def _open(self) -> AbstractConnection:
        """The connection, made again if it is lost. One try. Raises BrokerUnavailable."""
        async with self._connecting:
            if self._connection is None:
                raise _for_good(BrokerUnavailable("The client is not connected.", hint="Use it inside its `async with`."))
            if self._connection.is_closed:
                self._connection = await open_connection(self._url, self._name)
            return self._connection

    async def _on_reply(self, message: AbstractIncomingMessage) -> None:
        if (answers := self._waiting.get(message.correlation_id or "")) is not None:
            answers.put_nowait(message.body)

    def _on_closed(self, channel: object, error: BaseException | None) -> None:
        for answers in self._waiting.values():
            answers.put_nowait(_lost(error, maybe=True))

    # --- events

    async def events(self, binding: str = "#", *, queue: str | None = None, tap: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Decoded CloudEvents, from the first `anext` on; `subscribe` can tell that moment, and ends when its context does."""
        async with self.subscribe(binding, queue=queue, tap=tap) as subscription:
            async for event in subscription:
                yield event

    def subscribe(
        self, binding: str = "#", *, queue: str | None = None, tap: bool = False, reconnect: bool = True
    ) -> Subscription:
        """Events whose routing key (`<session>.<event>`) matches `binding`; bound when the `async with` is entered.

        With `queue`, a durable queue of that name, which keeps what comes while nobody reads. Without, one that is gone with
        this connection. `tap`: what people watch, without any promise, and without counting as a subscriber. `reconnect` False:
        it ends with BrokerUnavailable when the connection is lost, instead of going on when RabbitMQ is back.
        """
        exchange = self._topology.tap if tap else self._topology.events
        return Subscription(self._open, exchange, binding, None if tap else queue, reconnect=reconnect)


class Subscription:
    """Events of one binding: an async context manager, and an async iterator inside it.

    An event is acked when the next one is asked for: one that was not finished is delivered again, to whoever reads the queue
    then. Over a lost connection a durable queue misses nothing, and the event in hand comes again; without one, what happened
    meanwhile is missed. Ends by leaving the context, or with an error that trying again does not mend. Cancelling an `anext`
    loses nothing.
    """

    def __init__(
        self,
        connection: Callable[[], Awaitable[AbstractConnection]],
        exchange: str,
        binding: str,
        queue: str | None,
        *,
        reconnect: bool,
    ) -> None:
        self._connection, self._exchange, self._binding, self._queue = connection, exchange, binding, queue
        self._reconnect = reconnect
        self._channel: AbstractChannel | None = None
        self._incoming: asyncio.Queue[AbstractIncomingMessage | BrokerUnavailable] = asyncio.Queue()
        self._current: AbstractIncomingMessage | None = None

    async def __aenter__(self) -> Self:
        await self._bind()
        return self

    async def _bind(self) -> None:
        """Once. Raises BrokerUnavailable, NoAnswer."""
        # What an earlier channel delivered is delivered again.
        incoming = self._incoming = asyncio.Queue()
        with in_words(self._exchange):
            channel = self._channel = await (await self._connection()).channel()
            await channel.set_qos(prefetch_count=PREFETCH)
            if self._queue is None:
                queue = await channel.declare_queue(exclusive=True, auto_delete=True, arguments={"x-max-length": TAP_MAX_LENGTH})
            else:
                queue = await channel.declare_queue(self._queue, durable=True)
            await queue.bind(self._exchange, self._binding)
            channel.close_callbacks.add(lambda _, error: incoming.put_nowait(_lost(error)))
            await queue.consume(incoming.put)

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
            if isinstance(message, BrokerUnavailable):
                await self._again(message)
                continue
            self._current = message
            if (event := _event(message)) is not None:
                return event

    async def _again(self, lost: BrokerUnavailable) -> None:
        """Bind again until it is done. A cancelled `anext` finds the loss again."""
        self._incoming.put_nowait(lost)
        if not self._reconnect or not lost.retryable:
            raise lost
        logger.bind(action="subscription_lost").debug("Subscribing again: {}", lost)
        attempt = 0
        while True:
            try:
                await self._bind()
            except BrokerUnavailable as e:
                self._incoming = asyncio.Queue()
                self._incoming.put_nowait(e)
                await _pause(attempt, e)
                attempt += 1
            else:
                return

    async def _settle(self) -> None:
        done, self._current = self._current, None
        if done is not None:
            with contextlib.suppress(BrokerUnavailable), in_words(self._exchange):  # a lost ack means: delivered again
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
            answer = await answers.get()
    except TimeoutError:
        raise late from None
    if isinstance(answer, BrokerUnavailable):
        raise answer
    return answer


async def _within(timeout_s: float, once: Callable[[float], Awaitable[T]], late: NoAnswer) -> T:
    """`once`, and again while RabbitMQ is away and there is time. `late` if it may have been published when time is up."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    attempt, maybe = 0, False
    while True:
        try:
            return await once(deadline)
        except BrokerUnavailable as e:
            maybe = maybe or isinstance(e, _Unknown)
            pause = delay(attempt, base_s=RECONNECT_BASE_S, cap_s=RECONNECT_CAP_S, random01=_random01())
            if not e.retryable or loop.time() + pause >= deadline:
                if maybe and e.retryable:
                    raise late from e
                raise
        await asyncio.sleep(pause)
        attempt += 1


async def _pause(attempt: int, error: BrokerUnavailable) -> None:
    if not error.retryable:
        raise error
    await asyncio.sleep(delay(attempt, base_s=RECONNECT_BASE_S, cap_s=RECONNECT_CAP_S, random01=_random01()))


def _random01() -> float:
    return random.random()  # noqa: S311 (nothing to guess)


def _result(outcome: Outcome) -> dict[str, Any]:
    if outcome.error is not None:
        e = outcome.error
        raise CommandError(
            str(e.get("code")), str(e.get("message")), hint=str(e.get("hint") or ""), retry_after=e.get("retry_after")
        )
    return outcome.result


async def _connected(subscription: Subscription, session: str, status: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Follow the session's events from `status` on until it is connected."""
    if status.get("qr"):
        tell("qr", status["qr"])
    elif status.get("pairing_code"):
        tell("pairing_code", status["pairing_code"])
    elif _arrived(session, status, tell):
        return status
    async for event in subscription:
        # An event from before the answer may come after it.
        if event.get("time", "") < status["since"]:
            continue
        name, data = str(event["type"]).removeprefix("warren."), event.get("data") or {}
        if name in {"qr", "pairing_code"}:
            tell(name, data)
        elif "state" in data and _arrived(session, data, tell):
            return dict(data)
    raise _lost()


def _arrived(session: str, told: dict[str, Any], tell: Tell) -> bool:
    """Whether a status or a state event says that it is done. Raises CommandError when it will not happen by itself."""
    state = told.get("state")
    if state in _CONNECTED:
        return True
    if state in _ON_THE_WAY:
        tell("state", told)
        return False
    why = f": {told['message']}" if told.get("message") else "."
    raise CommandError(
        str(told.get("code") or state),
        f"Session {session} is {state}{why}",
        hint=f"`create` tries again (`warren session create {session}`)."
        if not told.get("until")
        else f"It goes on at {told['until']}.",
    )


@contextlib.contextmanager
def in_words(exchange: str, *, maybe: bool = False) -> Iterator[None]:
    """What RabbitMQ says, and what aiormq raises for a lost connection (a bare CancelledError or Exception too), as ours."""
    try:
        yield
    except ChannelNotFoundEntity:
        raise _no_daemon(exchange) from None
    except DeliveryError as e:
        raise BrokerUnavailable("RabbitMQ did not take the message.", hint="It was not queued. See RabbitMQ's log.") from e
    except (ChannelPreconditionFailed, ChannelLockedResource) as e:
        refused = BrokerUnavailable(f"RabbitMQ refused the queue: {e}", hint="Is it used in another way?")
        raise _for_good(refused) from e
    except asyncio.CancelledError as e:
        raise_if_cancelled(e)
        raise _lost(maybe=maybe) from e
    except (*CONNECTION_EXCEPTIONS, TimeoutError) as e:
        raise _lost(e, maybe=maybe) from e
    except Exception as e:
        if type(e) is Exception:
            raise _lost(maybe=maybe) from e
        raise


class _Unknown(BrokerUnavailable):
    """The connection was lost when something may have been published."""


def _for_good(error: BrokerUnavailable) -> BrokerUnavailable:
    error.retryable = False
    return error


def _lost(error: BaseException | None = None, *, maybe: bool = False) -> BrokerUnavailable:
    if isinstance(error, ChannelAccessRefused):
        return _for_good(
            BrokerUnavailable(
                f"RabbitMQ does not permit that: {error}", hint="docs/operations.md has the permissions that are needed."
            )
        )
    kind = _Unknown if maybe else BrokerUnavailable
    return kind("The connection to RabbitMQ was lost.", hint="Check RabbitMQ, then try again.")


def _no_daemon(exchange: str) -> NoAnswer:
    return NoAnswer(
        f"RabbitMQ has no exchange `{exchange}`: no daemon with this prefix has ever run there.",
        hint="Start warrend, or check `[amqp] prefix` and the URL. Nothing was sent.",
    )
