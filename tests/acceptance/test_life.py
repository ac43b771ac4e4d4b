"""One warren, used as its users use it: by RabbitMQ and with real processes."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from pathlib import Path

import pytest
from tests.acceptance.rig import Rig, until
from tests.conftest import Broker

from warren.client import Client

prefixes = itertools.count(1)
PEER = "15559990000"


@pytest.fixture
def prefix() -> str:
    return f"life{next(prefixes)}"


def texts(shown: list[dict[str, object]], sender: str) -> list[object]:
    return [m["text"] for m in shown if str(m["from"]).startswith(sender)]


async def test_commands_and_what_can_go_wrong(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        nobody = await rig.call("status", "nobody")
        assert nobody.error is not None
        assert nobody.error["code"] == "session_not_found"

        await rig.pair("acme", "15550001111")
        await rig.sim.add_phone(PEER, "Peer")
        status = await rig.call("status", "acme")
        assert status.result["state"] == "online"
        assert status.result["jid"].startswith("15550001111")

        sent = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "one"}, id="order-1")
        assert sent.ok
        again = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "one"}, id="order-1")
        assert again.result == sent.result
        conflict = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "two"}, id="order-1")
        assert conflict.error is not None
        assert conflict.error["code"] == "id_conflict"
        late = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "late"}, expires_in_s=-5)
        assert late.error is not None
        assert late.error["code"] == "expired"
        unknown = await rig.call("send", "acme", {"to": "+15557654321", "text": "nobody has this number"})
        assert unknown.error is not None
        assert unknown.error["code"] == "recipient_not_found"
        received = await rig.sim.received(PEER)
        assert received["stanzas"] == 1, "a repeated command must not be sent again"
        assert texts(received["shown"], "15550001111") == ["one"]

        listed = await rig.client.list_sessions()
        assert [(s["session"], s["state"], s["instance"]) for s in listed] == [("acme", "online", "rig")]
        assert rig.got.sequence_faults == []


async def test_unlinked_on_the_phone(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.pair("acme", "15550001112")
        await rig.sim.unlink("15550001112", (await rig.sim.devices("15550001112"))[0]["id"])
        gone = await rig.got.event("logout", "acme")
        assert gone["data"]["state"] == "logged_out"
        # It stays so over a restart, and shows no QR that nobody asked for.
        assert await rig.warrend.stop() == 0
        qrs = len(rig.got.of("qr"))
        await rig.restart()
        status = await rig.call("status", "acme")
        assert status.result["state"] == "logged_out"
        assert len(rig.got.of("qr")) == qrs
        # `create` starts a new life: a new QR, a new epoch.
        after = len(rig.got.events)
        created = await rig.call("create", "acme")
        assert created.result["epoch"] == gone["epoch"] + 1
        qr = await rig.got.event("qr", "acme", after=after)
        await rig.sim.scan("15550001112", qr["data"]["code"])
        await rig.got.event("connected", "acme", after=after)
        assert rig.got.sequence_faults == []


async def test_logout_removes_and_create_begins_anew(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.pair("acme", "15550001113")
        assert (await rig.call("logout", "acme")).ok
        assert await rig.sim.devices("15550001113") == []
        missing = await rig.call("status", "acme")
        assert missing.error is not None
        assert missing.error["code"] == "session_not_found"
        await until(lambda: not (rig.warrend.state / "sessions" / "acme").exists(), "the state to be deleted")
        after = len(rig.got.events)
        created = await rig.call("create", "acme")
        assert created.result["epoch"] == 2
        await rig.got.event("qr", "acme", after=after)
        # Two at once: one removes it, the other finds nothing to remove; neither waits for ever.
        both = await asyncio.gather(rig.call("logout", "acme"), rig.call("logout", "acme"))
        assert sorted(o.ok for o in both) == [False, True]
        assert [o.error["code"] for o in both if o.error] == ["session_not_found"]


async def test_sends_wait_while_the_session_is_offline(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.pair("acme", "15550001114")
        await rig.sim.add_phone(PEER, "Peer")
        stopped = await rig.call("disconnect", "acme")
        assert stopped.result == {"state": "stopped"}
        await rig.publish_sends("acme", PEER, 5)
        after = len(rig.got.events)
        await rig.call("create", "acme")
        await rig.got.event("connected", "acme", after=after)
        await until(lambda: len(rig.got.of("command_completed", "acme")) >= 8, "five sends and three life-cycle commands")
        assert texts((await rig.sim.received(PEER))["shown"], "15550001114") == [f"out {n}" for n in range(1, 6)]


async def test_dropped_connection_comes_back(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix, WARREN_RECONNECT__BASE_S="0.5") as rig:
        await rig.pair("acme", "15550001115")
        after = len(rig.got.events)
        await rig.sim.drop("15550001115", (await rig.sim.devices("15550001115"))[0]["id"])
        lost = await rig.got.event("disconnected", "acme", after=after)
        assert lost["data"]["code"] == "network"
        assert lost["data"]["state"] == "backing_off"
        await rig.got.event("connected", "acme", after=after)


async def traffic(rig: Rig, sessions: list[str], count: int) -> None:
    """`count` messages each way for each session, all at once."""
    await asyncio.gather(
        *(rig.publish_sends(s, PEER, count) for s in sessions),
        *(rig.sim.send(PEER, rig.number(s), f"in-{s}", count=count) for s in sessions),
    )


async def check_traffic(rig: Rig, sessions: list[str], count: int) -> None:
    """Each message exactly once at its receiver, in order, and every command with exactly one outcome."""
    expected_out = [f"out {n}" for n in range(1, count + 1)]

    async def all_out() -> bool:
        shown = (await rig.sim.received(PEER))["shown"]
        return all(len(texts(shown, rig.number(s))) >= count for s in sessions)

    await until(all_out, "all sends on the phone", 90)
    await until(
        lambda: all(sum(e["data"]["text"].startswith("in-") for e in rig.got.of("message", s)) >= count for s in sessions),
        "all messages at the subscriber",
        90,
    )
    ids = {f"{s}-{n}" for s in sessions for n in range(1, count + 1)}

    def outcomes() -> list[str]:
        ended = rig.got.of("command_completed") + rig.got.of("command_failed")
        return sorted(e["data"]["id"] for e in ended if e["data"]["id"] in ids)

    await until(lambda: len(outcomes()) >= len(ids), "all outcomes", 60)
    assert outcomes() == sorted(ids)
    shown = (await rig.sim.received(PEER))["shown"]
    for s in sessions:
        assert texts(shown, rig.number(s)) == expected_out, s
        inbound = [e["data"]["text"] for e in rig.got.of("message", s)]
        assert inbound == [f"in-{s} {n}" for n in range(1, count + 1)], s
    assert rig.got.sequence_faults == []


@pytest.mark.timeout(240)
async def test_ten_sessions_both_ways_with_sigterm_in_the_middle(tmp_path: Path, broker: Broker, prefix: str) -> None:
    count, sessions = 200, [f"s{n}" for n in range(10)]
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await asyncio.gather(*(rig.pair(s, f"1555010{n:04}") for n, s in enumerate(sessions)))
        qrs = len(rig.got.of("qr"))
        under_way = asyncio.create_task(traffic(rig, sessions, count))
        await until(lambda: len(rig.got.of("message")) > count, "a part of the traffic")
        assert await rig.warrend.stop() == 0
        await under_way
        done = len(rig.got.of("message"))
        assert done < count * len(sessions), "the stop came too late to prove anything"
        await rig.restart()
        await check_traffic(rig, sessions, count)
        assert len(rig.got.of("qr")) == qrs
        repeated = sum(n - 1 for n in rig.got.deliveries.values())
        stanzas = (await rig.sim.received(PEER))["stanzas"]
        print(
            f"repeated deliveries with the same event id: {repeated}; stanzas beyond messages: {stanzas - count * len(sessions)}"
        )


@pytest.mark.timeout(240)
async def test_kill_nine_at_random_moments(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """Daemon and engine killed under traffic."""
    count, sessions = 150, ["k0", "k1", "k2"]
    async with Rig(tmp_path, broker.url, prefix, WARREN_RECONNECT__BASE_S="0.5") as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await asyncio.gather(*(rig.pair(s, f"1555020{n:04}") for n, s in enumerate(sessions)))
        qrs = len(rig.got.of("qr"))
        under_way = asyncio.create_task(traffic(rig, sessions, count))
        await until(lambda: len(rig.got.of("message")) > 10, "some traffic")
        await rig.warrend.kill()
        await rig.restart()
        await until(lambda: len(rig.got.of("message")) > 60, "some more traffic")
        for pid in rig.warrend.engine_pids():
            os.kill(pid, signal.SIGKILL)
        await under_way
        await check_traffic(rig, sessions, count)
        assert len(rig.got.of("qr")) == qrs


@pytest.mark.timeout(240)
async def test_rabbitmq_killed_under_traffic(tmp_path: Path, broker: Broker, prefix: str) -> None:
    count, sessions = 150, ["r0", "r1", "r2"]
    async with Rig(tmp_path, broker.url, prefix, WARREN_RECONNECT__BASE_S="0.5") as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await asyncio.gather(*(rig.pair(s, f"1555070{n:04}") for n, s in enumerate(sessions)))
        qrs = len(rig.got.of("qr"))
        # The commands first: the test's own publishers would die with RabbitMQ.
        await asyncio.gather(*(rig.publish_sends(s, PEER, count) for s in sessions))
        incoming = [asyncio.create_task(rig.sim.send(PEER, rig.number(s), f"in-{s}", count=count)) for s in sessions]
        await until(lambda: len(rig.got.of("message")) > 20, "a part of the traffic")
        broker.kill()
        await broker.start()
        await asyncio.gather(*incoming)
        await check_traffic(rig, sessions, count)
        assert len(rig.got.of("qr")) == qrs
        print(f"repeated deliveries with the same event id: {sum(n - 1 for n in rig.got.deliveries.values())}")


@pytest.mark.timeout(240)
async def test_rabbitmq_killed_at_the_birth_of_a_session(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """RabbitMQ forgets who leads a queue that it made within the last second; the session must not notice."""
    number = "15550001120"
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.sim.add_phone(number, "New")
        await rig.sim.add_phone(PEER, "Peer")
        assert (await rig.call("create", "acme")).ok
        broker.kill()
        await broker.start()
        async with Client(rig.url, prefix) as client:  # the rig's own died with RabbitMQ
            rig.client = client
            await rig.ready()
            status = await rig.call("status", "acme")
            await rig.sim.scan(number, status.result["qr"]["code"])
            await rig.got.event("connected", "acme")
            sent = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "alive"}, id="order-1")
        assert sent.ok
        assert texts((await rig.sim.received(PEER))["shown"], number) == ["alive"]
        assert rig.got.sequence_faults == []
