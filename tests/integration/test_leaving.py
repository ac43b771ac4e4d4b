"""A program that has used an object store ends with its own status: Python's way out aborts it now and then."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

TRIES = 6
"""Without `edges.leaving` every fifth run or so aborted (status -6)."""


async def test_the_command_line_ends_with_its_own_status(tmp_path: Path) -> None:
    config = tmp_path / "warren.toml"
    config.write_text(
        '[storage]\nurl = "s3://bucket"\nendpoint = "https://127.0.0.1:1"\naccess_key_id = "a"\nsecret_access_key = "b"\n'
        f'region = "us-east-1"\nkey = "{os.urandom(32).hex()}"\n'
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WARREN_", "AWS_"))}

    async def status() -> int:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "warren.cli", "--config", str(config), "keys", "check"),
            env=clean,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert b"s3://bucket: could not get" in errors
        return process.returncode or 0

    assert [await status() for _ in range(TRIES)] == [5] * TRIES
