from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warren.core.backoff import delay

BASE_S, CAP_S = 5.0, 300.0
RANDOM = st.floats(min_value=0.0, max_value=1.0, exclude_max=True)


@given(st.integers(min_value=0, max_value=10**9), RANDOM)
def test_between_half_and_all_of_the_step(attempt: int, random01: float) -> None:
    full = min(CAP_S, BASE_S * 2.0 ** min(attempt, 32))
    assert full / 2 <= delay(attempt, base_s=BASE_S, cap_s=CAP_S, random01=random01) <= full


@given(st.integers(min_value=0, max_value=1000), RANDOM)
def test_never_shorter_after_more_attempts(attempt: int, random01: float) -> None:
    here = delay(attempt, base_s=BASE_S, cap_s=CAP_S, random01=random01)
    assert delay(attempt + 1, base_s=BASE_S, cap_s=CAP_S, random01=random01) >= here


@pytest.mark.parametrize(("attempt", "longest"), [(0, 5.0), (1, 10.0), (2, 20.0), (5, 160.0), (6, 300.0), (100, 300.0)])
def test_steps_of_the_design(attempt: int, longest: float) -> None:
    """5 s x 2^n, cap 300 s."""
    assert delay(attempt, base_s=BASE_S, cap_s=CAP_S, random01=0.0) == longest / 2
    assert delay(attempt, base_s=BASE_S, cap_s=CAP_S, random01=0.999999) == pytest.approx(longest, rel=1e-3)


def test_jitter_spreads() -> None:
    """A thousand sessions that lost one server must not come back in the same moment."""
    delays = {delay(0, base_s=BASE_S, cap_s=CAP_S, random01=n / 1000) for n in range(1000)}
    assert len(delays) == 1000
