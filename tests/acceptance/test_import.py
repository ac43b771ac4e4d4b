"""`warren import` and `warren backup` as an operator runs them: the daemon, the engine, RabbitMQ and a Baileys as they are."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.rig import Rig
from tests.conftest import Broker
from tests.node import INSTALL_S, RUN_S, run_baileys

ANA, BOB = "15550001", "15550002"
prefixes = itertools.count(1)


@pytest.fixture
def prefix() -> str:
    return f"import{next(prefixes)}"


async def warren(rig: Rig, *words: str, status: int = 0) -> dict[str, Any]:
    """Run the command line with the settings of the rig's daemon; its JSON."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "warren.cli", "--json", *words),
        env={k: v for k, v in os.environ.items() if not k.startswith("WARREN_")} | rig._environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == status, f"{out.decode()}{errors.decode()}"
    return dict(json.loads(out))


def digest(folder: Path) -> str:
    content = [(path.name, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return hashlib.sha256(repr(content).encode()).hexdigest()


async def heard(rig: Rig, session: str, text: str) -> dict[str, Any]:
    return await rig.got.event("message", session, lambda data: data["text"] == text)


@pytest.mark.timeout(INSTALL_S + RUN_S + 120)
@pytest.mark.parametrize("mode", ["hybrid", "local"])
async def test_a_baileys_session_goes_on_without_a_code(tmp_path: Path, broker: Broker, prefix: str, mode: str) -> None:
    async with Rig(tmp_path, broker.url, prefix, WARREN_STORAGE__MODE=mode) as rig:
        place = tmp_path / "baileys"
        place.mkdir()
        assert (await run_baileys("leave.mjs", rig.sim, place, what="importing a session"))[-1] == "ok left"
        source = place / "state" / "ana"
        shutil.copy(place / "package.json", source / "notes.json")  # somebody's own file
        before = digest(source)

        dry = await warren(rig, "import", "--from", str(source), "--session", "ana")
        assert dry["report"]["carried"]["device"] == 1
        assert not dry["executed"]
        refused = await warren(rig, "import", "--from", str(source), "--session", "ana", "--delete-source", status=1)
        assert refused["error"]["code"] == "session_not_found"

        if mode == "local":
            words = ("import", "--from", str(source), "--session", "ana", "--execute")
            assert (await warren(rig, *words, status=1))["error"]["code"] == "owned_elsewhere"
            assert await rig.warrend.stop() == 0
            await warren(rig, *words)
            assert (await warren(rig, *words, status=1))["error"]["code"] == "import_refused"
            await rig.restart()
        else:
            done = await warren(rig, "import", "--from", str(source), "--session", "ana", "--execute")
            assert done["state"] == "online"
            again = await warren(rig, "import", "--from", str(source), "--session", "ana", "--execute", status=1)
            assert again["error"]["code"] == "import_refused"
            assert (await warren(rig, "backup", "verify"))["clean"]
        assert digest(source) == before

        await rig.got.event("connected", "ana")

        # Both ways, with somebody whom the former client had a session with.
        outcome = await rig.call("send", "ana", {"to": f"+{BOB}", "text": "from warren"}, id="first")
        assert outcome.ok, outcome
        await rig.sim.send(BOB, ANA, "to warren")
        await heard(rig, "ana", "to warren")
        assert not rig.got.of("qr", "ana")

        deleted = await warren(rig, "import", "--from", str(source), "--session", "ana", "--delete-source")
        assert "creds.json" in deleted["deleted"]
        assert [path.name for path in source.iterdir()] == ["notes.json"]


async def test_backups_by_hand(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """now, list, verify, restore, prune, stats, and a new master key, on a daemon that runs."""
    async with Rig(tmp_path, broker.url, prefix) as rig:
        await rig.pair("acme", "15550006001")
        await rig.pair("b", "15550006002")
        made = (await warren(rig, "backup", "now", "acme"))["result"]
        together = await warren(rig, "backup", "now", "--all")
        assert all(told["ok"] for told in together["sessions"].values())
        assert set(together["sessions"]) == {"acme", "b"}
        listed = {s["session"]: s for s in (await warren(rig, "backup", "list"))["sessions"]}
        assert set(listed) == {"acme", "b"}
        assert listed["acme"]["newest_bytes"] > 1_000
        stats = await warren(rig, "backup", "stats")
        assert (stats["sessions"], stats["daemons"]["failing"]) == (2, {})

        # A new key, while the daemon runs with the old one.
        old = rig.warrend.state / "storage.key"
        key = (await warren(rig, "keys", "generate"))["key"]
        rig._environment |= {"WARREN_STORAGE__KEY": key, "WARREN_STORAGE__OLD_KEYS_FILE": str(old)}
        assert (await warren(rig, "keys", "rotate"))["rewrapped"] == ["acme", "b"]
        assert (await warren(rig, "backup", "verify"))["clean"]

        after = len(rig.got.events)
        restored = (await warren(rig, "backup", "restore", "acme", "--at", made["position"]))["result"]
        assert restored["position"] == made["position"]
        await rig.got.event("connected", "acme", after=after)
        assert len(rig.got.of("qr", "acme")) == 1
        assert (await warren(rig, "backup", "restore", "acme", "--at", "77/1", status=1))["error"]["code"]
        listed = {s["session"]: s for s in (await warren(rig, "backup", "list"))["sessions"]}
        assert listed["acme"]["last_restore_at"] is not None
        await warren(rig, "backup", "prune")
        assert (await warren(rig, "backup", "verify"))["clean"]

        # With the new key alone the daemon starts, with the old one alone it does not.
        assert await rig.warrend.stop() == 0
        right = rig.machine("right", WARREN_STATE_DIR=str(rig.warrend.state), WARREN_STORAGE__OLD_KEYS_FILE="")
        wrong = rig.machine(
            "wrong", WARREN_STATE_DIR=str(rig.warrend.state), WARREN_STORAGE__KEY="", WARREN_STORAGE__OLD_KEYS_FILE=""
        )
        await wrong.start()
        assert wrong._process is not None
        assert await asyncio.wait_for(wrong._process.wait(), 60) != 0
        assert "is not the one the backups were encrypted with" in wrong.log.read_text()
        rig.warrend = right
        await rig.restart()
        await rig.got.event("connected", "b", after=after)


async def test_a_whatsmeow_database_goes_on_without_a_code(tmp_path: Path, broker: Broker, prefix: str) -> None:
    """As one is at hand: that of a session which ends here and goes on under another name."""
    async with Rig(tmp_path, broker.url, prefix) as rig:
        connected = await rig.pair("acme", "15550006003")
        assert (await rig.call("disconnect", "acme")).ok
        (state,) = (rig.warrend.state / "sessions" / "acme").glob("*/state.db")
        source = tmp_path / "store.db"
        shutil.copy(state, source)
        before = source.read_bytes()
        dry = await warren(rig, "import", "--from", str(source), "--session", "b")
        assert dry["report"]["format"] == "whatsmeow"
        done = await warren(rig, "import", "--from", str(source), "--session", "b", "--execute")
        assert (done["state"], done["report"]["jid"]) == ("online", connected["data"]["jid"])
        assert source.read_bytes() == before
        assert not rig.got.of("qr", "b")
        deleted = await warren(rig, "import", "--from", str(source), "--session", "b", "--delete-source")
        assert "store.db" in deleted["deleted"]
        assert not list(tmp_path.glob("store.db*"))
