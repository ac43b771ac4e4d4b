from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from warren.core.machine import CAUSES, CONNECTED, TABLE, Cause, IllegalTrigger, State, Step, Trigger, cause_of, step

ROOT = Path(__file__).parents[2]
LIVE = (State.CONNECTING, State.PAIRING, State.ONLINE, State.TIME_LOCKED)


def reachable(start: State) -> set[State]:
    seen, todo = {start}, [start]
    while todo:
        here = todo.pop()
        new = {s.to for (state, _), s in TABLE.items() if state is here} - seen
        seen |= new
        todo.extend(new)
    return seen


class AnySession(RuleBasedStateMachine):
    """Whatever happens in whatever order, a session is where the table says, and an illegal trigger changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State.STOPPED

    @rule(trigger=st.sampled_from(Trigger))
    def anything_happens(self, trigger: Trigger) -> None:
        before = self.state
        legal = (before, trigger) in TABLE
        if legal:
            self.state = step(before, trigger).to
            assert self.state is TABLE[before, trigger].to
        else:
            with pytest.raises(IllegalTrigger, match=f"{before.value} cannot take {trigger.value}"):
                step(before, trigger)

    @invariant()
    def never_outside_the_table(self) -> None:
        assert self.state in reachable(State.STOPPED)

    @invariant()
    def somebody_can_always_stop_or_start_it(self) -> None:
        """No dead end: STOP is legal everywhere, and START everywhere except while stopping."""
        assert (self.state, Trigger.STOP) in TABLE
        assert self.state is State.STOPPING or (self.state, Trigger.START) in TABLE


AnySession.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnySession = AnySession.TestCase


def test_every_state_is_reachable() -> None:
    assert reachable(State.STOPPED) == set(State)


@pytest.mark.parametrize("state", sorted(State, key=lambda s: s.value))
def test_every_session_can_get_online_and_be_stopped(state: State) -> None:
    assert State.ONLINE in reachable(state)
    assert State.STOPPED in reachable(state)


@given(st.sampled_from(State), st.sampled_from(Trigger))
def test_illegal_raises_and_changes_nothing(state: State, trigger: Trigger) -> None:
    before = dict(TABLE)
    if (state, trigger) in TABLE:
        assert isinstance(step(state, trigger), Step)
    else:
        with pytest.raises(IllegalTrigger):
            step(state, trigger)
    assert before == TABLE


def test_a_missing_network_never_stops_a_session() -> None:
    """Promise 3, and the table's header: only a person or WhatsApp's account rules stop a session."""
    for live in LIVE:
        assert step(live, Trigger.LOST).to is State.BACKING_OFF
    assert step(State.BACKING_OFF, Trigger.RETRY).to is State.CONNECTING


def test_what_needs_somebody_is_announced() -> None:
    for (state, trigger), s in TABLE.items():
        needs = {State.LOGGED_OUT, State.REPLACED, State.BLOCKED, State.QUARANTINED, State.OUTDATED, State.TIME_LOCKED}
        if s.to in needs and state is not s.to:
            assert s.event, f"{state} --{trigger}--> {s.to} would be silent"


def test_only_a_phone_makes_a_session_online() -> None:
    into_online = {(state, trigger) for (state, trigger), s in TABLE.items() if s.to is State.ONLINE}
    assert into_online == {
        (State.CONNECTING, Trigger.CONNECTED),
        (State.ONLINE, Trigger.START),
        (State.TIME_LOCKED, Trigger.UNLOCKED),
    }


def test_a_time_lock_ends_no_connection() -> None:
    assert step(State.ONLINE, Trigger.TIME_LOCK).to is State.TIME_LOCKED
    assert {State.ONLINE, State.TIME_LOCKED} == CONNECTED
    assert step(State.TIME_LOCKED, Trigger.UNLOCKED).to is State.ONLINE
    for end in (Trigger.LOST, Trigger.REPLACED, Trigger.BANNED, Trigger.LOGGED_OUT, Trigger.RESTART, Trigger.STOP):
        assert step(State.TIME_LOCKED, end).to is step(State.ONLINE, end).to


def test_what_waits_for_time_goes_on_by_itself() -> None:
    for state in (State.BACKING_OFF, State.BLOCKED, State.OUTDATED, State.REPLACED):
        assert step(state, Trigger.RETRY).to is State.CONNECTING


# --- causes -----------------------------------------------------------------------------------------------------------


def documented_reasons() -> set[str]:
    """The reasons of `disconnected` in docs/engine-protocol.md."""
    text = (ROOT / "docs" / "engine-protocol.md").read_text()
    paragraph = re.search(r"^Reasons of `disconnected`:.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)
    assert paragraph is not None
    # Words in parentheses explain a reason and may name fields.
    plain = re.sub(r"\([^)]*\)", "", paragraph.group().split(":", 1)[1])
    return set(re.findall(r"`([a-z_]+)`", re.sub(r"`failure`\s.*", "`failure`, `internal`", plain, flags=re.DOTALL))) | {
        "internal"
    }


def test_every_documented_reason_has_a_cause() -> None:
    reasons = documented_reasons()
    assert {"restart_required", "network", "temporary_ban", "internal", "failure"} <= reasons
    assert reasons <= set(CAUSES)


@pytest.mark.parametrize("reason", sorted(documented_reasons() | {"logged_out"}))
def test_the_end_of_a_connection_is_never_illegal(reason: str) -> None:
    """The engine has closed the session when it says so: a state that ignored it would look alive for ever."""
    for live in (*LIVE, State.STOPPING):
        trigger = cause_of(reason).trigger
        if live in CONNECTED and trigger is Trigger.UNPAIRED:
            continue  # says that pairing failed; a paired session has that behind it
        assert step(live, trigger).to is not live or trigger is Trigger.RESTART


def test_a_requested_restart_is_at_once_only_while_connecting() -> None:
    assert step(State.CONNECTING, Trigger.RESTART) == Step(State.CONNECTING)
    assert step(State.ONLINE, Trigger.RESTART).to is State.BACKING_OFF


def test_errors_of_open_that_end_a_session_have_a_cause() -> None:
    text = (ROOT / "docs" / "engine-protocol.md").read_text()
    for code in ("state_missing", "state_unreadable", "state_locked"):
        assert f"`{code}`" in text
        assert code in CAUSES


@pytest.mark.parametrize("cause", CAUSES.values(), ids=lambda c: c.code)
def test_a_cause_speaks_to_the_operator_and_fits_the_table(cause: Cause) -> None:
    assert cause.message.endswith(".")
    assert cause.hint.endswith(".")
    # The engine opens in CONNECTING, so whatever ends a connection can happen there.
    at = State.ONLINE if cause.trigger is Trigger.TIME_LOCK else State.CONNECTING
    assert (at, cause.trigger) in TABLE


def test_a_disk_that_takes_no_writes_is_no_damage() -> None:
    assert step(State.CONNECTING, CAUSES["disk_trouble"].trigger).to is State.BACKING_OFF


def test_an_unknown_reason_is_retried_and_seen() -> None:
    assert cause_of("something_new") is CAUSES["internal"]
    assert cause_of("something_new").trigger is Trigger.LOST
    assert cause_of("replaced").trigger is Trigger.REPLACED
