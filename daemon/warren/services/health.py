"""What is wrong right now, and what the numbers are: for `/readyz`, `/metrics` and the page. Nothing here waits or fails."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Protocol

from warren.core.machine import State
from warren.core.metrics import Family, Labels, Metrics, gauge
from warren.ports import Bus, Problem
from warren.services.delivery import Delivery
from warren.services.engines import Engines
from warren.services.fleet import Fleet

NEED_SOMEONE = (State.LOGGED_OUT, State.REPLACED, State.BLOCKED, State.OUTDATED, State.QUARANTINED)
"""States that end only when somebody does something, or waits."""

_WAITS = "Events wait on disk, commands in RabbitMQ; it goes on by itself when RabbitMQ takes them again."


class Backing(Protocol):
    """What is asked of backups."""

    @property
    def trouble(self) -> str: ...

    def oldest_unsaved_at(self) -> datetime | None: ...


class Health:
    """One daemon's. `started` and `stopping` are the composition root's to set; `backups` None: none are made.

    `free_bytes` tells the free space of the state directory's disk, None when it cannot be told.
    """

    def __init__(
        self,
        bus: Bus,
        fleet: Fleet,
        delivery: Delivery,
        engines: Engines,
        metrics: Metrics,
        *,
        backups: Backing | None,
        free_bytes: Callable[[], int | None],
        min_free_bytes: int,
        now: Callable[[], datetime],
    ) -> None:
        self._bus, self._fleet, self._delivery, self._engines = bus, fleet, delivery, engines
        self._metrics, self._backups = metrics, backups
        self._free_bytes, self._min_free_bytes, self._now = free_bytes, min_free_bytes, now
        self.started = False
        self.stopping = False

    # --- what is wrong

    @property
    def ready(self) -> bool:
        return not any(problem.blocking for problem in self.problems())

    def problems(self) -> list[Problem]:
        """Everything that is wrong, the worst first. Empty: all is well."""
        found = [*self._phase(), *self._rabbitmq(), *self._disk(), *self._engines_down(), *self._backups_failing()]
        return [*found, *self._sessions_waiting()]

    def _phase(self) -> list[Problem]:
        if self.stopping:
            return [Problem("stopping", "warrend is stopping.", "Nothing to do.")]
        return [] if self.started else [Problem("starting", "warrend is starting.", "Wait; the log tells what it waits for.")]

    def _rabbitmq(self) -> list[Problem]:
        if self._bus.connected.is_set():
            return [Problem("rabbitmq_blocked", self._bus.trouble, _WAITS, blocking=False)] if self._bus.trouble else []
        return [
            Problem(
                "rabbitmq_away",
                "RabbitMQ cannot be reached. Messages are kept on disk, commands wait in RabbitMQ.",
                "Check that RabbitMQ runs and that `[amqp] url` leads to it; the log tells why connecting fails.",
            )
        ]

    def _disk(self) -> list[Problem]:
        free = self._free_bytes()
        if free is None or free <= self._min_free_bytes:
            told = "cannot be read" if free is None else f"has {free // 1_000_000} MB left"
            return [
                Problem("disk_full", f"The disk of the state directory {told}. Nothing more is taken.", "Make room on that disk.")
            ]
        if self._delivery.trouble:
            hint = "See the log; WhatsApp and RabbitMQ keep what is not taken."
            return [Problem("store_trouble", f"Events cannot be stored: {self._delivery.trouble}", hint)]
        return []

    def _engines_down(self) -> list[Problem]:
        down = [vitals for vitals in self._engines.vitals() if not vitals.up]
        if not down:
            return []
        told = f"{len(down)} of {len(self._engines.vitals())} engine processes are down; their sessions are offline."
        return [Problem("engine_down", told, "They are started again by themselves; the log tells why they ended.")]

    def _backups_failing(self) -> list[Problem]:
        if self._backups is None or not self._backups.trouble:
            return []
        hint = "Check `[storage]` and the object store. It is tried again by itself."
        return [Problem("backup_failing", f"Backups fail: {self._backups.trouble}", hint, blocking=False)]

    def _sessions_waiting(self) -> list[Problem]:
        states = self._fleet.states()
        waiting = {state.value: states[state.value] for state in NEED_SOMEONE if states[state.value]}
        if not waiting:
            return []
        told = ", ".join(f"{count} {state}" for state, count in waiting.items())
        hint = "Each says in its status what to do: `warren session list`, `warren session status ID`."
        return [Problem("sessions_need_someone", f"Sessions that need somebody: {told}.", hint, blocking=False)]

    # --- numbers

    def families(self) -> list[Family]:
        """Every metric of the daemon."""
        return [*self._metrics.families(), *self._general(), *self._of_engines(), *self._of_backups()]

    def _general(self) -> list[Family]:
        states = self._fleet.states()
        by_state: dict[Labels, float] = {(state.value,): float(states[state.value]) for state in State}
        free = self._free_bytes()
        return [
            gauge("warren_ready", "1 when nothing keeps the daemon from its work.", self.ready),
            Family("gauge", "warren_sessions", "Sessions of this daemon.", ("state",), by_state),
            gauge("warren_rabbitmq_connected", "1 while both connections to RabbitMQ are up.", self._bus.connected.is_set()),
            gauge("warren_outbox_events", "Events that RabbitMQ has not confirmed, since the start.", self._delivery.waiting()),
            gauge("warren_outbox_bytes", "Size of the events on disk that are not confirmed.", self._delivery.outbox_bytes),
            gauge(
                "warren_outbox_age_seconds", "Age of the oldest event not confirmed; 0: none.", self._age(self._delivery.oldest())
            ),
            gauge("warren_store_trouble", "1 while events cannot be stored.", bool(self._delivery.trouble)),
            gauge("warren_disk_free_bytes", "Free space of the state directory's disk.", free),
        ]

    def _of_engines(self) -> list[Family]:
        vitals = self._engines.vitals()
        memory: dict[Labels, float] = {(str(v.number),): float(v.rss_bytes) for v in vitals if v.rss_bytes is not None}
        ages = [v.wa_version_age_s for v in vitals if v.wa_version_age_s is not None]
        return [
            gauge("warren_engines", "Engine processes that there should be.", len(vitals)),
            gauge("warren_engines_up", "Engine processes that answer.", sum(v.up for v in vitals)),
            Family("gauge", "warren_engine_resident_memory_bytes", "Memory of an engine process.", ("engine",), memory),
            gauge(
                "warren_whatsapp_version_age_seconds",
                "For how long WhatsApp has not been heard to serve the version we claim.",
                max(ages, default=None),
            ),
        ]

    def _of_backups(self) -> list[Family]:
        if self._backups is None:
            return []
        unsaved = self._backups.oldest_unsaved_at()
        return [
            gauge("warren_backup_age_seconds", "For how long changes of a session wait for their backup.", self._age(unsaved)),
            gauge("warren_backup_trouble", "1 while a session's last backup failed.", bool(self._backups.trouble)),
        ]

    def _age(self, since: datetime | None) -> float:
        return 0.0 if since is None else max(0.0, (self._now() - since).total_seconds())

    # --- sessions

    def sessions(self) -> list[dict[str, Any]]:
        """Every session's status, by id."""
        return self._fleet.statuses()

    def session(self, session: str) -> dict[str, Any] | None:
        """One session's status; None when there is no such session."""
        found = self._fleet.get(session)
        return None if found is None else found.status()
