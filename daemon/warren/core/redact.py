"""What must not stand in a log: phone numbers, LIDs, keys, passwords, texts. Pure; `edges.logs` applies it to every record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

SECRET_FIELDS = frozenset({"text", "body", "code", "qr", "password", "key", "url", "token", "secret", "root_key", "push_name"})
"""Fields whose text is never shown, whatever it looks like. Numbers in them are (a `code` of 401 is no secret)."""

PLAIN_FIELDS = frozenset({"session"})
"""Session ids are the operator's own words, and a log whose sessions cannot be told apart helps nobody (the engine agrees)."""

MIN_DIGITS = 8
"""Shorter runs of digits are counts, ports, codes and years; hardly any mobile number is."""
MAX_DEPTH = 8
"""Of nested fields; deeper ones are hidden whole."""

# Repetitions are possessive (`++`), bounded or end at what begins the next match: anybody can get text into a log, and none may
# take quadratic time. A password reaches to the last `@` before the next URL or blank; it may be a token of some kilobytes.
_URL_PASSWORD = re.compile(r"""(\w://[^\s:/@"'<>]*+):(?:(?:(?!://)[^\s"'<>@])*+@)++""")
# 32 bytes and more as hex, or 32 bytes as base64 (43 characters and its padding): the sizes of every key there is.
_KEY = re.compile(r"[0-9A-Fa-f]{64,}+|(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{43}=")
_SERVER = r"(?:s\.whatsapp\.net|lid|g\.us|c\.us|hosted(?:\.lid)?|broadcast|newsletter|msgr|bot)\b"

# One pass from left to right, so that what must be left alone is taken out of the text before a number is looked for in it.
_NUMBERS = re.compile(
    r"(?P<time>\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d{1,9})?)"
    r"|(?P<uuid>\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b)"
    rf"|(?P<user>\d++)(?P<rest>(?:[.:_-][\d.:_-]{{0,40}}+)?@{_SERVER})"
    r"|(?P<written>\+\d(?:[ ().\u00a0-]{0,3}\d){5,20}+)"
    r"|(?P<word>[^\W_]++)"
)
_RUN = re.compile(rf"\d{{{MIN_DIGITS},}}+")
_HEX_ID = re.compile(r"(?=\d*[a-fA-F])(?:[0-9a-f]{16,}|[0-9A-F]{16,})")


def redact(text: str) -> str:
    """The text without passwords in URLs, keys, JIDs and phone numbers, however they are embedded.

    A number keeps its beginning and its last two digits (`1555…67`), so that two of them can be told apart; at least five
    digits go. Left alone are times and dates, UUIDs, hexadecimal ids of 16 digits and more that show a letter, and what cannot
    be a number by E.164: over 15 digits, and 10 or 13 digits that begin with 1 (with country code 1 there are 11; such are
    timestamps).
    """
    text = _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", text)
    text = _KEY.sub(HIDDEN, text)
    return _NUMBERS.sub(_replace, text)


def hide_password(url: str) -> str:
    """A URL without its password."""
    return _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", url)


def redact_fields(fields: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """The fields of a record, nested ones too, fit for a log. Text and what is not plain data is shown as redacted text."""
    return {redact(str(key)): _field(str(key), value, depth) for key, value in fields.items()}


def _field(name: str, value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if name.lower() in SECRET_FIELDS:
        return HIDDEN
    if name in PLAIN_FIELDS and isinstance(value, str):
        return value
    return _value(value, depth)


def _value(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return HIDDEN if depth >= MAX_DEPTH else redact_fields(value, depth + 1)
    if isinstance(value, list | tuple | set | frozenset):
        return HIDDEN if depth >= MAX_DEPTH else [_value(item, depth + 1) for item in value]
    return redact(str(value))


def _replace(match: re.Match[str]) -> str:
    if user := match["user"]:
        return _mask(user) + _RUN.sub(_mask_run, match["rest"])
    if written := match["written"]:
        return "+" + _mask("".join(filter(str.isdigit, written)))
    if (word := match["word"]) and not _HEX_ID.fullmatch(word):
        return _RUN.sub(_mask_run, word)
    return match[0]


def _mask_run(match: re.Match[str]) -> str:
    run = match[0]
    no_number = len(run) > 15 or (len(run) in (10, 13) and run[0] == "1")
    return run if no_number else _mask(run)


def _mask(digits: str) -> str:
    """Hides at least five digits, or all when there are fewer than eight."""
    if len(digits) < MIN_DIGITS:
        return "…"
    return f"{digits[: min(4, len(digits) - 7)]}…{digits[-2:]}"
