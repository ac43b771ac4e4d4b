"""What to do about a session's backups, given which there are: pure, so that every order of losses can be tried.

How backups come to be, which everything here relies on:

- Within an epoch the owner writes 1, 2, 3, …; whoever finds a number taken by other bytes is no longer the owner and stops.
- A restore begins a new epoch. Before it, it puts a *seal* at the old epoch's next number: the old owner's next put meets it.
- So nothing is behind a seal, the last object of every epoch but the newest is its seal, and the newest epoch may end in one,
  too (a restore that was cut off).
- A name does not tell whether it is a state or a seal; reading the object does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from warren.core.backup_names import Place
from warren.core.sealing import Kind

DAY_S = 86_400


def newest(places: Iterable[Place]) -> Place | None:
    return max(places, default=None)


def next_epoch(places: Iterable[Place], *known: int) -> int:
    """The epoch for a new owner: above every one in the store and every one `known` from elsewhere."""
    return max(0, *known, *(place.epoch for place in places)) + 1


# --- which state a session starts from ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Local:
    """A state on this machine that is there and readable."""

    recorded: Place | None
    """The last backup that is known to have been made of it; None: none is known."""
    intent: Place | None = None
    """A put that was begun behind `recorded`, with an outcome that is not known (a crash, a lost answer)."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """Nothing anywhere: a new session."""


@dataclass(frozen=True, slots=True)
class UseLocal:
    """The local state is as new as the newest backup, or newer."""


@dataclass(frozen=True, slots=True)
class CheckIntent:
    """Read this object: if it is what was about to be put, it was; decide again with it as `recorded` (else without intent)."""

    place: Place


@dataclass(frozen=True, slots=True)
class UseStore:
    """The store has something newer, or the only one: go on with `choose`."""


def decide(local: Local | None, places: Sequence[Place]) -> Fresh | UseLocal | CheckIntent | UseStore:
    """Where a session's state comes from. `local` None: there is none (missing, not unreadable).

    The local state wins only if the backup it is known for is the newest in the store or newer than that.
    """
    last = newest(places)
    if last is None:
        return Fresh() if local is None else UseLocal()
    if local is None:
        return UseStore()
    if local.recorded is not None and local.recorded >= last:
        return UseLocal()
    if local.intent == last:
        return CheckIntent(last)
    return UseStore()


@dataclass(frozen=True, slots=True)
class Read:
    """Open this object, add what it was to `opened`, and choose again."""

    place: Place


@dataclass(frozen=True, slots=True)
class Restore:
    """This state is the newest that counts; it was opened and is whole."""

    place: Place
    passed: tuple[Place, ...]
    """Newer objects that were damaged or vanished: what was in them is lost. Empty when all is well."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """There are backups, but none that can be restored. Never answered by starting afresh."""

    reason: str


def choose(places: Sequence[Place], opened: Mapping[Place, Kind | None]) -> Read | Restore | Refuse:
    """The newest state that counts, found by opening one object after the other, newest first.

    `opened` holds what each object that was read turned out to be; None: damaged, or it vanished meanwhile. Only what was proved
    (AEAD, integrity of the database) may be in it as STATE; a store that does not answer is no reason to put None.
    """
    passed: list[Place] = []
    for place in sorted(places, reverse=True):
        if place not in opened:
            return Read(place)
        kind = opened[place]
        if kind is Kind.STATE:
            return Restore(place, tuple(passed))
        if kind is None:
            passed.append(place)
    if not places:
        return Refuse("There is no backup.")
    damaged = f" {len(passed)} cannot be opened, the newest of them {passed[0]}." if passed else ""
    return Refuse(f"None of the {len(places)} objects is a whole state.{damaged}")


# --- what may go --------------------------------------------------------------------------------------------------------


def prune(modified: Mapping[Place, float], now: float, keep_last: int, keep_days: int) -> list[Place]:
    """The backups of one session that may be deleted, oldest first. `modified` and `now` are Unix times in seconds.

    Kept: the last `keep_last` states, the last state of each of the last `keep_days` days (UTC), and every seal (each tells one
    former owner that it is no longer one). The newest object, state or seal, is kept, and so is the state before it.
    """
    ordered = sorted(modified, reverse=True)
    seals = {older for newer, older in pairwise(ordered) if older.epoch != newer.epoch}
    states = [place for place in ordered[1:] if place not in seals]
    keep = {*ordered[:1], *seals, *states[: max(1, keep_last - 1)]}
    days: set[int] = set()
    for place in states:
        day = int(modified[place] // DAY_S)
        if day not in days and day > int(now // DAY_S) - keep_days:
            days.add(day)
            keep.add(place)
    return [place for place in reversed(ordered) if place not in keep]
