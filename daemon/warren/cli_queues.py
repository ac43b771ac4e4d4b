"""`warren dead …` and `warren events …`: what waits in RabbitMQ for somebody to look at it.

Nothing is taken out of a queue before its copy is confirmed elsewhere (or is to be dropped): what is held while it is looked at
goes back, in its place, when this ends, however it ends. A copy whose ack is lost comes twice, which ids make harmless.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aio_pika
import orjson
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue

from warren.cli_base import CALL_TIMEOUT_S, EXIT_FAILED, EXIT_OK, Progress, UsageError, broker_url, note, print_json, settings_of
from warren.cli_text import columns, event_line
from warren.client import CONNECT_TIMEOUT_S, close_connection, in_words, open_connection
from warren.core.names import Topology
from warren.edges.terminal import printable

KEY_CHARS = 10
LIST_DEFAULT = 100
REPLAYED = "x-warren-replayed"
"""Header of what `events replay` publishes: the run that did, so that it knows what came back."""

Add = Callable[..., argparse.ArgumentParser]


@dataclass(frozen=True, slots=True)
class Dead:
    """A command in the dead queue: `key` names it, the same for the same command."""

    key: str
    exchange: str
    """Where it was published to, and `routing_key` with which."""
    routing_key: str
    reason: str
    message: str
    command: str
    id: str | None
    message_id: str | None
    """As it was published."""
    body: Any
    """JSON if it is, else text."""


Act = Callable[["Held", AbstractIncomingMessage, Dead], Awaitable[bool]]
"""What to do with one; whether it could be done."""


def dead_of(message: AbstractIncomingMessage) -> Dead:
    """What is known of it. Our own headers say it, or those of RabbitMQ, whose first entry is the newest death."""
    headers = message.headers
    deaths = headers.get("x-death")
    death: dict[str, Any] = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], dict) else {}
    keys = death.get("routing-keys")
    routing_key = _text(keys[0]) if isinstance(keys, list) and keys else message.routing_key or ""
    exchange = _text(death["exchange"] if "exchange" in death else headers.get("x-warren-exchange", ""))
    reason = _text(death.get("reason") or headers.get("x-warren-reason") or "unknown")
    said = "" if death else _text(headers.get("x-warren-message", ""))
    message_id = message.message_id
    if not death and "x-warren-reason" in headers:  # our copy has an id of its own
        own = headers.get("x-warren-message-id")
        message_id = None if own is None else _text(own)
    try:
        body = orjson.loads(message.body)
    except orjson.JSONDecodeError:
        body = message.body.decode(errors="replace")
    told = body if isinstance(body, dict) else {}
    name = hashlib.sha256(b"\0".join((exchange.encode(), routing_key.encode(), message.body))).hexdigest()[:KEY_CHARS]
    command, command_id = told.get("command"), told.get("id")
    return Dead(
        name,
        exchange,
        routing_key,
        reason,
        said,
        command if isinstance(command, str) else "",
        command_id if isinstance(command_id, str) else message_id,
        message_id,
        body,
    )


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


# --- looking and taking -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """A queue whose messages are held one after the other; those not acked go back when the context ends."""

    channel: AbstractChannel
    queue: AbstractQueue
    count: int
    """How many were there at the beginning."""
    topology: Topology

    async def messages(self, limit: int) -> AsyncIterator[AbstractIncomingMessage]:
        """At most `limit`, oldest first, until there is none."""
        for _ in range(limit):
            with in_words(self.queue.name):
                message = await self.queue.get(fail=False, timeout=CALL_TIMEOUT_S)
            if message is None:
                return
            yield message

    async def republish(
        self, message: AbstractIncomingMessage, exchange: str, key: str, message_id: str | None, headers: dict[str, Any]
    ) -> None:
        """Publish a copy with confirm, then ack. Raises BrokerUnavailable (and the message goes back)."""
        copy = aio_pika.Message(
            message.body,
            headers=headers,
            content_type=message.content_type,
            message_id=message_id,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        with in_words(exchange):
            target = await self.channel.get_exchange(exchange, ensure=False) if exchange else self.channel.default_exchange
            # Mandatory: where it leads nowhere, it stays here.
            await target.publish(copy, key, mandatory=True, timeout=CALL_TIMEOUT_S)
            await message.ack()


@asynccontextmanager
async def held(args: argparse.Namespace, queue_of: Callable[[Topology], str]) -> AsyncIterator[Held]:
    """The queue of this prefix. Raises BrokerUnavailable, NoAnswer when no daemon has ever run there."""
    settings = settings_of(args)
    topology = Topology(settings.amqp.prefix)
    name = queue_of(topology)
    connection = await open_connection(broker_url(settings), "warren-cli")
    try:
        with in_words(name):
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                queue = await channel.declare_queue(name, passive=True)
        yield Held(channel, queue, queue.declaration_result.message_count or 0, topology)
    finally:
        await close_connection(connection)


# --- dead ---------------------------------------------------------------------------------------------------------------


def _dead_list(args: argparse.Namespace) -> int:
    found, count = asyncio.run(_peeked(args))
    if args.json:
        print_json({"count": count, "commands": [_shown(d) for d in found]})
        return EXIT_OK
    if not found:
        print("No dead commands.")
        return EXIT_OK
    rows = [(d.key, d.reason, d.routing_key or "-", d.command or "-", d.id or "-", d.message or "-") for d in found]
    print("\n".join(columns([("KEY", "REASON", "SESSION", "COMMAND", "ID", "MESSAGE"), *(_printable(row) for row in rows)])))
    if count > len(found):
        note(f"{len(found)} of {count}; --limit shows more")
    return EXIT_OK


def _dead_show(args: argparse.Namespace) -> int:
    found, _ = asyncio.run(_peeked(args))
    wanted = [d for d in found if d.key == args.key]
    if not wanted:
        raise UsageError(f"There is no dead command {args.key}.", hint="`warren dead list` shows what there is.")
    d = wanted[0]
    if args.json:
        print_json(_shown(d))
    else:
        for name in ("key", "reason", "message", "exchange", "routing_key"):
            print(printable(f"{name:<12} {getattr(d, name)}"))
        text = d.body if isinstance(d.body, str) else orjson.dumps(d.body, option=orjson.OPT_INDENT_2).decode()
        print("\n".join(printable(line) for line in text.splitlines()))
    return EXIT_OK


async def _peeked(args: argparse.Namespace) -> tuple[list[Dead], int]:
    async with held(args, lambda t: t.dead) as queue:
        limit = getattr(args, "limit", queue.count)
        return [dead_of(message) async for message in queue.messages(min(limit, queue.count))], queue.count


def _shown(d: Dead) -> dict[str, Any]:
    return {name: getattr(d, name) for name in Dead.__slots__}


def _printable(row: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(printable(cell) for cell in row)


def _dead_replay(args: argparse.Namespace) -> int:
    async def replay(queue: Held, message: AbstractIncomingMessage, dead: Dead) -> bool:
        if not dead.exchange:
            note(printable(f"{dead.key} was published to no exchange of warren's: publish it anew, then drop it here"))
            return False
        await queue.republish(message, dead.exchange, dead.routing_key, dead.message_id, {})
        return True

    return _dead_each(args, replay, "replayed")


def _dead_drop(args: argparse.Namespace) -> int:
    async def drop(queue: Held, message: AbstractIncomingMessage, dead: Dead) -> bool:
        with in_words(queue.queue.name):
            await message.ack()
        return True

    if args.all and not args.yes:
        _confirm("Every command in the dead queue is dropped, for good. Type `drop`: ", "drop")
    return _dead_each(args, drop, "dropped")


def _confirm(question: str, answer: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError("That needs a confirmation.", hint="Give --yes, if it is meant.")
    sys.stderr.write(question)
    sys.stderr.flush()
    if sys.stdin.readline().strip() != answer:
        raise UsageError("Not confirmed: nothing was done.")


def _dead_each(args: argparse.Namespace, act: Act, done: str) -> int:
    if args.all == bool(args.key):
        raise UsageError("Name commands by their keys, or give --all.", hint="`warren dead list` shows the keys.")
    acted, left = asyncio.run(_dead_acted(args, act, done))
    left |= set(args.key) - acted.keys()
    if args.json:
        print_json({done: [key for key, times in acted.items() for _ in range(times)], "left": sorted(left)})
    else:
        print(f"{acted.total()} commands {done}" + (f"; not: {', '.join(map(printable, sorted(left)))}" if left else ""))
    return EXIT_FAILED if left else EXIT_OK


async def _dead_acted(args: argparse.Namespace, act: Act, done: str) -> tuple[Counter[str], set[str]]:
    """By key: how often it was done, and what could not be done."""
    acted, left, progress = Counter[str](), set[str](), Progress(done)
    async with held(args, lambda t: t.dead) as queue:
        # Only those that were there: what dies again comes behind them.
        async for message in queue.messages(queue.count):
            dead = dead_of(message)
            if not args.all and dead.key not in args.key:
                continue
            if await act(queue, message, dead):
                acted[dead.key] += 1
                progress(acted.total(), queue.count)
            else:
                left.add(dead.key)
    progress.end()
    return acted, left


# --- events -------------------------------------------------------------------------------------------------------------


def _events_list(args: argparse.Namespace) -> int:
    async def run() -> tuple[list[dict[str, Any]], int]:
        async with held(args, lambda t: t.unrouted) as queue:
            bodies = [message.body async for message in queue.messages(min(args.limit, queue.count))]
            return [orjson.loads(body) for body in bodies], queue.count

    found, count = asyncio.run(run())
    if args.json:
        print_json({"count": count, "events": found})
        return EXIT_OK
    print("\n".join(printable(event_line(event)) for event in found) or "No events without a subscriber.")
    if count > len(found):
        note(f"{len(found)} of {count}; --limit shows more")
    return EXIT_OK


def _events_replay(args: argparse.Namespace) -> int:
    replayed, back = asyncio.run(_replayed(args))
    if args.json:
        print_json({"replayed": replayed, "came_back": back})
    else:
        print(f"{replayed} events replayed" + (f"; {back} of them have no subscriber yet and came back" if back else ""))
    return EXIT_OK


async def _replayed(args: argparse.Namespace) -> tuple[int, int]:
    """(published again, and how many of these came back)."""
    run, replayed, back = uuid.uuid4().hex, 0, 0
    progress = Progress("events")
    async with held(args, lambda t: t.unrouted) as queue:
        async for message in queue.messages(queue.count):
            if message.headers.get(REPLAYED) == run:
                back = 1  # it is held now; those behind it are counted below
                break
            await queue.republish(message, queue.topology.events, message.routing_key or "", message.message_id, {REPLAYED: run})
            replayed += 1
            progress(replayed, queue.count)
        async for message in queue.messages(2 * replayed):  # new ones may be between them
            back += message.headers.get(REPLAYED) == run
    progress.end()
    return replayed, back


# --- usage --------------------------------------------------------------------------------------------------------------


def add_commands(dead: Any, events: Any, add: Add) -> None:
    """The sub-commands of `warren dead` and `warren events`."""
    _with_limit(add(dead, "list", _dead_list, "commands that could not be executed; nothing is taken", "warren dead list"))
    show = add(dead, "show", _dead_show, "one of them, whole", "warren dead show 3f2a9c01bd")
    show.add_argument("key", metavar="KEY")
    replay = add(dead, "replay", _dead_replay, "publish them again, to where they were published", "warren dead replay --all")
    drop = add(dead, "drop", _dead_drop, "delete them", "warren dead drop 3f2a9c01bd")
    for sub in (replay, drop):
        sub.add_argument("key", metavar="KEY", nargs="*", help="as `warren dead list` shows it")
        sub.add_argument("--all", action="store_true", help="all that are there now")
    drop.add_argument("--yes", action="store_true", help="do not ask")
    _with_limit(add(events, "list", _events_list, "events that had no subscriber; nothing is taken", "warren events list --json"))
    add(events, "replay", _events_replay, "publish them again, to those who subscribe now", "warren events replay")


def _with_limit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--limit", metavar="N", type=_count, default=LIST_DEFAULT, help=f"how many at most ({LIST_DEFAULT})")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
