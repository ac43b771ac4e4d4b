"""docs/examples/life.py runs: sixty lines, a stock RabbitMQ client, and nothing of warren's."""

from __future__ import annotations

import ast
import asyncio
import sys
from pathlib import Path

from tests.acceptance.rig import Rig, until
from tests.conftest import Broker

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "life.py"
PHONE, PEER = "15550003301", "15559990002"


def test_it_is_short_and_stands_for_itself() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 60
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} == {"json", "sys", "uuid", "pika"}


async def test_it_leads_a_session_through_its_life(tmp_path: Path, broker: Broker) -> None:
    async with Rig(tmp_path, broker.url, "example") as rig:
        await rig.sim.add_phone(PHONE, "Shop")
        await rig.sim.add_phone(PEER, "Ana")
        script = await asyncio.create_subprocess_exec(
            sys.executable, str(SCRIPT), broker.url, "acme", f"+{PEER}", "example", stdout=asyncio.subprocess.PIPE
        )
        assert script.stdout is not None
        said: list[str] = []
        try:
            async with asyncio.timeout(60):
                while line := (await script.stdout.readline()).decode().strip():
                    said.append(line.split(" ", 2)[0] + (line.split(" ", 2)[1] if line.startswith("done:") else ""))
                    if line.startswith("scan: ") and said.count("scan:") == 1:
                        await rig.sim.scan(PHONE, line.removeprefix("scan: "))
                    elif line.startswith("done: send "):
                        await until(lambda: shown(rig, "Hello! Do you read me?"), "the text on the phone")
                        await rig.sim.send(PEER, PHONE, "Loud and clear")
                    elif line.startswith("message: "):
                        assert line.endswith("Loud and clear")
                assert await script.wait() == 0, said
        finally:
            if script.returncode is None:
                script.kill()
                await script.wait()
        order = [word for word in said if word not in {"scan:", "done:create"}]
        assert order == ["connected:", "done:send", "message:", "done:disconnect", "connected:", "done:logout"]
        assert said.count("done:create") == 2
        assert await rig.sim.devices(PHONE) == []


async def shown(rig: Rig, text: str) -> bool:
    return text in [m["text"] for m in (await rig.sim.received(PEER))["shown"]]
