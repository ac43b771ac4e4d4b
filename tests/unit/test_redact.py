from __future__ import annotations

import time
import uuid
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from warren.core.redact import HIDDEN, SECRET_FIELDS, redact, redact_fields

SERVERS = ["s.whatsapp.net", "lid", "g.us", "c.us", "hosted", "hosted.lid", "newsletter", "broadcast", "bot"]


def looks_like_a_timestamp(digits: str) -> bool:
    return len(digits) in (10, 13) and digits[0] == "1"


numbers = st.from_regex(r"[1-9][0-9]{7,14}", fullmatch=True).filter(lambda n: not looks_like_a_timestamp(n))
# What may stand around a number: anything but more digits, or letters that would make a hexadecimal id of it.
around = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def touches(before: str, after: str) -> bool:
    """Whether the texts would join the number between them to a longer word, or make part of a date or a decimal of it."""
    return before[-1:].isalnum() or after[:1].isalnum()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15551234567@s.whatsapp.net", "1555…67@s.whatsapp.net"),
        ("15551234567:3@s.whatsapp.net", "1555…67:3@s.whatsapp.net"),
        ("15551234567.0:12@s.whatsapp.net", "1555…67.0:12@s.whatsapp.net"),
        ("123456789012345@lid", "1234…45@lid"),
        ("120363000000000001@g.us", "1203…01@g.us"),
        ("15551234567-1600000000@g.us", "1555…67-1600000000@g.us"),
        ("15551234567-4915112345678@g.us", "1555…67-4915…78@g.us"),
        ("1234567@c.us", "…@c.us"),
        ("call +15551234567.", "call +1555…67."),
        ("call +1 (555) 123-4567 now", "call +1555…67 now"),
        ("+49 151 1234 5678", "+4915…78"),
        ("n=15551234567,", "n=1555…67,"),
        ("tel15551234567x", "tel1555…67x"),
        ("id_12345678_9", "id_1…78_9"),
        ("٩٦٦٥٠١٢٣٤٥٦٧", "٩٦٦٥…٦٧"),
        ("amqp://warren:s3cret@rabbit:5672/", "amqp://warren:***@rabbit:5672/"),
        ("amqps://u:p:q/@x@rabbit/", "amqps://u:***@rabbit/"),
        ("amqp://:s3cret@rabbit", "amqp://:***@rabbit"),
        ("amqp://a:s3@h1,amqp://b:s@4@h2", "amqp://a:***@h1,amqp://b:***@h2"),
        (f"amqp://:{'token.' * 500}@rabbit", "amqp://:***@rabbit"),
        (f"key {'0a' * 32}.", "key ***."),
        (f"key {'0A' * 40}", "key ***"),
        (f"key {'Ab1+' * 10}/9x=", "key ***"),
    ],
)
def test_what_is_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme went from CONNECTING to ONLINE in 1234567 ms",
        "2026-11-20T11:42:00.123456789Z",
        "2026-11-20 11:42:00.120",
        "1800000000",  # seconds
        "1800000000123",  # milliseconds
        "1800000000123456789",  # nanoseconds
        "3EB0C431C26A1916E07A",
        "3EB012345678901234567F",
        "1234567890abcdef",
        "550e8400-e29b-41d4-a716-446655440000",
        "amqp://rabbit:5672/",
        "127.0.0.1:5672",
        "warren.session.acme",
        "acme/7k2vqxyz7k2vqxyz7k2vqxyz22",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert redact(text) == text


@given(around, numbers, around)
def test_no_number_survives_in_any_text(before: str, number: str, after: str) -> None:
    assume(not touches(before, after))
    assume(number not in before + after)
    # `.` and `-` after a digit could make it part of a time; those are taken for what they look like.
    assume(not any(c.isdigit() for c in before + after))
    assert number not in redact(before + number + after)
    assert number not in redact(before + "+" + number + after)


@given(numbers, st.text(st.sampled_from(" .-()"), max_size=2).filter(lambda s: "." not in s[1:]))
def test_no_written_number_survives(number: str, gap: str) -> None:
    written = "+" + gap.join(number)
    left = [c for c in redact(f"call {written} now") if c.isdigit()]
    assert len(left) <= max(len(number) - 5, 0)


@given(
    around, st.from_regex(r"[0-9]{1,20}", fullmatch=True), st.sampled_from(["", ":3", ".0:12", "_1"]), st.sampled_from(SERVERS)
)
def test_no_jid_survives(before: str, user: str, device: str, server: str) -> None:
    # Behind a `+` it may be taken for a phone number, device and all, which hides more.
    assume(not before[-1:].isalnum() and not set(before) & {"@", "+"} and not any(c.isdigit() for c in before))
    text = redact(f"{before}{user}{device}@{server} and {user}{device}@{server}")
    assert f"{user}{device}@" not in text
    assert text.count(f"{device}@{server}") == 2
    # Five digits are gone, or all.
    kept = text.rsplit(" ", 1)[-1].removesuffix(f"{device}@{server}").replace("…", "")
    assert len(kept) <= max(len(user) - 5, 0)


@given(
    st.text(st.characters(exclude_characters=" \t\n\r\"'<>@", exclude_categories=["Z", "C"]), min_size=4, max_size=40).filter(
        lambda s: "://" not in s
    )
)
def test_no_password_survives(password: str) -> None:
    assert password not in redact(f"cannot connect to amqp://x:{password}@h/, giving up").replace(HIDDEN, "")


@given(st.from_regex(r"[0-9a-f]{64}|[0-9A-F]{64}", fullmatch=True))
def test_no_key_survives(key: str) -> None:
    assert redact(f"root key {key} refused") == "root key *** refused"


@given(st.uuids(), st.datetimes(), st.integers(0, 2**64))
def test_ids_and_times_survive(u: uuid.UUID, when: Any, number: int) -> None:
    assert str(u) in redact(f"id {u}.")
    assume(when.year >= 1000)
    assert when.isoformat(timespec="milliseconds") in redact(f"at {when.isoformat(timespec='milliseconds')}Z")
    message_id = f"3EB0{number:018X}"
    assert message_id in redact(f"message {message_id}: sent") or message_id.isdecimal()


@given(st.text())
def test_any_text_is_redacted_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "unit", ["1", "1-", "1@", "1.1:", "+1 ", "a://:", "a://x:@", "0a", "12345678a", "+", "2026-11-20T", "A" * 43]
)
def test_long_texts_take_linear_time(unit: str) -> None:
    text = (unit * 65_536)[:65_536]
    start = time.perf_counter()
    redact(text)
    assert time.perf_counter() - start < 0.5


# --- fields -----------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=9), values), st.sampled_from(sorted(SECRET_FIELDS)), numbers)
def test_secret_fields_and_numbers_are_hidden_however_deep(fields: dict[str, Any], name: str, number: str) -> None:
    assume(number not in repr(fields))
    for shape in ({name: "s3cret"}, {name.upper(): ["s3cret"]}, {"a": [{"b": {name: b"s3cret"}}]}, {"a": (f"to {number}",)}):
        shown = repr(redact_fields({**fields, "x": shape}))
        assert "s3cret" not in shown
        assert number not in shown


def test_fields_keep_what_is_no_text() -> None:
    fields = {"code": 401, "count": 15551234567, "ratio": 0.5, "paired": True, "jid": None, "data": b"12345678901", "l": (1, "a")}
    assert redact_fields(fields) == {**fields, "data": "<11 bytes>", "l": [1, "a"]}


def test_objects_are_shown_as_redacted_text() -> None:
    class Thing:
        def __str__(self) -> str:
            return "thing of 15551234567"

    assert redact_fields({"e": ValueError("for 15551234567"), "t": Thing(), "key": Thing()}) == {
        "e": "for 1555…67",
        "t": "thing of 1555…67",
        "key": HIDDEN,
    }


def test_the_session_is_the_operators_own_word() -> None:
    assert redact_fields({"session": "15551234567"}) == {"session": "15551234567"}


def test_circles_end() -> None:
    circle: dict[str, Any] = {}
    circle["again"] = circle
    assert HIDDEN in repr(redact_fields(circle))
