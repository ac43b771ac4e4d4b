"""Errors that speak to people: what is wrong, why, and what to do about it."""

from __future__ import annotations

from typing import ClassVar, Literal

StorageTrouble = Literal["unavailable", "denied", "misconfigured", "corrupt"]
"""Of a StorageError: try again later; credentials or permissions; a wrong bucket, region or address; an answer without sense."""


class WarrenError(Exception):
    """Base of every error warren raises on purpose.

    `code` is stable and meant for programs; `message` and `hint` are sentences for people. `hint` says what to do, `retryable`
    whether the same request may succeed later without anybody changing anything.
    """

    code: ClassVar[str] = "internal"
    retryable: bool = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class ConfigError(WarrenError):
    """A setting is missing, malformed or contradicts another; the message names it."""

    code = "config"


class BrokerUnavailable(WarrenError):
    """RabbitMQ cannot be reached, started or used."""

    code = "broker_unavailable"
    retryable = True


class OwnershipError(WarrenError):
    """Somebody else holds the session or the state directory."""

    code = "owned_elsewhere"
    retryable = True


class StateError(WarrenError):
    """State on disk exists but cannot be used. Never answered by starting afresh over it.

    `retryable`: the disk takes no writes now (full, read-only), which says nothing about what is on it.
    """

    code = "state_unreadable"

    def __init__(self, message: str, *, hint: str = "", retryable: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.retryable = retryable


class StorageError(WarrenError):
    """The object store did not do what was asked. Whether a put took effect is unknown when `kind` is "unavailable"."""

    code = "storage"

    def __init__(self, message: str, *, kind: StorageTrouble, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.retryable = kind == "unavailable"


class SealError(WarrenError):
    """Bytes from the object store that are not what was sealed under their name: damaged, swapped, renamed or replayed."""

    code = "backup_damaged"


class StorageKeyError(SealError):
    """A session's key is wrapped with a master key that is not among the ones given."""

    code = "storage_key"


class EngineError(WarrenError):
    """The engine refused a request or is not there. `engine_code` is its word (see docs/engine-protocol.md)."""

    code = "engine"
    retryable = True

    def __init__(self, message: str, *, engine_code: str, server_code: int | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.engine_code = engine_code
        self.server_code = server_code


class FrameError(WarrenError):
    """Bytes from the engine that are not a frame of the protocol: the two sides no longer agree."""

    code = "frame"


class CommandError(WarrenError):
    """Why a command failed, as its outcome tells the sender. `final` failures are kept in the journal."""

    def __init__(self, code: str, message: str, *, hint: str = "", final: bool = True, retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = code
        self.final = final
        self.retry_after = retry_after
