"""How long to wait before trying again."""

from __future__ import annotations


def delay(attempt: int, *, base_s: float, cap_s: float, random01: float) -> float:
    """Seconds before attempt number `attempt` (from 0): `base_s` x 2^attempt, at most `cap_s`, with jitter.

    `random01` in [0, 1) spreads the result over [50 %, 100 %] of that, so that a thousand sessions that lost one server do
    not come back in the same second, and none comes back at once.
    """
    # Capping the exponent keeps 2**attempt from growing without end over a long outage.
    full = min(cap_s, base_s * 2.0 ** min(attempt, 32))
    return full * (0.5 + 0.5 * random01)
