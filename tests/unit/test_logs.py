from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from warren.edges.logs import (
    ENGINE_MESSAGE_CHARS,
    REPEAT_WINDOW_S,
    REPEATS,
    REPEATS_KNOWN,
    Format,
    configure_logging,
    log_engine_line,
)

NUMBER = "15551234567"
few = settings(max_examples=30, deadline=None)  # each sets the log up


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging is global; pytest's own handlers come back."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # so that they are not closed
    yield
    logger.remove()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("aiormq", "aio_pika", "asyncio"):
        logging.getLogger(name).setLevel(logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def logged(
    write: Callable[[], object], *, level: str = "debug", format: Format = "json", redact: bool = True
) -> list[dict[str, Any]]:
    out = io.StringIO()
    configure_logging(level, format, redact, stream=out)
    write()
    *lines, end = out.getvalue().split("\n")
    assert end == ""
    return [orjson.loads(line) for line in lines]


def as_text(write: Callable[[], object], *, redact: bool = True) -> str:
    out = io.StringIO()
    configure_logging("debug", "human", redact, stream=out)
    write()
    return out.getvalue()


def test_json_is_one_object_per_line_with_fixed_keys_first() -> None:
    (entry,) = logged(lambda: logger.bind(session="acme", action="connected", generation=3).info("on\nline"))
    assert list(entry) == ["time", "level", "action", "session", "message", "generation"]
    assert entry | {"time": ""} == {
        "time": "",
        "level": "info",
        "action": "connected",
        "session": "acme",
        "message": "on\nline",
        "generation": 3,
    }
    assert entry["time"].endswith("Z")
    assert len(entry["time"]) == len("2026-11-20T11:42:00.120Z")


def test_fields_cannot_take_the_place_of_the_fixed_ones() -> None:
    (entry,) = logged(lambda: logger.bind(time="t", level="l", message="m", exception="e").info("real"))
    assert (entry["message"], entry["level"], entry["message_"], entry["level_"]) == ("real", "info", "m", "l")


def test_human_is_time_level_action_session_message_fields() -> None:
    text = as_text(lambda: logger.bind(session="acme", action="connected", generation=3).info("Online."))
    assert text[2] == text[5] == ":"
    assert text[12:] == " INFO    connected acme Online. generation=3\n"
    assert as_text(lambda: logger.warning("Bare."))[12:] == " WARNING Bare.\n"


def test_nobody_can_fake_a_line_or_drive_the_terminal() -> None:
    text = as_text(lambda: logger.bind(name="x\r\x1b[2J").info("one\n12:00:00.000 ERROR two\x9b1m"))
    assert text.count("\n") == 1
    assert "\\n12:00:00.000 ERROR two\\x9b1m" in text
    assert "name=x\\r\\x1b[2J" in text


def test_auto_is_human_on_a_terminal_and_json_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_character(out: io.StringIO) -> str:
        configure_logging("info", "auto", True, stream=out)
        logger.info("x")
        return out.getvalue()[0]

    assert first_character(Terminal()).isdigit()
    assert first_character(io.StringIO()) == "{"
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    assert first_character(Terminal()) == "{"


def test_levels_are_obeyed() -> None:
    def write() -> None:
        logger.debug("no")
        logging.getLogger("x").info("no")
        logger.warning("yes")
        logging.getLogger("x").warning("yes")

    assert [entry["message"] for entry in logged(write, level="warning")] == ["yes", "yes"]


# --- one session, and repeats -------------------------------------------------------------------------------------------


def test_a_traced_session_tells_everything_redacted_and_the_others_no_more_than_before() -> None:
    out = io.StringIO()
    configure_logging("warning", "json", True, trace=["acme"], stream=out)
    for session in ("acme", "other", ""):
        logger.bind(session=session).debug("to {}", NUMBER)
        logger.bind(session=session).info("state")
    logging.getLogger("x").debug("no")
    log_engine_line(b'{"level":"DEBUG","msg":"frame","session":"acme"}')
    log_engine_line(b'{"level":"DEBUG","msg":"frame","session":"other"}')
    told = [(e["session"], e["message"]) for e in map(orjson.loads, out.getvalue().splitlines())]
    assert told == [("acme", "to 1555…67"), ("acme", "state"), ("acme", "frame")]


def test_a_warning_that_repeats_is_told_a_few_times_a_minute_and_counted() -> None:
    out, now = io.StringIO(), [0.0]
    configure_logging("info", "json", True, stream=out, clock=lambda: now[0])

    def again(times: int) -> list[dict[str, Any]]:
        out.seek(0)
        out.truncate()
        for _ in range(times):
            logger.bind(action="broker_failed").warning("It does not start.")
        return [orjson.loads(line) for line in out.getvalue().splitlines()]

    assert len(again(100)) == REPEATS
    assert again(10) == []
    logger.bind(action="broker_failed", session="acme").warning("It does not start.")
    logger.bind(action="other").warning("It does not start.")
    logger.bind(action="broker_failed").error("It does not start.")
    assert len(out.getvalue().splitlines()) == 3
    now[0] = REPEAT_WINDOW_S
    first, *more = again(50)
    assert first["repeated"] == 105
    assert len(more) == REPEATS - 1
    assert all("repeated" not in entry for entry in more)


def test_state_changes_are_told_however_often() -> None:
    assert len(logged(lambda: [logger.bind(session="acme").info("online") for _ in range(50)])) == 50


def test_what_is_remembered_of_repeats_is_bounded() -> None:
    def many() -> None:
        for n in range(REPEATS_KNOWN + 1):
            logger.warning("warning {}", n)
        for _ in range(2):
            logger.warning("warning 0")

    assert len(logged(many)) == REPEATS_KNOWN + 3


# --- redaction --------------------------------------------------------------------------------------------------------


def fail(error: Exception) -> None:
    raise error


def failing() -> None:
    local = f"local {NUMBER}"
    try:
        fail(ValueError(f"no session for {NUMBER}@s.whatsapp.net at amqp://u:s3cret@h/"))
    except ValueError:
        logger.bind(jid=f"{NUMBER}@lid", text="hello", code="ABCD-EFGH", deep={"to": [NUMBER], "key": "k"}).exception(
            "cannot serve {}", NUMBER
        )
    del local


@pytest.mark.parametrize("format", ["json", "human"])
def test_every_part_of_a_record_is_redacted(format: Format) -> None:
    out = io.StringIO()
    configure_logging("debug", format, True, stream=out)
    failing()
    text = out.getvalue()
    for secret in (NUMBER, "s3cret", "hello", "ABCD", "local 1555"):
        assert secret not in text
    assert "cannot serve 1555…67" in text
    assert "ValueError: no session for 1555…67@s.whatsapp.net at amqp://u:***@h/" in text
    assert "in failing" in text


def test_redaction_can_be_turned_off_but_local_variables_are_never_shown() -> None:
    text = as_text(failing, redact=False)
    assert f"cannot serve {NUMBER}" in text
    assert "text=hello" in text
    assert f"local {NUMBER}" not in text


@few
@given(st.dictionaries(st.sampled_from(["a", "b", "time"]), st.text() | st.integers() | st.binary()), st.text(), st.booleans())
def test_any_record_is_one_line_of_json(fields: dict[str, Any], message: str, redact: bool) -> None:
    (entry,) = logged(lambda: logger.bind(**fields).info("{}", message), redact=redact)
    assert set(entry) >= {"time", "level", "action", "session", "message"}


@pytest.mark.parametrize("value", ["\ud800", 2**70, {"a": {1, 2}}, object])
@pytest.mark.parametrize("redact", [True, False])
def test_values_that_json_does_not_know_are_shown_as_text(value: object, redact: bool) -> None:
    (entry,) = logged(lambda: logger.bind(x=value).info("odd"), redact=redact)
    assert entry["message"] == "odd"
    assert entry["x"]


# --- others' logs -----------------------------------------------------------------------------------------------------


def test_libraries_log_into_the_same_stream_and_are_redacted() -> None:
    def write() -> None:
        logging.getLogger("aiormq.connection").info("frame by frame")
        logging.getLogger("aiormq.connection").warning("Cannot reach amqp://u:%s@h/ {} for %s", "s3cret", NUMBER)
        try:
            fail(RuntimeError(NUMBER))
        except RuntimeError:
            logging.getLogger("asyncio").exception("Task failed")

    warning, error = logged(write)
    assert (warning["action"], warning["logger"], warning["level"]) == ("library", "aiormq.connection", "warning")
    assert warning["message"] == "Cannot reach amqp://u:***@h/ {} for 1555…67"
    assert error["level"] == "error"
    assert "RuntimeError: 1555…67" in error["exception"]


def test_configuring_again_replaces_what_was() -> None:
    first = io.StringIO()
    configure_logging("info", "json", True, stream=first)
    entries = logged(lambda: logging.getLogger("x").warning("once"))
    assert len(entries) == 1
    assert first.getvalue() == ""


def test_an_engines_line_is_logged_with_its_own_level_and_fields() -> None:
    line = (
        b'{"time":"2026-11-20T11:42:00Z","level":"WARN","msg":"slow {}",'
        b'"session":"acme","module":"Client","jid":"15551234567@lid"}\n'
    )
    (entry,) = logged(lambda: log_engine_line(line))
    assert entry | {"time": ""} == {
        "time": "",
        "level": "warning",
        "action": "engine",
        "session": "acme",
        "message": "slow {}",
        "module": "Client",
        "jid": "1555…67@lid",
    }


@pytest.mark.parametrize(
    ("level", "expected"),
    [("DEBUG", "debug"), ("DEBUG-4", "debug"), ("INFO", "info"), ("WARN+2", "warning"), ("ERROR", "error"), ("?", "warning")],
)
def test_levels_of_slog(level: str, expected: str) -> None:
    (entry,) = logged(lambda: log_engine_line(orjson.dumps({"level": level, "msg": "x"})))
    assert entry["level"] == expected


def test_a_panic_is_logged_as_it_is_but_redacted_and_bounded() -> None:
    def write() -> None:
        log_engine_line(f"panic: no device {NUMBER}\n".encode())
        log_engine_line(b"x" * 100_000)

    panic, long = logged(write)
    assert panic["message"] == "panic: no device 1555…67"
    assert (panic["level"], panic["action"]) == ("warning", "engine")
    assert len(long["message"]) == ENGINE_MESSAGE_CHARS


@few
@given(st.binary() | st.recursive(st.none() | st.text() | st.integers(), st.lists, max_leaves=3).map(lambda v: repr(v).encode()))
def test_no_line_of_an_engine_raises(line: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged(lambda: log_engine_line(line))


@few
@given(st.dictionaries(st.text(), st.text() | st.integers(-(2**63), 2**63 - 1) | st.none() | st.lists(st.text()), max_size=4))
def test_any_object_of_an_engine_is_logged(fields: dict[str, Any]) -> None:
    (entry,) = logged(lambda: log_engine_line(orjson.dumps(fields)))
    assert entry["message"] == str(fields.get("msg", ""))
