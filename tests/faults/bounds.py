"""What the backoff allows at most."""

from __future__ import annotations

from warren.core.backoff import delay


def attempts_within(seconds: float, *, base_s: float, cap_s: float) -> int:
    """The most attempts that the backoff allows in a time that begins with a loss: each pause as short as jitter makes it."""
    at, attempts = 0.0, 0
    while (at := at + delay(attempts, base_s=base_s, cap_s=cap_s, random01=0.0)) <= seconds:
        attempts += 1
    return attempts
