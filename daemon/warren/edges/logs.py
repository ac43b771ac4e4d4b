"""The log: one set-up for warren, its libraries and the engine's stderr, redacted on its way out whoever wrote it."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any, Literal, TextIO

import orjson
from loguru import logger

from warren.core.redact import redact, redact_fields

if TYPE_CHECKING:
    from loguru import Message, Record

Format = Literal["auto", "human", "json"]

ENGINE_MESSAGE_CHARS = 4_096
"""Of an engine's line that is no JSON (a Go panic): the rest is cut off."""

WARNING = 30
REPEATS = 5
REPEAT_WINDOW_S = 60.0
REPEATS_KNOWN = 1_000
"""Different warnings that are remembered; of more, the oldest count as new again."""

_RESERVED = ("time", "level", "action", "session", "message", "exception")
_QUIET_LIBRARIES = ("aiormq", "aio_pika", "asyncio")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {9: "\\t", 10: "\\n", 13: "\\r"}

Redact = Callable[[str], str]
RedactFields = Callable[[Mapping[str, Any]], dict[str, Any]]


def configure_logging(
    level: str,
    format: Format,
    redact: bool,
    *,
    trace: Collection[str] = (),
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Send everything to `stream` (stderr when None), replacing what was set up before.

    `auto` is for people on a terminal and JSON elsewhere: under systemd, in a container, through a pipe. Of the sessions in
    `trace` everything is told, whatever the level.
    """
    out = sys.stderr if stream is None else stream
    as_json = format == "json" or (format == "auto" and not _is_terminal(out))
    render = _json_line if as_json else _human_line
    text, fields = _redaction(redact)
    lowest, traced, repeats = logger.level(level.upper()).no, frozenset(trace), _Repeats(clock)

    def wanted(record: Record) -> bool:
        return record["level"].no >= lowest or record["extra"].get("session") in traced

    def sink(message: Message) -> None:
        if said := repeats.said(message.record):
            out.write(render(said, text, fields))
            out.flush()

    # `diagnose` would print the values of local variables, keys included; `backtrace` frames of callers.
    logger.remove()
    floor = "DEBUG" if traced else level.upper()
    logger.add(sink, level=floor, filter=wanted, format="{message}", diagnose=False, backtrace=False)
    _intercept_stdlib(level)


def log_engine_line(line: bytes) -> None:
    """Log again one line that an engine wrote to stderr. Whatever it is, it does not raise; what is no JSON is a warning."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        text = line.decode(errors="replace").rstrip()[:ENGINE_MESSAGE_CHARS]
        logger.bind(action="engine").warning("{}", text)
        return
    level, message = str(record.pop("level", "")), str(record.pop("msg", ""))
    record.pop("time", None)
    logger.bind(**{"action": "engine", **record}).log(_loguru_level(level), "{}", message)


def _loguru_level(name: str) -> str:
    # slog writes levels between its four as `DEBUG-4` or `WARN+2`.
    name = name.upper().split("+")[0].split("-")[0]
    return {"DEBUG": "DEBUG", "INFO": "INFO", "WARN": "WARNING", "ERROR": "ERROR"}.get(name, "WARNING")


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and "JOURNAL_STREAM" not in os.environ


def _redaction(on: bool) -> tuple[Redact, RedactFields]:
    return (redact, redact_fields) if on else (str, dict)


class _Repeats:
    """The same warning or error (level, action, session and words) is told REPEATS times in REPEAT_WINDOW_S; what comes more is
    counted, and the first one of the next window has the count as `repeated`. Milder records always pass: a state change is told.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._windows: OrderedDict[tuple[object, ...], _Window] = OrderedDict()

    def said(self, record: Record) -> Record | None:
        """The record to write, or None. Called under loguru's lock."""
        if record["level"].no < WARNING:
            return record
        extra, now = record["extra"], self._clock()
        key = (record["level"].no, extra.get("action"), extra.get("session"), record["message"])
        window = self._windows.get(key)
        if window is None or now - window.began >= REPEAT_WINDOW_S:
            self._windows[key] = _Window(now)
            self._windows.move_to_end(key)
            if len(self._windows) > REPEATS_KNOWN:
                self._windows.popitem(last=False)
            if window is not None and window.held:
                extra["repeated"] = window.held
            return record
        window.told += 1
        if window.told <= REPEATS:
            return record
        window.held += 1
        return None


@dataclass(slots=True)
class _Window:
    began: float
    told: int = 1
    held: int = 0


# --- one record as one line -------------------------------------------------------------------------------------------


def _json_line(record: Record, text: Redact, fields: RedactFields) -> str:
    extra = fields(record["extra"])
    entry = {
        "time": _utc(record),
        "level": record["level"].name.lower(),
        "action": extra.pop("action", ""),
        "session": extra.pop("session", ""),
        "message": text(record["message"]),
    }
    if exception := _exception(record):
        entry["exception"] = text(exception)
    entry |= {f"{key}_" if key in _RESERVED else str(key): value for key, value in extra.items()}
    return _dumps(entry) + "\n"


def _human_line(record: Record, text: Redact, fields: RedactFields) -> str:
    extra = fields(record["extra"])
    words = [
        record["time"].strftime("%H:%M:%S.%f")[:-3],
        f"{record['level'].name:<7}",
        str(extra.pop("action", "")),
        str(extra.pop("session", "")),
        text(record["message"]),
        *(f"{key}={value}" for key, value in extra.items()),
    ]
    # Texts may come from anybody: without control characters nobody can fake a line or drive the terminal.
    line = " ".join(word for word in words if word).translate(_CONTROL) + "\n"
    if exception := _exception(record):
        line += text(exception)
    return line


def _utc(record: Record) -> str:
    return record["time"].astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _exception(record: Record) -> str:
    exception = record["exception"]
    if exception is None:
        return ""
    return "".join(traceback.format_exception(exception.type, exception.value, exception.traceback))


def _dumps(entry: dict[str, Any]) -> str:
    options = orjson.OPT_NON_STR_KEYS
    try:
        return orjson.dumps(entry, default=str, option=options).decode()
    except TypeError:  # a lone surrogate, an integer over 64 bits, a circle
        plain = {str(key): str(value).encode("utf-8", "backslashreplace").decode() for key, value in entry.items()}
        return orjson.dumps(plain).decode()


# --- the standard library's logging -------------------------------------------------------------------------------------


def _intercept_stdlib(level: str) -> None:
    logging.basicConfig(handlers=[_Intercept()], level=level.upper(), force=True)
    for name in _QUIET_LIBRARIES:
        # They tell every frame at DEBUG and every reconnect of their own at INFO; ours are told by our own code.
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class _Intercept(logging.Handler):
    """Hands records of libraries to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the standard library for each record."""
        known = {"CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG"}
        level: str | int = record.levelname if record.levelname in known else record.levelno
        logger.bind(action="library", logger=record.name).opt(exception=record.exc_info).log(level, "{}", record.getMessage())
