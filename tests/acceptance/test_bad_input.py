"""Whatever is published to a real warren is answered with a precise error: no crash, no lost command, no blocked queue."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aio_pika
import orjson
import pika
import pytest
from tests.acceptance.rig import Rig, until
from tests.bodies import random_body
from tests.conftest import Broker
from tests.contract import reply_faults

from warren.core.envelope import COMMANDS, MAX_BODY_BYTES, Command, Origin, Rejected, decode_command
from warren.core.names import NO_SESSION

PEER = "15559990001"
PAST = "2020-01-01T00:00:00Z"


@dataclass(frozen=True)
class Case:
    """`body` is published as it is, or as JSON with what is missing of a `send` to session acme filled in (None: left out)."""

    code: str
    what: str
    body: bytes | dict[str, Any]
    exchange: str = "commands"
    key: str = "acme"
    of: str = "acme"
    """The session that the outcome event is of."""
    message_id: str | None = None
    dead: bool = False

    @property
    def bytes(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        whole = {"command": "send", "session": "acme", "id": self.what, "args": {"to": f"+{PEER}", "text": "x"}, **self.body}
        return orjson.dumps({k: v for k, v in whole.items() if v is not None})


def control(code: str, what: str, command: str, session: str, **more: Any) -> Case:
    of = more.pop("of", session)
    return Case(code, what, {"command": command, "session": session, "args": None, **more}, "control", session, of)


def undecodable(code: str, what: str, body: bytes, **more: Any) -> Case:
    return Case(code, what, body, dead=True, **more)


CASES = [
    undecodable("invalid_json", "an empty body", b""),
    undecodable("invalid_json", "words", b"please send"),
    undecodable("invalid_json", "binary garbage", bytes(range(256))),
    undecodable("invalid_json", "text that is not UTF-8", b'{"command": "s\xffnd"}'),
    undecodable("invalid_json", "half an object", b'{"command": "send", "session": "acme", "args": {'),
    undecodable("invalid_json", "NaN", b'{"command": "send", "args": NaN}'),
    undecodable("invalid_json", "a number without end", b'{"command": ' + b"9" * 400 + b"}"),
    undecodable("invalid_json", "a lone surrogate", b'{"command": "\\ud800"}'),
    undecodable("invalid_json", "a list", b'[{"command": "send"}]'),
    undecodable("invalid_json", "null", b"null"),
    undecodable("invalid_json", "a hundred thousand brackets", b"[" * 100_000),
    undecodable("invalid_json", "a deep object", b'{"args":' * 2_000 + b"1" + b"}" * 2_000),
    undecodable("invalid_json", "nothing for nobody", b"\0", key="not a session!", of=NO_SESSION),
    undecodable("invalid_json", "words on control", b"please create", exchange="control"),
    undecodable("invalid_json", "words on queries", b"please list", exchange="queries"),
    undecodable("invalid_json", "words for nobody's session", b"hello?", key="nobody", of="nobody"),
    undecodable("too_large", "a byte too much", b" " * (MAX_BODY_BYTES - 1) + b"{}"),
    undecodable("too_large", "a megabyte", bytes(1 << 20), exchange="control"),
    Case("invalid_command", "no command", {"command": None}),
    Case("invalid_command", "a command that is a number", {"command": 7}),
    Case("invalid_command", "an unknown field", {"txt": "x"}),
    Case("invalid_command", "a field name of 200 KB", {"x" * 200_000: 1}),
    Case("invalid_command", "an id that is a number", {"id": 4711}),
    Case("invalid_command", "an empty id", {"id": ""}),
    Case("invalid_command", "an id of 201 characters", {"id": "x" * 201}),
    Case("invalid_command", "a session that is a list", {"session": ["acme"]}, of=NO_SESSION),
    Case("invalid_command", "arguments that are text", {"args": "to"}),
    Case("invalid_command", "a time without zone", {"expires_at": "2030-11-20T12:00:00"}),
    Case("invalid_command", "a time that is none", {"expires_at": "2030-02-30T12:00:00Z"}),
    Case("invalid_command", "a time that is a number", {"expires_at": 1_900_000_000}),
    Case("invalid_command", "a message_id of 201 characters", {"id": None}, message_id="x" * 201),
    Case("unknown_command", "a command that is not there", {"command": "sing"}),
    Case("unknown_command", "a command of 200 KB", {"command": "s" * 200_000}),
    Case("wrong_exchange", "send on control", {}, exchange="control"),
    Case("wrong_exchange", "send on queries", {}, exchange="queries"),
    Case("wrong_exchange", "create on commands", {"command": "create", "args": None}),
    Case("wrong_exchange", "list on control", {"command": "list", "args": None}, exchange="control"),
    Case("wrong_exchange", "send on the exchange for nobody's", {}, exchange="unclaimed"),
    Case("invalid_session", "no session", {"session": None}, of=NO_SESSION),
    Case("invalid_session", "a malformed session", {"session": "../acme"}, of=NO_SESSION),
    Case("invalid_session", "a session of 65 characters", {"session": "a" * 65}, of=NO_SESSION),
    Case("invalid_session", "another routing key", {"session": "other"}, of="other"),
    Case("id_required", "no id", {"id": None}),
    control("id_required", "create without id", "create", "third", id=None),
    Case("invalid_argument", "no recipient", {"args": {"text": "x"}}),
    Case("invalid_argument", "a malformed recipient", {"args": {"to": "Ana", "text": "x"}}),
    Case("invalid_argument", "a number without plus", {"args": {"to": PEER, "text": "x"}}),
    Case("invalid_argument", "an empty text", {"args": {"to": f"+{PEER}", "text": ""}}),
    Case("invalid_argument", "a text of 65,537 characters", {"args": {"to": f"+{PEER}", "text": "x" * 65_537}}),
    Case("invalid_argument", "a text that is a number", {"args": {"to": f"+{PEER}", "text": 1e300}}),
    Case("invalid_argument", "an unknown argument", {"args": {"to": f"+{PEER}", "text": "x", "txt": "x"}}),
    control("invalid_argument", "arguments for logout", "logout", "acme", args={"now": True}),
    Case("id_conflict", "the id of another text", {"id": "used", "args": {"to": f"+{PEER}", "text": "other"}}),
    control("id_conflict", "the id of another command", "disconnect", "acme", id="used"),
    Case("expired", "too late", {"expires_at": PAST}),
    Case("expired", "very long ago", {"expires_at": "0001-01-01T00:00:00+23:59"}),
    control("expired", "a create too late", "create", "third", expires_at=PAST),
    Case("session_not_found", "a send for nobody", {"session": "nobody"}, key="nobody", of="nobody"),
    control("session_not_found", "a logout for nobody", "logout", "nobody"),
    control("owned_elsewhere", "a session of somebody else", "create", "taken"),
    control("session_limit", "one session too many", "create", "third"),
    Case("recipient_not_found", "a number without WhatsApp", {"args": {"to": "+15557654321", "text": "x"}}),
    control("not_connected", "a logout that WhatsApp cannot hear", "logout", "acme"),
]
"""Together with tests/unit/test_sending.py every row of the table of errors; tests/unit/test_error_table.py sees to it."""


class Publisher:
    """A backend service: publishes to any exchange, and takes replies in a queue of its own."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._answered = asyncio.Event()
        self.replies: dict[str, dict[str, Any]] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Publisher]:
        async with await aio_pika.connect(self._rig.url) as connection:
            self.channel = await connection.channel()
            self.queue = await self.channel.declare_queue(exclusive=True)
            await self.queue.consume(self.on_reply, no_ack=True)
            yield self

    async def on_reply(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.replies[str(message.correlation_id)] = orjson.loads(message.body)
        self._answered.set()

    async def publish(self, exchange: str, key: str, body: bytes, *, reply_to: str | None = None, **properties: Any) -> None:
        properties = {"delivery_mode": 2, "reply_to": reply_to or self.queue.name, **properties}
        exchange = f"{self._rig.prefix}.{exchange}"
        if properties.get("message_id") is None:
            await asyncio.to_thread(self._publish_without_id, exchange, key, body, properties)
        else:
            to = await self.channel.get_exchange(exchange, ensure=False)
            await to.publish(aio_pika.Message(body, **properties), key, mandatory=False)

    def _publish_without_id(self, exchange: str, key: str, body: bytes, properties: dict[str, Any]) -> None:
        """With another library: aio-pika makes up a message_id where there is none."""
        with pika.BlockingConnection(pika.URLParameters(self._rig.url)) as connection:
            connection.channel().basic_publish(exchange, key, body, pika.BasicProperties(**properties))

    async def reply(self, correlation_id: str) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while correlation_id not in self.replies:
                self._answered.clear()
                await self._answered.wait()
        return self.replies[correlation_id]

    async def dead(self) -> list[aio_pika.abc.AbstractIncomingMessage]:
        """Everything in `warren.dead`, taken out."""
        queue = await self.channel.get_queue(f"{self._rig.prefix}.dead", ensure=False)
        taken = []
        while (message := await queue.get(fail=False, no_ack=True)) is not None:
            taken.append(message)
        return taken


async def left_in_queues(broker: Broker, prefix: str) -> dict[str, int]:
    """Messages, settled or not, in warren's own queues."""
    table = await broker.ctl("list_queues", "--quiet", "--no-table-headers", "name", "messages")
    rows = [line.split("\t") for line in table.splitlines() if line.startswith(f"{prefix}.")]
    return {name: int(count) for name, count in rows if int(count)}


async def faults(case: Case, rig: Rig, publisher: Publisher) -> list[str]:
    await publisher.publish(case.exchange, case.key, case.bytes, correlation_id=case.what, message_id=case.message_id)
    try:
        reply = await publisher.reply(case.what)
        event = await rig.got.event("command_failed", case.of, lambda data: data == reply)
    except (AssertionError, TimeoutError) as e:
        return [f"{case.what}: no reply or no event: {publisher.replies.get(case.what)} ({type(e).__name__})"]
    error = reply.get("error") or {}
    found = reply_faults(reply["command"], reply) if reply["command"] in COMMANDS else []
    if error.get("code") != case.code:
        found.append(f"it is told {error}")
    if not error.get("message") or not error.get("hint") or len(orjson.dumps(reply)) > 1_000:
        found.append(f"not a helpful error: {error}")
    body = orjson.loads(case.bytes) if not case.dead else {}
    written = body.get("id")
    if isinstance(written, str) and 0 < len(written) <= 200 and written != event.get("causationid"):
        found.append("the event does not name the command")
    return [f"{case.what}: {fault}" for fault in found]


async def by_code(code: str, rig: Rig, publisher: Publisher, *, but: bool = False) -> list[str]:
    """All cases of a code, or all but those, side by side."""
    results = await asyncio.gather(*(faults(case, rig, publisher) for case in CASES if (case.code == code) != but))
    assert results
    return [fault for result in results for fault in result]


IN_THEIR_OWN_TIME = ("owned_elsewhere", "session_limit", "not_connected")


async def test_every_bad_command_gets_a_precise_error(tmp_path: Path, broker: Broker) -> None:
    async with Rig(tmp_path, broker.url, "bad", WARREN_FLEET__MAX_SESSIONS="2") as rig, Publisher(rig).open() as publisher:
        await rig.pair("acme", "15550002201")
        await rig.sim.add_phone(PEER, "Peer")
        used = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "x"}, id="used")
        assert used.ok

        await publisher.channel.declare_queue("bad.owner.taken", exclusive=True)
        found = await by_code("owned_elsewhere", rig, publisher)
        assert (await rig.call("create", "second")).ok
        found += await by_code("session_limit", rig, publisher)
        rest = [case for case in CASES if case.code not in IN_THEIR_OWN_TIME]
        for result in await asyncio.gather(*(faults(case, rig, publisher) for case in rest)):
            found += result
        assert (await rig.call("send", "acme", {"to": f"+{PEER}", "text": "still here"})).ok
        assert (await rig.call("disconnect", "acme")).ok
        found += await by_code("not_connected", rig, publisher)
        assert found == []

        buried = await publisher.dead()
        assert all(str(m.headers["x-warren-exchange"]).startswith("bad.") and m.headers["x-warren-message"] for m in buried)
        dead = {m.body: str(m.headers["x-warren-reason"]) for m in buried}
        assert dead == {case.bytes: case.code for case in CASES if case.dead}
        await until(lambda: empty(broker, rig.prefix), "empty queues")
        assert (await rig.sim.received(PEER))["stanzas"] == 2, "nothing that was refused went out"
        listed = await rig.client.list_sessions()
        assert [(s["session"], s["state"]) for s in listed] == [("acme", "stopped"), ("second", "pairing")]


async def empty(broker: Broker, prefix: str) -> bool:
    return await left_in_queues(broker, prefix) == {}


async def test_replies_that_lead_nowhere_or_into_warren(tmp_path: Path, broker: Broker) -> None:
    async with Rig(tmp_path, broker.url, "odd") as rig, Publisher(rig).open() as publisher:
        await rig.pair("acme", "15550002202")
        own = [f"odd.{name}" for name in ("control.acme", "session.acme", "owner.acme", "unclaimed", "dead", "events.unrouted")]
        nowhere = [
            "nobody-has-this-queue",
            "x" * 255,
            "odd",
            "ö",
        ]
        for n, reply_to in enumerate(own + nowhere):
            body = {"command": "status", "session": "acme", "id": f"odd-{n}"}
            await publisher.publish("control", "acme", orjson.dumps(body), reply_to=reply_to)
            await publisher.publish("control", "acme", b"garbage", reply_to=reply_to, message_id=f"garbage-{n}")
            await publisher.publish("queries", "", orjson.dumps({"command": "list"}), reply_to=reply_to)
        for n in range(len(own + nowhere)):
            done = await rig.got.event("command_completed", "acme", lambda data, n=n: data["id"] == f"odd-{n}")
            assert done["data"]["result"]["state"] == "online"
            await rig.got.event("command_failed", "acme", lambda data, n=n: data["id"] == f"garbage-{n}")
        assert {m.body for m in await publisher.dead()} == {b"garbage"}, "no reply among them"
        await until(lambda: empty(broker, rig.prefix), "empty queues")
        # Had a reply come back as a command, it would have been refused, and told of.
        assert len(rig.got.of("command_failed")) == len(own + nowhere)
        assert (await rig.call("status", "acme")).ok, "the next reply finds its way"
        direct = await publisher.channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
        await direct.consume(publisher.on_reply, no_ack=True)
        body = orjson.dumps({"command": "status", "session": "acme"})
        await publisher.publish("control", "acme", body, reply_to=direct.name, correlation_id="direct", message_id="direct")
        assert (await publisher.reply("direct"))["ok"], "RabbitMQ's direct reply-to works"


async def test_garbage_waits_its_turn_while_the_session_is_offline(tmp_path: Path, broker: Broker) -> None:
    async with Rig(tmp_path, broker.url, "later") as rig, Publisher(rig).open() as publisher:
        await rig.pair("acme", "15550002204")
        await rig.sim.add_phone(PEER, "Peer")
        assert (await rig.call("disconnect", "acme")).ok
        await rig.publish_sends("acme", PEER, 2)
        await publisher.publish("commands", "acme", b"garbage", message_id="garbage")
        await rig.publish_sends("acme", PEER, 2, start=3)
        assert (await rig.call("status", "acme")).result["state"] == "stopped"
        assert (await rig.call("create", "acme")).ok
        await rig.got.event("command_completed", "acme", lambda data: data["id"] == "acme-4")
        await rig.got.event("command_failed", "acme", lambda data: data["id"] == "garbage")
        assert [m["text"] for m in (await rig.sim.received(PEER))["shown"]] == [f"out {n}" for n in range(1, 5)]
        assert [m.body for m in await publisher.dead()] == [b"garbage"]


def told_id(exchange: str, key: str, body: bytes, message_id: str) -> str | None:
    """The id of the outcome; None for a `list`, which has none."""
    try:
        command: Command = decode_command(body, Origin(exchange, key, message_id))
    except Rejected as e:
        return e.command_id
    return None if command.name == "list" else command.id


def harmless(body: bytes) -> bool:
    """Not by chance a command that starts or ends a session."""
    return not any(name in body for name in (b'"create"', b'"logout"', b'"disconnect"'))


@pytest.mark.parametrize("seed", [20_301_120])
async def test_random_bodies_all_end(tmp_path: Path, broker: Broker, seed: int) -> None:
    chance = random.Random(seed)
    async with Rig(tmp_path, broker.url, "fuzz") as rig, Publisher(rig).open() as publisher:
        await rig.pair("acme", "15550002203")
        await rig.sim.add_phone(PEER, "Peer")
        expected: set[str] = set()
        for n in range(900):
            exchange = chance.choice(("control", "commands", "queries"))
            key = chance.choice(("acme", "acme", "nobody", "no session", ""))
            while not harmless(body := random_body(chance, PEER)):
                pass
            if (told := told_id(exchange, key, body, f"fuzz-{n}")) is not None:
                expected.add(told)
            await publisher.publish(exchange, key, body, message_id=f"fuzz-{n}", correlation_id=f"fuzz-{n}")
        assert len(expected) > 800

        def told() -> set[str]:
            return {str(e.get("causationid")) for e in rig.got.events if e["type"].startswith("warren.command_")}

        await until(lambda: expected <= told(), "an outcome for each")
        await publisher.dead()
        await until(lambda: empty(broker, rig.prefix), "empty queues")
        assert (await rig.call("status", "acme")).result["state"] == "online"
        assert (await rig.call("send", "acme", {"to": f"+{PEER}", "text": "after all that"})).ok
