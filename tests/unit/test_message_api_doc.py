"""docs/message-api.md is what people build on: its examples must be real, and its tables complete."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from warren.core import events
from warren.core.envelope import COMMANDS, EPHEMERAL, MAX_BODY_BYTES, MAX_TEXT_CHARS, Origin, Outcome, decode_command
from warren.core.frames import EngineEvent
from warren.core.machine import CAUSES, TABLE, State
from warren.core.names import SESSION_ID, Topology

DOC = (Path(__file__).parents[2] / "docs" / "message-api.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)
EXAMPLES: list[dict[str, Any]] = [json.loads(text) for language, text in BLOCKS if language == "json"]
COMMAND_EXAMPLES = [e for e in EXAMPLES if "command" in e and "ok" not in e]


def section(title: str) -> str:
    match = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^## |\Z)", DOC, re.DOTALL | re.MULTILINE)
    assert match is not None, title
    return match.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row whose first cell is code."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| `")]


def names(text: str, width: int) -> set[str]:
    return {row[0].strip("`") for row in rows(text) if len(row) == width}


def test_there_are_examples_and_all_blocks_have_a_language() -> None:
    assert len(EXAMPLES) >= 12
    assert {language for language, _ in BLOCKS} == {"json", "python"}


@pytest.mark.parametrize("example", COMMAND_EXAMPLES, ids=lambda e: e["command"])
def test_command_examples_are_understood(example: dict[str, Any]) -> None:
    exchange = COMMANDS[example["command"]].exchange
    command = decode_command(orjson.dumps(example), Origin(exchange, example.get("session", "")))
    assert command.name == example["command"]


def test_every_command_has_an_example_and_a_row_that_is_right() -> None:
    assert {e["command"] for e in COMMAND_EXAMPLES} == set(COMMANDS)
    table = {row[0].strip("`"): row for row in rows(section("Commands")) if len(row) == 5}
    assert set(table) == set(COMMANDS)
    for name, spec in COMMANDS.items():
        _, exchange, id_cell, args, _ = (cell.strip("`") for cell in table[name])
        assert exchange == f"warren.{spec.exchange}"
        assert (id_cell == "required") == spec.effect
        assert all(f"`{field}" in table[name][3] for field in spec.args.model_fields), args


def test_outcome_examples_are_outcomes() -> None:
    outcomes = [Outcome.parse(orjson.dumps(e)) for e in EXAMPLES if "ok" in e]
    assert {o.ok for o in outcomes} == {True, False}


def test_the_event_table_is_complete() -> None:
    documented = names(section("Events"), 3) - {"#", "acme.*", "*.message"}
    of_machine = {s.event for s in TABLE.values() if s.event}
    of_design = {
        *("qr", "pairing_code", "connected", "disconnected", "reconnecting", "reconnect_failed", "logout", "message", "receipt"),
        *("command_completed", "command_failed", "health_check_failed", "backup_failed", "error"),
    }
    assert documented == of_design
    assert of_machine <= documented
    ephemeral = {row[0].strip("`") for row in rows(section("Events")) if row[-1] == "ephemeral"}
    assert ephemeral == EPHEMERAL


FRAMES = {
    "message": {"chat": "c", "sender": "s", "from_me": False, "message_id": "m", "kind": "text", "timestamp": "t"},
    "receipt": {"chat": "c", "sender": "s", "from_me": False, "message_ids": ["m"], "type": "read", "timestamp": "t"},
    "undecryptable": {"chat": "c", "sender": "s", "message_id": "m", "timestamp": "t"},
}


@pytest.mark.parametrize("kind", sorted(events.ANSWERED))
def test_examples_of_inbound_events_have_the_fields_that_are_published(kind: str) -> None:
    published = events.inbound(EngineEvent(kind, "acme", 1, FRAMES[kind])).data
    datas = [e.get("data", e) for e in EXAMPLES]
    assert any(set(data) == set(published) for data in datas), sorted(published)


def test_every_state_is_named() -> None:
    text = section("States")
    assert all(f"`{state.value}`" in text for state in State)


def test_the_status_example_and_its_table_agree() -> None:
    example = next(e for e in EXAMPLES if "desired" in e)
    told = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in rows(section("Status").split("\n### ")[0]))))
    assert set(example) - {"session", "epoch", "last_message_at"} == told


def test_every_error_code_in_the_source_is_in_the_table() -> None:
    documented = names(section("Errors"), 4)
    package = Path(events.__file__).parents[1]
    source = "\n".join(p.read_text() for p in package.rglob("*.py") if not p.name.startswith(("cli", "http")))
    raised = set(re.findall(r"\b(?:CommandError|SendFailure|unreadable)\(\s*\"([a-z_]+)\"", source))
    assert {"id_conflict", "expired", "restricted", "too_large"} <= raised
    assert raised <= documented
    kinds = {row[1] for row in rows(section("Errors"))}
    assert kinds == {"refused", "final", "retry"}


def test_every_state_that_needs_somebody_has_a_row() -> None:
    """With a code that explains it."""
    told = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows(section("States"))}
    assert set(told) == {"time_locked", "blocked", "outdated", "replaced", "logged_out", "quarantined"}
    assert set().union(*told.values()) <= set(CAUSES)


def test_what_is_final_is_said_of_failed_sends() -> None:
    kinds = {row[0].strip("`"): row[1] for row in rows(section("Errors"))}
    for code in ("invalid_recipient", "recipient_not_found", "recipient_unreachable", "restricted", "rate_limited", "rejected"):
        failure = events.send_failure(code, "", None)
        assert kinds[failure.code] == ("final" if failure.final else "retry")


def test_limits_and_names_are_the_real_ones() -> None:
    assert f"{MAX_BODY_BYTES:,}" in DOC
    assert f"{MAX_TEXT_CHARS:,}" in DOC
    assert f"^{SESSION_ID.pattern}$" in DOC
    t = Topology("warren")
    for name in (t.control, t.commands, t.queries, t.events, t.tap, t.unrouted, t.dead, t.work_queue("<id>")):
        assert f"`{name}`" in DOC


def test_the_python_example_is_python() -> None:
    (code,) = [text for language, text in BLOCKS if language == "python"]
    ast.parse(code)


def test_links_inside_the_page_lead_somewhere() -> None:
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", DOC, re.MULTILINE)}
    assert set(re.findall(r"\(#([\w-]+)\)", DOC)) <= headings
