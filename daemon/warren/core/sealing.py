"""Sealed objects and wrapped keys: bytes that nobody reads or changes without the key, and that open only under their own name.

A sealed object, all numbers big-endian:

    "WARREN" | version 1 | kind 1 or 2 | data key id (16) | nonce (12) | AES-256-GCM of zstd(record length, 4 | record | database)

What is authenticated beside the content: the first 24 bytes, the session, the epoch and the sequence. A wrapped key:

    "WARKEY" | version 1 | 0 | master key id (16) | data key id (16) | nonce (12) | AES-256-GCM of the data key (32)

authenticated with its first 40 bytes and the session. So an object that was damaged, cut, swapped with another, renamed or
brought back under another number does not open. What this cannot tell: that the newest objects of a session are missing.

Randomness comes from the operating system: it must never be somebody's choice.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import struct
from dataclasses import dataclass, field
from enum import Enum

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from warren.core.backup_names import Place
from warren.errors import SealError, StorageKeyError

KEY_BYTES = 32
MAX_CONTENT_BYTES = 256 * 1024 * 1024
"""Of record and database together, uncompressed: bounds the memory of one backup or restore. A database has 1 to 20 MB."""
ZSTD_LEVEL = 3
"""Keys do not compress; higher levels only cost time (measured)."""

_OBJECT, _KEY, _VERSION = b"WARREN", b"WARKEY", 1
_OBJECT_HEAD = struct.Struct(">6sBB16s")
_KEY_HEAD = struct.Struct(">6sBB16s16s")
_NONCE_BYTES, _TAG_BYTES, _ID_BYTES = 12, 16, 16
_LENGTH = struct.Struct(">I")
_RESTORE = "It is left where it is; an older backup may be whole: `warren backup verify` tells."


class Kind(Enum):
    """What a sealed object is. 3 is kept for increments."""

    STATE = 1
    """A session record and a database."""
    SEAL = 2
    """The end of an epoch: a record only. Nothing of that epoch counts behind it."""


@dataclass(frozen=True, slots=True)
class Position:
    """Which backup of which session: what the name of the object says."""

    session: str
    place: Place

    def __str__(self) -> str:
        return f"{self.session} {self.place}"


@dataclass(frozen=True, slots=True)
class Sealed:
    """What was in a sealed object."""

    kind: Kind
    record: bytes
    database: bytes
    """Empty in a SEAL."""


# --- keys -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MasterKey:
    """The operator's key. It wraps data keys and nothing else."""

    secret: bytes = field(repr=False)

    @classmethod
    def from_hex(cls, text: str) -> MasterKey:
        """From 64 hexadecimal digits. Raises ValueError, without repeating what was given."""
        if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
            raise ValueError("a key is 64 hexadecimal digits")
        secret = bytes.fromhex(text)
        if len(set(secret)) < KEY_BYTES // 4:  # among random keys one in 10^33
            raise ValueError("this key is not random; `warren keys generate` makes one")
        return cls(secret)

    @property
    def id(self) -> bytes:
        """Tells which key is meant and nothing about it; 16 bytes."""
        return hmac.digest(self.secret, b"warren: the id of a master key", hashlib.sha256)[:_ID_BYTES]


@dataclass(frozen=True, slots=True)
class Keyring:
    """The master keys in use: new data keys are wrapped with `write`; `read` are the older ones that still open some."""

    write: MasterKey
    read: tuple[MasterKey, ...] = ()

    def find(self, id: bytes) -> MasterKey | None:
        return next((key for key in (self.write, *self.read) if key.id == id), None)


@dataclass(frozen=True, slots=True)
class DataKey:
    """Seals the objects of one session, for as long as the session lives."""

    id: bytes
    secret: bytes = field(repr=False)


def new_data_key() -> DataKey:
    return DataKey(os.urandom(_ID_BYTES), os.urandom(KEY_BYTES))


def wrap(keyring: Keyring, session: str, data_key: DataKey) -> bytes:
    """The bytes of a session's key object, for the keyring's `write` key."""
    head = _KEY_HEAD.pack(_KEY, _VERSION, 0, keyring.write.id, data_key.id)
    nonce = os.urandom(_NONCE_BYTES)
    return head + nonce + AESGCM(keyring.write.secret).encrypt(nonce, data_key.secret, head + session.encode())


def unwrap(keyring: Keyring, session: str, blob: bytes) -> DataKey:
    """The data key in a session's key object.

    Raises StorageKeyError when it is wrapped with a master key that the keyring does not have, SealError when it is damaged or
    another session's.
    """
    what = f"The key of session {session}"
    master_id, key_id = _key_head(what, blob)
    master = keyring.find(master_id)
    if master is None:
        raise StorageKeyError(
            f"{what} is wrapped with the master key {master_id.hex()[:8]}, which is not among the ones given.",
            hint="Put the key that was in use when it was written into `[storage] key` or, after a change, `old_keys`.",
        )
    body = blob[_KEY_HEAD.size :]
    try:
        secret = AESGCM(master.secret).decrypt(
            body[:_NONCE_BYTES], body[_NONCE_BYTES:], blob[: _KEY_HEAD.size] + session.encode()
        )
    except InvalidTag:
        raise SealError(f"{what} is damaged, or belongs to another session.", hint=_KEY_LOST) from None
    return DataKey(key_id, secret)


def master_key_id(session: str, blob: bytes) -> bytes:
    """Which master key a key object was wrapped with: what it claims, not proved before `unwrap`. Raises SealError."""
    return _key_head(f"The key of session {session}", blob)[0]


_KEY_LOST = (
    "Without it the session's backups cannot be read. If the bucket keeps versions, bring an earlier one of this object back."
)


def _key_head(what: str, blob: bytes) -> tuple[bytes, bytes]:
    if len(blob) != _KEY_HEAD.size + _NONCE_BYTES + KEY_BYTES + _TAG_BYTES:
        raise SealError(f"{what} has {len(blob)} bytes, which no wrapped key has.", hint=_KEY_LOST)
    magic, version, zero, master_id, key_id = _KEY_HEAD.unpack_from(blob)
    if magic != _KEY or zero:
        raise SealError(f"{what} is no wrapped key.", hint=_KEY_LOST)
    if version != _VERSION:
        raise SealError(f"{what} is in format {version}; this warren reads {_VERSION}.", hint="A newer warren wrote it: upgrade.")
    return master_id, key_id


# --- objects ----------------------------------------------------------------------------------------------------------


def seal_state(data_key: DataKey, position: Position, record: bytes, database: bytes) -> bytes:
    """The bytes of a backup. Takes some milliseconds per megabyte: not for the event loop. Raises SealError when too large."""
    return _seal(data_key, position, Kind.STATE, record, database)


def seal_end(data_key: DataKey, position: Position, record: bytes) -> bytes:
    """The bytes of a seal, which closes the epoch of `position`."""
    return _seal(data_key, position, Kind.SEAL, record, b"")


def _seal(data_key: DataKey, position: Position, kind: Kind, record: bytes, database: bytes) -> bytes:
    size = _LENGTH.size + len(record) + len(database)
    if size > MAX_CONTENT_BYTES:
        raise SealError(
            f"Session {position.session} is too large to be backed up: {size} bytes; the limit is {MAX_CONTENT_BYTES}.",
            hint="No session known has a hundredth of it: look at its state.db.",
        )
    packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(b"".join((_LENGTH.pack(len(record)), record, database)))
    head = _OBJECT_HEAD.pack(_OBJECT, _VERSION, kind.value, data_key.id)
    nonce = os.urandom(_NONCE_BYTES)
    return b"".join((head, nonce, AESGCM(data_key.secret).encrypt(nonce, packed, _bound(head, position))))


def kind_of(position: Position, blob: bytes) -> Kind:
    """What an object claims to be, from its first 24 bytes; not proved before `open_sealed`. Raises SealError."""
    return _object_head(f"The backup {position}", blob)[0]


def open_sealed(data_key: DataKey, position: Position, blob: bytes) -> Sealed:
    """What `seal_state` or `seal_end` was given for this very position. Raises SealError for anything else."""
    what = f"The backup {position}"
    kind, key_id = _object_head(what, blob)
    if key_id != data_key.id:
        raise SealError(f"{what} was sealed with another key than the session's.", hint=_RESTORE)
    head, body = blob[: _OBJECT_HEAD.size], blob[_OBJECT_HEAD.size :]
    try:
        packed = AESGCM(data_key.secret).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], _bound(head, position))
    except InvalidTag:
        raise SealError(f"{what} is damaged, or was sealed for another session or position.", hint=_RESTORE) from None
    return _unpack(what, kind, packed)


def _object_head(what: str, blob: bytes) -> tuple[Kind, bytes]:
    if len(blob) < _OBJECT_HEAD.size + _NONCE_BYTES + _TAG_BYTES:
        raise SealError(f"{what} is cut off after {len(blob)} bytes.", hint=_RESTORE)
    magic, version, kind, key_id = _OBJECT_HEAD.unpack_from(blob)
    if magic != _OBJECT:
        raise SealError(f"{what} is no sealed object of warren.", hint=_RESTORE)
    if version != _VERSION or kind not in {k.value for k in Kind}:
        raise SealError(
            f"{what} is of format {version}, kind {kind}, which this warren does not read.",
            hint="A newer warren wrote it: upgrade.",
        )
    return Kind(kind), key_id


def _bound(head: bytes, position: Position) -> bytes:
    session = position.session.encode()
    return b"".join(
        (head, _LENGTH.pack(len(session)), session, struct.pack(">QQ", position.place.epoch, position.place.sequence))
    )


def _unpack(what: str, kind: Kind, packed: bytes) -> Sealed:
    """Of bytes that whoever has the key has sealed: what is wrong here is a bug or a limit, not an attack."""
    try:
        size = zstandard.frame_content_size(packed)
        if not _LENGTH.size <= size <= MAX_CONTENT_BYTES:
            raise SealError(f"{what} claims to hold {size} bytes; the limit is {MAX_CONTENT_BYTES}.", hint=_RESTORE)
        content = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as e:
        raise SealError(f"{what} does not decompress ({e}).", hint=_RESTORE) from e
    (length,) = _LENGTH.unpack_from(content)
    record, database = content[_LENGTH.size : _LENGTH.size + length], content[_LENGTH.size + length :]
    if len(record) != length or (kind is Kind.SEAL and database):
        raise SealError(f"{what} contradicts itself.", hint=_RESTORE)
    return Sealed(kind, record, database)
