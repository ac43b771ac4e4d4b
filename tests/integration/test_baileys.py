"""An unmodified Baileys, from npm, against the simulator: an independent judge, because it shares no code with it.

Baileys is installed from the lock file in tests/baileys into build/, once per lock file.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from warren.edges.settings import find_engine_binary
from warren.simulator import Simulator

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "baileys"
OLDEST_NODE = 20
INSTALL_S = 240.0
CHECK_S = 120.0

STEPS = [
    "paired by QR",
    "paired by code",
    "direct message from a phone by pn, with delivery and read receipt",
    "direct message from a phone by lid, with delivery and read receipt",
    "direct message to a phone, with delivery and read receipt",
    "direct messages between two Baileys",
    "group messages from a phone",
    "group messages from Baileys, with receipts",
    "150 messages that waited, after a new login",
    "a message refused with 463, a connection replaced, a login refused with 402",
    "logout",
    "unlinked by the phone",
]


def node_is_missing() -> str:
    """Why Baileys cannot run here; "" if it can."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        return "there is no Node.js with npm here"
    version = subprocess.run([node, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < OLDEST_NODE:
        return f"Node.js {version} is older than {OLDEST_NODE}"
    return ""


def installed() -> Path:
    """The folder with Baileys and what it needs; it appears in one piece."""
    parts = [SOURCE / name for name in ("package.json", "package-lock.json", ".npmrc")]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:16]
    ready = ROOT / "build" / f"baileys-{digest}"
    if not ready.exists():
        ready.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ready.parent, prefix="baileys-new-") as place:
            fresh = Path(place) / "fresh"
            fresh.mkdir()
            for part in parts:
                shutil.copy(part, fresh)
            npm = subprocess.run(["npm", "ci"], cwd=fresh, check=False, capture_output=True, text=True, timeout=INSTALL_S)
            assert npm.returncode == 0, f"npm ci failed:\n{npm.stdout}{npm.stderr}"
            fresh.rename(ready)
    return ready / "node_modules"


@pytest.mark.timeout(INSTALL_S + CHECK_S + 30)
async def test_baileys_accepts_the_simulator(tmp_path: Path) -> None:
    if missing := node_is_missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"the check with Baileys must run in CI, and {missing}", pytrace=False)
        pytest.skip(f"NOT CHECKED WITH BAILEYS, the independent judge of the simulator: {missing}")
    modules = await asyncio.to_thread(installed)
    # Node looks for packages next to the program, so it is run from a folder that has them.
    (tmp_path / "node_modules").symlink_to(modules)
    for name in ("package.json", "check.mjs", "client.mjs"):
        shutil.copy(SOURCE / name, tmp_path)
    (tmp_path / "state").mkdir()
    async with Simulator(find_engine_binary(None, "warren-sim"), log=tmp_path / "sim.log") as sim:
        at = sim.endpoint
        process = await asyncio.create_subprocess_exec(
            "node",
            "check.mjs",
            *(at.endpoint, at.control, at.root_key, str(tmp_path / "state")),
            cwd=tmp_path,
            env={**os.environ, "NODE_EXTRA_CA_CERTS": at.ca_file},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(CHECK_S):
                out, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0, f"{out.decode()}{errors.decode()}"
    assert out.decode().splitlines() == [*(f"ok {step}" for step in STEPS), "all ok"]
