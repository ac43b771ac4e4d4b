"""docs/guarantees.md names tests that exist, and bounds that are those of the backoff."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tests.faults.bounds import attempts_within

from warren.edges.amqp_link import BusOptions
from warren.services.session import SessionOptions

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))


def test_every_promise_names_its_proof() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and line.endswith("` |")]
    assert len(rows) > 15
    promised = TEXT.split("## How many connections", maxsplit=1)[0]
    told = [line for line in promised.splitlines() if line.startswith("| ") and "| proved by |" not in line]
    assert told == [line for line in told if re.search(r"`tests/[\w/]+\.py::\w+` \|$", line)]


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_the_bounds_are_those_of_the_backoff() -> None:
    session, bus = SessionOptions(), BusOptions(url="amqp://localhost/", topology=None, instance="i")  # type: ignore[arg-type]
    for who, base_s, cap_s in (
        ("a session, to WhatsApp", session.reconnect_base_s, session.reconnect_cap_s),
        ("the daemon, to RabbitMQ", bus.backoff_base_s, bus.backoff_cap_s),
    ):
        first = attempts_within(60, base_s=base_s, cap_s=cap_s)
        later = max(
            attempts_within(s + 60, base_s=base_s, cap_s=cap_s) - attempts_within(s, base_s=base_s, cap_s=cap_s)
            for s in range(60, 3600)
        )
        assert re.search(rf"^\| {who} .*\| {first} \| {later} \|$", TEXT, re.MULTILINE), (who, first, later)
