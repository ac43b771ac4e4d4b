from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from warren.cli_text import account, event_line, outcome_text, sessions_table
from warren.core.envelope import COMMANDS, Outcome

STATUS: dict[str, Any] = {
    "session": "acme",
    "state": "blocked",
    "since": "2030-11-20T11:42:00.120Z",
    "code": "temporary_ban",
    "message": "Banned.",
    "hint": "Wait.",
    "until": "2030-11-21T00:00:00.000Z",
    "jid": "15550001:2@s.whatsapp.net",
    "lid": None,
    "push_name": "Ana",
    "epoch": 1,
    "attempt": 3,
    "last_message_at": None,
    "outbox": 12,
    "qr": None,
    "instance": "host-1",
}


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"list"}))
def test_every_command_has_words_for_any_result(command: str) -> None:
    assert outcome_text("acme", Outcome(command, "1", {})).startswith("acme: ")


def test_a_status_says_what_is_known_and_nothing_else() -> None:
    assert outcome_text("acme", Outcome("status", None, STATUS)).splitlines() == [
        "acme: blocked since 2030-11-20T11:42:00.120Z",
        "  account      +15550001 (Ana)",
        "  reason       Banned. (temporary_ban)",
        "  to do        Wait.",
        "  until        2030-11-21T00:00:00.000Z",
        "  attempt      3",
        "  outbox       12 events wait for RabbitMQ",
    ]


def test_a_number_stands_for_an_account_without_a_name() -> None:
    assert account({"jid": "15550001:2@s.whatsapp.net", "push_name": ""}) == "+15550001"


def test_columns_stand_below_each_other() -> None:
    lines = sessions_table([STATUS, {**STATUS, "session": "a-much-longer-name", "jid": None, "code": None}])
    assert len({line.index(word) for line, word in zip(lines, ("STATE", "blocked", "blocked"), strict=True)}) == 1
    assert lines[2].endswith("host-1    -")


DATAS = {
    "message": {"chat": "1@g.us", "from": "2:3@lid", "kind": "other", "type": "image", "text": None, "push_name": "Ana"},
    "receipt": {"type": "read", "from": "2@lid", "message_ids": ["3EB0", "3EB1"]},
    "connected": {"state": "online", "previous": "connecting", "jid": "15550001:2@s.whatsapp.net", "push_name": "Ana"},
    "disconnected": {"state": "backing_off", "previous": "online", "message": "Lost.", "retry_in_s": 4.2},
    "command_completed": {"command": "send", "id": "order-1"},
    "command_failed": {"command": "", "id": None, "error": {"code": "invalid_json", "message": "No."}},
    "qr": {"code": "2@x", "expires_at": "soon", "remaining": 5},
    "error": {"code": "undecryptable", "message": "Cannot be read."},
}
LINES = {
    "message": "Ana 2:3@lid in 1@g.us: [image]",
    "receipt": "read by 2@lid: 3EB0, 3EB1",
    "connected": "as +15550001 (Ana)",
    "disconnected": "online -> backing_off: Lost. Next try in 4.2 s.",
    "command_completed": "send order-1",
    "command_failed": "invalid_json: No.",
    "qr": "a code to scan until soon, 5 more",
    "error": "undecryptable: Cannot be read.",
}


@pytest.mark.parametrize("name", sorted(DATAS))
def test_an_event_is_one_line(name: str) -> None:
    now = datetime.now(UTC)
    line = event_line({"type": f"warren.{name}", "time": now.isoformat(), "session": "acme", "data": DATAS[name]})
    clock, session, event, gist = line.split(maxsplit=3)
    assert (clock, session, event) == (now.astimezone().strftime("%H:%M:%S"), "acme", name)
    assert gist == LINES[name]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 100) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@example("command_failed", {"error": "no object"})
@given(
    st.sampled_from(sorted(DATAS)) | st.text(max_size=8),
    st.dictionaries(st.sampled_from(["text", "kind", "from", "error", "jid", "id"]), JSON),
)
def test_no_event_is_too_strange_to_show(name: str, data: dict[str, Any]) -> None:
    assert event_line({"type": f"warren.{name}", "time": "2030-11-20T11:42:00.120Z", "session": "acme", "data": data})
    assert event_line({"type": name, "data": data})
