"""`schemas/` is current, valid, and says what the daemon does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
import yaml
from jsonschema import Draft202012Validator
from tests.contract import SCHEMAS, faults_of, reply_faults, schema_faults
from tests.unit.test_message_api_doc import BLOCKS, COMMAND_EXAMPLES, EXAMPLES
from tools import make_schemas

from warren.core import contract
from warren.core.envelope import COMMANDS, EPHEMERAL, Origin, Outcome, Rejected, cloud_event, decode_command
from warren.core.machine import TABLE, State
from warren.core.names import Topology, event_id
from warren.errors import CommandError

FILES = make_schemas.files()
PATHS = sorted(path for path in FILES if path.endswith(".json"))
ASYNCAPI: dict[str, Any] = yaml.safe_load(FILES["asyncapi.yaml"])
NOW = datetime(2030, 11, 20, tzinfo=UTC)


def test_the_files_are_current() -> None:
    """`make schemas` brings them up to date."""
    there = {str(p.relative_to(SCHEMAS)): p.read_text() for p in SCHEMAS.rglob("*") if p.is_file()}
    assert sorted(there) == sorted(FILES)
    assert [path for path in FILES if there[path] != FILES[path]] == []


def test_stale_files_are_replaced_and_removed(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "gone.json").write_text("{}")
    make_schemas.write(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(FILES)


@pytest.mark.parametrize("path", PATHS)
def test_each_is_a_schema_with_an_id_of_its_own(path: str) -> None:
    schema = json.loads(FILES[path])
    Draft202012Validator.check_schema(schema)
    kind, name = path.removesuffix(".json").split("/")
    singular = {"commands": "command", "replies": "reply", "outcomes": "outcome", "events": "event"}[kind]
    assert schema["$id"] == f"urn:warren:schema:{singular}:{name}"
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert all(ref.startswith("#/$defs/") for ref in references(schema)), "it stands for itself"


def test_there_is_one_for_everything() -> None:
    names = {kind: {p.split("/")[1][:-5] for p in PATHS if p.startswith(kind)} for kind in ("commands", "replies", "events")}
    assert names["commands"] == names["replies"] == set(COMMANDS)
    assert names["events"] == set(contract.EVENTS) == set(make_schemas.EVENT_TITLES)
    assert {s.event for s in TABLE.values() if s.event} <= names["events"]
    assert set(get_args(contract.StateName)) == {s.value for s in State}


def test_ephemeral_events_have_no_place_in_the_order() -> None:
    without = {name for name in contract.EVENTS if "sequence" not in json.loads(FILES[f"events/{name}.json"])["properties"]}
    assert without == EPHEMERAL & set(contract.EVENTS)


# --- CloudEvents 1.0.2 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", contract.EVENTS)
def test_attributes_follow_the_rules_of_cloudevents(name: str) -> None:
    schema = json.loads(FILES[f"events/{name}.json"])
    assert {"specversion", "id", "source", "type"} <= set(schema["required"])
    for attribute, content in schema["properties"].items():
        if attribute == "data":
            continue
        assert re.fullmatch(r"[a-z0-9]{1,20}", attribute), attribute
        assert content["type"] in {"string", "integer"}, attribute
        if content["type"] == "integer":
            assert content["maximum"] < 2**31, "CloudEvents' Integer has 32 bits"


# --- the examples of the docs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", COMMAND_EXAMPLES, ids=lambda e: e["command"])
def test_command_examples_fit(example: dict[str, Any]) -> None:
    assert schema_faults(f"commands/{example['command']}.json", example) == []


def test_every_other_example_fits_something() -> None:
    datas = [contract.ShownQr, contract.PairingCode, contract.StateChange, contract.Connected, contract.Message, contract.Receipt]
    adapters = [contract.TypeAdapter(kind) for kind in (*datas, contract.Undecryptable, contract.BackupFailed, contract.Status)]
    for example in EXAMPLES:
        if example in COMMAND_EXAMPLES:
            continue
        if "specversion" in example:
            assert faults_of(example) == []
        elif "ok" in example:
            assert reply_faults(example["command"], example) == []
        else:
            assert any(fits(adapter, example) for adapter in adapters), example
    assert len(BLOCKS) > len(EXAMPLES) > len(COMMAND_EXAMPLES)


def fits(adapter: Any, example: dict[str, Any]) -> bool:
    try:
        adapter.validate_json(orjson.dumps(example))
    except ValueError:
        return False
    return True


# --- schemas and daemon agree -----------------------------------------------------------------------------------------


def mutations(valid: dict[str, Any]) -> Iterator[dict[str, Any]]:
    values: list[Any] = ["", "x", "acme", "x" * 201, "+15551234567", "+1", "15551234567@lid", "2030-11-20T12:00:00Z", "2030", 0]
    values += ["2030-11-20T12:00:00", "2030-W01-1T00:00:00Z", "2030-11-20T12:00:00.5+01:00", "20301120T000000Z"]
    values += [-1, 1.5, True, [], {}, {"to": "+15551234567"}, {"text": "x"}, {"device_name": "x" * 51}]
    for field in ("command", "session", "id", "expires_at", "args", "extra"):
        yield {k: v for k, v in valid.items() if k != field}
        yield from ({**valid, field: value} for value in values)
    for field in ("to", "text", "device_name", "extra"):
        args = valid.get("args", {})
        yield {**valid, "args": {k: v for k, v in args.items() if k != field}}
        yield from ({**valid, "args": {**args, field: value}} for value in [*values, "x" * 65_536, "x" * 65_537])


def understood(body: dict[str, Any], origin: Origin) -> bool:
    try:
        decode_command(orjson.dumps(body), origin)
    except Rejected:
        return False
    return True


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_understood_if_and_only_if_it_fits_its_schema(name: str) -> None:
    spec, seen = COMMANDS[name], set()
    valid = next(e for e in COMMAND_EXAMPLES if e["command"] == name)
    for body in mutations(valid):
        key = body.get("session")
        origin = Origin(spec.exchange, key if isinstance(key, str) else "", "a-message-id")
        fitting = schema_faults(f"commands/{name}.json", body) == []
        seen.add(fitting)
        # `list` concerns no session, so what stands there does not matter.
        assert understood(body, origin) in {fitting, fitting or name == "list"}, body
    assert seen == {True, False}


def test_what_the_envelope_makes_fits() -> None:
    error = CommandError("expired", "Too late.", hint="Earlier.", retry_after=1.5)
    for outcome in (Outcome("logout", "c1"), Outcome.failed("", None, error)):
        body = cloud_event(
            Topology("w"),
            event=outcome.event,
            event_id=event_id("acme", "x"),
            session="acme",
            instance="i",
            time=NOW,
            data=outcome.body(),
            epoch=1,
            sequence=7,
            causation_id=outcome.command_id,
        )
        assert faults_of(orjson.loads(body)) == []


def test_the_check_notices_what_is_wrong() -> None:
    event = next(e for e in EXAMPLES if "specversion" in e)
    for wrong in (
        {"sequence": 7},
        {"type": "warren.massage"},
        {"data": {**event["data"], "colour": "red"}},
        {"subject": "other"},
    ):
        assert faults_of({**event, **wrong}) != []
    assert schema_faults("events/message.json", {**event, "data": {**event["data"], "colour": "red"}}) == [], (
        "for clients it is open"
    )


# --- AsyncAPI ---------------------------------------------------------------------------------------------------------


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def resolve(reference: str) -> Any:
    node: Any = ASYNCAPI
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    found = list(references(ASYNCAPI))
    assert {r.removeprefix("./") for r in found if r.startswith("./")} == set(PATHS) - {p for p in PATHS if "outcomes/" in p}
    assert all(resolve(r) is not None for r in found if not r.startswith("./"))


def test_the_asyncapi_document_has_what_version_3_requires() -> None:
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= set(ASYNCAPI["info"])
    for name, channel in ASYNCAPI["channels"].items():
        assert {"address", "messages"} <= set(channel), name
        used = set(re.findall(r"\{(\w+)\}", channel["address"] or ""))
        assert used == set(channel.get("parameters", {})), name
        binding = channel.get("bindings", {}).get("amqp")
        assert name == "reply" or ("exchange" in binding) == (binding["is"] == "routingKey"), name
    for name, operation in ASYNCAPI["operations"].items():
        assert operation["action"] in {"send", "receive"}, name
        channel = operation["channel"]["$ref"]
        for message in operation.get("messages", []):
            assert message["$ref"].startswith(f"{channel}/messages/"), "a subset of its channel's messages"
    assert all("schemaFormat" in m["payload"] for n, m in ASYNCAPI["components"]["messages"].items() if n != "dead")


def test_the_asyncapi_document_names_the_real_exchanges_and_queues() -> None:
    bindings = [c["bindings"]["amqp"] for c in ASYNCAPI["channels"].values() if "bindings" in c]
    named = {(b.get("exchange") or b["queue"])["name"] for b in bindings}
    t = Topology("warren")
    assert named == {t.control, t.commands, t.queries, t.events, t.tap, t.unrouted, t.dead}
    sent = {name for name, o in ASYNCAPI["operations"].items() if o["action"] == "send"}
    assert sent == set(COMMANDS)
    for name in sent:
        assert ASYNCAPI["operations"][name]["channel"]["$ref"] == f"#/channels/{COMMANDS[name].exchange}"
