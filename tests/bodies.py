"""Random bodies of commands and random frames of an engine: from plain noise to what is nearly right."""

from __future__ import annotations

import random
from typing import Any

import orjson

WORDS = [
    "send",
    "status",
    "list",
    "create",
    "logout",
    "acme",
    "nobody",
    "../x",
    "",
    "x",
    "order-1",
    "+15551234567",
    "2030-01-01T00:00:00Z",
]
FIELDS = ["command", "session", "id", "expires_at", "args", "to", "text", "device_name", "extra"]
FRAME_FIELDS = ["re", "ok", "result", "error", "event", "generation", "id", "data", "session", "answer", "op"]
EVENTS = ["message", "receipt", "qr", "connected", "hello", "undecryptable", "disconnected", "?"]


def random_body(chance: random.Random, peer: str = "15551234567") -> bytes:
    """A command's body, broken in one way or another; now and then it is a good `send` or `status`."""
    match chance.randrange(5):
        case 0:
            return chance.randbytes(chance.choice((0, 1, 7, 100, 3_000)))
        case 1:
            return _dumps(_value(chance, FIELDS, 4))
        case 2:
            return _mutated(chance, _dumps(_command(chance, peer)))
        case _:
            return _dumps(_altered(chance, _command(chance, peer)))


def random_frame(chance: random.Random) -> bytes:
    """A line from an engine, broken in one way or another."""
    match chance.randrange(5):
        case 0:
            return chance.randbytes(chance.choice((0, 1, 7, 100, 3_000)))
        case 1:
            return _dumps(_value(chance, FRAME_FIELDS, 4))
        case 2:
            return _mutated(chance, _dumps(_frame(chance)))
        case _:
            return _dumps(_altered(chance, _frame(chance), FRAME_FIELDS))


def _command(chance: random.Random, peer: str) -> dict[str, Any]:
    # Every number makes another body, and so another event.
    text = f"fuzz {chance.getrandbits(64)}"
    if chance.random() < 0.5:
        return {"command": "send", "session": "acme", "args": {"to": f"+{peer}", "text": text}}
    return {"command": "status", "session": "acme", "args": {}, "expires_at": f"20{chance.randrange(10, 99)}-01-01T00:00:00Z"}


def _frame(chance: random.Random) -> dict[str, Any]:
    data = {"chat": "c@lid", "sender": "s@lid", "message_id": "m", "from_me": False, "kind": "text", "timestamp": "t"}
    if chance.random() < 0.5:
        return {"event": chance.choice(EVENTS), "session": "acme", "generation": 1, "id": 7, "data": data}
    return {"re": 7, "session": "acme", "ok": chance.random() < 0.5, "result": {}, "error": {"code": "x", "message": "y"}}


def _altered(chance: random.Random, good: dict[str, Any], fields: list[str] = FIELDS) -> dict[str, Any]:
    for _ in range(chance.randrange(3)):
        where = good["args"] if isinstance(good.get("args"), dict) and chance.random() < 0.4 else good
        if where and chance.random() < 0.3:
            where.pop(chance.choice(list(where)))
        else:
            where[chance.choice(fields)] = _value(chance, fields, 2)
    return good


def _mutated(chance: random.Random, raw: bytes) -> bytes:
    """Some bytes changed, taken out or doubled."""
    data = bytearray(raw)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at : at + chance.randrange(8)]
            case _:
                data[at:at] = data[at : at + chance.randrange(30)]
        if not data:
            break
    return bytes(data)


def _value(chance: random.Random, fields: list[str], depth: int) -> Any:
    match chance.randrange(9 if depth else 7):
        case 0:
            return None
        case 1:
            return chance.random() < 0.5
        case 2:
            return chance.choice((0, -1, 7, 2**53, 2**63, -(2**63), 2**64 - 1))
        case 3:
            return chance.choice((0.0, -1.5, 1e308, 5e-324))
        case 4:
            return "".join(chr(chance.choice((0, 10, 65, 0x2028, 0x1F600))) for _ in range(chance.randrange(300)))
        case 5 | 6:
            return chance.choice(WORDS)
        case 7:
            return [_value(chance, fields, depth - 1) for _ in range(chance.randrange(4))]
        case _:
            return {chance.choice(fields): _value(chance, fields, depth - 1) for _ in range(chance.randrange(5))}


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value)
