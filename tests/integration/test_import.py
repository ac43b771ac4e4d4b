"""A session of an unmodified Baileys goes on with warren's engine, without a QR code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.node import INSTALL_S, RUN_S, run_baileys

from warren.core import frames
from warren.core.frames import EngineEvent, Response
from warren.edges.engine_pipe import PipedEngine, start_engine
from warren.edges.settings import find_engine_binary
from warren.simulator import Simulator

ANA, BOB = "15550001", "15550002"
WAIT_S = 30.0
ENGINE = find_engine_binary(None, "warren-engine")


class Pipe:
    """One session over an engine's pipe: every event is answered with yes and remembered."""

    def __init__(self, engine: PipedEngine) -> None:
        self._engine = engine
        self._seen: list[frames.Frame] = []
        self._id = 0

    async def request(self, op: str, **arguments: Any) -> Response:
        self._id += 1
        number = self._id
        await self._engine.send(frames.encode_request(op, number, "ana", {"generation": 1, **arguments}))
        answer = await self._wait(lambda f: isinstance(f, Response) and f.re == number, f"the answer to {op}")
        assert isinstance(answer, Response)
        return answer

    async def event(self, name: str, **data: str) -> EngineEvent:
        def wanted(f: frames.Frame) -> bool:
            return isinstance(f, EngineEvent) and f.event == name and data.items() <= f.data.items()

        event = await self._wait(wanted, f"{name} {data}")
        assert isinstance(event, EngineEvent)
        return event

    def count(self, name: str) -> int:
        return sum(isinstance(f, EngineEvent) and f.event == name for f in self._seen)

    async def _wait(self, wanted: Callable[[frames.Frame], bool], what: str) -> frames.Frame:
        try:
            async with asyncio.timeout(WAIT_S):
                while not (found := next((f for f in self._seen if wanted(f)), None)):
                    line = await self._engine.frames()
                    assert line is not None, "the engine ended"
                    frame = frames.decode(line)
                    self._seen.append(frame)
                    if isinstance(frame, EngineEvent) and frame.answer_id is not None:
                        await self._engine.send(frames.encode_answer(frame, ok=True))
        except TimeoutError:
            raise AssertionError(f"waited {WAIT_S:g} s in vain for {what}; got {self._seen}") from None
        return found


async def import_it(source: Path, target: Path, *more: str) -> dict[str, Any]:
    arguments = ["import", "--format", "baileys", "--from", str(source), "--to", str(target), *more]
    process = await asyncio.create_subprocess_exec(
        ENGINE, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    report = orjson.loads(out)
    assert isinstance(report, dict)
    return report


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


async def shown(sim: Simulator, text: str) -> None:
    """Waits until the other phone shows a text."""
    async with asyncio.timeout(WAIT_S):
        while text not in [m["text"] for m in (await sim.received(BOB))["shown"]]:
            await asyncio.sleep(0.03)


@pytest.mark.timeout(INSTALL_S + RUN_S + 120)
async def test_a_session_of_baileys_goes_on_without_a_qr_code(tmp_path: Path) -> None:
    async with Simulator(find_engine_binary(None, "warren-sim"), log=tmp_path / "sim.log") as sim:
        lines = await run_baileys("leave.mjs", sim, tmp_path, what="whether a session of Baileys can be imported")
        assert lines == ["ok paired", "ok left"]
        source, target = tmp_path / "state" / "ana", tmp_path / "sessions" / "ana" / "1"
        before = contents(source)
        dry = await import_it(source, target, "--dry-run")
        assert not target.exists()
        report = await import_it(source, target)
        assert contents(source) == before
        assert report["jid"] == f"{ANA}:1@s.whatsapp.net"
        assert report["carried"] == dry["carried"]
        assert report["carried"] == {"device": 1, "pre_keys": 812, "lid_mappings": 2, "sessions": 3, "sender_keys": 1}
        assert {left["kind"] for left in report["not_carried"]} == {"own_sender_keys", "sender_key_memories", "device_lists"}
        assert report["warnings"] == []
        group = (await sim.request("GET", "/groups"))["groups"][0]["id"]
        # These wait in sessions that only Baileys knew.
        await sim.send(BOB, ANA, "while away")
        await sim.send(BOB, group, "group while away")
        at = sim.endpoint
        engine = await start_engine(ENGINE, ["--endpoint", at.endpoint, "--root-key", at.root_key, "--ca-file", at.ca_file])
        try:
            await goes_on(Pipe(engine), sim, target, group)
        finally:
            assert await engine.terminate(20) == 0


async def goes_on(pipe: Pipe, sim: Simulator, target: Path, group: str) -> None:
    opened = await pipe.request("open", dir=str(target), create=False, device_name="warren test")
    assert opened.result.get("paired") is True, opened
    await pipe.event("connected")
    for text in ("while away", "group while away"):
        await pipe.event("message", text=text)
    for number, to in enumerate((f"{BOB}@s.whatsapp.net", group)):
        text = f"from warren {number}"
        sent = await pipe.request("send", message_id=f"3EB0IMPORTED{number}", to=to, text=text, timeout_ms=10_000)
        assert sent.error is None, sent
        await shown(sim, text)
    for to, text in ((ANA, "to warren"), (group, "group to warren")):
        await sim.send(BOB, to, text)
        await pipe.event("message", text=text)
    # What came in Baileys' sessions was read in them; what was sent began new ones.
    assert pipe.count("undecryptable") == 0
    assert pipe.count("qr") == 0
    assert (await sim.received(BOB))["undecryptable"] == 0
    closed = await pipe.request("close")
    assert closed.error is None, closed
    assert await sim.pending(ANA) == 0
