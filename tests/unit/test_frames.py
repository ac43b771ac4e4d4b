from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warren.core import frames
from warren.core.frames import MAX_FRAME_BYTES, EngineEvent, Response
from warren.errors import FrameError

KEYS = st.sampled_from(["re", "event", "session", "ok", "result", "error", "code", "generation", "id", "data", "x"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=12)
NAMES = st.text(max_size=20)
OBJECTS = st.dictionaries(st.text(max_size=8), SCALARS, max_size=4)
INTS = st.integers(0, 2**53)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_a_frame(line: bytes) -> None:
    _decode_or_refuse(line)


@given(JSON)
def test_arbitrary_json_is_refused_or_a_frame(value: object) -> None:
    _decode_or_refuse(orjson.dumps(value))


@given(
    st.fixed_dictionaries(
        {"session": NAMES | SCALARS},
        optional={
            "re": SCALARS,
            "event": NAMES | SCALARS,
            "ok": st.booleans() | SCALARS,
            "result": OBJECTS | JSON,
            "error": st.fixed_dictionaries({"code": NAMES}) | JSON,
            "generation": INTS | SCALARS,
            "id": INTS | SCALARS,
            "data": OBJECTS | JSON,
        },
    )
)
def test_almost_frames_are_refused_or_a_frame(value: object) -> None:
    _decode_or_refuse(orjson.dumps(value))


def _decode_or_refuse(line: bytes) -> None:
    try:
        frame = frames.decode(line)
    except FrameError:
        return
    assert isinstance(frame.session, str)
    if isinstance(frame, Response):
        assert type(frame.re) is int
        assert isinstance(frame.result, dict)
        assert frame.error is None or isinstance(frame.error["code"], str)
    else:
        assert isinstance(frame.event, str)
        assert type(frame.generation) is int
        assert isinstance(frame.data, dict)
        assert frame.answer_id is None or type(frame.answer_id) is int


@given(NAMES, INTS, NAMES, OBJECTS, st.none() | INTS)
def test_events_come_back_as_sent(event: str, generation: int, session: str, data: dict[str, Any], answer_id: int | None) -> None:
    raw: dict[str, Any] = {"event": event, "session": session, "generation": generation, "data": data}
    if answer_id is not None:
        raw["id"] = answer_id
    assert frames.decode(orjson.dumps(raw)) == EngineEvent(event, session, generation, data, answer_id)


@given(INTS, NAMES, OBJECTS)
def test_responses_come_back_as_sent(re: int, session: str, result: dict[str, Any]) -> None:
    good = orjson.dumps({"re": re, "session": session, "ok": True, "result": result})
    assert frames.decode(good) == Response(re, session, result=result)
    bad = orjson.dumps({"re": re, "session": session, "ok": False, "error": {**result, "code": "timeout"}})
    decoded = frames.decode(bad)
    assert isinstance(decoded, Response)
    assert decoded.error == {**result, "code": "timeout"}


@pytest.mark.parametrize(
    ("line", "about"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'"hello"', "without a session"),
        (b"[]", "without a session"),
        (b"{}", "without a session"),
        (b'{"session": 7, "re": 1}', "without a session"),
        (b'{"session": "a"}', "neither"),
        (b'{"session": "a", "re": "1", "ok": true}', "`re` or `ok`"),
        (b'{"session": "a", "re": true, "ok": true}', "`re` or `ok`"),
        (b'{"session": "a", "re": 1}', "`re` or `ok`"),
        (b'{"session": "a", "re": 1, "ok": 1}', "`re` or `ok`"),
        (b'{"session": "a", "re": 1, "ok": true, "result": []}', "`result`"),
        (b'{"session": "a", "re": 1, "ok": false}', "without a code"),
        (b'{"session": "a", "re": 1, "ok": false, "error": {"code": 5}}', "without a code"),
        (b'{"session": "a", "event": 5}', "name or generation"),
        (b'{"session": "a", "event": "x", "generation": "3"}', "name or generation"),
        (b'{"session": "a", "event": "x", "generation": true}', "name or generation"),
        (b'{"session": "a", "event": "x", "id": "5"}', "id is no number"),
        (b'{"session": "a", "event": "x", "data": null}', "`data`"),
    ],
)
def test_what_is_wrong_is_said(line: bytes, about: str) -> None:
    with pytest.raises(FrameError, match=about):
        frames.decode(line)


def test_the_protocols_examples_are_frames() -> None:
    hello = b'{"event": "hello", "session": "", "data": {"protocol": 1, "engine": "0.1.0", "pid": 123}}'
    assert frames.decode(hello) == EngineEvent("hello", "", 0, {"protocol": 1, "engine": "0.1.0", "pid": 123})
    message = b'{"event": "message", "session": "acme", "generation": 3, "id": 5, "data": {"text": "hi"}}'
    assert frames.decode(message) == EngineEvent("message", "acme", 3, {"text": "hi"}, 5)


def test_requests_and_answers_are_single_lines() -> None:
    line = frames.encode_request("send", 17, "acme", {"generation": 3, "text": "two\nlines"})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert orjson.loads(line) == {"op": "send", "id": 17, "session": "acme", "generation": 3, "text": "two\nlines"}
    answer = frames.encode_answer(EngineEvent("message", "acme", 3, {}, 5), ok=False)
    assert orjson.loads(answer) == {"answer": 5, "session": "acme", "generation": 3, "ok": False}


def test_the_size_limit_is_exact_and_counts_bytes() -> None:
    empty = len(frames.encode_request("send", 1, "acme", {"text": ""}))
    room = MAX_FRAME_BYTES - empty
    assert len(frames.encode_request("send", 1, "acme", {"text": "x" * room})) == MAX_FRAME_BYTES
    with pytest.raises(FrameError, match="over the limit"):
        frames.encode_request("send", 1, "acme", {"text": "x" * (room + 1)})
    with pytest.raises(FrameError, match="over the limit"):
        frames.encode_request("send", 1, "acme", {"text": "é" * (room // 2 + 1)})
