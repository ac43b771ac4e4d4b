"""Frames from RabbitMQ made readable: one malformed message must not cost the connection.

RabbitMQ passes on what publishers wrote into a message's properties without looking at it. pamqp 4.0.1 refuses a
timestamp past the year 9999 (a publisher that counts in microseconds is enough) and short strings that are not UTF-8,
and aiormq 7.2.4 then drops the whole connection; the message comes back with the next one, for ever (measured). So
what pamqp cannot read is taken out before it sees the frame; the message itself is delivered.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Final

import pamqp.decode
import pamqp.frame

METHOD: Final = 1
HEADER: Final = 2
HEAD_SIZE: Final = 7
"""Type (1), channel (2), size of the payload (4)."""

_DELIVER: Final = b"\x00\x3c\x00\x3c"
_GET_OK: Final = b"\x00\x3c\x00\x47"

_SHORT, _TABLE, _OCTET, _TIME = range(4)
_PROPERTIES: Final = (
    (15, _SHORT),  # content type
    (14, _SHORT),  # content encoding
    (13, _TABLE),  # headers
    (12, _OCTET),  # delivery mode
    (11, _OCTET),  # priority
    (10, _SHORT),  # correlation id
    (9, _SHORT),  # reply to
    (8, _SHORT),  # expiration
    (7, _SHORT),  # message id
    (6, _TIME),
    (5, _SHORT),  # type
    (4, _SHORT),  # user id
    (3, _SHORT),  # app id
    (2, _SHORT),  # cluster id
)
"""Basic's properties by flag bit, in the order of the wire (AMQP 0-9-1, 1.8.1)."""
_NEEDS_A_LOOK: Final = 1 << 13 | 1 << 6


def readable(frame: bytes) -> bytes:
    """`frame` (with its end byte) as it is, or, if pamqp could not read it, without what it cannot read."""
    kind, payload = frame[0], frame[HEAD_SIZE:-1]
    if kind == METHOD and payload[:4] in {_DELIVER, _GET_OK} and not payload.isascii():
        return _framed(frame, _readable_delivery(payload))
    if kind == HEADER and not _plain(payload) and not _reads(frame):
        return _framed(frame, _readable_header(payload))
    return frame


def _plain(header: bytes) -> bool:
    (flags,) = struct.unpack_from(">H", header, 12)
    return not flags & _NEEDS_A_LOOK and header[14:].isascii()


def _reads(frame: bytes) -> bool:
    try:
        pamqp.frame.unmarshal(frame)
    except Exception:  # whatever it raises, it has not read it
        return False
    return True


def _framed(original: bytes, payload: bytes) -> bytes:
    return original[:3] + struct.pack(">I", len(payload)) + payload + original[-1:]


def _readable_delivery(payload: bytes) -> bytes:
    """The same Basic.Deliver or Basic.GetOk, with a readable routing key (the publisher chose it)."""
    at = 4
    if payload[:4] == _DELIVER:
        at += 1 + payload[at]  # consumer tag
    at += 9  # delivery tag, redelivered
    at += 1 + payload[at]  # exchange
    start, end = at + 1, at + 1 + payload[at]
    key = payload[start:end]
    if _is_text(key):
        return payload
    return payload[:start] + bytes(byte if byte < 0x80 else ord("?") for byte in key) + payload[end:]


def _readable_header(payload: bytes) -> bytes:
    """The same content header, with only those properties that can be read; never the timestamp."""
    (flags,) = struct.unpack_from(">H", payload, 12)
    at, kept_flags, kept = 14, 0, bytearray()
    for bit, kind in _PROPERTIES:
        if not flags & 1 << bit:
            continue
        size = _size(kind, payload, at)
        value = payload[at : at + size]
        at += size
        if _keeps(kind, value):
            kept_flags |= 1 << bit
            kept += value
    return payload[:12] + struct.pack(">H", kept_flags) + bytes(kept)


def _size(kind: int, payload: bytes, at: int) -> int:
    match kind:
        case 0:
            return 1 + payload[at]
        case 1:
            return 4 + int(struct.unpack_from(">I", payload, at)[0])
        case 2:
            return 1
        case _:
            return 8


def _keeps(kind: int, value: bytes) -> bool:
    if kind == _SHORT:
        return _is_text(value[1:])
    if kind == _TABLE:
        try:
            pamqp.decode.field_table(value)
        except Exception:  # a table that pamqp cannot read is left out
            return False
        return True
    return kind == _OCTET


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


class FrameReader(asyncio.StreamReader):
    """Reads whole frames from `inner` and gives on what pamqp can read."""

    def __init__(self, inner: asyncio.StreamReader) -> None:
        super().__init__()
        self._inner = inner
        self._ready = bytearray()

    def at_eof(self) -> bool:
        return not self._ready and self._inner.at_eof()

    async def readexactly(self, n: int) -> bytes:
        while len(self._ready) < n:
            self._ready += await self._frame()
        data = bytes(self._ready[:n])
        del self._ready[:n]
        return data

    async def read(self, n: int = -1) -> bytes:
        if self._ready:
            data = bytes(self._ready)
            self._ready.clear()
            return data
        return await self._inner.read(n)

    async def _frame(self) -> bytes:
        head = await self._inner.readexactly(HEAD_SIZE)
        if head.startswith(b"AMQP"):  # a broker that speaks another version says so with eight bytes that are no frame
            return head + await self._inner.readexactly(1)
        (size,) = struct.unpack_from(">I", head, 3)
        return readable(head + await self._inner.readexactly(size + 1))
