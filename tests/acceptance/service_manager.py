"""Plays systemd for one service: notify socket, watchdog, credentials, stop signals and patience, as the unit file says.

There is no systemd as PID 1 where tests run. What is here follows sd_notify(3), systemd.service(5) and systemd.exec(5).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.acceptance.rig import DEADLINE_S, until

UNIT = Path(__file__).parents[2] / "systemd" / "warren.service"
ABORT_S = 10.0
"""How long a service may take to die of the watchdog's SIGABRT (TimeoutAbortSec=)."""
# Only a process that has forked knows its pid. UMask=, and MemoryDenyWriteExecute= where the kernel can (6.3), as in the unit.
_BECOME = """
import ctypes, os, sys
PR_SET_NO_NEW_PRIVS, PR_SET_MDWE = 38, 65
ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
ctypes.CDLL(None).prctl(PR_SET_MDWE, 1, 0, 0, 0)
os.umask(0o077)
os.execve(sys.argv[1], sys.argv[1:], {**os.environ, "WATCHDOG_PID": str(os.getpid())})
"""
_CREDENTIALS = struct.Struct("3i")


def unit_settings(path: Path = UNIT) -> dict[str, list[str]]:
    """`Key=value` lines of all sections, in order, by key."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@dataclass(frozen=True)
class Word:
    """One assignment of a datagram from the main process."""

    at: float
    name: str
    value: str


class ServiceManager:
    """`async with ServiceManager(base, environment, credentials)`; `start` then runs warrend as the unit would."""

    def __init__(
        self, base: Path, environment: dict[str, str], credentials: dict[str, str], *, config: str = "", watchdog_s: float = 60.0
    ) -> None:
        self.base, self.log, self.config = base, base / "journal", base / "warren.toml"
        self.config.write_text(config)
        self.words: list[Word] = []
        self.strangers: list[str] = []
        """What processes other than the main one said: NotifyAccess=main drops it."""
        self.missed_watchdogs = 0
        self._unit = unit_settings()
        self._watchdog_s = watchdog_s
        self._credentials = base / "credentials"
        self._credentials.mkdir(mode=0o700)
        for name, secret in credentials.items():
            (self._credentials / name).write_text(secret)
            (self._credentials / name).chmod(0o400)
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._patient_until = 0.0

    async def __aenter__(self) -> Self:
        self._path = self.base / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self._path))
        asyncio.get_running_loop().add_reader(self._socket, self._receive)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        finally:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    # --- the service

    async def start(self) -> None:
        state = self.base / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        environment = {
            **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            "NOTIFY_SOCKET": str(self._path),
            "STATE_DIRECTORY": str(state),
            "CREDENTIALS_DIRECTORY": str(self._credentials),
            "WATCHDOG_USEC": str(int(self._watchdog_s * 1e6)),
            **self._environment,
        }
        self.words.clear()
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _BECOME,
                sys.executable,
                "-m",
                "warren.app",
                f"--config={self.config}",
                env=environment,
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._patient_until = time.monotonic() + 90.0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def reload(self) -> None:
        """ExecReload=, and what the unit's notify state makes of it."""
        assert self._unit["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
        before = len(self.words)
        os.kill(self.pid, signal.SIGHUP)
        await until(
            lambda: [w.name for w in self.words[before:] if w.name in ("RELOADING", "READY")] == ["RELOADING", "READY"], "reload"
        )

    async def stop(self) -> int:
        """SIGTERM to the main process alone (KillMode=mixed), TimeoutStopSec= of patience or what it asks for; the status."""
        assert self._unit["KillMode"] == ["mixed"]
        assert self._process is not None
        os.kill(self.pid, signal.SIGTERM)
        self._patient_until = time.monotonic() + float(self._unit["TimeoutStopSec"][0])
        ended = asyncio.ensure_future(self._process.wait())
        while not ended.done():
            assert time.monotonic() < self._patient_until, f"it does not stop; see {self.log}"
            await asyncio.wait({ended}, timeout=0.1)
        return ended.result()

    async def supervise(self) -> int:
        """The watchdog of a service that is ready, until the service ends; returns its exit status."""
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        while not ended.done():
            await asyncio.wait({ended}, timeout=0.1)
            fed = max((w.at for w in self.words if w.name in ("WATCHDOG", "READY")), default=0.0)
            if not ended.done() and time.monotonic() - fed > self._watchdog_s:
                self.missed_watchdogs += 1
                # As systemd does: a process that is stopped must go on to die.
                os.kill(self.pid, signal.SIGABRT)
                os.kill(self.pid, signal.SIGCONT)
                await asyncio.wait({ended}, timeout=ABORT_S)
                if not ended.done():
                    self._process.kill()
                await ended
        return ended.result()

    # --- what it said

    def values(self, name: str) -> list[str]:
        return [word.value for word in self.words if word.name == name]

    @property
    def status(self) -> str:
        return (self.values("STATUS") or [""])[-1]

    @property
    def ready(self) -> bool:
        return "READY" in (word.name for word in self.words)

    async def until_status(self, *parts: str) -> None:
        try:
            await until(lambda: all(part in self.status for part in parts), f"a status with {parts}")
        except AssertionError as e:
            raise AssertionError(f"{e}; it is {self.status!r}, see {self.log}") from None

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, ancillary, *_ = self._socket.recvmsg(65_536, socket.CMSG_SPACE(_CREDENTIALS.size))
                ((_, _, credentials),) = ancillary
                pid = _CREDENTIALS.unpack(credentials[: _CREDENTIALS.size])[0]
                if self._process is None or pid != self._process.pid:
                    self.strangers.append(f"{pid}: {data!r}")
                    continue
                now = time.monotonic()
                for line in data.decode().splitlines():
                    name, _, value = line.partition("=")
                    self.words.append(Word(now, name, value))
                    if name == "EXTEND_TIMEOUT_USEC":
                        self._patient_until = max(self._patient_until, now + int(value) / 1e6)


def systemd_analyze() -> str:
    """The program; a machine without it cannot say that the unit is right (`make setup` installs it)."""
    found = shutil.which("systemd-analyze")
    assert found, "systemd-analyze is missing: apt-get install systemd (or run `make setup`)"
    return found


__all__ = ["DEADLINE_S", "UNIT", "ServiceManager", "systemd_analyze", "unit_settings"]
