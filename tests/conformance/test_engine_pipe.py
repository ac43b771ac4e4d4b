"""The engine's pipe, with a few lines of Python playing the engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from warren.core.frames import MAX_FRAME_BYTES
from warren.edges.engine_pipe import PipedEngine, start_engine
from warren.errors import EngineError, FrameError

PLAY = """
import json, os, socket, sys
def say(**frame): os.write(3, json.dumps(frame).encode() + b"\\n")
def lines():
    with open(3, "rb", closefd=False) as pipe:
        yield from pipe
"""

Start = Callable[..., Awaitable[PipedEngine]]


class Log(list[bytes]):
    def __init__(self) -> None:
        super().__init__()
        self.grown = asyncio.Event()

    def __call__(self, line: bytes) -> None:
        self.append(line)
        self.grown.set()


@pytest.fixture
def log() -> Log:
    return Log()


def descriptors() -> set[str]:
    """What this process has open, and where it leads; the one that lists them is gone when it is looked at."""
    links = set()
    for fd in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            links.add(f"{fd.name} {fd.readlink()}")
    return links


@pytest.fixture
async def start(log: Log) -> AsyncIterator[Start]:
    """Starts engines made of code; at the end all are gone and no descriptor is left."""
    before = descriptors()
    engines: list[PipedEngine] = []

    async def start(code: str) -> PipedEngine:
        engine = await start_engine(Path(sys.executable), ["-S", "-c", PLAY + code], log=log)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.kill()
        await engine.terminate(10)
    assert descriptors() <= before


async def frame(engine: PipedEngine) -> Any:
    async with asyncio.timeout(20):
        line = await engine.frames()
    return None if line is None else orjson.loads(line)


async def test_lines_go_both_ways_whole_and_in_order(start: Start) -> None:
    engine = await start("for line in lines(): os.write(3, line)")
    sent = [b'{"n":%d,"x":"%s"}' % (n, b"x" * (n * 37 % 5000)) for n in range(500)]

    async def send() -> None:
        for line in sent:
            await engine.send(line + b"\n")

    sending = asyncio.create_task(send())
    async with asyncio.timeout(20):
        assert [await engine.frames() for _ in sent] == sent
        await sending


async def test_many_tasks_may_send_and_frames_are_not_mixed(start: Start) -> None:
    engine = await start("for line in lines(): os.write(3, line)")
    lines = [b"%d" % n * 50_000 for n in range(1, 10)] * 3
    tasks = [asyncio.create_task(engine.send(line + b"\n")) for line in lines]
    async with asyncio.timeout(20):
        got = [await engine.frames() for _ in lines]
        await asyncio.gather(*tasks)
    assert sorted(line or b"" for line in got) == sorted(lines)


async def test_the_child_has_its_own_session_and_only_descriptors_0_to_3(start: Start) -> None:
    code = """
fds = sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}"))
say(pid=os.getpid(), sid=os.getsid(0), fds=fds, stdin=os.readlink("/proc/self/fd/0"), stdout=os.readlink("/proc/self/fd/1"),
    stream=socket.socket(fileno=os.dup(3)).type == socket.SOCK_STREAM)
"""
    engine = await start(code)
    hello = await frame(engine)
    assert hello["pid"] == hello["sid"] == engine.pid != os.getpid()
    assert hello["fds"] == [0, 1, 2, 3]
    assert hello["stdin"] == hello["stdout"] == "/dev/null"
    assert hello["stream"]


async def test_terminate_ends_the_input_and_returns_the_status(start: Start) -> None:
    engine = await start("say(event='hello')\nfor line in lines(): pass\nsay(event='bye')\nsys.exit(7)")
    assert await frame(engine) == {"event": "hello"}
    reading = asyncio.create_task(frame(engine))
    status = await engine.terminate(20)
    assert status == 7
    # The last words are read although the process is gone.
    assert await reading == {"event": "bye"}
    assert await frame(engine) is None
    assert await engine.terminate(1) == 7
    with pytest.raises(EngineError) as caught:
        await engine.send(b"{}\n")
    assert caught.value.engine_code == "gone"


async def test_an_engine_that_does_not_end_is_killed(start: Start) -> None:
    engine = await start("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); say(a=1)\nwhile True: signal.pause()")
    assert await frame(engine) == {"a": 1}
    assert await engine.terminate(0.05) == -signal.SIGKILL
    assert await frame(engine) is None


async def test_a_killed_engine_is_the_end_of_its_frames_and_of_waiting_senders(start: Start) -> None:
    engine = await start("import signal; say(a=1)\nwhile True: signal.pause()")
    assert await frame(engine) == {"a": 1}
    stuck = [asyncio.create_task(engine.send(b"x" * 900_000 + b"\n")) for _ in range(3)]
    done, _ = await asyncio.wait(stuck, timeout=0.05)
    assert not done  # nobody reads
    engine.kill()
    assert await frame(engine) is None
    results = await asyncio.gather(*stuck, return_exceptions=True)
    assert {type(r) for r in results} == {EngineError}
    assert await engine.terminate(20) == -signal.SIGKILL
    engine.kill()  # nothing happens


async def test_an_engine_that_crashes_is_seen_at_once(start: Start) -> None:
    engine = await start("say(a=1); os.write(3, b'{\"torn\":'); os.abort()")
    assert await frame(engine) == {"a": 1}
    assert await frame(engine) is None
    assert await engine.terminate(20) == -signal.SIGABRT


@pytest.mark.parametrize("size", [MAX_FRAME_BYTES, MAX_FRAME_BYTES + 1])
async def test_a_line_has_a_limit_newline_included(start: Start, size: int) -> None:
    engine = await start(f"""
left = memoryview(b"x" * {size - 1} + b"\\n")
while left: left = left[os.write(3, left):]
for line in lines(): pass""")
    async with asyncio.timeout(20):
        if size <= MAX_FRAME_BYTES:
            assert await engine.frames() == b"x" * (size - 1)
        else:
            with pytest.raises(FrameError, match="over the limit"):
                await engine.frames()


async def test_cancelling_a_reader_loses_nothing(start: Start) -> None:
    engine = await start("for line in lines(): os.write(3, line)")
    for n in range(20):
        reading = asyncio.create_task(engine.frames())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        await engine.send(b"%d\n" % n)
    async with asyncio.timeout(20):
        assert [await engine.frames() for _ in range(20)] == [b"%d" % n for n in range(20)]


async def test_standard_error_is_logged_line_by_line_also_over_long_ones(start: Start, log: Log) -> None:
    engine = await start("""
os.write(2, b"one\\n")
left = memoryview(b"y" * 300_000 + b"\\ntwo\\n")
while left: left = left[os.write(2, left):]
os.write(2, b"no newline")
for line in lines(): pass""")
    async with asyncio.timeout(20):
        while b"two\n" not in log:
            log.grown.clear()
            await log.grown.wait()
    await engine.terminate(20)
    one, cut, two, last = log
    assert (one, two, last) == (b"one\n", b"two\n", b"no newline")
    assert set(cut) == {ord("y")}
    assert 60_000 < len(cut) < 300_000


async def test_a_program_that_is_not_there_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = descriptors()
    for binary in (tmp_path / "missing", tmp_path):
        with pytest.raises(EngineError, match="cannot be started") as caught:
            await start_engine(binary, [])
        assert caught.value.engine_code == "not_started"
        assert "make engine" in caught.value.hint
    assert descriptors() <= before


async def test_the_engine_sees_the_end_when_the_daemon_is_killed(tmp_path: Path) -> None:
    """The promise behind "an engine that outlives its daemon exits": no other process holds the daemon's end of the pipe."""
    daemon = f"""
import asyncio, sys
from pathlib import Path
from warren.edges.engine_pipe import start_engine
async def main():
    code = {PLAY!r} + "say(pid=os.getpid())\\nfor line in lines(): pass"
    engines = [await start_engine(Path(sys.executable), ["-S", "-c", code]) for _ in range(3)]
    for engine in engines: sys.stdout.buffer.write(await engine.frames() + b"\\n")
    sys.stdout.flush()
    await asyncio.Event().wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", daemon, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(30):
        pids = [orjson.loads(await process.stdout.readline())["pid"] for _ in range(3)]
        watches = [os.pidfd_open(pid) for pid in pids]
        process.kill()
        await process.wait()
        loop = asyncio.get_running_loop()
        for watch in watches:
            exited = asyncio.Event()
            loop.add_reader(watch, exited.set)
            await exited.wait()
            loop.remove_reader(watch)
            os.close(watch)
    process._transport.close()  # type: ignore[attr-defined]  # its pipe
