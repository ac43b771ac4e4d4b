"""Supervision of engines: what leaks, floods or dies is replaced, and only its own sessions notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest

from warren.core.frames import EngineEvent
from warren.errors import EngineError
from warren.services import engines as module
from warren.services.engines import EngineOptions, Engines, Flood

MB = 1_000_000
OPTIONS = EngineOptions(
    2, ping_interval_s=0.01, ping_timeout_s=2.0, restart_base_s=0.01, restart_cap_s=0.02, memory_ceiling=100 * MB
)


class PlayedEngine:
    """`ports.EngineProcess`: says hello, answers every request at once."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.rss = 10 * MB
        self.asked: list[str] = []
        self.last_id = 0
        self.deaf: set[str] = set()
        """Operations that get no answer."""
        self.killed = False
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.say({"event": "hello", "session": "", "data": {"protocol": 1}})

    def say(self, frame: dict[str, Any]) -> None:
        self._out.put_nowait(orjson.dumps(frame))

    def event(self, session: str, event: str = "keepalive", generation: int = 1) -> None:
        self.say({"event": event, "session": session, "generation": generation, "data": {}})

    async def send(self, frame: bytes) -> None:
        request = orjson.loads(frame)
        op = request["op"]
        self.asked.append(op)
        if op in self.deaf:
            self.last_id = request["id"]
            return
        result = {"rss_bytes": self.rss} if op == "ping" else {}
        self.say({"re": request["id"], "session": request["session"], "ok": True, "result": result})
        if op == "stop":
            self._out.put_nowait(None)

    async def frames(self) -> bytes | None:
        return await self._out.get()

    async def terminate(self, timeout_s: float) -> int:
        return 0

    def kill(self) -> None:
        self.killed = True
        self._out.put_nowait(None)


class World:
    """Engines with every process there ever was, and what the sessions heard."""

    def __init__(self) -> None:
        self.processes: list[PlayedEngine] = []
        self.heard: list[tuple[str, str, str | None]] = []
        self.may_start = asyncio.Event()
        self.may_start.set()

    async def begin(self) -> None:
        self.engines = Engines(self._start, OPTIONS, random01=lambda: 0.5)
        await self.engines.start()

    async def _start(self) -> PlayedEngine:
        await self.may_start.wait()
        self.processes.append(PlayedEngine(len(self.processes)))
        return self.processes[-1]

    async def open(self, session: str, on_event: Callable[[EngineEvent], None] | None = None) -> PlayedEngine:
        """Open a session; the process it is in."""
        before = [p.asked.count("open") for p in self.processes]
        await self.engines.open(session, 1, on_event or self.hear)
        grown = [p for n, p in enumerate(self.processes) if n >= len(before) or p.asked.count("open") > before[n]]
        return grown[0]

    def hear(self, event: EngineEvent) -> None:
        self.heard.append((event.session, event.event, event.data.get("reason")))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.begin()
    yield world
    await world.engines.stop(2)


async def true(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_cancelled_open_waits_for_its_answer_so_that_no_close_overtakes_it(world: World) -> None:
    engine = world.processes[0]
    engine.deaf = {"open"}
    opening = asyncio.create_task(world.engines.open("acme", 1, lambda _: None))
    await true(lambda: engine.last_id)
    opening.cancel()
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not opening.done()
    engine.say({"re": engine.last_id, "session": "acme", "ok": True, "result": {"paired": True}})
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(opening, 30)


async def test_a_process_above_its_ceiling_is_closed_and_replaced_with_only_its_sessions(world: World) -> None:
    leaking = await world.open("a")
    await world.open("b")
    sound = await world.open("c")
    assert sound is not leaking
    leaking.rss = 101 * MB
    await true(lambda: len(world.heard) == 2)
    assert world.heard == [("a", "disconnected", "engine_replaced"), ("b", "disconnected", "engine_replaced")]
    assert "stop" in leaking.asked, "its sessions were closed in good order"
    assert not sound.killed
    assert "stop" not in sound.asked
    assert await world.open("a") not in {leaking, sound}


async def test_sessions_that_open_while_an_engine_starts_do_not_overfill_it(world: World) -> None:
    await world.open("a")
    await world.open("b")
    world.may_start.clear()
    opening = [asyncio.create_task(world.engines.open(s, 1, world.hear)) for s in ("c", "d", "e")]
    await true(lambda: len(world.engines.vitals()) > 1)
    world.may_start.set()
    await asyncio.wait_for(asyncio.gather(*opening), 30)
    assert [vitals.sessions for vitals in world.engines.vitals()] == [2, 2, 1]


async def test_a_peak_is_no_leak(world: World) -> None:
    process = await world.open("a")
    calm = process.send

    async def peaking(frame: bytes) -> None:
        process.rss = 101 * MB if process.asked.count("ping") % 2 else 10 * MB
        await calm(frame)

    process.send = peaking  # type: ignore[method-assign]
    await true(lambda: process.asked.count("ping") > 10)
    assert world.heard == []


async def test_a_process_that_does_not_close_its_sessions_is_killed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_TIMEOUT_S", 0.05)
    process = await world.open("a")
    process.deaf.add("stop")
    process.rss = 101 * MB
    await true(lambda: world.heard)
    assert process.killed
    assert world.heard == [("a", "disconnected", "engine_replaced")]


async def test_while_a_process_is_replaced_nothing_is_sent_and_nothing_counts_as_sent(world: World) -> None:
    process = await world.open("a")
    process.deaf.add("stop")
    process.rss = 101 * MB
    await true(lambda: "stop" in process.asked)
    with pytest.raises(EngineError) as refused:
        await world.engines.request("send", "a", 1, timeout_s=1.0)
    assert refused.value.engine_code == "not_open"
    assert "send" not in process.asked
    process.kill()


async def test_an_engine_that_floods_a_session_is_killed_and_its_sessions_hear_of_it(world: World) -> None:
    def full(event: EngineEvent) -> None:
        if event.event != "disconnected":
            raise Flood("too much")
        world.hear(event)

    process = await world.open("a", full)
    await world.open("b")
    process.event("a")
    await true(lambda: len(world.heard) == 2)
    assert process.killed
    assert world.heard == [("a", "disconnected", "engine_lost"), ("b", "disconnected", "engine_lost")]
    await world.open("a")


async def test_an_engine_that_floods_with_sessions_it_does_not_have_is_killed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STRAYS", 50)
    process = await world.open("a")
    process.deaf.add("ping")
    for _ in range(51):
        process.event("nobody")
    await true(lambda: world.heard)
    assert process.killed


async def test_one_sessions_bug_ends_nothing(world: World) -> None:
    def broken(event: EngineEvent) -> None:
        raise ZeroDivisionError

    process = await world.open("a", broken)
    await world.open("b")
    process.event("a")
    process.event("b")
    await true(lambda: world.heard == [("b", "keepalive", None)])
    assert not process.killed
