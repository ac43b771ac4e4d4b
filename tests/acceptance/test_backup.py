"""Sessions outlive their disk and their machine: daemon, engine and RabbitMQ as they are, backups in a directory."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sqlite3
import time
from pathlib import Path

import orjson
import pytest
from tests.acceptance.bucket import Bucket, backed_up, secrets_of
from tests.acceptance.rig import Rig, until
from tests.conftest import Broker

from warren.core.sealing import Kind

prefixes = itertools.count(1)
PEER = "15559990000"


@pytest.fixture
def prefix() -> str:
    return f"backup{next(prefixes)}"


async def all_connected(rig: Rig, sessions: list[str], after: int) -> float:
    """Until each has said `connected` behind position `after`; the seconds it took."""
    began = time.monotonic()
    await until(
        lambda: {e["session"] for e in rig.got.events[after:] if e["type"] == "warren.connected"} >= set(sessions),
        "all sessions to connect",
        90,
    )
    return time.monotonic() - began


async def talks(rig: Rig, session: str, text: str) -> None:
    """A message each way gets through."""
    await rig.sim.send(PEER, rig.number(session), f"{text}, in")
    await rig.got.event("message", session, lambda d: d["text"] == f"{text}, in")
    outcome = await rig.call("send", session, {"to": f"+{PEER}", "text": f"{text}, out"})
    assert outcome.ok, outcome

    async def shown() -> bool:
        return any(m["text"] == f"{text}, out" for m in (await rig.sim.received(PEER))["shown"])

    await until(shown, f"{text}, out")


def restores(log: Path) -> int:
    return log.read_text().count("Restored from the backup")


@pytest.mark.timeout(400)
async def test_fifty_sessions_outlive_their_disk_and_their_machine(tmp_path: Path, broker: Broker, prefix: str) -> None:
    sessions = [f"s{n}" for n in range(50)]
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment()) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await asyncio.gather(*(rig.pair(s, f"1555600{n:04}") for n, s in enumerate(sessions)))
        qrs = len(rig.got.of("qr"))
        await rig.call("create", "s0", {"device_name": "Warehouse 7"})
        await talks(rig, "s0", "the secret of s0")
        once = await rig.call("send", "s0", {"to": f"+{PEER}", "text": "only once"}, id="order-1")
        began = time.monotonic()
        await asyncio.gather(*(backed_up(rig, s) for s in sessions))
        print(f"50 sessions backed up in {time.monotonic() - began:.1f} s")

        # The disk is lost.
        await rig.warrend.kill()
        shutil.rmtree(rig.warrend.state / "sessions")
        after = len(rig.got.events)
        began = time.monotonic()
        await rig.restart()
        ready = time.monotonic() - began
        took = await all_connected(rig, sessions, after)
        print(f"without local state: ready after {ready:.1f} s, all 50 connected after {ready + took:.1f} s")
        assert restores(rig.warrend.log) == 50
        await talks(rig, "s0", "after the disk")

        # The machine is lost; its last backups were made at its stop.
        assert await rig.warrend.stop() == 0
        a, rig.warrend = rig.warrend, rig.machine("b")
        after = len(rig.got.events)
        began = time.monotonic()
        await rig.restart()
        ready = time.monotonic() - began
        took = await all_connected(rig, sessions, after)
        print(f"on an empty machine: ready after {ready:.1f} s, all 50 connected after {ready + took:.1f} s")
        stanzas = (await rig.sim.received(PEER))["stanzas"]
        again = await rig.call("send", "s0", {"to": f"+{PEER}", "text": "only once"}, id="order-1")
        assert again.result == once.result, "the journal came along"
        assert (await rig.sim.received(PEER))["stanzas"] == stanzas
        await talks(rig, "s1", "on another machine")
        assert await rig.warrend.stop() == 0
        with sqlite3.connect(rig.warrend.state / "warren.db") as db:
            (settings,) = db.execute("SELECT settings FROM sessions WHERE session = 's0'").fetchone()
        assert orjson.loads(settings)["device_name"] == "Warehouse 7"

        # Back on the first machine, whose state is older than the store.
        rig.warrend = a
        after = len(rig.got.events)
        await rig.restart()
        await all_connected(rig, sessions, after)
        assert restores(a.log) == 100, "A's older local state is not used"
        await talks(rig, "s1", "back again")
        assert len(rig.got.of("qr")) == qrs
        assert rig.got.sequence_faults == []
        assert await rig.warrend.stop() == 0

    whole = await bucket.verify()
    assert set(whole) == set(sessions)
    raw = await bucket.raw()
    known = [b"the secret of s0", b"only once", PEER.encode(), b"Warehouse", b"order-1", b"s.whatsapp.net", b"SQLite"]
    known += [rig.number(s).encode() for s in sessions]
    newest = [list(places.values())[-1] for places in whole.values()]
    known += [secret for sealed in newest if sealed.kind is Kind.STATE for secret in secrets_of(sealed.database)]
    assert any(b"Warehouse" in sealed.record for sealed in newest), "it is in there, once opened"
    shown = [(name, word) for name, data in raw.items() for word in known if word in data]
    assert shown == []
    print(f"{len(raw)} objects, {sum(map(len, raw.values())):,} bytes, searched for {len(known)} secrets")


async def test_an_unchanged_session_costs_nothing_and_a_stop_saves_what_changed(
    tmp_path: Path, broker: Broker, prefix: str
) -> None:
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment(interval_s="0")) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await rig.pair("acme", "15556010001")
        await talks(rig, "acme", "hello")
        first = (await rig.call("backup", "acme")).result
        second = (await rig.call("backup", "acme")).result
        # The first `backup` left an outcome in the journal; the second backup has it, and nothing after that changes.
        before = set(await bucket.raw())
        again = await rig.client.call("status", "acme")
        assert again.result["backup"]["position"] == second["position"]
        assert again.result["backup"]["failures"] == 0
        assert int(second["position"].split("/")[1]) - int(first["position"].split("/")[1]) <= 1
        await rig.sim.send(PEER, rig.number("acme"), "news", count=3)
        await until(lambda: len(rig.got.of("message", "acme")) == 4, "the messages")
        assert await rig.warrend.stop() == 0
        new = set(await bucket.raw()) - before
        assert len(new) >= 1, "what changed since is backed up at the stop"
        after = len(rig.got.events)
        await rig.restart()
        await all_connected(rig, ["acme"], after)
        assert restores(rig.warrend.log) == 0, "its own state is the newest"
    assert set(await bucket.verify()) == {"acme"}


async def test_a_logout_leaves_nothing_in_the_store(tmp_path: Path, broker: Broker, prefix: str) -> None:
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment()) as rig:
        await rig.pair("acme", "15556020001")
        await rig.pair("other", "15556020002")
        await backed_up(rig, "acme", "other")
        assert (await rig.call("logout", "acme")).ok

        async def gone() -> bool:
            return not any("/acme/" in name for name in await bucket.raw())

        await until(gone, "its objects to be deleted")
        # A new life under the same name begins behind the old one, and is backed up again.
        await rig.sim.add_phone("15556020003", "new")
        after = len(rig.got.events)
        created = await rig.call("create", "acme")
        assert created.result["epoch"] == 2
        qr = await rig.got.event("qr", "acme", after=after)
        await rig.sim.scan("15556020003", qr["data"]["code"])
        await rig.got.event("connected", "acme", after=after)
        await backed_up(rig, "acme")
        assert {p.split("/")[0] for p in (await bucket.verify())["acme"]} == {"2"}


async def test_a_logout_goes_on_deleting_when_the_store_is_back(tmp_path: Path, broker: Broker, prefix: str) -> None:
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment()) as rig:
        await rig.pair("acme", "15556021001")
        await backed_up(rig, "acme")
        (tmp_path / "bucket").rename(tmp_path / "away")
        assert (await rig.call("logout", "acme")).ok
        await until(lambda: '"action":"removal_failed"' in rig.warrend.log.read_text(), "a first try to delete")
        await rig.warrend.kill()
        (tmp_path / "away").rename(tmp_path / "bucket")
        assert any("/acme/" in name for name in await bucket.raw())
        await rig.restart()

        async def gone() -> bool:
            return not any("/acme/" in name for name in await bucket.raw())

        await until(gone, "its objects to be deleted after the restart")
        assert await rig.client.list_sessions() == []


async def test_what_whatsapp_has_unlinked_never_hides_the_last_good_backup(tmp_path: Path, broker: Broker, prefix: str) -> None:
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment()) as rig:
        await rig.pair("acme", "15556030001")
        await backed_up(rig, "acme")
        await rig.sim.unlink("15556030001", (await rig.sim.devices("15556030001"))[0]["id"])
        await rig.got.event("logout", "acme")
        refused = await rig.call("backup", "acme")
        assert refused.error is not None
        assert refused.error["code"] == "backup_failed"
        assert await rig.warrend.stop() == 0
        # `verify` finds a device in every state that is in the store.
        frozen = await bucket.verify()
        assert frozen["acme"]
        await rig.restart()
        after = len(rig.got.events)
        created = await rig.call("create", "acme")
        assert created.result["epoch"] == 2
        qr = await rig.got.event("qr", "acme", after=after)
        await rig.sim.scan("15556030001", qr["data"]["code"])
        await rig.got.event("connected", "acme", after=after)
        await backed_up(rig, "acme")
        assert [p for p in (await bucket.verify())["acme"] if p.startswith("2/")]


async def test_from_local_to_hybrid_and_back(tmp_path: Path, broker: Broker, prefix: str) -> None:
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, WARREN_STORAGE__MODE="local") as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await rig.pair("acme", "15556040001")
        assert (await rig.call("status", "acme")).result["backup"] is None
        for command in ("backup", "restore"):
            none = await rig.call(command, "acme")
            assert none.error is not None
            assert none.error["code"] == "no_storage"
        local = rig.warrend
        assert await local.stop() == 0
        assert not (local.state / "backups").exists()

        # hybrid: what is there is backed up, without anything being asked for.
        shutil.copytree(local.state, tmp_path / "hybrid" / "state")
        rig.warrend = rig.machine("hybrid", WARREN_STORAGE__MODE="hybrid", **bucket.environment(interval_s="2"))
        after = len(rig.got.events)
        await rig.restart()
        await rig.got.event("connected", "acme", after=after)

        async def is_saved() -> bool:
            return bool((await bucket.verify()).get("acme"))

        await until(is_saved, "the first backup")
        assert restores(rig.warrend.log) == 0
        await talks(rig, "acme", "in hybrid")
        assert await rig.warrend.stop() == 0

        # And back: the local copy goes on, and a logout takes the backups of before along.
        rig.warrend = rig.machine("hybrid", **(bucket.environment() | {"WARREN_STORAGE__MODE": "local"}))
        after = len(rig.got.events)
        await rig.restart()
        await rig.got.event("connected", "acme", after=after)
        await talks(rig, "acme", "in local")
        assert (await rig.call("logout", "acme")).ok

        async def gone() -> bool:
            return not any("/acme/" in name for name in await bucket.raw())

        await until(gone, "its backups of hybrid days to be deleted")


async def test_cloud_mode_has_nothing_on_the_machine_that_is_missed(tmp_path: Path, broker: Broker, prefix: str) -> None:
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, WARREN_STORAGE__MODE="cloud", **bucket.environment(interval_s="1")) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await rig.pair("acme", "15556045001")
        await talks(rig, "acme", "before")
        await backed_up(rig, "acme")
        await rig.sim.send(PEER, rig.number("acme"), "last words", count=5)
        await until(lambda: len(texts_in(rig, "last words")) == 5, "the messages, confirmed by RabbitMQ")
        await rig.warrend.kill()
        shutil.rmtree(rig.warrend.state)  # a tmpfs after a reboot
        rig.warrend.state.mkdir(mode=0o700)
        await rig.sim.send(PEER, rig.number("acme"), "while it was down", count=5)
        after = len(rig.got.events)
        await rig.restart()
        await rig.got.event("connected", "acme", after=after)
        await until(lambda: len(texts_in(rig, "while it was down")) == 5, "what came while it was down", 60)
        await talks(rig, "acme", "after")
        assert len(rig.got.of("qr")) >= 1
        assert not [e for e in rig.got.events[after:] if e["type"] == "warren.qr"]


async def test_a_damaged_state_is_set_aside_and_comes_back_from_the_store(tmp_path: Path, broker: Broker, prefix: str) -> None:
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment()) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await rig.pair("acme", "15556050001")
        await backed_up(rig, "acme")
        assert await rig.warrend.stop() == 0
        ruin = rig.warrend.state / "sessions" / "acme" / "1" / "state.db"
        ruin.write_bytes(b"ruins" * 1000)
        after = len(rig.got.events)
        await rig.restart()
        connected = await rig.got.event("connected", "acme", after=after)
        assert connected["epoch"] == 2
        assert ruin.read_bytes() == b"ruins" * 1000
        await talks(rig, "acme", "restored")
        # Without a backup that is as new, somebody has to look at it.
        assert await rig.warrend.stop() == 0
        shutil.rmtree(tmp_path / "bucket" / "warren" / "acme")
        (rig.warrend.state / "sessions" / "acme" / "2" / "state.db").write_bytes(b"ruins again")
        after = len(rig.got.events)
        await rig.restart()
        error = await rig.got.event("error", "acme", after=after)
        assert error["data"]["state"] == "quarantined"
        assert error["data"]["code"] == "state_unreadable"


async def test_restore_on_command(tmp_path: Path, broker: Broker, prefix: str) -> None:
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment()) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await rig.pair("acme", "15556060001")
        first = (await rig.call("backup", "acme")).result["position"]
        await talks(rig, "acme", "before")
        await backed_up(rig, "acme")
        for at in ("9/9", "1/99"):
            wrong = await rig.call("restore", "acme", {"at": at})
            assert wrong.error is not None
            assert wrong.error["code"] == "restore_failed"
        after = len(rig.got.events)
        restored = await rig.call("restore", "acme", {"at": first})
        assert restored.ok, restored
        assert restored.result == {"position": first, "epoch": 2}
        await rig.got.event("connected", "acme", after=after)
        await talks(rig, "acme", "after")
        # While it is stopped it stays stopped.
        assert (await rig.call("disconnect", "acme")).ok
        restored = await rig.call("restore", "acme")
        assert restored.ok, restored
        status = await rig.call("status", "acme")
        assert status.result["desired"] == "stopped"
        after = len(rig.got.events)
        await rig.call("create", "acme")
        await rig.got.event("connected", "acme", after=after)
        await talks(rig, "acme", "at last")
        await rig.sim.unlink("15556060001", (await rig.sim.devices("15556060001"))[0]["id"])
        await rig.got.event("logout", "acme")
        unlinked = await rig.call("restore", "acme")
        assert unlinked.error is not None
        assert unlinked.error["code"] == "not_now"
        # A ban is waited out: a restore would connect.
        await rig.pair("banned", "15556060002")
        await backed_up(rig, "banned")
        after = len(rig.got.events)
        await rig.sim.failure("15556060002", code=402, expire_s=600)
        await rig.got.event("disconnected", "banned", lambda d: d["state"] == "blocked", after=after)
        waits = await rig.call("restore", "banned")
        assert waits.error is not None
        assert waits.error["code"] == "not_now"
    await bucket.verify()


@pytest.mark.timeout(240)
async def test_a_state_fifty_messages_old_heals_both_ways(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """What comes back is older than what the phones have seen. Everything said afterwards arrives, once; what did not decrypt at
    first is counted.
    """
    bucket = Bucket(tmp_path)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment(interval_s="0")) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await rig.pair("acme", "15556070001")
        number = rig.number("acme")
        await talks(rig, "acme", "first")
        group = await rig.sim.create_group(PEER, [PEER, number], "Team")
        await rig.sim.send(PEER, group, "group first")
        await rig.got.event("message", "acme", lambda d: d["text"] == "group first")
        old = (await rig.call("backup", "acme")).result["position"]
        for n in range(5):
            await rig.publish_sends("acme", PEER, 5, start=5 * n + 1)
            await rig.sim.send(PEER, number, f"round {n} in", count=5)
            await until(lambda n=n: len(texts_in(rig, f"round {n} in")) == 5, "a round's messages")
        await rig.sim.send(PEER, group, "group later", count=5)
        await until(lambda: len(texts_in(rig, "group later")) == 5, "the group's messages")
        await until(lambda: len(rig.got.of("command_completed", "acme")) >= 25, "all sends")
        await backed_up(rig, "acme")

        undecryptable = (await rig.sim.received(PEER))["undecryptable"]
        after = len(rig.got.events)
        restored = await rig.call("restore", "acme", {"at": old})
        assert restored.ok, restored
        await rig.got.event("connected", "acme", after=after)
        await rig.sim.send(PEER, number, "healed in", count=10)
        await rig.sim.send(PEER, group, "group healed", count=5)
        await rig.publish_sends("acme", PEER, 10, start=101)
        await until(lambda: len(texts_in(rig, "healed in")) == 10, "what was said after the restore", 90)
        await until(lambda: len(texts_in(rig, "group healed")) == 5, "what was said in the group after the restore", 90)

        async def all_out() -> bool:
            shown = [m["text"] for m in (await rig.sim.received(PEER))["shown"]]
            return all(shown.count(f"out {n}") == 1 for n in range(101, 111))

        await until(all_out, "what was sent after the restore", 90)
        here = [e for e in rig.got.events[after:] if e["type"] == "warren.error" and e["data"]["code"] == "undecryptable"]
        there = (await rig.sim.received(PEER))["undecryptable"] - undecryptable
        ids = [e["id"] for e in rig.got.of("message", "acme")]
        assert len(ids) == len(set(ids))
        assert there == 0, "a restored state begins new Signal sessions before it sends"
        assert rig.got.sequence_faults == []
        print(f"state 50 messages old: of 15 in, {len(here)} came undecryptable first and again; of 10 out, {there}")


def texts_in(rig: Rig, prefix: str) -> set[str]:
    return {e["data"]["text"] for e in rig.got.of("message", "acme") if str(e["data"]["text"]).startswith(prefix)}
