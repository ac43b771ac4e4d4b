"""How fast a session may send: a sliding window over the moments at which its last messages went out. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MINUTE_MS = 60_000


@dataclass(frozen=True, slots=True)
class Pace:
    """At most `per_minute` messages in any minute, and at most `burst` of them (1 to `per_minute`) in any `burst` / `per_minute`
    of a minute: so many may go right behind each other, and then there is a pause until the average is back. A burst of
    `per_minute` is the whole minute at once; a burst of 1 is one message at a time, evenly.
    """

    per_minute: int
    burst: int

    def __post_init__(self) -> None:
        if not 1 <= self.burst <= self.per_minute:
            raise ValueError(f"a burst of {self.burst} does not fit {self.per_minute} a minute")

    @property
    def burst_ms(self) -> int:
        return -(-MINUTE_MS * self.burst // self.per_minute)


@dataclass(frozen=True, slots=True)
class Window:
    """The last messages: milliseconds since 1970, in order. After a clock was turned back, what lies ahead counts as now, so that
    nobody waits for the difference.
    """

    stamps: tuple[int, ...] = ()

    def wait_ms(self, pace: Pace, now_ms: int) -> int:
        """How long until one more may go out; 0: now."""
        return max(self._until(pace.per_minute, MINUTE_MS, now_ms), self._until(pace.burst, pace.burst_ms, now_ms))

    def _until(self, count: int, span_ms: int, now_ms: int) -> int:
        if len(self.stamps) < count:
            return 0
        return max(0, min(self.stamps[-count], now_ms) + span_ms - now_ms)

    def taken(self, now_ms: int) -> Window:
        """With one more message, now. What is older than a minute is forgotten."""
        kept = (min(stamp, now_ms) for stamp in self.stamps)
        return Window((*(stamp for stamp in kept if stamp > now_ms - MINUTE_MS), now_ms))
