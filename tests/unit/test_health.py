"""What counts as a problem, and what is told of it."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fakes import MemoryBus

from warren.core.machine import State
from warren.core.metrics import Metrics
from warren.services.engines import Vitals
from warren.services.health import NEED_SOMEONE, Health

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


class World:
    """Everything is well until a test changes it."""

    def __init__(self) -> None:
        self.bus = MemoryBus()
        self.states: Counter[str] = Counter(online=3)
        self.delivery = SimpleNamespace(
            trouble="", waiting=lambda: 2, outbox_bytes=500, oldest=lambda: NOW - timedelta(seconds=9)
        )
        self.engines = [Vitals(0, True, 3, 40_000_000, "2.3000.1", 3600.0)]
        self.unsaved: datetime | None = NOW - timedelta(seconds=60)
        self.backups = SimpleNamespace(trouble="", oldest_unsaved_at=lambda: self.unsaved)
        self.free: int | None = 10**9
        fleet: Any = SimpleNamespace(states=lambda: self.states)
        engines: Any = SimpleNamespace(vitals=lambda: self.engines)
        bus: Any = self.bus
        delivery: Any = self.delivery
        self.health = Health(
            bus, fleet, delivery, engines, Metrics(), backups=self.backups,
            free_bytes=lambda: self.free, min_free_bytes=10**6, now=lambda: NOW,
        )  # fmt: skip
        self.health.started = True

    def codes(self) -> list[str]:
        return [problem.code for problem in self.health.problems()]

    def value(self, name: str, *labels: str) -> float:
        (family,) = [f for f in self.health.families() if f.name == name]
        return family.samples[labels]


@pytest.fixture
async def world() -> World:
    return World()


async def test_when_all_is_well_there_is_nothing_to_say(world: World) -> None:
    assert world.codes() == []
    assert world.health.ready
    assert world.value("warren_ready") == 1


async def test_it_is_ready_only_between_start_and_stop(world: World) -> None:
    world.health.started = False
    assert world.codes() == ["starting"]
    world.health.started, world.health.stopping = True, True
    assert world.codes() == ["stopping"]
    assert not world.health.ready


async def test_what_keeps_it_from_its_work(world: World) -> None:
    world.bus.connected.clear()
    world.free = 10**6
    world.engines.append(Vitals(1, False, 2, None, None, None))
    assert world.codes() == ["rabbitmq_away", "disk_full", "engine_down"]
    assert world.value("warren_ready") == world.value("warren_rabbitmq_connected") == 0
    assert (world.value("warren_engines"), world.value("warren_engines_up")) == (2, 1)
    world.free = None
    assert "cannot be read" in next(p.message for p in world.health.problems() if p.code == "disk_full")


async def test_a_rabbitmq_that_blocks_publishers_is_named(world: World) -> None:
    world.bus.trouble = "RabbitMQ blocks publishers."
    assert world.codes() == ["rabbitmq_blocked"]
    assert world.health.ready


async def test_events_that_cannot_be_stored(world: World) -> None:
    world.delivery.trouble = "The outbox holds 1000 bytes, its limit."
    assert world.codes() == ["store_trouble"]
    assert "its limit" in world.health.problems()[0].message
    assert world.value("warren_store_trouble") == 1


async def test_failing_backups_and_sessions_that_wait_are_said_but_do_not_make_it_unready(world: World) -> None:
    world.backups.trouble = "The bucket is gone."
    world.states = Counter({state.value: 2 for state in NEED_SOMEONE})
    assert world.codes() == ["backup_failing", "sessions_need_someone"]
    assert world.health.ready
    assert "2 logged_out" in world.health.problems()[1].message


async def test_every_problem_says_what_to_do(world: World) -> None:
    world.health.stopping = True
    world.bus.connected.clear()
    world.free, world.delivery.trouble, world.backups.trouble = 0, "full", "gone"
    world.engines = [Vitals(0, False, 0, None, None, None)]
    world.states = Counter(blocked=1)
    problems = world.health.problems()
    assert len(problems) == 6
    assert all(problem.hint.endswith(".") and len(problem.hint) > 10 for problem in problems)


async def test_ages_and_sizes(world: World) -> None:
    told = {name: world.value(f"warren_{name}") for name in ("outbox_age_seconds", "outbox_bytes", "outbox_events")}
    assert told == {"outbox_age_seconds": 9, "outbox_bytes": 500, "outbox_events": 2}
    assert world.value("warren_backup_age_seconds") == 60
    world.unsaved = None
    world.delivery.oldest = lambda: None
    assert world.value("warren_backup_age_seconds") == world.value("warren_outbox_age_seconds") == 0
    assert world.value("warren_whatsapp_version_age_seconds") == 3600
    assert world.value("warren_engine_resident_memory_bytes", "0") == 40_000_000


async def test_every_state_is_told_so_that_none_is_missed_when_it_first_happens(world: World) -> None:
    assert {state: world.value("warren_sessions", state) for state in (s.value for s in State)} == {
        s.value: float(s is State.ONLINE) * 3 for s in State
    }


async def test_nothing_is_told_of_backups_when_none_are_made(world: World) -> None:
    world.health._backups = None
    assert not [f for f in world.health.families() if f.name == "warren_backup_age_seconds"]
