"""What is counted while warren runs, and how it is told: plain numbers, without clock or library.

Services count into one `Metrics`; `services.health` adds what is only known now; `edges.http_metrics` writes it for Prometheus.
Labels take their values from closed sets (states, causes, commands, error codes, event names), never from sessions or people, so
the number of series does not grow with the number of sessions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from warren.core.envelope import COMMANDS, Outcome

CONFIRM_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
COMMAND_BOUNDS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0)

Labels = tuple[str, ...]


@dataclass(slots=True)
class Timing:
    """Durations in seconds, counted by bucket; `bounds` are upper ends, rising."""

    bounds: tuple[float, ...]
    total_s: float = 0.0
    _counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper end, how many were at most that long), as Prometheus wants them; the last is "+Inf", all."""
        ends = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return list(zip(ends, accumulate(map(float, self._counts)), strict=True))


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. A counter's `name` is without `_total`; `samples` by the values of `labels`, a histogram's as Timing."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: Labels = ()
    samples: dict[Labels, float] = field(default_factory=dict)
    timings: dict[Labels, Timing] = field(default_factory=dict)


def gauge(name: str, help_: str, value: float | None) -> Family:
    """A gauge without labels; None: not known, no sample."""
    return Family("gauge", name, help_, (), {} if value is None else {(): float(value)})


def counter(name: str, help_: str, value: float) -> Family:
    return Family("counter", name, help_, (), {(): float(value)})


class Metrics:
    """The counters of one daemon, since its start. Not shared between threads."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        """Events taken for publishing, by name."""
        self.publishes: Counter[str] = Counter()
        """Attempts to publish an event with a sequence, by what became of them."""
        self.confirms = Timing(CONFIRM_BOUNDS_S)
        self._commands: Counter[tuple[str, str]] = Counter()
        self._command_seconds: dict[Labels, Timing] = {}
        self._transitions: Counter[tuple[str, str]] = Counter()
        self._reconnects = 0
        self.engine_restarts = 0
        self._backups: Counter[bool] = Counter()
        self._backup_bytes = 0

    # --- what services tell

    def published(self, result: str, seconds: float) -> None:
        """An attempt to publish ended; `result` is a value of ports.Published."""
        self.publishes[result] += 1
        if result == "confirmed":
            self.confirms.add(seconds)

    def command(self, outcome: Outcome, seconds: float) -> None:
        """A command of ours has its outcome, `seconds` after it came in."""
        # What could not be decoded names no command, or one that somebody made up.
        name = outcome.command if outcome.command in COMMANDS else "unknown"
        self._commands[name, "completed" if outcome.error is None else str(outcome.error.get("code"))] += 1
        key = (name, "completed" if outcome.ok else "failed")
        self._command_seconds.setdefault(key, Timing(COMMAND_BOUNDS_S)).add(seconds)

    def transition(self, before: str, state: str, reason: str | None) -> None:
        """A session entered `state`, for `reason` (a code of machine.CAUSES)."""
        self._transitions[state, reason or ""] += 1
        self._reconnects += before == "backing_off" and state == "connecting"

    def backup(self, *, ok: bool, size: int = 0) -> None:
        """A backup was put (`size` in bytes), or an attempt failed."""
        self._backups[ok] += 1
        self._backup_bytes += size

    # --- what is told of them

    def families(self) -> list[Family]:
        """Every counter, also those that are still 0."""
        sent = self._commands["send", "completed"]
        by_event: dict[Labels, float] = {(name,): float(n) for name, n in self.events.items()}
        return [
            counter("warren_messages_received", "Messages from WhatsApp that were taken for publishing.", self.events["message"]),
            counter("warren_messages_sent", "Messages that WhatsApp took from us.", sent),
            Family("counter", "warren_events", "Events taken for publishing.", ("event",), by_event),
            Family(
                "counter",
                "warren_publishes",
                "Attempts to publish a stored event, by what RabbitMQ said.",
                ("result",),
                {(r,): float(self.publishes[r]) for r in ("confirmed", "refused", "unknown")},
            ),
            Family(
                "histogram",
                "warren_confirm_seconds",
                "From publishing a stored event to RabbitMQ's confirm.",
                timings={(): self.confirms},
            ),
            Family(
                "counter",
                "warren_commands",
                "Commands that have their outcome: `completed`, or the error's code.",
                ("command", "outcome"),
                {key: float(n) for key, n in self._commands.items()},
            ),
            Family(
                "histogram",
                "warren_command_seconds",
                "From the arrival of a command to its outcome.",
                ("command", "outcome"),
                timings=dict(self._command_seconds),
            ),
            Family(
                "counter",
                "warren_session_transitions",
                "State changes of sessions, by the state entered and the reason.",
                ("state", "reason"),
                {key: float(n) for key, n in self._transitions.items()},
            ),
            counter("warren_reconnects", "Attempts to reconnect a session to WhatsApp.", self._reconnects),
            counter(
                "warren_probe_failures", "Connections that looked open and did not answer.", self.events["health_check_failed"]
            ),
            counter(
                "warren_engine_restarts",
                "Engine processes that ended or were replaced, and were started again.",
                self.engine_restarts,
            ),
            counter("warren_backups", "Backups put into the object store.", self._backups[True]),
            counter("warren_backup_failures", "Attempts to back a session up that failed.", self._backups[False]),
            counter("warren_backup_bytes", "Bytes put into the object store.", self._backup_bytes),
        ]
