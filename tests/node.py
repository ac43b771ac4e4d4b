"""Programs of tests/baileys, run with an unmodified Baileys from npm against the simulator.

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

from warren.simulator import Simulator

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "baileys"
OLDEST_NODE = 20
INSTALL_S = 240.0
RUN_S = 120.0


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


async def run_baileys(program: str, sim: Simulator, place: Path, *, what: str) -> list[str]:
    """The lines that the program prints; its files are in `place`/state. Without Node the test is skipped, but not in CI."""
    if missing := node_is_missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what} must be checked in CI, and {missing}", pytrace=False)
        pytest.skip(f"NOT CHECKED WITH BAILEYS: {what}: {missing}")
    modules = await asyncio.to_thread(installed)
    # Node looks for packages next to the program, so it is run from a folder that has them.
    (place / "node_modules").symlink_to(modules)
    for name in ("package.json", "client.mjs", program):
        shutil.copy(SOURCE / name, place)
    (place / "state").mkdir()
    at = sim.endpoint
    process = await asyncio.create_subprocess_exec(
        "node",
        program,
        *(at.endpoint, at.control, at.root_key, str(place / "state")),
        cwd=place,
        env={**os.environ, "NODE_EXTRA_CA_CERTS": at.ca_file},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(RUN_S):
            out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{out.decode()}{errors.decode()}"
    return out.decode().splitlines()
