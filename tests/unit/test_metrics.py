"""What is counted, and that it stays within bounds."""

from __future__ import annotations

from warren.core.envelope import Outcome
from warren.core.metrics import CONFIRM_BOUNDS_S, Metrics, Timing
from warren.errors import CommandError


def sample(metrics: Metrics, name: str, *labels: str) -> float:
    (family,) = [f for f in metrics.families() if f.name == name]
    return family.samples[labels]


def test_a_timing_counts_each_duration_in_every_bucket_it_fits() -> None:
    timing = Timing((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        timing.add(seconds)
    assert timing.cumulative() == [("0.1", 2), ("1", 3), ("+Inf", 4)]
    assert timing.total_s == 7.65


def test_only_confirms_are_timed() -> None:
    metrics = Metrics()
    metrics.published("confirmed", 0.002)
    metrics.published("unknown", 10.0)
    assert (sample(metrics, "warren_publishes", "confirmed"), sample(metrics, "warren_publishes", "unknown")) == (1, 1)
    assert metrics.confirms.cumulative()[-1] == ("+Inf", 1)
    assert len(metrics.confirms.cumulative()) == len(CONFIRM_BOUNDS_S) + 1


def test_commands_count_by_outcome_and_what_people_make_up_becomes_no_label() -> None:
    metrics = Metrics()
    metrics.command(Outcome("send", "1", {"message_id": "3EB0"}), 0.2)
    metrics.command(Outcome.failed("send", "2", CommandError("rate_limited", "Too fast.")), 0.1)
    for n in range(50):
        metrics.command(Outcome.failed(f"made-up-{n}", None, CommandError("unknown_command", "No.")), 0.0)
    assert sample(metrics, "warren_commands", "send", "completed") == sample(metrics, "warren_messages_sent") == 1
    assert sample(metrics, "warren_commands", "send", "rate_limited") == 1
    assert sample(metrics, "warren_commands", "unknown", "unknown_command") == 50


def test_a_reconnect_is_a_way_from_backing_off_to_connecting() -> None:
    metrics = Metrics()
    metrics.transition("online", "backing_off", "network")
    metrics.transition("backing_off", "connecting", None)
    metrics.transition("stopped", "connecting", None)
    assert sample(metrics, "warren_reconnects") == 1
    assert sample(metrics, "warren_session_transitions", "backing_off", "network") == 1
    assert sample(metrics, "warren_session_transitions", "connecting", "") == 2


def test_backups_count_apart_from_their_failures() -> None:
    metrics = Metrics()
    metrics.backup(ok=True, size=1000)
    metrics.backup(ok=False)
    assert [sample(metrics, f"warren_backup{s}") for s in ("s", "_failures", "_bytes")] == [1, 1, 1000]
