from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warren.core.limiter import MINUTE_MS, Pace, Window

paces = st.integers(1, 90).flatmap(lambda n: st.builds(Pace, st.just(n), st.integers(1, n)))
START = 1_800_000_000_000


@given(paces, st.lists(st.integers(0, 20_000), max_size=250))
def test_never_more_than_the_limit_in_any_window(pace: Pace, pauses: list[int]) -> None:
    window, now, sent = Window(), START, []
    for pause in pauses:
        now += pause
        if not window.wait_ms(pace, now):
            window = window.taken(now)
            sent.append(now)
    # A window is a span that contains its begin and not its end: so many messages further on it must be over.
    for count, span in ((pace.per_minute, MINUTE_MS), (pace.burst, pace.burst_ms)):
        assert all(later - earlier >= span for earlier, later in zip(sent, sent[count:], strict=False))
    assert len(window.stamps) <= pace.per_minute


@given(paces, st.integers(0, 100))
def test_who_waits_as_long_as_told_may_send_then_and_not_before(pace: Pace, sent: int) -> None:
    window, now = Window(), START
    for _ in range(sent):
        wait = window.wait_ms(pace, now)
        assert 0 <= wait <= MINUTE_MS
        if wait:
            assert window.wait_ms(pace, now + wait - 1) == 1
        now += wait
        assert window.wait_ms(pace, now) == 0
        window = window.taken(now)


def test_a_burst_goes_at_once_and_the_average_is_kept() -> None:
    pace, window, now, sent = Pace(30, 10), Window(), START, []
    for _ in range(70):
        now += window.wait_ms(pace, now)
        window = window.taken(now)
        sent.append(now - START)
    assert sent[:10] == [0] * 10
    assert sent[10:20] == [20_000] * 10
    assert sent[60] == 120_000


def test_a_burst_of_one_is_even() -> None:
    pace, window, now, sent = Pace(30, 1), Window(), START, []
    for _ in range(4):
        now += window.wait_ms(pace, now)
        window = window.taken(now)
        sent.append(now)
    assert {b - a for a, b in pairwise(sent)} == {2_000}


def test_a_clock_turned_back_costs_a_minute_at_most() -> None:
    pace, window = Pace(2, 2), Window((START, START))
    back = START - 3_600_000
    assert window.wait_ms(pace, back) <= MINUTE_MS
    assert window.taken(back).stamps == (back, back, back)


@pytest.mark.parametrize(("per_minute", "burst"), [(1, 2), (5, 0), (0, 0)])
def test_what_is_no_pace_is_refused(per_minute: int, burst: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Pace(per_minute, burst)
