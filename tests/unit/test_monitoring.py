"""Alert rules, dashboard and handbook name metrics that exist, and each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.test_health import World

from warren.core.envelope import Outcome
from warren.core.machine import State
from warren.core.metrics import Family
from warren.edges.http_metrics import Exposition

DOCS = Path(__file__).parents[2] / "docs"
RULES = yaml.safe_load((DOCS / "metrics" / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DOCS / "metrics" / "dashboard.json").read_text())
NOT_OURS = {"up"}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
WORDS = {  # of PromQL
    "sum", "min", "max", "by", "rate", "increase", "histogram_quantile", "and", "on", "or", "instance", "le", "job", "e9",
    "label_values", "state", "reason", "result", "command", "outcome", "engine", "event", "__rate_interval",
}  # fmt: skip


@pytest.fixture
async def families() -> list[Family]:
    return World().health.families()


@pytest.fixture
async def names(families: list[Family]) -> set[str]:
    """Every name that a query may use."""
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.kind]} | {"process_resident_memory_bytes"}


def queries() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def used(query: str) -> set[str]:
    """The names in a query, without PromQL's words, strings and numbers."""
    bare = re.sub(r'"[^"]*"|\b\d[\w.]*', "", query)
    return set(re.findall(r"[A-Za-z_]\w*", bare)) - WORDS - {"s", "m"}


@pytest.mark.parametrize(("where", "query"), list(queries()))
async def test_every_metric_that_is_asked_for_exists(names: set[str], where: str, query: str) -> None:
    asked = used(query)
    assert asked, where
    assert asked <= names | NOT_OURS, f"{where}: {asked - names}"


async def test_a_name_that_does_not_exist_would_be_noticed(names: set[str]) -> None:
    assert used('sum by (state) (rate(warren_nothing_total{state="online"}[5m])) > 1e9') == {"warren_nothing_total"}
    assert "warren_nothing_total" not in names
    assert "warren_commands" not in names  # a counter is asked for with `_total`


@pytest.mark.parametrize(("where", "query"), list(queries()))
async def test_every_label_that_is_asked_for_exists(families: list[Family], where: str, query: str) -> None:
    for name, matchers in re.findall(r"(warren_\w+)\{([^}]*)\}", query):
        (family,) = [f for f in families if name in {f.name + suffix for suffix in SUFFIXES[f.kind]}]
        for label, value in re.findall(r'(\w+)(?:=~|!=|=)"([^"]*)"', matchers):
            assert label in {*family.labels, "instance"}, f"{where}: {name} has no label {label}"
            if label == "state":
                assert set(value.split("|")) <= {state.value for state in State}, where


def test_each_alert_has_its_place_in_the_handbook_and_the_other_way_round() -> None:
    handbook = (DOCS / "operations.md").read_text()
    alerts = handbook.split("\n## Alerts\n")[1].split("\n## ")[0]
    sections = dict(re.findall(r"^### (Warren\w+)\n(.*?)(?=^### |\Z)", alerts, re.MULTILINE | re.DOTALL))
    assert set(sections) == {rule["alert"] for rule in RULES}
    for name, text in sections.items():
        for part in ("**Meaning.**", "**Where to look.**", "**Command.**"):
            assert part in text, f"{name} says nothing about {part}"
        assert "`" in text.split("**Command.**")[1], f"{name} has no command"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_says_what_how_bad_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


async def test_every_metric_is_in_the_handbook_of_metrics(families: list[Family]) -> None:
    told = set(re.findall(r"^\| `(warren_\w+)`", (DOCS / "metrics" / "README.md").read_text(), re.MULTILINE))
    assert told == {family.name + ("_total" if family.kind == "counter" else "") for family in families}


async def test_the_number_of_series_does_not_grow_with_the_number_of_sessions() -> None:
    def series(sessions: int) -> int:
        world = World()
        world.states["online"] = sessions
        for n in range(sessions):
            world.health._metrics.transition("connecting", "online", None)
            world.health._metrics.command(Outcome("send", f"{n}", {}), 0.1)
        return Exposition(world.health.families).render("")[0].count(b"\n")

    assert series(500) == series(1)
