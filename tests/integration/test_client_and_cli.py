"""The client and the command line against a real RabbitMQ and a daemon that is played by the test."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import aio_pika
import orjson
import pytest
from aio_pika.abc import AbstractIncomingMessage
from tests.conftest import Broker

from warren.client import Client, NoAnswer
from warren.core.envelope import CLOUDEVENT, COMMANDS, Origin, cloud_event, decode_command, timestamp
from warren.core.names import Topology
from warren.edges import amqp_topology
from warren.edges.terminal import qr_lines
from warren.errors import BrokerUnavailable, CommandError

DEADLINE_S = 15.0
CODE = "2@" + "Q0RFRkdISUo" * 20
Play = Callable[[dict[str, Any]], "dict[str, Any] | None"]


class RunningBroker(Protocol):
    @property
    def url(self) -> str: ...


class Played:
    """What a client sees of a daemon: it answers what `play` returns (None: nothing), and publishes events on demand."""

    def __init__(self, url: str, prefix: str) -> None:
        self.url, self.prefix, self.topology = url, prefix, Topology(prefix)
        self.play: Play = ok
        self.commands: list[tuple[dict[str, Any], AbstractIncomingMessage]] = []
        self.sequence = 0
        self._news = asyncio.Event()

    async def start(self) -> None:
        self._connection = await aio_pika.connect(self.url)
        self._channel = await self._connection.channel()
        await amqp_topology.declare(self._channel, self.topology, unrouted_ttl_s=60, unrouted_max=100, dead_max=100)
        for source in (self.topology.unclaimed, self.topology.queries):
            queue = await self._channel.declare_queue(exclusive=True)
            await queue.bind(source)
            await queue.consume(self._on_command)

    async def stop(self) -> None:
        await self._connection.close()

    async def _on_command(self, message: AbstractIncomingMessage) -> None:
        kind = (message.exchange or "").removeprefix(f"{self.prefix}.")
        decode_command(message.body, Origin(kind, message.routing_key or "", message.message_id))  # what it gets is legal
        command = orjson.loads(message.body)
        self.commands.append((command, message))
        self._news.set()
        if (outcome := self.play(command)) is not None:
            await self.answer(message, outcome)
        await message.ack()

    async def answer(self, message: AbstractIncomingMessage, outcome: dict[str, Any]) -> None:
        assert message.reply_to is not None
        reply = aio_pika.Message(orjson.dumps(outcome), correlation_id=message.correlation_id)
        await self._channel.default_exchange.publish(reply, message.reply_to)

    async def command(self, name: str) -> tuple[dict[str, Any], AbstractIncomingMessage]:
        """The first command of that name; waits for it."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for command, message in self.commands:
                    if command["command"] == name:
                        return command, message
                self._news.clear()
                await self._news.wait()

    async def event(self, session: str, event: str, data: dict[str, Any], *, at: datetime | None = None) -> None:
        self.sequence += 1
        body = cloud_event(
            self.topology, event=event, event_id=f"{session}/{self.sequence}", session=session, instance="test",
            time=at or datetime.now(UTC), data=data, epoch=1, sequence=self.sequence,
        )  # fmt: skip
        message = aio_pika.Message(body, content_type=CLOUDEVENT)
        await (await self._channel.get_exchange(self.topology.out)).publish(message, f"{session}.{event}")


def ok(command: dict[str, Any], **result: Any) -> dict[str, Any]:
    return {"id": command.get("id"), "command": command["command"], "ok": True, "result": result}


def failed(command: dict[str, Any], code: str) -> dict[str, Any]:
    error = {"code": code, "message": "It failed.", "hint": "Do something."}
    return {"id": command.get("id"), "command": command["command"], "ok": False, "error": error}


def status(state: str, **more: Any) -> dict[str, Any]:
    known = {
        "session": "acme",
        "state": state,
        "since": timestamp(datetime.now(UTC)),
        "code": None,
        "message": None,
        "hint": None,
        "until": None,
    }
    return {**known, "jid": None, "lid": None, "push_name": None, "epoch": 1, "outbox": 0, "qr": None, **more}


def qr(code: str = CODE, valid_s: float = 20.0, remaining: int = 4) -> dict[str, Any]:
    return {"code": code, "expires_at": timestamp(datetime.now(UTC) + timedelta(seconds=valid_s)), "remaining": remaining}


ONLINE = {"state": "online", "previous": "connecting", "jid": "15550001:2@s.whatsapp.net", "lid": None, "push_name": "Ana"}


@pytest.fixture
async def daemon(broker: RunningBroker) -> AsyncIterator[Played]:
    played = Played(broker.url, f"t{uuid.uuid4().hex[:8]}")
    await played.start()
    yield played
    await played.stop()


@pytest.fixture
async def client(daemon: Played) -> AsyncIterator[Client]:
    async with Client(daemon.url, daemon.prefix) as c:
        yield c


# --- client -----------------------------------------------------------------------------------------------------------


async def test_a_call_is_one_persistent_message_and_its_reply(daemon: Played, client: Client) -> None:
    daemon.play = lambda command: ok(command, message_id="3EB0")
    before = datetime.now(UTC)
    outcome = await client.call("send", "acme", {"to": "+15551234567", "text": "hi"}, id="order-1", expires_in_s=60)
    assert (outcome.ok, outcome.command_id, outcome.result) == (True, "order-1", {"message_id": "3EB0"})
    command, message = await daemon.command("send")
    assert message.exchange == daemon.topology.commands
    assert (message.routing_key, message.message_id, message.delivery_mode) == ("acme", "order-1", 2)
    left = datetime.fromisoformat(command["expires_at"]) - before
    assert timedelta(seconds=59) < left < timedelta(seconds=65)


async def test_ids_are_made_for_what_has_an_effect_only(daemon: Played, client: Client) -> None:
    await client.call("create", "acme")
    await client.call("create", "acme")
    await client.call("status", "acme")
    ids = [command.get("id") for command, _ in daemon.commands]
    assert ids[0] != ids[1]
    assert all(re.fullmatch(r"cli-[0-9a-f]{32}", i or "") for i in ids[:2])
    assert ids[2] is None


async def test_a_failure_is_an_outcome(daemon: Played, client: Client) -> None:
    daemon.play = lambda command: failed(command, "session_not_found")
    outcome = await client.call("status", "acme")
    assert not outcome.ok
    assert outcome.error == {"code": "session_not_found", "message": "It failed.", "hint": "Do something."}


async def test_calls_side_by_side_get_their_own_replies_in_any_order(daemon: Played, client: Client) -> None:
    daemon.play = lambda _: None
    calls = [asyncio.create_task(client.call("send", f"s{n}", {"to": "+15551234567", "text": "x"})) for n in range(20)]
    while len(daemon.commands) < 20:
        await daemon.command("send")
        await asyncio.sleep(0.01)
    for command, message in reversed(daemon.commands):
        await daemon.answer(message, ok(command, session=command["session"]))
    assert [(await call).result["session"] for call in calls] == [f"s{n}" for n in range(20)]


async def test_no_answer_names_the_way_to_learn_more(daemon: Played, client: Client) -> None:
    daemon.play = lambda _: None
    with pytest.raises(NoAnswer, match=r"may still run; repeat it with the same id \(order-1\)"):
        await client.call("disconnect", "acme", id="order-1", timeout_s=0.2)
    # A late reply harms nobody.
    command, message = await daemon.command("disconnect")
    await daemon.answer(message, ok(command))
    daemon.play = lambda command: ok(command, state="online")
    assert (await client.call("status", "acme")).result == {"state": "online"}


async def test_no_daemon_ever(broker: RunningBroker) -> None:
    async with Client(broker.url, "nobody") as client:
        for _ in range(2):  # RabbitMQ closes the channel each time
            with pytest.raises(NoAnswer, match="Nothing was sent"):
                await client.call("status", "acme")
        with pytest.raises(NoAnswer, match="no exchange"):
            await client.list_sessions()
        with pytest.raises(NoAnswer, match="no exchange"):
            async with client.subscribe():
                pass


async def test_what_cannot_be_addressed_is_refused_before_it_is_sent(client: Client, daemon: Played) -> None:
    for command, session in (("dance", "acme"), ("list", "acme"), ("status", "a.b"), ("status", "x" * 300)):
        with pytest.raises(CommandError):
            await client.call(command, session)
    assert daemon.commands == []


async def test_a_broken_reply_is_an_error(daemon: Played, client: Client) -> None:
    daemon.play = lambda _: {"nonsense": True}
    with pytest.raises(Exception, match="no outcome"):
        await client.call("status", "acme")


async def test_list_collects_the_answers_of_all_daemons(daemon: Played, client: Client) -> None:
    second = Played(daemon.url, daemon.prefix)
    await second.start()
    daemon.play = lambda c: ok(c, instance="one", sessions=[{"session": "b"}, {"session": "d"}])
    second.play = lambda c: ok(c, instance="two", sessions=[{"session": "a"}])
    started = asyncio.get_running_loop().time()
    sessions = await client.list_sessions(timeout_s=10.0)
    assert asyncio.get_running_loop().time() - started < 2.0
    assert [(s["session"], s["instance"]) for s in sessions] == [("a", "two"), ("b", "one"), ("d", "one")]
    await second.stop()


async def test_nobody_answers_list(daemon: Played, client: Client) -> None:
    daemon.play = lambda _: None
    with pytest.raises(NoAnswer, match="No daemon answered"):
        await client.list_sessions(timeout_s=0.2)


async def test_a_durable_queue_keeps_what_was_not_finished(daemon: Played) -> None:
    queue = f"{daemon.prefix}.mine"
    async with Client(daemon.url, daemon.prefix) as client, client.subscribe("acme.*", queue=queue) as events:
        for n in range(3):
            await daemon.event("acme", "message", {"n": n})
        await daemon.event("other", "message", {"n": 99})
        assert (await anext(events))["data"] == {"n": 0}
        assert (await anext(events))["data"] == {"n": 1}  # which says that 0 is done; 1 is not
    async with Client(daemon.url, daemon.prefix) as client:
        seen = []
        async for event in client.events("acme.*", queue=queue):
            seen.append(event["data"]["n"])
            if len(seen) == 2:
                break
        assert seen == [1, 2]
        channel = await (await client._open()).channel()
        await channel.queue_delete(queue)


async def test_what_is_no_event_is_skipped(daemon: Played, client: Client) -> None:
    async with client.subscribe(tap=True) as events:
        out = await daemon._channel.get_exchange(daemon.topology.out)
        for body in (b"{", b"[]", b"{}"):
            await out.publish(aio_pika.Message(body), "acme.message")
        await daemon.event("acme", "message", {"n": 1})
        assert (await anext(events))["data"] == {"n": 1}


async def test_a_cancelled_anext_loses_nothing(daemon: Played, client: Client) -> None:
    async with client.subscribe("acme.*", tap=True) as events:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.05)
        await daemon.event("acme", "message", {"n": 1})
        assert (await anext(events))["data"] == {"n": 1}


async def cut(client: Client) -> None:
    await (await client._open()).close(ConnectionResetError("cut"))


async def test_a_call_goes_on_over_a_lost_connection_with_the_same_id(daemon: Played, client: Client) -> None:
    daemon.play = lambda _: None
    call = asyncio.create_task(client.call("disconnect", "acme", timeout_s=DEADLINE_S))
    first, _ = await daemon.command("disconnect")
    daemon.play = lambda command: ok(command, state="stopped")
    await cut(client)
    assert (await asyncio.wait_for(call, DEADLINE_S)).result == {"state": "stopped"}
    assert [command["id"] for command, _ in daemon.commands] == [first["id"]] * 2


async def test_what_may_have_been_published_is_told_apart_from_what_was_not(
    daemon: Played, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.play = lambda _: None
    call = asyncio.create_task(client.call("disconnect", "acme", id="D1", timeout_s=1.5))
    await daemon.command("disconnect")
    monkeypatch.setattr(client, "_url", "amqp://u:geheim@127.0.0.1:1/")
    await cut(client)
    with pytest.raises(NoAnswer, match=r"same id \(D1\)"):
        await asyncio.wait_for(call, DEADLINE_S)
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1 cannot be reached"):
        await client.call("disconnect", "acme", timeout_s=0.5)


async def test_events_go_on_over_a_lost_connection(daemon: Played, client: Client) -> None:
    queue = f"{daemon.prefix}.mine"
    async with client.subscribe("acme.*", queue=queue) as events:
        await daemon.event("acme", "message", {"n": 0})
        assert (await anext(events))["data"] == {"n": 0}
        await cut(client)
        await daemon.event("acme", "message", {"n": 1})
        seen = {(await anext(events))["data"]["n"] for _ in range(2)}
        assert seen == {0, 1}, "what was in hand comes again, nothing is missed"
        waiting = asyncio.create_task(anext(events))
        await cut(client)
        await daemon.event("acme", "message", {"n": 2})
        numbers = [(await asyncio.wait_for(waiting, DEADLINE_S))["data"]["n"]]
        while numbers[-1] != 2 and len(numbers) < 3:  # the last ack may have been lost
            numbers.append((await anext(events))["data"]["n"])
        assert numbers[-1] == 2
    channel = await (await client._open()).channel()
    await channel.queue_delete(queue)


async def test_a_subscription_that_shall_not_reconnect_ends(daemon: Played, client: Client) -> None:
    async with client.subscribe(tap=True, reconnect=False) as events:
        event = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        await cut(client)
        for _ in range(2):
            with pytest.raises(BrokerUnavailable):
                await asyncio.wait_for(event, DEADLINE_S)
            event = asyncio.create_task(anext(events))
        with pytest.raises(BrokerUnavailable):
            await event


async def test_waiting_for_connected_goes_on_over_a_lost_connection(daemon: Played, client: Client) -> None:
    told: list[tuple[str, Any]] = []
    daemon.play = lambda c: ok(c, **status("pairing", qr=qr()))
    waiting = asyncio.create_task(
        client.connect("acme", {"device_name": "Shop"}, tell=lambda what, d: told.append((what, d["code"])))
    )
    await daemon.command("status")
    async with asyncio.timeout(DEADLINE_S):
        while not told:
            await asyncio.sleep(0.01)
    daemon.play = lambda c: ok(c, **status("online", jid="15550001:2@s.whatsapp.net", push_name="Ana"))
    await cut(client)
    assert (await asyncio.wait_for(waiting, DEADLINE_S))["push_name"] == "Ana"
    assert told == [("qr", CODE)]
    assert (await daemon.command("create"))[0]["args"] == {"device_name": "Shop"}


async def test_a_send_that_failed_is_an_error(daemon: Played, client: Client) -> None:
    daemon.play = lambda c: failed(c, "recipient_not_found")
    with pytest.raises(CommandError, match="It failed") as caught:
        await client.send("acme", "+15551234567", "hi")
    assert caught.value.reason == "recipient_not_found"


async def test_unreachable_and_refused_are_told_apart_and_tell_no_password(broker: RunningBroker) -> None:
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1 cannot be reached") as caught:
        await Client("amqp://u:geheim@127.0.0.1:1/").__aenter__()
    assert "geheim" not in str(caught.value)
    with pytest.raises(BrokerUnavailable, match="refuses user or password") as caught:
        await Client(re.sub(r":[^:@]+@", ":geheim@", broker.url)).__aenter__()
    assert "geheim" not in str(caught.value)


async def test_a_missing_permission_is_told_at_once(daemon: Played, broker: Broker) -> None:
    """Not after the deadline: trying again does not mend it."""
    user = f"{daemon.prefix}-shop"
    await broker.ctl("add_user", user, "secret")
    try:
        await broker.ctl("set_permissions", user, r"^amq\.gen-.*", r"^amq\.gen-.*", r"^amq\.gen-.*")
        async with Client(re.sub("//[^@]+@", f"//{user}:secret@", broker.url), daemon.prefix) as client:
            with pytest.raises(BrokerUnavailable, match="does not permit that") as caught:
                await asyncio.wait_for(client.call("status", "acme", timeout_s=3600), DEADLINE_S)
            assert "operations.md" in caught.value.hint
            with pytest.raises(BrokerUnavailable, match="does not permit that"):
                async with client.subscribe(tap=True):
                    pass
        assert daemon.commands == []
    finally:
        await broker.ctl("delete_user", user)


# --- command line -----------------------------------------------------------------------------------------------------

Warren = Callable[..., Awaitable["Ran"]]


class Ran:
    def __init__(self, status: int | None, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out.decode(), err.decode()

    @property
    def json(self) -> dict[str, Any]:
        decoded = orjson.loads(self.out)
        assert isinstance(decoded, dict)
        return decoded


def environment(daemon: Played | None, state: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WARREN_")}
    known = {"WARREN_AMQP__URL": daemon.url, "WARREN_AMQP__PREFIX": daemon.prefix} if daemon else {}
    return {**clean, **known, "WARREN_STATE_DIR": str(state), "PYTHONUNBUFFERED": "1", "COLUMNS": "100", "LINES": "60"}


def spawn(*words: str, env: dict[str, str], cwd: Path, **more: Any) -> Awaitable[asyncio.subprocess.Process]:
    piped = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE, **more}
    return asyncio.create_subprocess_exec(sys.executable, "-m", "warren.cli", *words, env=env, cwd=cwd, **piped)


@pytest.fixture
def warren(daemon: Played, tmp_path: Path) -> Warren:
    async def run(*words: str, env: dict[str, str] | None = None) -> Ran:
        process = await spawn(*words, env=env or environment(daemon, tmp_path), cwd=tmp_path)
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        return Ran(process.returncode, out, err)

    return run


async def test_send_in_words_and_as_json(daemon: Played, warren: Warren) -> None:
    daemon.play = lambda c: ok(c, message_id="3EB0", timestamp="2030-11-20T12:00:00.000Z")
    words = ("session", "send", "acme", "--to", "+15551234567", "--text", "hi", "--id", "order-1", "--expires-in", "60")
    ran = await warren(*words)
    assert (ran.status, ran.out, ran.err) == (0, "acme: sent as 3EB0 at 2030-11-20T12:00:00.000Z\n", "")
    command, _ = await daemon.command("send")
    assert command["id"] == "order-1"
    assert "expires_at" in command
    for position in (("--json", *words), (*words, "--json")):
        ran = await warren(*position)
        assert (ran.status, ran.json["ok"], ran.json["result"]["message_id"]) == (0, True, "3EB0")


async def test_a_failed_command_is_exit_1(daemon: Played, warren: Warren) -> None:
    daemon.play = lambda c: failed(c, "session_not_found")
    ran = await warren("session", "status", "acme")
    assert (ran.status, ran.out, ran.err) == (1, "", "error: It failed. hint: Do something.\n")
    ran = await warren("session", "status", "acme", "--json")
    assert (ran.status, ran.json["error"]["code"]) == (1, "session_not_found")
    assert ran.err == "error: It failed. hint: Do something.\n"


async def test_no_answer_is_exit_4(daemon: Played, warren: Warren) -> None:
    daemon.play = lambda _: None
    for words in (("session", "disconnect", "acme", "--timeout", "0.3"), ("--timeout", "0.3", "session", "list")):
        ran = await warren(*words, "--json")
        assert (ran.status, ran.json["error"]["code"]) == (4, "no_answer")
        assert "warrend" in ran.err


async def test_the_private_rabbitmq_is_found_in_the_state_directory(daemon: Played, warren: Warren, tmp_path: Path) -> None:
    state = tmp_path / "state"
    env = environment(None, state) | {"WARREN_AMQP__PREFIX": daemon.prefix}
    ran = await warren("session", "list", env=env)
    assert ran.status == 3
    assert str(state) in ran.err
    (state / "rabbitmq").mkdir(parents=True)
    (state / "rabbitmq" / "url").write_text(daemon.url + "\n")
    daemon.play = lambda c: ok(
        c, instance="host", sessions=[status("online", jid="15550001:2@s.whatsapp.net", push_name="A\x1b[31mna")]
    )
    ran = await warren("session", "list", env=env)
    assert ran.status == 0
    header, row = ran.out.splitlines()
    assert header.split() == ["SESSION", "STATE", "SINCE", "ACCOUNT", "INSTANCE", "REASON"]
    assert row.startswith("acme     online  ")
    assert "+15550001 (A\N{REPLACEMENT CHARACTER}[31mna)" in row
    ran = await warren("session", "list", "--url", "amqp://u:geheim@127.0.0.1:1/", env=env)
    assert (ran.status, ran.out) == (3, "")
    assert "geheim" not in ran.err


async def test_create_and_wait_for_a_pipe(daemon: Played, warren: Warren) -> None:
    def play(command: dict[str, Any]) -> dict[str, Any]:
        return (
            ok(command, session="acme", state="connecting", epoch=1)
            if command["command"] == "create"
            else ok(command, **status("pairing", qr=qr()))
        )

    daemon.play = play
    running = asyncio.create_task(warren("session", "create", "acme", "--device-name", "Shop", "--wait"))
    await daemon.command("status")
    # Older than the answer, so it says nothing about now.
    await daemon.event(
        "acme", "disconnected", {"state": "stopped", "code": "qr_expired"}, at=datetime.now(UTC) - timedelta(minutes=5)
    )
    await daemon.event("acme", "qr", qr(CODE + "x"))
    await daemon.event("acme", "connected", ONLINE)
    ran = await running
    assert ran.out.splitlines() == [CODE, CODE + "x", "acme: connected as +15550001 (Ana)"]
    assert ran.status == 0
    assert (await daemon.command("create"))[0]["args"] == {"device_name": "Shop"}


async def test_qr_as_json_lines(daemon: Played, warren: Warren) -> None:
    daemon.play = lambda c: ok(c, **status("connecting"))
    running = asyncio.create_task(warren("qr", "acme", "--json"))
    await daemon.command("status")
    await daemon.event("acme", "qr", {**qr(), "image": "data:image/png;base64,xxxx"})
    await daemon.event("acme", "connected", ONLINE)
    ran = await running
    lines = [orjson.loads(line) for line in ran.out.splitlines()]
    assert [line["event"] for line in lines] == ["qr", "connected"]
    assert set(lines[0]["data"]) == {"code", "expires_at", "remaining"}
    assert ran.status == 0


async def test_qr_of_a_session_that_is_connected(daemon: Played, warren: Warren) -> None:
    daemon.play = lambda c: ok(c, **status("online", jid="15550001:2@s.whatsapp.net", push_name="Ana"))
    ran = await warren("qr", "acme")
    assert (ran.status, ran.out) == (0, "acme: connected as +15550001 (Ana)\n")


async def test_qr_of_a_session_that_nobody_knows(daemon: Played, warren: Warren) -> None:
    daemon.play = lambda c: failed(c, "session_not_found")
    ran = await warren("qr", "acme")
    assert ran.status == 1
    assert "`warren session create acme`" in ran.err


async def test_qr_that_expires(daemon: Played, warren: Warren) -> None:
    daemon.play = lambda c: ok(c, **status("pairing", qr=qr()))
    running = asyncio.create_task(warren("qr", "acme", "--json"))
    await daemon.command("status")
    told = {"state": "stopped", "previous": "pairing", "code": "qr_expired", "message": "Nobody scanned the QR code."}
    await daemon.event("acme", "disconnected", told)
    ran = await running
    assert ran.status == 1
    assert orjson.loads(ran.out.splitlines()[-1])["error"]["code"] == "qr_expired"
    assert "Nobody scanned" in ran.err
    assert "`warren session create acme`" in ran.err


async def test_qr_waits_no_longer_than_told(daemon: Played, warren: Warren) -> None:
    daemon.play = lambda c: ok(c, **status("connecting"))
    ran = await warren("qr", "acme", "--timeout", "1")
    assert ran.status == 4
    assert "not connected within 1 s" in ran.err


async def test_qr_is_drawn_in_a_terminal_and_replaced(daemon: Played, tmp_path: Path) -> None:
    daemon.play = lambda c: ok(c, **status("pairing", qr=qr(valid_s=2.0)))
    ours, theirs = pty.openpty()
    process = await spawn("qr", "acme", env=environment(daemon, tmp_path), cwd=tmp_path, stdout=theirs)
    os.close(theirs)
    shown = asyncio.create_task(asyncio.to_thread(_everything, ours))
    await daemon.command("status")
    await asyncio.sleep(2.5)  # long enough for it to count down to nothing
    await daemon.event("acme", "qr", qr(CODE + "x", remaining=3))
    await daemon.event("acme", "connected", ONLINE)
    assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 0
    text = await shown
    os.close(ours)
    for code in (CODE, CODE + "x"):
        for line in qr_lines(code):
            assert f"\x1b[38;5;16m\x1b[48;5;231m{line}\x1b[0m\r\n" in text
    assert re.search(r"Valid [12] s, 4 more", text)
    assert "this code has expired" in text
    height = len(qr_lines(CODE))
    assert text.count(f"\x1b[{height}A\x1b[J") == 2, "each code is erased: by the next one, and by the end"
    assert text.endswith("acme: connected as +15550001 (Ana)\r\n")


def _everything(descriptor: int) -> str:
    data = b""
    while True:
        try:
            data += os.read(descriptor, 65536)
        except OSError:  # how Linux says that nobody has the other side any more
            return data.decode()


async def test_watch_prints_lines_and_ends_at_once(daemon: Played, tmp_path: Path) -> None:
    env = environment(daemon, tmp_path)
    watch = await spawn("watch", "acme", env=env, cwd=tmp_path)
    raw = await spawn("watch", "*.message", "--raw", env=env, cwd=tmp_path)
    assert watch.stdout is not None
    assert watch.stderr is not None
    assert raw.stdout is not None
    assert raw.stderr is not None
    assert b"watching acme.* at 127.0.0.1:" in await watch.stderr.readline()
    assert b"watching *.message at" in await raw.stderr.readline()
    await daemon.event(
        "acme",
        "disconnected",
        {"state": "backing_off", "previous": "online", "code": "network", "message": "Lost.", "retry_in_s": 4.2},
    )
    evil = {
        "chat": "1@s.whatsapp.net",
        "from": "1@s.whatsapp.net",
        "kind": "text",
        "text": "hi\x1b]0;owned\x07\nfake line",
        "push_name": "Ana",
    }
    await daemon.event("acme", "message", evil)
    line = (await watch.stdout.readline()).decode()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  acme +disconnected +online -> backing_off: Lost\. Next try in 4\.2 s\.\n", line)
    line = (await watch.stdout.readline()).decode()
    assert "Ana 1@s.whatsapp.net: hi\N{REPLACEMENT CHARACTER}]0;owned" in line
    assert "fake line" in line
    assert not set(line) & set("\x1b\x07")
    event = orjson.loads(await raw.stdout.readline())
    assert event["data"] == evil
    for process in (watch, raw):
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert (process.returncode, err) == (130, b"")


async def test_a_reader_that_has_seen_enough_is_no_error(daemon: Played, tmp_path: Path) -> None:
    watch = await spawn("watch", env=environment(daemon, tmp_path), cwd=tmp_path)
    assert watch.stdout is not None
    assert watch.stderr is not None
    await watch.stderr.readline()
    await daemon.event("acme", "message", {})
    await watch.stdout.readline()
    watch._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
    while watch.returncode is None:
        await daemon.event("acme", "message", {})
        await asyncio.sleep(0.05)
    assert (watch.returncode, await watch.stderr.read()) == (0, b"")


async def test_the_example_of_the_documentation_runs(daemon: Played, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "message-api.md").read_text()
    code = (
        text.split("```python\n", 1)[1]
        .split("```", 1)[0]
        .replace('"warren.', f'"{daemon.prefix}.')
        .replace('"greeter"', f'"{daemon.prefix}.greeter"')
    )
    # Only names on RabbitMQ have the prefix; the types of events do not.
    code = re.sub(rf'case "{daemon.prefix}\.', 'case "warren.', code)
    (tmp_path / "greeter.py").write_text(code)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "greeter.py", daemon.url, "acme", cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        daemon.play = lambda _: None
        await daemon.command("create")
        await daemon.event("acme", "qr", qr("2@scan"))
        await daemon.event("acme", "connected", ONLINE)
        said = {"chat": "15550002@s.whatsapp.net", "from_me": False, "group": False, "kind": "text", "text": "hi"}
        await daemon.event("acme", "message", said)
        await daemon.event("acme", "command_failed", failed({"command": "send"}, "rejected"))
        lines = [(await process.stdout.readline()).decode() for _ in range(3)]
        assert [line.partition(":")[0] for line in lines] == ["scan", "connected", "failed"]
        command, message = await daemon.command("send")
        assert message.exchange == f"{daemon.prefix}.{COMMANDS['send'].exchange}"
        assert command["args"] == {"to": "15550002@s.whatsapp.net", "text": "Hello!"}
    finally:
        process.kill()
        await process.wait()


async def test_the_example_of_the_readme_runs(daemon: Played, tmp_path: Path) -> None:
    code = (Path(__file__).parents[2] / "README.md").read_text().split("```python\n", 1)[1].split("```", 1)[0]
    assert len([line for line in code.splitlines() if line]) <= 15
    here = code.replace('"amqp://guest:guest@127.0.0.1/"', f'"{daemon.url}", "{daemon.prefix}"')
    (tmp_path / "example.py").write_text(here.replace('"my-service"', f'"{daemon.prefix}.mine"'))

    def play(command: dict[str, Any]) -> dict[str, Any]:
        match command["command"]:
            case "create":
                return ok(command, session="acme", state="connecting", epoch=1)
            case "status":
                return ok(command, **status("connecting", code="connecting"))
        return ok(command, message_id="3EB0", timestamp="2030-11-20T12:00:00.000Z")

    daemon.play = play
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-u", "example.py", cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            await daemon.command("status")
            await daemon.event("acme", "qr", qr())
            await daemon.event("acme", "connected", ONLINE)
            lines = [(await process.stdout.readline()).decode() for _ in range(3)]
            assert lines == ["state connecting\n", f"qr {CODE}\n", "connected as 15550001:2@s.whatsapp.net\n"]
            command, _ = await daemon.command("send")
            assert (command["id"], command["args"]) == ("order-4711", {"to": "+15551234567", "text": "Shipped."})
            heard = asyncio.create_task(process.stdout.readline())
            while not heard.done():  # bound only after the send
                await daemon.event("acme", "message", {"push_name": "Ana", "text": "Thanks"})
                await asyncio.wait({heard}, timeout=0.2)
            assert heard.result() == b"Ana Thanks\n"
    finally:
        process.kill()
        await process.wait()
        channel = await daemon._connection.channel()
        await channel.queue_delete(f"{daemon.prefix}.mine")
