"""Tells systemd how the daemon is: ready, what it does, alive (sd_notify(3)); says nothing where systemd did not start it.

One task of the event loop says everything, so that a loop that hangs is silent, and systemd's watchdog acts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Final

from loguru import logger

TICK_S: Final = 0.5
EXTEND_S: Final = 30.0
"""How long systemd shall wait for the next word while a start or stop goes on: many ticks of a busy machine."""
MAX_STATUS_CHARS: Final = 400


@dataclass(frozen=True, slots=True)
class Condition:
    """`ready`: commands are taken, or will be as soon as RabbitMQ lets us. `status`: one line for people."""

    ready: bool
    status: str


class ServiceManager:
    """The way to systemd: `socket_path` None says nothing. `watchdog_s`: the longest silence it allows; None: any."""

    def __init__(self, socket_path: str | None = None, watchdog_s: float | None = None) -> None:
        self._address = None if socket_path is None else _address(socket_path)
        self._watchdog_s = watchdog_s
        self._socket: socket.socket | None = None
        self._condition: Callable[[], Condition] = lambda: Condition(False, "")
        self._task: asyncio.Task[None] | None = None
        self._announced = False
        self._stopping_until: float | None = None
        self._status = ""
        self._fed = self._extended = float("-inf")
        self._failed = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> ServiceManager:
        """Take what systemd gave out of the environment: it is meant for this process, not for its children."""
        path = environ.pop("NOTIFY_SOCKET", "")
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = usec.isdigit() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(path or None, int(usec) / 1e6 if ours else None)

    def start(self, condition: Callable[[], Condition]) -> None:
        """Report `condition` from now on; READY=1 goes out, once, when it is first ready."""
        if self._address is None:
            return
        self._condition = condition
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._task = asyncio.create_task(self._report(), name="systemd.report")

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """While the configuration is read again. systemd hears nothing of it while the start has not come to READY=1."""
        if self._announced:
            self._send({"RELOADING": "1", "MONOTONIC_USEC": str(time.monotonic_ns() // 1000)})
        try:
            yield
        finally:
            if self._announced:
                self._send({"READY": "1"})

    def stopping(self, budget_s: float) -> None:
        """The stop begins. systemd is asked for patience while it goes on, for at most `budget_s`: a stop that hangs is ended."""
        self._stopping_until = time.monotonic() + budget_s
        self._extended = float("-inf")
        self._status = "Stopping."
        self._send({"STOPPING": "1", "STATUS": self._status} | self._signs_of_life(time.monotonic()))

    async def close(self) -> None:
        """No more words."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- inside

    async def _report(self) -> None:
        pause_s = TICK_S if self._watchdog_s is None else min(TICK_S, self._watchdog_s / 4)
        while True:
            try:
                self._tick()
            except Exception:  # a bug in the status must not look like a hung daemon
                logger.bind(action="systemd_bug").exception("The status for systemd cannot be told.")
                self._send(self._signs_of_life(time.monotonic()))
            await asyncio.sleep(pause_s)

    def _tick(self) -> None:
        now, condition = time.monotonic(), self._condition()
        words = self._signs_of_life(now)
        if ready := condition.ready and not self._announced and self._stopping_until is None:
            words["READY"] = "1"
        if (status := " ".join(condition.status.split())[:MAX_STATUS_CHARS]) != self._status:
            words["STATUS"] = status
        if self._send(words):
            self._status = status
            self._announced |= ready

    def _signs_of_life(self, now: float) -> dict[str, str]:
        words = {}
        if self._watchdog_s is not None and now - self._fed >= self._watchdog_s / 2 - TICK_S / 2:
            self._fed = now
            words["WATCHDOG"] = "1"
        if self._waited_for(now) and now - self._extended >= EXTEND_S / 6:
            self._extended = now
            words["EXTEND_TIMEOUT_USEC"] = str(int(EXTEND_S * 1e6))
        return words

    def _waited_for(self, now: float) -> bool:
        """Whether systemd counts the time of a start (RabbitMQ may be away for hours) or of a stop that is within its budgets."""
        return not self._announced if self._stopping_until is None else now < self._stopping_until

    def _send(self, words: Mapping[str, str]) -> bool:
        """False when systemd did not take it (its queue is full, or it is gone); what matters is said again."""
        if self._socket is None or self._address is None:
            return False
        if not words:
            return True
        try:
            self._socket.sendto("\n".join(f"{name}={value}" for name, value in words.items()).encode(), self._address)
        except OSError as e:
            if not self._failed:
                logger.bind(action="systemd_deaf").warning("systemd does not take our messages: {}", e)
            self._failed = True
            return False
        self._failed = False
        return True


def _address(path: str) -> str:
    """Linux' abstract sockets begin with a zero byte; systemd writes it as @."""
    return "\0" + path[1:] if path.startswith("@") else path


def status_line(states: Mapping[str, int], outbox_bytes: int, rabbitmq: str) -> str:
    """`3 sessions (2 online, 1 pairing); outbox 4 kB; RabbitMQ: connected`. `rabbitmq`: the trouble, "" for none."""
    count = sum(states.values())
    each = ", ".join(f"{number} {state}" for state, number in sorted(states.items(), key=lambda item: (-item[1], item[0])))
    sessions = f"{count} session{'' if count == 1 else 's'}" + (f" ({each})" if each else "")
    outbox = f"outbox {-(-outbox_bytes // 1000)} kB" if outbox_bytes else "outbox empty"
    return f"{sessions}; {outbox}; RabbitMQ: {rabbitmq or 'connected'}"
