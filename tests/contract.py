"""Holds what is published against the contract: the schemas in `schemas/`, and the exact types they are made from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import orjson
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter, ValidationError

from warren.core import contract

SCHEMAS = Path(__file__).parents[1] / "schemas"


@cache
def validator(path: str) -> Draft202012Validator:
    """For a schema as it is published, by its path in `schemas/`."""
    return Draft202012Validator(json.loads((SCHEMAS / path).read_text()))


def schema_faults(path: str, value: Any) -> list[str]:
    return [f"{path}: {e.json_path}: {e.message[:300]}" for e in validator(path).iter_errors(value)]


def type_faults(adapter: TypeAdapter[Any], value: Any) -> list[str]:
    """Against the exact type: a field that nobody wrote down is a fault here, though schemas let it pass."""
    try:
        adapter.validate_json(orjson.dumps(value))
    except ValidationError as e:
        return [f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in e.errors(include_url=False)]
    return []


def faults_of(event: dict[str, Any]) -> list[str]:
    """What is wrong with a published event, its data included; empty when it is as documented."""
    name = str(event.get("type")).removeprefix("warren.")
    if name not in contract.EVENTS:
        return [f"there is no event {event.get('type')!r}"]
    faults = schema_faults(f"events/{name}.json", event) + type_faults(contract.EVENTS[name], event)
    if name in contract.OUTCOMES:
        faults += schema_faults(f"outcomes/{name}.json", event["data"])
    if ("epoch" in event) != ("sequence" in event) or event.get("subject") != event.get("session"):
        faults.append("epoch without sequence, or a subject that is not the session")
    return [f"{name}: {fault} in {json.dumps(event)[:800]}" for fault in faults]


def reply_faults(command: str, reply: dict[str, Any]) -> list[str]:
    return schema_faults(f"replies/{command}.json", reply) + type_faults(contract.REPLIES[command], reply)
