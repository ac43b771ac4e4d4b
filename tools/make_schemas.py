"""Writes `schemas/` from the models in warren.core: `make schemas`, or `python tools/make_schemas.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from warren import __version__
from warren.core import contract
from warren.core.envelope import CLOUDEVENT, COMMANDS, JSON, MAX_BODY_BYTES, Spec
from warren.core.names import Topology

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_FORMAT = "application/schema+json;version=draft-2020-12"
ASYNCAPI = "3.0.0"
AMQP_BINDING = "0.3.0"
NAMES = Topology("warren")

EVENT_TITLES = {
    "qr": "A new code to scan, each time it rotates",
    "pairing_code": "A new code to type into the phone, for a `create` with `phone_number`",
    "connected": "The session is online, as WhatsApp confirmed",
    "disconnected": "The connection ended; `state` says what follows",
    "reconnecting": "It connects again after a wait",
    "reconnect_failed": "Ten attempts failed: an alarm, once; trying goes on",
    "logout": "The device is unlinked, by the phone, WhatsApp or `logout`",
    "message": "A message arrived, or was sent from another device of the account",
    "receipt": "Messages were delivered, read or played",
    "command_completed": "A command went well",
    "command_failed": "A command failed",
    "health_check_failed": "A connection that looked alive was not; it is recycled",
    "backup_failed": "Backups of the session fail again and again: an alarm, once; trying goes on",
    "error": "Something needs attention: `code` says what",
}


class _Generator(GenerateJsonSchema):
    """Without a title for every field: they only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


# --- JSON Schema ------------------------------------------------------------------------------------------------------


def schemas() -> dict[str, Schema]:
    """Every schema by its path in the folder."""
    made = {f"commands/{name}.json": _command(name, spec) for name, spec in COMMANDS.items()}
    for kind, adapters in (("replies", contract.REPLIES), ("outcomes", contract.OUTCOMES), ("events", contract.EVENTS)):
        for name, adapter in adapters.items():
            made[f"{kind}/{name}.json"] = _outgoing(kind, name, adapter)
    return made


def _command(name: str, spec: Spec) -> Schema:
    """The envelope with the command's own arguments. Closed: warren refuses fields that it does not know."""
    args = spec.args.model_json_schema(schema_generator=_Generator)
    args.pop("title")
    properties: Schema = {
        "command": {"const": name},
        "session": {**_schema_of(contract.SessionId), "description": "The session; also the routing key."},
        "id": {
            "type": "string",
            "minLength": 1,
            "maxLength": 200,
            "description": "Names this request: the same id has its effect once. "
            + ("Required, here or as the AMQP property message_id." if spec.effect else "Optional."),
        },
        "expires_at": {**_schema_of(contract.Time), "description": "Not begun after that; it fails with `expired`."},
        "args": args,
    }
    required = ["command", "session"] + (["args"] if args.get("required") else [])
    if spec.exchange == "queries":
        required.remove("session")
        properties["session"]["description"] = "Has no meaning here."
    return {
        "$schema": DIALECT,
        "$id": _urn("commands", name),
        "title": f"The command `{name}`",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _schema_of(kind: Any) -> Schema:
    return TypeAdapter(kind).json_schema(schema_generator=_Generator)


def _outgoing(kind: str, name: str, adapter: TypeAdapter[Any]) -> Schema:
    schema = adapter.json_schema(schema_generator=_Generator)
    schema.pop("title", None)
    _open(schema)
    for definition, content in schema.get("$defs", {}).items():
        content["title"] = definition
    title = {"events": "The event", "outcomes": "The data of the event", "replies": "The reply to the command"}[kind]
    return {"$schema": DIALECT, "$id": _urn(kind, name), "title": f"{title} `{name}`", **schema}


def _open(node: Any) -> None:
    """Let outgoing objects have further fields: more may be added, and readers are to ignore them."""
    if isinstance(node, dict):
        if node.get("additionalProperties") is False:
            del node["additionalProperties"]
        for child in node.values():
            _open(child)
    elif isinstance(node, list):
        for child in node:
            _open(child)


def _urn(kind: str, name: str) -> str:
    singular = {"commands": "command", "replies": "reply", "outcomes": "outcome", "events": "event"}
    return f"urn:warren:schema:{singular[kind]}:{name}"


# --- AsyncAPI ---------------------------------------------------------------------------------------------------------


def asyncapi() -> Schema:
    """The same contract as an AsyncAPI document, from the view of a client of warren."""
    return {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "warren",
            "version": __version__,
            "description": "WhatsApp sessions as a service on RabbitMQ. The words for all of it: docs/message-api.md. "
            "Exchanges and queues have the default prefix `warren` here.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": JSON,
        "channels": _channels(),
        "operations": _operations(),
        "components": {"messages": _messages()},
    }


def _messages() -> Schema:
    made: Schema = {}
    for name in COMMANDS:
        made[f"command.{name}"] = _message(f"commands/{name}.json", f"The command `{name}`", JSON)
        made[f"reply.{name}"] = _message(f"replies/{name}.json", f"The reply to `{name}`", JSON)
    for name in contract.EVENTS:
        made[f"event.{name}"] = _message(f"events/{name}.json", EVENT_TITLES[name], CLOUDEVENT)
    made["dead"] = {
        "title": "What could not be decoded, as it was published",
        "headers": {
            "type": "object",
            "properties": {
                "x-warren-reason": {"type": "string", "description": "The error's code."},
                "x-warren-message": {"type": "string"},
                "x-warren-exchange": {"type": "string", "description": "The exchange it was published to."},
            },
        },
        "contentType": "application/octet-stream",
    }
    return made


def _message(path: str, title: str, content_type: str) -> Schema:
    return {
        "title": title,
        "contentType": content_type,
        "payload": {"schemaFormat": SCHEMA_FORMAT, "schema": {"$ref": f"./{path}"}},
    }


def _channels() -> Schema:
    def commands_on(exchange: str) -> list[str]:
        return [f"command.{name}" for name, spec in COMMANDS.items() if spec.exchange == exchange]

    events = [f"event.{name}" for name in contract.EVENTS]
    size = f"At most {MAX_BODY_BYTES:,} bytes each."
    return {
        "control": _exchange(NAMES.control, "direct", "{session}", commands_on("control"), f"Life-cycle commands. {size}"),
        "commands": _exchange(
            NAMES.commands, "direct", "{session}", commands_on("commands"), f"Commands with an effect on WhatsApp. {size}"
        ),
        "queries": _exchange(NAMES.queries, "fanout", None, commands_on("queries"), "Answered by every daemon."),
        "events": _exchange(NAMES.events, "topic", "{session}.{event}", events, "Bind queues of your own here."),
        "tap": _exchange(
            NAMES.tap, "topic", "{session}.{event}", events, "The same for people who watch; it never counts as a subscriber."
        ),
        "unrouted": _queue(NAMES.unrouted, events, "Events that no queue was bound for; bounded."),
        "dead": _queue(NAMES.dead, ["dead"], "What cannot be decoded, with the reason in its headers."),
        "reply": {
            "address": None,
            "description": "The queue named in the AMQP property reply_to, over the default exchange; never one of warren's own.",
            "messages": _refs([f"reply.{name}" for name in COMMANDS]),
        },
    }


def _exchange(name: str, kind: str, address: str | None, messages: list[str], description: str) -> Schema:
    parameters = {
        "session": {"description": "The session id."},
        "event": {"description": "The event's name.", "enum": list(contract.EVENTS)},
    }
    used = {key: value for key, value in parameters.items() if address and f"{{{key}}}" in address}
    return {
        "address": address,
        "description": description,
        **({"parameters": used} if used else {}),
        "messages": _refs(messages),
        "bindings": _amqp(**{"is": "routingKey", "exchange": {"name": name, "type": kind, "durable": True, "autoDelete": False}}),
    }


def _queue(name: str, messages: list[str], description: str) -> Schema:
    queue = {"name": name, "durable": True, "exclusive": False, "autoDelete": False}
    return {
        "address": name,
        "description": description,
        "messages": _refs(messages),
        "bindings": _amqp(**{"is": "queue", "queue": queue}),
    }


def _refs(messages: list[str]) -> Schema:
    return {name: {"$ref": f"#/components/messages/{name}"} for name in messages}


def _amqp(**binding: Any) -> Schema:
    return {"amqp": {**binding, "bindingVersion": AMQP_BINDING}}


def _operations() -> Schema:
    made: Schema = {name: _command_operation(name, spec) for name, spec in COMMANDS.items()}
    for operation, channel, summary in (
        ("subscribe", "events", "Take events from a durable queue of your own."),
        ("watch", "tap", "Look at events."),
        ("readUnrouted", "unrouted", "Read what had no subscriber."),
        ("readDead", "dead", "Read what could not be decoded."),
    ):
        made[operation] = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{channel}"},
            "summary": summary,
            "bindings": _amqp(ack=True),
        }
    return made


def _command_operation(name: str, spec: Spec) -> Schema:
    return {
        "action": "send",
        "channel": {"$ref": f"#/channels/{spec.exchange}"},
        "summary": f"Publish `{name}`" + (", with an id." if spec.effect else "."),
        "messages": [{"$ref": f"#/channels/{spec.exchange}/messages/command.{name}"}],
        "bindings": _amqp(deliveryMode=2),
        "reply": {
            "address": {
                "description": "The AMQP properties reply_to and correlation_id ask for a reply.",
                "location": "$message.header#/reply_to",
            },
            "channel": {"$ref": "#/channels/reply"},
            "messages": [{"$ref": f"#/channels/reply/messages/reply.{name}"}],
        },
    }


# --- files ------------------------------------------------------------------------------------------------------------


def files() -> dict[str, str]:
    """What belongs into the folder, by path."""
    head = "# Generated by `make schemas`.\n"
    made = {path: json.dumps(schema, indent=2, ensure_ascii=False) + "\n" for path, schema in schemas().items()}
    made["asyncapi.yaml"] = head + yaml.safe_dump(asyncapi(), sort_keys=False, allow_unicode=True, width=120)
    return made


def write(folder: Path) -> None:
    """Write all files, and remove what is no longer generated."""
    made = files()
    for path, text in made.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for old in (*folder.rglob("*.json"), *folder.rglob("*.yaml")):
        if str(old.relative_to(folder)) not in made:
            old.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "schemas")
