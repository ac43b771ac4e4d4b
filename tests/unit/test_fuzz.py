"""Ten thousand random bodies and frames: refused with a reason or understood, and nothing else."""

from __future__ import annotations

import contextlib
import random

import orjson
from tests.bodies import random_body, random_frame
from tests.contract import type_faults

from warren.core import contract, events, frames
from warren.core.envelope import Origin, Outcome, Rejected, decode_command
from warren.core.frames import EngineEvent
from warren.errors import FrameError

COUNT = 10_000
KEYS = ("acme", "acme", "nobody", "no session", "")


def test_random_bodies_are_refused_with_a_reason_or_understood() -> None:
    chance = random.Random(1)
    refused: dict[str, int] = {}
    for _ in range(COUNT):
        body = random_body(chance)
        origin = Origin(chance.choice(("control", "commands", "queries", "")), chance.choice(KEYS), chance.choice((None, "m")))
        try:
            decode_command(body, origin)
        except Rejected as e:
            refused[e.reason] = refused.get(e.reason, 0) + 1
            outcome = Outcome.failed(e.command, e.command_id, e).body()
            assert type_faults(contract.OUTCOMES["command_failed"], outcome) == [], body
            assert outcome["error"]["hint"], body
            assert len(orjson.dumps(outcome)) < 2_000, body
    assert set(refused) == {
        *("invalid_json", "invalid_command", "unknown_command", "wrong_exchange"),
        *("invalid_session", "id_required", "invalid_argument"),
    }
    assert 100 < sum(refused.values()) < COUNT


def test_random_frames_are_refused_or_frames() -> None:
    chance = random.Random(2)
    read: list[frames.Frame] = []
    for _ in range(COUNT):
        with contextlib.suppress(FrameError):
            read.append(frames.decode(random_frame(chance)))
    assert 1_000 < len(read) < COUNT
    assert any(isinstance(f, EngineEvent) and _is_inbound(f) for f in read)


def _is_inbound(frame: EngineEvent) -> bool:
    """Whatever a frame's data is, it is taken, or refused with an exception that the pipe's reader contains."""
    try:
        events.inbound(frame)
    except (KeyError, TypeError, AttributeError):
        return False
    return True
