"""The engine protocol's frames: JSON lines as `docs/engine-protocol.md` defines them. Pure; the pipe itself is an edge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from warren.errors import FrameError

MAX_FRAME_BYTES = 1_048_576
"""Newline included."""
PROTOCOL = 1


@dataclass(frozen=True, slots=True)
class Response:
    """The engine's answer to request `re`. `error` is None when it went well."""

    re: int
    session: str
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Something that happened. `answer_id` is set when the engine waits for an answer before WhatsApp is told "received"."""

    event: str
    session: str
    generation: int
    data: dict[str, Any]
    answer_id: int | None = None


Frame = Response | EngineEvent


def encode_request(op: str, request_id: int, session: str, arguments: dict[str, Any]) -> bytes:
    """One request line. Raises FrameError when it would be over the size limit; nothing is sent then."""
    return _line({"op": op, "id": request_id, "session": session, **arguments})


def encode_answer(event: EngineEvent, *, ok: bool) -> bytes:
    return _line({"answer": event.answer_id, "session": event.session, "generation": event.generation, "ok": ok})


def _line(frame: dict[str, Any]) -> bytes:
    line = orjson.dumps(frame, option=orjson.OPT_APPEND_NEWLINE)
    if len(line) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(line)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return line


def decode(line: bytes) -> Frame:
    """The frame in one line from the engine. Raises FrameError for anything that is not a frame."""
    try:
        raw = orjson.loads(line)
    except orjson.JSONDecodeError as e:
        raise FrameError(f"the engine sent something that is not JSON: {e}") from e
    if not isinstance(raw, dict) or not isinstance(session := raw.get("session"), str):
        raise FrameError("the engine sent a frame without a session")
    if "re" in raw:
        return _response(raw, session)
    if "event" in raw:
        return _event(raw, session)
    raise FrameError("the engine sent a frame that is neither a response nor an event")


def _response(raw: dict[str, Any], session: str) -> Response:
    re, ok = raw.get("re"), raw.get("ok")
    if type(re) is not int or type(ok) is not bool:
        raise FrameError("the engine sent a response without `re` or `ok`")
    if ok:
        return Response(re, session, result=_object(raw, "result"))
    error = _object(raw, "error")
    if not isinstance(error.get("code"), str):
        raise FrameError("the engine sent an error without a code")
    return Response(re, session, error=error)


def _event(raw: dict[str, Any], session: str) -> EngineEvent:
    name, generation, answer_id = raw["event"], raw.get("generation", 0), raw.get("id")
    if not isinstance(name, str) or type(generation) is not int:
        raise FrameError("the engine sent an event without a name or generation")
    if answer_id is not None and type(answer_id) is not int:
        raise FrameError("the engine sent an event whose id is no number")
    return EngineEvent(name, session, generation, _object(raw, "data"), answer_id)


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise FrameError(f"the engine sent a frame whose `{key}` is no object")
    return value
