from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from warren.edges.sdnotify import MAX_STATUS_CHARS, Condition, ServiceManager, status_line


class Systemd:
    """The other end of the socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(address)
        self.lines: list[str] = []

    async def hears(self, line: str, times: int = 1) -> None:
        async with asyncio.timeout(10):
            while self.lines.count(line) < times:
                await asyncio.sleep(0.01)
                self.take()

    def take(self) -> list[str]:
        while True:
            try:
                self.lines += self.socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.lines


def manager(address: str, **more: str) -> ServiceManager:
    return ServiceManager.from_environment({"NOTIFY_SOCKET": address, **more})


@pytest.mark.parametrize("abstract", [False, True])
async def test_ready_is_said_once_and_the_status_when_it_changes(tmp_path: Path, abstract: bool) -> None:
    name = f"warren-test-{os.getpid()}"
    systemd = Systemd(f"\0{name}" if abstract else str(tmp_path / "s"))
    service = manager(f"@{name}" if abstract else str(tmp_path / "s"))
    now = Condition(False, "RabbitMQ is\naway\nREADY=1")
    service.start(lambda: now)
    await systemd.hears("STATUS=RabbitMQ is away READY=1")
    assert "READY=1" not in systemd.lines
    assert "EXTEND_TIMEOUT_USEC=30000000" in systemd.lines
    now = Condition(True, "x" * 10_000)
    await systemd.hears("READY=1")
    assert f"STATUS={'x' * MAX_STATUS_CHARS}" in systemd.lines
    with service.reloading():
        await systemd.hears("RELOADING=1")
        assert any(line.startswith("MONOTONIC_USEC=") for line in systemd.take())
    await systemd.hears("READY=1", times=2)
    # Not ready any more is no reason to say READY=1 again.
    now = Condition(False, "lost")
    await systemd.hears("STATUS=lost")
    now = Condition(True, "found")
    await systemd.hears("STATUS=found")
    assert systemd.lines.count("READY=1") == 2
    extended = systemd.lines.count("EXTEND_TIMEOUT_USEC=30000000")
    service.stopping(60)
    await systemd.hears("STOPPING=1")
    assert systemd.lines.count("EXTEND_TIMEOUT_USEC=30000000") == extended + 1
    await service.close()
    systemd.socket.close()


async def test_a_stop_beyond_its_budget_gets_no_more_patience(tmp_path: Path) -> None:
    systemd = Systemd(str(tmp_path / "s"))
    service = manager(str(tmp_path / "s"))
    service.start(lambda: Condition(True, "ok"))
    await systemd.hears("READY=1")
    service.stopping(-1)
    await systemd.hears("STOPPING=1")
    before = systemd.take().count("EXTEND_TIMEOUT_USEC=30000000")
    await systemd.hears("STATUS=ok", times=2)
    assert systemd.lines.count("EXTEND_TIMEOUT_USEC=30000000") == before
    await service.close()
    systemd.socket.close()


async def test_the_watchdog_is_fed_also_when_the_status_cannot_be_told(tmp_path: Path) -> None:
    def broken() -> Condition:
        raise RuntimeError("a bug")

    systemd = Systemd(str(tmp_path / "s"))
    service = manager(str(tmp_path / "s"), WATCHDOG_USEC="400000", WATCHDOG_PID=str(os.getpid()))
    service.start(broken)
    await systemd.hears("WATCHDOG=1", times=3)
    await service.close()
    systemd.socket.close()


async def test_what_systemd_did_not_take_is_said_again(tmp_path: Path) -> None:
    service = manager(str(tmp_path / "s"), WATCHDOG_USEC="200000")
    service.start(lambda: Condition(True, "ok"))  # nobody listens yet
    await asyncio.sleep(0)
    systemd = Systemd(str(tmp_path / "s"))
    await systemd.hears("READY=1")
    await systemd.hears("STATUS=ok")
    await service.close()
    systemd.socket.close()


def test_what_systemd_gave_is_for_this_process_alone() -> None:
    environ = {"NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/"}
    ServiceManager.from_environment(environ)
    assert environ == {"HOME": "/"}


async def test_without_systemd_nothing_is_said() -> None:
    service = ServiceManager.from_environment({})
    service.start(lambda: pytest.fail("nobody asks"))
    with service.reloading():
        pass
    service.stopping(1)
    await service.close()


async def test_a_watchdog_meant_for_another_process_is_not_fed(tmp_path: Path) -> None:
    systemd = Systemd(str(tmp_path / "s"))
    service = manager(str(tmp_path / "s"), WATCHDOG_USEC="100000", WATCHDOG_PID="1")
    service.start(lambda: Condition(True, "ok"))
    await systemd.hears("READY=1")
    assert "WATCHDOG=1" not in systemd.lines
    await service.close()
    systemd.socket.close()


def test_the_status_is_a_line_for_people() -> None:
    assert status_line({}, 0, "") == "0 sessions; outbox empty; RabbitMQ: connected"
    assert status_line({"online": 1}, 1, "") == "1 session (1 online); outbox 1 kB; RabbitMQ: connected"
    assert status_line({"pairing": 1, "online": 29, "blocked": 1}, 12_345, "RabbitMQ at h:5672/ refused the login.") == (
        "31 sessions (29 online, 1 blocked, 1 pairing); outbox 13 kB; RabbitMQ: RabbitMQ at h:5672/ refused the login."
    )
