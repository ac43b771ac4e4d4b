"""`[log] trace`: one session under the glass, all others as quiet as before."""

from __future__ import annotations

from pathlib import Path

import orjson
from tests.acceptance.rig import Rig, until
from tests.conftest import Broker


async def test_a_traced_session_tells_what_its_engine_does_and_still_no_numbers(tmp_path: Path, broker: Broker) -> None:
    numbers = {"acme": "15550001111", "other": "15550002222"}
    async with Rig(tmp_path, broker.url, "trace", WARREN_LOG__LEVEL="info", WARREN_LOG__TRACE="acme") as rig:
        for session, number in numbers.items():
            await rig.pair(session, number)

        def lines() -> list[dict[str, object]]:
            whole = rig.warrend.log.read_bytes().rpartition(b"\n")[0]
            return [orjson.loads(line) for line in whole.splitlines()]

        def of(session: str, level: str) -> list[dict[str, object]]:
            return [line for line in lines() if line["session"] == session and line["level"] == level]

        await until(lambda: any(line["action"] == "engine" for line in of("acme", "debug")), "the engine's own words")
        assert of("other", "info")
        assert of("other", "debug") == []
        text = rig.warrend.log.read_text()
        assert [number for number in numbers.values() if number in text] == []
