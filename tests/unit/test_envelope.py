from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warren.core.envelope import (
    COMMANDS,
    MAX_BODY_BYTES,
    Command,
    CreateArgs,
    Origin,
    Outcome,
    Rejected,
    SendArgs,
    cloud_event,
    decode_command,
    outcome_event_id,
    timestamp,
)
from warren.core.names import NO_SESSION, Topology
from warren.errors import CommandError

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SEND: dict[str, Any] = {
    "command": "send",
    "session": "acme",
    "id": "order-4711",
    "args": {"to": "+15551234567", "text": "Shipped."},
}
MINIMAL: dict[str, dict[str, Any]] = {name: {"to": "+15551234567", "text": "hi"} if name == "send" else {} for name in COMMANDS}


def origin(command: str = "send", key: str = "acme", message_id: str | None = None) -> Origin:
    return Origin(COMMANDS[command].exchange, key, message_id)


def decode(command: dict[str, Any], where: Origin | None = None) -> Command:
    return decode_command(orjson.dumps(command), where or origin())


def rejection(command: object, where: Origin | None = None) -> Rejected:
    body = command if isinstance(command, bytes) else orjson.dumps(command)
    with pytest.raises(Rejected) as caught:
        decode_command(body, where or origin())
    return caught.value


# --- what is understood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_in_its_smallest_form(name: str) -> None:
    key = "" if name == "list" else "acme"
    command = decode({"command": name, "session": "acme", "id": "1", "args": MINIMAL[name]}, origin(name, key))
    assert (command.name, command.session, command.id) == (name, key, "1")
    assert isinstance(command.args, COMMANDS[name].args)


def test_the_example_of_the_design() -> None:
    command = decode({**SEND, "expires_at": "2026-11-20T12:00:00Z"})
    assert isinstance(command.args, SendArgs)
    assert command.args.jid == "15551234567@s.whatsapp.net"
    assert command.expires_at == NOW


@pytest.mark.parametrize("to", ["15551234567@s.whatsapp.net", "987654321@lid", "12345-678@g.us", "120363012345678901@g.us"])
def test_a_jid_is_taken_as_it_is(to: str) -> None:
    assert SendArgs(to=to, text="x").jid == to


def test_create_takes_a_device_name() -> None:
    command = decode({"command": "create", "session": "acme", "id": "1", "args": {"device_name": "Shop"}}, origin("create"))
    assert command.args == CreateArgs(device_name="Shop")


def test_args_may_be_left_out() -> None:
    assert decode({"command": "disconnect", "session": "acme", "id": "1"}, origin("disconnect")).name == "disconnect"


def test_the_id_may_be_in_the_message_property() -> None:
    without = {k: v for k, v in SEND.items() if k != "id"}
    assert decode(without, origin(message_id="from-property")).id == "from-property"
    assert decode(SEND, origin(message_id="order-4711")).id == "order-4711"


def test_queries_need_no_id_and_no_session() -> None:
    assert decode({"command": "list"}, origin("list", "")).session == ""
    assert decode({"command": "status", "session": "acme"}, origin("status")).id is None


def test_the_deadline_is_the_first_moment_that_is_too_late() -> None:
    command = decode({**SEND, "expires_at": "2026-11-20T13:00:00+01:00"})
    assert not command.expired(NOW - timedelta(milliseconds=1))
    assert command.expired(NOW)
    assert not decode(SEND).expired(NOW)


def test_a_fingerprint_ignores_how_the_same_arguments_were_written() -> None:
    reordered = b'{"args": {"text": "Shipped.", "to": "+15551234567"}, "id": "x", "session": "acme", "command": "send"}'
    assert decode_command(reordered, origin()).fingerprint == decode(SEND).fingerprint
    assert decode({**SEND, "args": {**SEND["args"], "text": "Sent."}}).fingerprint != decode(SEND).fingerprint
    explicit = decode({"command": "create", "session": "acme", "id": "1", "args": {"device_name": None}}, origin("create"))
    assert explicit.fingerprint == decode({"command": "create", "session": "acme", "id": "1"}, origin("create")).fingerprint


# --- what is rejected -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[]", b"7", b"null", b'"send"', b'{"a": "\\ud800"}', b"[" * 10_000])
def test_not_a_json_object(body: bytes) -> None:
    rejected = rejection(body, origin(message_id="m-1"))
    assert (rejected.reason, rejected.undecodable) == ("invalid_json", True)
    assert (rejected.session, rejected.command_id) == ("acme", "m-1"), "routing key and property still address the outcome"
    assert rejection(body, origin(key="no session!")).session == NO_SESSION


def test_too_large() -> None:
    assert rejection(b" " * (MAX_BODY_BYTES + 1)).reason == "too_large"
    assert rejection(b" " * MAX_BODY_BYTES).reason == "invalid_json"


@pytest.mark.parametrize(
    ("change", "code", "about"),
    [
        ({"command": None}, "invalid_command", "`command`"),
        ({"command": 7}, "invalid_command", "`command`"),
        ({"command": "dance"}, "unknown_command", "`dance`"),
        ({"command": "create"}, "wrong_exchange", "control|commands"),
        ({"session": None}, "invalid_session", "no session"),
        ({"session": "a.b"}, "invalid_session", "no session id"),
        ({"session": 7}, "invalid_command", "`session`"),
        ({"session": "other"}, "invalid_session", "routing key"),
        ({"id": None}, "id_required", "needs an id"),
        ({"id": ""}, "invalid_command", "`id`"),
        ({"id": "x" * 201}, "invalid_command", "`id`"),
        ({"id": 4711}, "invalid_command", "`id`"),
        ({"expires_at": "tomorrow"}, "invalid_command", "`expires_at`"),
        ({"expires_at": "2026-11-20T12:00:00"}, "invalid_command", "`expires_at`"),
        ({"expires_at": 1_800_000_000}, "invalid_command", "`expires_at`"),
        ({"args": []}, "invalid_command", "`args`"),
        ({"arg": {}}, "invalid_command", "no field `arg`"),
        ({"args": {}}, "invalid_argument", "`to`"),
        ({"args": {"to": "+15551234567"}}, "invalid_argument", "`text`"),
        ({"args": {"to": "+15551234567", "text": ""}}, "invalid_argument", "`text`"),
        ({"args": {"to": "+15551234567", "text": 7}}, "invalid_argument", "`text`"),
        ({"args": {"to": "+15551234567", "text": "x" * 65_537}}, "invalid_argument", "`text`"),
        ({"args": {"to": "+15551234567", "text": "x", "txt": "y"}}, "invalid_argument", "no field `txt`"),
        ({"args": {"to": "15551234567", "text": "x"}}, "invalid_argument", "phone number"),
        ({"args": {"to": "+15551234567\n", "text": "x"}}, "invalid_argument", "phone number"),
        ({"args": {"to": "1:2@s.whatsapp.net", "text": "x"}}, "invalid_argument", "phone number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(change: dict[str, Any], code: str, about: str) -> None:
    with pytest.raises(Rejected, match=about) as caught:
        decode({k: v for k, v in {**SEND, **change}.items() if v is not None})
    assert caught.value.reason == code
    assert not caught.value.undecodable


def test_an_unknown_field_is_named_before_what_it_explains() -> None:
    assert "`texts`" in rejection({**SEND, "args": {"to": "+15551234567", "texts": "x"}}).message


def test_the_id_in_the_body_wins_over_the_property() -> None:
    assert decode_command(orjson.dumps(SEND), origin(message_id="random")).id == SEND["id"]


def test_an_id_property_has_the_same_bounds() -> None:
    without = {k: v for k, v in SEND.items() if k != "id"}
    assert rejection(without, origin(message_id="x" * 201)).reason == "invalid_command"
    assert rejection(without, origin(message_id="")).reason == "invalid_command"


def test_a_rejection_keeps_whom_to_answer() -> None:
    rejected = rejection({**SEND, "args": {}})
    assert (rejected.session, rejected.command_id) == ("acme", "order-4711")
    assert rejection({**SEND, "session": "a/b"}).session == NO_SESSION


# --- whatever comes, an answer ----------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
FIELDS = st.sampled_from(["command", "session", "id", "expires_at", "args", "to", "text", "device_name", "x"])
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=6), max_leaves=12
)
ORIGINS = st.builds(
    Origin,
    st.sampled_from(["control", "commands", "queries", "?"]),
    st.sampled_from(["acme", "", "a.b"]) | st.text(max_size=10),
    st.none() | st.sampled_from(["", "1"]) | st.text(max_size=10),
)
ALMOST = st.fixed_dictionaries(
    {"command": st.sampled_from([*COMMANDS]) | ANY_JSON, "session": st.just("acme") | ANY_JSON},
    optional={
        "id": st.text(max_size=3) | ANY_JSON,
        "expires_at": st.datetimes(timezones=st.timezones() | st.none()).map(str) | st.text(max_size=30) | ANY_JSON,
        "args": st.fixed_dictionaries(
            {}, optional={"to": st.just("+15551234567") | ANY_JSON, "text": ANY_JSON, "device_name": ANY_JSON}
        )
        | ANY_JSON,
    },
)


def answered(body: bytes, where: Origin) -> None:
    """The one property of the way in: a Command or a Rejected, never anything else."""
    command, rejected = None, None
    try:
        command = decode_command(body, where)
    except Rejected as e:
        rejected = e
    if command is not None:
        assert command.name in COMMANDS
        assert command.id is not None or not COMMANDS[command.name].effect
        command.expired(NOW)
    if rejected is not None:
        assert rejected.reason
        assert rejected.message
        assert rejected.session == NO_SESSION or rejected.session.isascii()


@given(st.binary(max_size=300), ORIGINS)
def test_arbitrary_bytes(body: bytes, where: Origin) -> None:
    answered(body, where)


@given(ANY_JSON, ORIGINS)
def test_arbitrary_json(value: object, where: Origin) -> None:
    answered(orjson.dumps(value), where)


@given(ALMOST, ORIGINS)
def test_almost_commands(value: dict[str, Any], where: Origin) -> None:
    answered(orjson.dumps(value), where)


@given(
    st.text(min_size=1, max_size=200),
    st.text(min_size=1, max_size=500),
    st.integers(10**6, 10**15 - 1),
    st.none() | st.datetimes(timezones=st.just(UTC) | st.just(timezone(timedelta(hours=5, minutes=30)))),
)
def test_a_send_arrives_as_it_was_written(command_id: str, text: str, number: int, expires_at: datetime | None) -> None:
    raw = {"command": "send", "session": "acme", "id": command_id, "args": {"to": f"+{number}", "text": text}}
    command = decode(raw if expires_at is None else {**raw, "expires_at": expires_at.isoformat()})
    assert command.id == command_id
    assert command.args == SendArgs(to=f"+{number}", text=text)
    assert command.expires_at == expires_at


# --- outcomes ---------------------------------------------------------------------------------------------------------


def test_bodies_of_outcomes() -> None:
    good = Outcome("send", "order-4711", {"message_id": "3EB0"})
    assert good.event == "command_completed"
    assert good.body() == {"id": "order-4711", "command": "send", "ok": True, "result": {"message_id": "3EB0"}}
    error = CommandError("rate_limited", "Too fast.", hint="Wait.", final=False, retry_after=12.3)
    bad = Outcome.failed("send", "order-4711", error)
    assert bad.event == "command_failed"
    assert bad.body() == {
        "id": "order-4711",
        "command": "send",
        "ok": False,
        "error": {"code": "rate_limited", "message": "Too fast.", "hint": "Wait.", "retry_after": 12.3},
    }
    assert "retry_after" not in Outcome.failed("send", "1", CommandError("expired", "Late.")).body()["error"]


@given(
    st.sampled_from([*COMMANDS]),
    st.none() | st.text(max_size=20),
    st.dictionaries(st.text(max_size=5), SCALARS, max_size=3),
    st.booleans(),
)
def test_outcomes_come_back_as_stored(command: str, command_id: str | None, told: dict[str, Any], ok: bool) -> None:
    told = orjson.loads(orjson.dumps(told))
    outcome = Outcome(command, command_id, result=told) if ok else Outcome(command, command_id, error=told)
    assert Outcome.parse(orjson.dumps(outcome.body())) == outcome


@given(st.binary(max_size=60) | ANY_JSON.map(orjson.dumps) | ALMOST.map(orjson.dumps))
def test_what_is_no_outcome_is_a_value_error(body: bytes) -> None:
    try:
        outcome = Outcome.parse(body)
    except ValueError:
        return
    assert isinstance(outcome.command, str)


def test_an_outcome_event_has_the_same_id_each_time_and_another_per_outcome() -> None:
    good, bad = Outcome("send", "1"), Outcome.failed("send", "1", CommandError("expired", "Late."))
    ids = [outcome_event_id("acme", o, f) for o in (good, bad) for f in ("f1", "f2")]
    assert len(set(ids)) == 4
    assert ids == [outcome_event_id("acme", o, f) for o in (good, bad) for f in ("f1", "f2")]
    assert outcome_event_id("other", good, "f1") not in ids


# --- events -----------------------------------------------------------------------------------------------------------


def event(**more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "event": "message",
        "event_id": "acme/7k2v",
        "session": "acme",
        "instance": "host-1",
        "time": NOW,
        "data": {"text": "hi"},
    }
    decoded = orjson.loads(cloud_event(Topology("warren"), **{**base, **more}))
    assert isinstance(decoded, dict)
    return decoded


def test_an_event_is_a_cloudevent() -> None:
    assert event(epoch=3, sequence=1234, causation_id="order-4711") == {
        "specversion": "1.0",
        "id": "acme/7k2v",
        "source": "/warren/warren",
        "type": "warren.message",
        "subject": "acme",
        "time": "2026-11-20T12:00:00.000Z",
        "datacontenttype": "application/json",
        "session": "acme",
        "instance": "host-1",
        "epoch": 3,
        "sequence": "0000001234",
        "causationid": "order-4711",
        "data": {"text": "hi"},
    }


def test_an_ephemeral_event_has_no_place_in_the_order() -> None:
    assert not {"sequence", "epoch", "causationid"} & set(event(event="qr"))


@given(st.integers(0, 10**10 - 2))
def test_sequences_sort_as_strings(sequence: int) -> None:
    assert event(sequence=sequence)["sequence"] < event(sequence=sequence + 1)["sequence"]


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.timezones()))  # noqa: DTZ001
def test_timestamps_are_utc_in_milliseconds(time: datetime) -> None:
    text = timestamp(time)
    assert len(text) == len("2026-11-20T12:00:00.000Z")
    assert timedelta(0) <= time - datetime.fromisoformat(text) < timedelta(milliseconds=1)
