"""Fixtures that several suites share."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from warren.edges.broker_node import BrokerNode, NodeInfo, find_rabbitmq

T = TypeVar("T")


class Broker:
    """A private RabbitMQ for the whole run, kept by a thread of its own so that it outlives the loops of single tests."""

    def __init__(self, base: Path) -> None:
        self._node = BrokerNode(base)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rabbitmq")
        self._thread.start()

    @property
    def info(self) -> NodeInfo:
        assert self._node.info is not None
        return self._node.info

    @property
    def url(self) -> str:
        return self.info.url

    def on_thread(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(90)

    def begin(self) -> None:
        """Like `start`, for a fixture outside any loop."""
        self.on_thread(self._node.start())

    async def start(self) -> None:
        await asyncio.to_thread(self.on_thread, self._node.start())

    def kill(self) -> None:
        """SIGKILL. `start` brings it back, on the same data."""
        os.kill(self.info.pid, signal.SIGKILL)

    async def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl, in the environment of the node."""
        return await asyncio.to_thread(self._ctl, *arguments)

    def _ctl(self, *arguments: str) -> str:
        raw = Path(f"/proc/{self.info.pid}/environ").read_text().split("\0")
        environment = dict(line.split("=", 1) for line in raw if "=" in line)
        command = [str(find_rabbitmq() / "rabbitmqctl"), *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout

    def stop(self) -> None:
        self.on_thread(self._node.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """RabbitMQ, shared: use a prefix of your own, and leave it running and unblocked."""
    running = Broker(tmp_path_factory.mktemp("rabbitmq"))
    try:
        running.begin()
        yield running
    finally:
        running.stop()
