"""What WhatsApp can do to a session, on demand of the simulator; and the other ways to pair and to talk."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.rig import Rig, until
from tests.acceptance.test_life import PEER, texts
from tests.conftest import Broker

prefixes = itertools.count(1)


@pytest.fixture
def prefix() -> str:
    return f"no{next(prefixes)}"


async def test_pairing_by_code(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.sim.add_phone("15550500001", "Ana")
        created = await rig.call("create", "acme", {"phone_number": "+15550500001", "device_name": "Shop"})
        assert created.ok, created
        shown = await rig.got.event("pairing_code", "acme")
        assert shown["data"]["phone_number"] == "+15550500001"
        status = await rig.call("status", "acme")
        assert status.result["state"] == "pairing"
        assert status.result["pairing_code"]["code"] == shown["data"]["code"]
        assert rig.got.of("qr") == [], "who types a code needs no QR"
        await rig.sim.request("POST", "/phones/15550500001/pair-code", {"code": shown["data"]["code"]})
        connected = await rig.got.event("connected", "acme")
        assert connected["data"]["jid"].startswith("15550500001")


async def test_groups_both_ways(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.pair("acme", "15550500002")
        await rig.sim.add_phone(PEER, "Peer")
        group = await rig.sim.request("POST", "/groups", {"creator": PEER, "participants": ["15550500002"], "subject": "Orders"})
        await rig.sim.send(PEER, group["id"], "hello all")
        message = await rig.got.event("message", "acme", lambda data: data["text"] == "hello all")
        assert message["data"]["group"] is True
        assert message["data"]["chat"] == group["id"]
        answered = await rig.call("send", "acme", {"to": group["id"], "text": "hello group"})
        assert answered.ok, answered

        async def shown() -> bool:
            return "hello group" in texts((await rig.sim.received(PEER))["shown"], "15550500002")

        await until(shown, "the answer in the group")


async def _fault(rig: Rig, **what: Any) -> None:
    await rig.sim.request("POST", "/faults", what)


async def test_refused_sends_say_why(tmp_path: Path, broker: Broker, prefix: str) -> None:
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.pair("acme", "15550500003")
        await rig.sim.add_phone(PEER, "Peer")
        for code, expected in ((463, "restricted"), (429, "rate_limited"), (479, "rejected")):
            await _fault(rig, kind="send_error", phone="15550500003", code=code)
            failed = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "no"}, id=f"try-{code}")
            assert failed.error is not None, code
            assert failed.error["code"] == expected
            assert failed.error["hint"]
            # Such a failure is not final: the same command may be repeated, and is the same message.
            again = await rig.call("send", "acme", {"to": f"+{PEER}", "text": "no"}, id=f"try-{code}")
            assert again.ok, again
        await rig.sim.add_phone("15559990001", "Other")
        await _fault(rig, kind="prekeys", of="15559990001")
        unreachable = await rig.call("send", "acme", {"to": "+15559990001", "text": "no keys"}, id="keys")
        assert unreachable.error is not None
        assert unreachable.error["code"] == "recipient_unreachable"
        assert (await rig.call("send", "acme", {"to": "+15559990001", "text": "no keys"}, id="keys")).ok


async def test_each_refusal_has_its_state(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """Stream errors and refused logins: what comes back by itself, and what needs somebody."""
    async with Rig(tmp_path, broker.url, prefix, WARREN_RECONNECT__BASE_S="0.2") as rig:
        number = "15550500004"
        await rig.pair("acme", number)

        async def strike(path: str, **body: Any) -> int:
            after = len(rig.got.events)
            await rig.sim.request("POST", f"/phones/{number}/{path}", body)
            return after

        after = await strike("stream-error", code=503)
        assert (await rig.got.event("disconnected", "acme", after=after))["data"]["code"] == "server"
        await rig.got.event("connected", "acme", after=after)

        await _fault(rig, kind="login_failure", phone=number, code=405)
        after = await strike("stream-error", code=503)
        await rig.got.event("disconnected", "acme", lambda d: d["code"] == "client_outdated", after=after)
        await rig.got.event("connected", "acme", after=after)

        await _fault(rig, kind="login_failure", phone=number, code=402, expire_s=3)
        after = await strike("stream-error", code=503)
        banned = await rig.got.event("disconnected", "acme", lambda d: d["code"] == "temporary_ban", after=after)
        assert banned["data"]["state"] == "blocked"
        assert banned["data"]["until"]
        await rig.got.event("connected", "acme", after=after)  # by itself, when the ban is over

        after = await strike("stream-error", conflict="replaced")
        replaced = await rig.got.event("disconnected", "acme", after=after)
        assert (replaced["data"]["state"], replaced["data"]["code"]) == ("replaced", "replaced")
        assert replaced["data"]["hint"]
        assert (await rig.call("create", "acme")).ok
        await rig.got.event("connected", "acme", after=after)

        await _fault(rig, kind="login_failure", phone=number, code=401)
        after = await strike("stream-error", code=503)
        gone = await rig.got.event("logout", "acme", after=after)
        assert gone["data"]["state"] == "logged_out"
        assert rig.got.sequence_faults == []


async def test_a_malformed_frame_takes_one_engine_with_it(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """whatsmeow's process dies of it; sessions in another process do not notice, and its own come back without a QR."""
    settings = {"WARREN_RECONNECT__BASE_S": "0.2", "WARREN_ENGINE__SESSIONS_PER_PROCESS": "1"}
    async with Rig(tmp_path, broker.url, prefix, **settings) as rig:
        await rig.pair("bad", "15550500005")
        await rig.pair("good", "15550500006")
        before = set(rig.warrend.engine_pids())
        assert len(before) == 2
        after, qrs = len(rig.got.events), len(rig.got.of("qr"))
        await rig.sim.request("POST", "/phones/15550500005/malformed")
        lost = await rig.got.event("disconnected", "bad", after=after)
        assert lost["data"]["code"] == "engine_lost"
        await rig.got.event("connected", "bad", after=after)
        assert len(before & set(rig.warrend.engine_pids())) == 1
        assert [e for e in rig.got.events[after:] if e["session"] == "good"] == []
        assert len(rig.got.of("qr")) == qrs
