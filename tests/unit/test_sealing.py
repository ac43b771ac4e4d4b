"""Sealing: what is sealed opens only whole, unchanged and under its own name."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warren.core import sealing
from warren.core.backup_names import KEY_CHECK, Place
from warren.core.sealing import (
    Keyring,
    Kind,
    MasterKey,
    Position,
    kind_of,
    master_key_id,
    new_data_key,
    open_sealed,
    seal_end,
    seal_state,
    unwrap,
    wrap,
)
from warren.errors import SealError, StorageKeyError

KEY = new_data_key()
OLD, NEW = MasterKey(os.urandom(32)), MasterKey(os.urandom(32))
HERE = Position("acme", Place(3, 17))

places = st.builds(Place, st.integers(1, 9_999_999_999), st.integers(1, 9_999_999_999))
sessions = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_@+=-]{0,63}", fullmatch=True)
positions = st.builds(Position, sessions, places)


@given(positions, st.binary(max_size=500), st.binary(max_size=5_000))
def test_what_is_sealed_opens(position: Position, record: bytes, database: bytes) -> None:
    state = open_sealed(KEY, position, seal_state(KEY, position, record, database))
    end = open_sealed(KEY, position, seal_end(KEY, position, record))
    assert (state.kind, state.record, state.database) == (Kind.STATE, record, database)
    assert (end.kind, end.record, end.database) == (Kind.SEAL, record, b"")


@pytest.mark.parametrize("sealed", [seal_state(KEY, HERE, b'{"a":1}', b"database"), seal_end(KEY, HERE, b'{"next_epoch":4}')])
def test_any_flipped_bit_is_found(sealed: bytes) -> None:
    for bit in range(len(sealed) * 8):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealError, match="acme 3/17"):
            open_sealed(KEY, HERE, bytes(damaged))


def test_any_cut_or_addition_is_found() -> None:
    sealed = seal_state(KEY, HERE, b"{}", b"database" * 20)
    for length in range(len(sealed)):
        with pytest.raises(SealError):
            open_sealed(KEY, HERE, sealed[:length])
    for more in (b"\0", sealed):
        with pytest.raises(SealError):
            open_sealed(KEY, HERE, sealed + more)


@given(positions, positions, st.binary(max_size=100))
def test_an_object_under_another_name_does_not_open(sealed_for: Position, found_at: Position, database: bytes) -> None:
    """Swapped, renamed, or an old one replayed under a newer number."""
    sealed = seal_state(KEY, sealed_for, b"{}", database)
    if sealed_for == found_at:
        assert open_sealed(KEY, found_at, sealed).database == database
    else:
        with pytest.raises(SealError):
            open_sealed(KEY, found_at, sealed)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # The same characters in a row, divided otherwise.
        (Position("acme1", Place(1, 1)), Position("acme", Place(1, 1))),
        (Position("a", Place(1, 23)), Position("a", Place(12, 3))),
    ],
)
def test_names_that_run_together_stay_apart(one: Position, other: Position) -> None:
    with pytest.raises(SealError):
        open_sealed(KEY, other, seal_state(KEY, one, b"{}", b"x"))


def test_another_session_key_does_not_open() -> None:
    sealed = seal_state(KEY, HERE, b"{}", b"x")
    with pytest.raises(SealError, match="another key"):
        open_sealed(new_data_key(), HERE, sealed)
    with pytest.raises(SealError, match="damaged"):
        open_sealed(replace(KEY, secret=os.urandom(32)), HERE, sealed)


def test_a_state_cannot_pass_for_a_seal() -> None:
    sealed = bytearray(seal_state(KEY, HERE, b"{}", b"x"))
    assert kind_of(HERE, bytes(sealed)) is Kind.STATE
    sealed[7] = Kind.SEAL.value
    assert kind_of(HERE, bytes(sealed)) is Kind.SEAL  # only what it claims
    with pytest.raises(SealError):
        open_sealed(KEY, HERE, bytes(sealed))


@pytest.mark.parametrize(("at", "value"), [(6, 2), (7, 3), (7, 0)])
def test_a_newer_format_is_said_to_be_one(at: int, value: int) -> None:
    sealed = bytearray(seal_state(KEY, HERE, b"{}", b"x"))
    sealed[at] = value
    with pytest.raises(SealError, match="does not read") as told:
        open_sealed(KEY, HERE, bytes(sealed))
    assert "upgrade" in told.value.hint


@given(st.binary(max_size=200))
def test_any_bytes_are_answered_with_an_error(blob: bytes) -> None:
    for attempt in (blob, b"WARREN\x01\x01" + blob):
        with pytest.raises(SealError):
            open_sealed(KEY, HERE, attempt)
    for attempt in (blob, b"WARKEY\x01\x00" + blob):
        with pytest.raises(SealError):
            unwrap(Keyring(NEW), "acme", attempt)


def test_sizes_are_bounded_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    large = seal_state(KEY, HERE, b"{}", bytes(2_000))
    monkeypatch.setattr(sealing, "MAX_CONTENT_BYTES", 1_000)
    with pytest.raises(SealError, match="claims to hold"):
        open_sealed(KEY, HERE, large)
    with pytest.raises(SealError, match="too large"):
        seal_state(KEY, HERE, b"{}", bytes(2_000))


def test_nothing_of_the_content_shows() -> None:
    secrets = [b"+15551234567", b"see you at eight", b"15551234567@s.whatsapp.net", bytes(range(64))]
    record, database = b"|".join(secrets), b"".join(secrets) * 10
    blobs = [seal_state(KEY, HERE, record, database), seal_end(KEY, HERE, record), wrap(Keyring(NEW), "acme", KEY)]
    for blob in blobs:
        for secret in (*secrets, KEY.secret, NEW.secret):
            assert all(secret[at : at + 6] not in blob for at in range(len(secret) - 5))


def test_the_same_state_sealed_twice_differs() -> None:
    """Each has a nonce of its own: two under one nonce would give both away."""
    assert len({seal_state(KEY, HERE, b"{}", b"x")[24:36] for _ in range(100)}) == 100


# --- keys -------------------------------------------------------------------------------------------------------------


@given(sessions)
def test_a_wrapped_key_opens(session: str) -> None:
    blob = wrap(Keyring(NEW), session, KEY)
    assert unwrap(Keyring(NEW), session, blob) == KEY
    assert master_key_id(session, blob) == NEW.id


def test_a_key_of_another_session_does_not_open() -> None:
    blob = wrap(Keyring(NEW), "acme", KEY)
    with pytest.raises(SealError, match="another session"):
        unwrap(Keyring(NEW), "other", blob)
    with pytest.raises(SealError, match="another session"):
        unwrap(Keyring(NEW), KEY_CHECK, blob)


def test_any_flipped_bit_of_a_wrapped_key_is_found() -> None:
    blob = wrap(Keyring(NEW), "acme", KEY)
    for bit in range(len(blob) * 8):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealError):
            unwrap(Keyring(NEW), "acme", bytes(damaged))
    for length in range(len(blob)):
        with pytest.raises(SealError):
            unwrap(Keyring(NEW), "acme", blob[:length])


def test_a_wrong_master_key_is_told_apart_from_damage() -> None:
    blob = wrap(Keyring(OLD), "acme", KEY)
    with pytest.raises(StorageKeyError, match=OLD.id.hex()[:8]) as told:
        unwrap(Keyring(NEW), "acme", blob)
    assert "old_keys" in told.value.hint


def test_old_keys_read_and_the_new_one_writes() -> None:
    both = Keyring(NEW, (OLD,))
    old = wrap(Keyring(OLD), "acme", KEY)
    assert unwrap(both, "acme", old) == KEY
    again = wrap(both, "acme", unwrap(both, "acme", old))
    assert unwrap(Keyring(NEW), "acme", again) == KEY
    with pytest.raises(StorageKeyError):
        unwrap(Keyring(OLD), "acme", again)


def test_a_new_master_key_does_not_change_the_objects() -> None:
    sealed = seal_state(KEY, HERE, b"{}", b"x")
    both = Keyring(NEW, (OLD,))
    rewrapped = wrap(both, "acme", unwrap(both, "acme", wrap(Keyring(OLD), "acme", KEY)))
    assert open_sealed(unwrap(Keyring(NEW), "acme", rewrapped), HERE, sealed).database == b"x"


@pytest.mark.parametrize("text", ["", "ab" * 31, "ab" * 33, "zz" * 32, "00" * 32, "0123" * 16, " " + "ab" * 32])
def test_what_is_no_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match="key") as told:
        MasterKey.from_hex(text)
    assert not text.strip() or text not in str(told.value)


def test_keys_do_not_show() -> None:
    assert MasterKey.from_hex(NEW.secret.hex()) == NEW
    for shown in (repr(NEW), repr(Keyring(NEW, (OLD,))), repr(KEY)):
        assert repr(NEW.secret) not in shown
        assert repr(OLD.secret) not in shown
        assert repr(KEY.secret) not in shown
