"""Where a session's state comes from, under any loss; and what may be deleted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warren.core.backup_names import MAX_NUMBER, Names, Place
from warren.core.backup_plan import (
    DAY_S,
    CheckIntent,
    Fresh,
    Local,
    Read,
    Refuse,
    Restore,
    UseLocal,
    UseStore,
    choose,
    decide,
    newest,
    next_epoch,
    prune,
)
from warren.core.sealing import Kind

NAMES = Names("warren")
NOW = 20_000.5 * DAY_S

History = dict[Place, Kind]


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Backups as owners make them: epochs of states, each closed by a seal before the next begins; the last may be, too."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths)))
    sealed = draw(st.booleans())
    history: History = {}
    epoch = 0
    for i, (states, gap) in enumerate(zip(lengths, gaps, strict=True)):
        epoch += gap
        last = i == len(lengths) - 1
        for sequence in range(1, states + 1):
            history[Place(epoch, sequence)] = Kind.STATE
        if not last or sealed:
            history[Place(epoch, states + 1)] = Kind.SEAL
    return history


def walk(places: Sequence[Place], content: dict[Place, Kind | None]) -> tuple[Restore | Refuse, list[Place]]:
    """What a restore does, and what it read on the way."""
    opened: dict[Place, Kind | None] = {}
    while isinstance(choice := choose(places, opened), Read):
        assert choice.place not in opened
        opened[choice.place] = content[choice.place]
    return choice, list(opened)


@given(st.data(), histories())
def test_any_loss_gives_the_newest_whole_state_or_a_refusal(data: st.DataObject, history: History) -> None:
    """Some objects are gone, some are damaged, in any combination."""
    fate = {place: data.draw(st.sampled_from(["whole", "whole", "lost", "damaged"])) for place in history}
    left: dict[Place, Kind | None] = {p: k if fate[p] == "whole" else None for p, k in history.items() if fate[p] != "lost"}
    whole = [place for place, kind in left.items() if kind is Kind.STATE]
    choice, read = walk(data.draw(st.permutations(list(left))), left)
    if whole:
        assert choice == Restore(
            max(whole), tuple(sorted((p for p, k in left.items() if k is None and p > max(whole)), reverse=True))
        )
        assert min(read) == max(whole)  # nothing older was read
    else:
        assert isinstance(choice, Refuse)


@given(histories())
def test_without_loss_the_newest_state_comes_back_and_little_is_read(history: History) -> None:
    states = [place for place, kind in history.items() if kind is Kind.STATE]
    choice, _ = walk(list(history), dict(history))
    assert choice == Restore(max(states), ()) if states else isinstance(choice, Refuse)


def test_a_refusal_says_what_is_wrong() -> None:
    a, b = Place(1, 1), Place(1, 2)
    assert choose([], {}) == Refuse("There is no backup.")
    refused = choose([a, b], {a: None, b: Kind.SEAL})
    assert isinstance(refused, Refuse)
    assert "1 cannot be opened, the newest of them 1/1" in refused.reason


@pytest.mark.parametrize(
    ("local", "places", "expected"),
    [
        (None, [], Fresh()),
        (None, [Place(1, 1)], UseStore()),
        (Local(None), [], UseLocal()),
        (Local(Place(1, 5)), [], UseLocal()),
        (Local(Place(1, 5)), [Place(1, 4), Place(1, 5)], UseLocal()),
        (Local(Place(1, 6)), [Place(1, 5)], UseLocal()),
        (Local(Place(1, 5)), [Place(1, 5), Place(1, 6)], UseStore()),
        (Local(Place(1, 5)), [Place(1, 5), Place(2, 1)], UseStore()),
        (Local(None), [Place(1, 1)], UseStore()),
        # Whether the put before the crash took effect is seen by its bytes.
        (Local(None, Place(1, 1)), [Place(1, 1)], CheckIntent(Place(1, 1))),
        (Local(Place(1, 5), Place(1, 6)), [Place(1, 5), Place(1, 6)], CheckIntent(Place(1, 6))),
        (Local(Place(1, 6)), [Place(1, 5), Place(1, 6)], UseLocal()),
        (Local(Place(1, 5), Place(1, 6)), [Place(1, 5)], UseLocal()),
        # Whatever became of our put, somebody else went on.
        (Local(Place(1, 5), Place(1, 6)), [Place(1, 6), Place(1, 7), Place(2, 1)], UseStore()),
    ],
)
def test_where_the_state_comes_from(local: Local | None, places: list[Place], expected: object) -> None:
    assert decide(local, places) == expected


@given(histories(), st.data())
def test_an_older_local_state_never_wins(history: History, data: st.DataObject) -> None:
    """A, then B, then A again: A's record is of its own last backup."""
    recorded = data.draw(st.sampled_from(sorted(history) or [Place(1, 1)]))
    decided = decide(Local(recorded), list(history))
    assert isinstance(decided, UseLocal) == (not history or recorded == max(history))


@given(histories(), st.integers(0, 20))
def test_a_new_epoch_is_above_all(history: History, known: int) -> None:
    epoch = next_epoch(history, known)
    assert epoch > known
    assert all(place.epoch < epoch for place in history)
    last = newest(history)
    assert (last is None) == (not history)
    assert last is None or last.following() not in history  # where a seal goes


# --- pruning ------------------------------------------------------------------------------------------------------------


@given(histories(), st.data(), st.integers(1, 4), st.integers(0, 5))
def test_pruning_keeps_what_it_must(history: History, data: st.DataObject, keep_last: int, keep_days: int) -> None:
    at = NOW
    modified: dict[Place, float] = {}
    for place in sorted(history, reverse=True):
        modified[place] = at
        at -= data.draw(st.sampled_from([60.0, DAY_S / 2, 2 * DAY_S]))
    gone = prune(modified, NOW, keep_last, keep_days)
    left = {place: kind for place, kind in history.items() if place not in gone}
    states = sorted(place for place, kind in history.items() if kind is Kind.STATE)
    assert all(history[place] is Kind.STATE for place in gone)
    if states:
        assert walk(list(left), dict(left))[0] == Restore(states[-1], ())
    ends_sealed = bool(history) and history[max(history)] is Kind.SEAL
    for place in states[len(states) - keep_last + ends_sealed :] if keep_last > ends_sealed else []:
        assert place in left
    for day in range(keep_days):
        of_day = [place for place in states if int(modified[place] // DAY_S) == int(NOW // DAY_S) - day]
        assert not of_day or max(of_day) in left
    # What is left stays: pruning twice takes nothing more.
    assert prune({p: modified[p] for p in left}, NOW, keep_last, keep_days) == []


def test_the_last_three_and_one_a_day_are_kept() -> None:
    """Two months with a backup each six hours."""
    modified = {Place(1, i + 1): NOW - (240 - 1 - i) * DAY_S / 4 for i in range(240)}
    left = sorted(set(modified) - set(prune(modified, NOW, 3, 31)), reverse=True)
    assert left[:3] == [Place(1, 240), Place(1, 239), Place(1, 238)]
    days = [int(modified[place] // DAY_S) for place in left]
    assert sorted(set(days)) == [int(NOW // DAY_S) - back for back in reversed(range(31))]
    assert len(left) == 33


def test_the_newest_state_stays_behind_a_seal() -> None:
    modified = {Place(1, 1): 1.0, Place(1, 2): 2.0, Place(1, 3): 3.0}  # 1/3 may be the seal of a restore that was cut off
    assert prune(modified, NOW, 1, 0) == [Place(1, 1)]


# --- names --------------------------------------------------------------------------------------------------------------

places = st.builds(Place, st.integers(1, MAX_NUMBER), st.integers(1, MAX_NUMBER))


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_@+=-]{0,63}", fullmatch=True), places)
def test_names_lead_back(session: str, place: Place) -> None:
    assert NAMES.parse(NAMES.backup(session, place)) == (session, place)
    assert NAMES.parse(NAMES.key(session)) == (session, None)
    assert Place.parse(str(place)) == place


@given(places, places)
def test_names_sort_as_places_do(a: Place, b: Place) -> None:
    assert (NAMES.backup("acme", a) < NAMES.backup("acme", b)) == (a < b)


@pytest.mark.parametrize(
    "name",
    [
        "warren/.key-check",
        "warren/acme",
        "warren/acme/key/more",
        "warren/acme/1/2",
        "warren/acme/0000000000/0000000001",
        "warren/acme/0000000001/0000000000",
        "warren/acme/0000000001/0000000001/x",
        "warren/acme/0000000001/0000000001#1",
        "other/acme/key",
        "warrenacme/key",
        "acme/key",
        "",
    ],
)
def test_what_else_lies_there_is_left_alone(name: str) -> None:
    assert NAMES.parse(name) is None
    assert NAMES.places("acme", [name]) == []


@pytest.mark.parametrize("text", ["", "1", "1/", "/1", "0/1", "1/0", "-1/2", "1/2/3", "a/b", "1/10000000000", "\u0663/\u0661"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="place"):
        Place.parse(text)


@pytest.mark.parametrize("session", ["", ".key-check", "a/b", "..", "a" * 65])
def test_only_sessions_have_names(session: str) -> None:
    with pytest.raises(ValueError, match="session id"):
        NAMES.session(session)
