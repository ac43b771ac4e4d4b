"""The embedded node against the real RabbitMQ: started, adopted, killed, broken.

Each start costs seconds, so a test tells a whole story.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aio_pika
import pytest

from warren.edges import broker_node
from warren.edges.broker_node import BrokerNode
from warren.errors import BrokerUnavailable, StateError

QUEUE = "kept"
DEADLINE_S = 30.0

STARTS_A_NODE_AND_WAITS = """
import asyncio, sys
from pathlib import Path
from warren.edges.broker_node import BrokerNode

async def main():
    info = await BrokerNode(Path(sys.argv[1])).start()
    print(info.url, info.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def base(tmp_path: Path) -> AsyncIterator[Path]:
    """A node's directory; fails when a test leaves processes behind, and ends them."""
    path = tmp_path / "with space" / "broker"
    yield path
    if left := programs(path):
        node = BrokerNode(path)
        await node._kill_all(node._load())
    assert left == []


def name_of(base: Path) -> str | None:
    try:
        return json.loads((base / "node.json").read_bytes())["name"]
    except FileNotFoundError:
        return None


def programs(base: Path) -> list[str]:
    """What runs of a node, by the names of the programs."""
    name = name_of(base)
    found = []
    for process in broker_node._marked(name) if name else []:
        try:
            found.append(Path(f"/proc/{process.pid}/comm").read_text().strip())
        except OSError:
            continue
    return sorted(found)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def publish(url: str, text: str) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        message = aio_pika.Message(text.encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, QUEUE, timeout=10)


def queues_registered(base: Path) -> bool:
    """Whether RabbitMQ's register of quorum queues is on disk.

    RabbitMQ 3.10 writes it up to half a second after the declaration, confirmed messages or not: a queue that is younger when the
    broker is killed comes back empty and without a leader, and hangs until it is deleted.
    """
    (register,) = (base / "data").glob("*/quorum/*/names.dets")
    return all(folder.name.encode() in register.read_bytes() for folder in register.parent.iterdir() if folder.is_dir())


async def held(url: str) -> list[str]:
    """What the queue holds; it stays there."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(QUEUE)
        texts = []
        while (message := await queue.get(no_ack=False, fail=False, timeout=10)) is not None:
            texts.append(message.body.decode())
        return texts


async def holds(url: str, *texts: str) -> None:
    """Wait until the queue holds just these; what was out when the broker died comes back a moment after its restart."""
    async with asyncio.timeout(DEADLINE_S):
        while await held(url) != list(texts):
            await asyncio.sleep(0.05)


@pytest.fixture
async def stranger() -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that is none of ours."""
    process = await asyncio.create_subprocess_exec("sleep", "1000")
    yield process
    process.kill()
    await process.wait()


async def test_a_node_is_usable_and_nothing_is_left_of_it(base: Path, stranger: asyncio.subprocess.Process) -> None:
    # A node.json from before whose process id belongs to somebody else by now.
    base.mkdir(parents=True)
    (base / "node.json").write_text(
        json.dumps(
            {"name": "warren-test@localhost", "user": "u", "password": "p", "amqp_port": 0, "epmd_port": 0, "dist_port": 0}
            | {"broker": {"pid": stranger.pid, "started": broker_node._started(stranger.pid)}}
        )
    )
    node = BrokerNode(base)
    info = await node.start()
    assert not info.adopted
    assert info.pid != stranger.pid
    assert node.info == info
    assert (base / "url").read_text() == info.url
    await publish(info.url, "one")
    await holds(info.url, "one")
    private = [base, base / "url", base / "node.json", base / "rabbitmq.conf", base / "log" / "console.log"]
    assert [path for path in private if path.stat().st_mode & 0o077] == []
    assert {"beam.smp", "epmd"} <= set(programs(base))
    assert listening_beyond_loopback(info.pid) == []

    exited = asyncio.create_task(node.wait_exit())
    await node.stop()
    assert await exited == 0
    assert programs(base) == []
    assert not (base / "url").exists()
    assert node.info is None
    assert await node.wait_exit() is None
    await node.stop()

    assert stranger.returncode is None


def listening_beyond_loopback(pid: int) -> list[str]:
    """Local addresses (hexadecimal) of a process's listening TCP sockets that are not 127.0.0.1."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            sockets.add(str(link.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets and not fields[1].startswith("0100007F:"):
                found.append(fields[1])
    return found


async def test_a_node_outlives_its_daemon_and_its_data_outlive_the_node(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTS_A_NODE_AND_WAITS, str(base), stdout=asyncio.subprocess.PIPE
    )
    assert daemon.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        url, pid = (await daemon.stdout.readline()).decode().split()
    await publish(url, "before the crash")
    await until(lambda: queues_registered(base))
    daemon.kill()
    await daemon.communicate()

    adopting = BrokerNode(base)
    info = await adopting.start()
    assert (info.adopted, info.url, info.pid) == (True, url, int(pid))
    await holds(url, "before the crash")

    # It hangs: the kernel still accepts connections, nobody answers.
    os.kill(info.pid, signal.SIGSTOP)
    monkeypatch.setattr(broker_node, "ADOPT_S", 0.3)
    exited = asyncio.create_task(adopting.wait_exit())
    second = BrokerNode(base)
    info = await second.start()
    assert (info.adopted, info.url) == (False, url)
    assert await exited is None
    await holds(url, "before the crash")

    # It is killed, and with it only what nobody is told of.
    exited = asyncio.create_task(second.wait_exit())
    os.kill(info.pid, signal.SIGKILL)
    assert await exited == -signal.SIGKILL
    info = await second.start()
    assert (info.adopted, info.url) == (False, url)
    await holds(url, "before the crash")

    # An adopted node is nobody's child here, and is stopped all the same.
    third = BrokerNode(base)
    assert (await third.start()).adopted
    await third.stop()
    assert programs(base) == []
    assert await second.wait_exit() == 0
    await second.stop()


@pytest.mark.parametrize("program", ["epmd", "beam.smp"])
async def test_a_cancelled_start_leaves_nothing(base: Path, program: str) -> None:
    node = BrokerNode(base)
    starting = asyncio.create_task(node.start())
    await until(lambda: program in programs(base))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert programs(base) == []
    assert node.info is None
    await node.stop()


async def test_a_cancelled_stop_kills(base: Path) -> None:
    node = BrokerNode(base)
    info = await node.start()
    os.kill(info.pid, signal.SIGSTOP)
    stopping = asyncio.create_task(node.stop(timeout_s=DEADLINE_S))
    await until(lambda: node.info is None)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert programs(base) == []


async def test_a_node_that_cannot_boot_says_why(base: Path) -> None:
    (base / "conf.d").mkdir(parents=True)
    (base / "conf.d" / "broken.conf").write_text("no.such.setting = 1\n")
    with pytest.raises(BrokerUnavailable, match=r"ended while starting \(status \d+\)(.|\n)*no\.such\.setting") as raised:
        await BrokerNode(base).start()
    assert str(base / "log") in raised.value.hint
    assert programs(base) == []


async def test_a_start_has_a_deadline(base: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"no answer within 0\.1 s"):
        await BrokerNode(base, start_timeout_s=0.1).start()
    assert programs(base) == []


async def test_a_missing_installation_says_what_to_install(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(base))
    with pytest.raises(BrokerUnavailable, match="Erlang") as raised:
        await BrokerNode(base).start()
    assert "erlang-base" in raised.value.hint
    monkeypatch.setattr(broker_node, "SBIN_PATTERNS", ())
    with pytest.raises(BrokerUnavailable, match="not installed") as raised:
        await BrokerNode(base).start()
    assert "apt-get install" in raised.value.hint
    assert "[amqp] url" in raised.value.hint


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "x"}'])
async def test_an_unreadable_node_json_is_never_replaced(base: Path, content: bytes) -> None:
    base.mkdir(parents=True)
    (base / "node.json").write_bytes(content)
    with pytest.raises(StateError, match="cannot be read"):
        await BrokerNode(base).start()
    assert (base / "node.json").read_bytes() == content
    (base / "node.json").unlink()
    (base / "data" / "x").mkdir(parents=True)
    with pytest.raises(StateError, match="is missing") as raised:
        await BrokerNode(base).start()
    assert str(base) in raised.value.hint


async def test_a_disk_that_takes_no_writes_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("warren.edges.broker_node._write", full)
    with pytest.raises(StateError, match="No space left") as caught:
        await BrokerNode(tmp_path / "rabbitmq").start()
    assert caught.value.retryable
    assert "free space" in caught.value.hint
