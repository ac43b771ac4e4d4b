"""The seams between services and edges: small Protocols over plain records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from warren.core.envelope import Outcome
from warren.core.metrics import Family

T = TypeVar("T")

# --- RabbitMQ ---------------------------------------------------------------------------------------------------------


class Published(Enum):
    """What became of a publish."""

    CONFIRMED = "confirmed"
    REFUSED = "refused"
    """The broker said no (nack, unknown exchange, too large): the message is not stored."""
    UNKNOWN = "unknown"
    """No confirm came: it may be stored or not. Publish again with the same id; never assume either."""


class Incoming(Protocol):
    """One message from RabbitMQ that is not settled yet. Settling never raises: on a lost channel RabbitMQ redelivers."""

    body: bytes
    exchange: str
    """The exchange the client published to, also when the message took the way over an alternate exchange."""
    routing_key: str
    message_id: str | None
    reply_to: str | None
    correlation_id: str | None
    redelivered: bool

    async def ack(self) -> None: ...

    async def requeue(self) -> None:
        """Give it back to its queue, at its old place as far as the broker can."""
        ...


OnMessage = Callable[[Incoming], None]
"""Called in the event loop, for each message in order; it must only hand over (it may not block, await or raise)."""


OnDead = Callable[[Incoming, str], None]
"""The same for what came to the dead queue: with RabbitMQ's word for why it put it there ("expired", ...), or "" when that was
not RabbitMQ.
"""


class Claim(Protocol):
    """One session's hold on RabbitMQ: the ownership lock, its two queues, its consumers, on a channel of its own.

    A claim is kept until released: after a lost connection the edge takes the lock again (waiting while somebody else holds it),
    declares the queues again and consumes again, by itself.
    """

    @property
    def held(self) -> bool:
        """Whether the lock is ours right now."""
        ...

    async def wait_held(self) -> None:
        """Until the lock is ours and the control queue is consumed."""
        ...

    async def consume_work(self) -> None:
        """Start consuming `warren.session.<id>` (idempotent). Kept up over reconnects.

        Returns at once, or, when the queue has only just been made, when it takes commands: seconds later at most.
        """
        ...

    async def pause_work(self) -> None:
        """Stop consuming `warren.session.<id>` (idempotent).

        Everything unsettled of it returns to the queue, in its order; settling it afterwards does nothing.
        """
        ...

    async def unbind(self) -> None:
        """Let no more commands into the two queues: they go to the unclaimed ones from now on. Best effort; until the claim is
        set up again (`release(remove=True)` follows).
        """
        ...

    async def release(self, *, remove: bool = False) -> None:
        """Stop consuming and give up the lock. `remove` (logout) also unbinds and deletes both queues, after handing what is
        left in them to the callbacks it was claimed with (so that each still gets its answer).
        """
        ...


class Bus(Protocol):
    """RabbitMQ as the services see it. Connections, reconnects and declarations are the edge's own business."""

    @property
    def connected(self) -> asyncio.Event:
        """Set while both connections are up and the topology is declared."""
        ...

    @property
    def trouble(self) -> str:
        """What is wrong with RabbitMQ, with a hint; empty when nothing is. It may block publishers while connected."""
        ...

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        *,
        message_id: str,
        content_type: str,
        headers: dict[str, str],
    ) -> Published:
        """Publish persistently and wait for the confirm, at most the configured time. Never raises for broker trouble."""
        ...

    async def reply(self, reply_to: str, correlation_id: str | None, body: bytes) -> None:
        """Best effort, to the default exchange, not confirmed."""
        ...

    async def claim(self, session: str, *, on_control: OnMessage, on_work: OnMessage) -> Claim:
        """Take the session. Raises OwnershipError when somebody else holds it, BrokerUnavailable when RabbitMQ is away."""
        ...

    def keep_claim(self, session: str, *, on_control: OnMessage, on_work: OnMessage) -> Claim:
        """Like `claim` but at once, for sessions that are ours by our own records: the edge goes on trying until it is held."""
        ...


# --- warren.db --------------------------------------------------------------------------------------------------------


class Desired(Enum):
    """What the registry wants of a session."""

    RUNNING = "running"
    STOPPED = "stopped"
    REMOVING = "removing"
    """Logged out; its queues on RabbitMQ are still to be emptied and deleted."""
    GONE = "gone"
    """Removed: only the epoch is remembered, so that a later session of the same name continues it."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A row of the registry."""

    session: str
    epoch: int
    desired: Desired
    sequence: int = 0
    """The last sequence used in this epoch."""
    settings: dict[str, Any] = field(default_factory=dict)
    account: dict[str, Any] = field(default_factory=dict)
    """`jid`, `lid` and `push_name` as of the last login; empty before the first."""
    halted: str = ""
    """The state that needs somebody (`logged_out`, `replaced`, ...), kept over restarts; "" when none."""
    paired: bool = False
    """A device row was seen: from now on a missing state is a loss to report, not a reason to pair afresh."""
    until: str = ""
    """When `halted` ends by itself (RFC 3339), kept over restarts; without `halted`, when WhatsApp's time-lock does. "": never,
    or nobody knows."""


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """An event on its way to RabbitMQ, as it will be published (`body` is the finished CloudEvent)."""

    session: str
    epoch: int
    sequence: int
    event_id: str
    event: str
    body: bytes


@dataclass(frozen=True, slots=True)
class JournalRow:
    """The final outcome of a command."""

    session: str
    command_id: str
    fingerprint: str
    outcome: bytes
    """The outcome as JSON, without the envelope."""


@dataclass(frozen=True, slots=True)
class AddEvent:
    row: OutboxRow


@dataclass(frozen=True, slots=True)
class RemoveEvents:
    """Confirmed rows, by (session, epoch, sequence)."""

    keys: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class PutOutcome:
    row: JournalRow


@dataclass(frozen=True, slots=True)
class PutSession:
    """Insert or replace a registry row. Its `sequence` is only used for a new (session, epoch): AddEvent keeps it after that.

    `Desired.GONE` also forgets what PutPacing and PutStarts have kept of the session.
    """

    record: SessionRecord


@dataclass(frozen=True, slots=True)
class KeepOutcome:
    """A journal row that came back with a backup; one that is there already stays."""

    row: JournalRow


@dataclass(frozen=True, slots=True)
class BackupRow:
    """How far a session is backed up: the last object of ours that the store holds, and what we have tried to put behind it."""

    session: str
    epoch: int
    sequence: int
    """0: the epoch has begun, and nothing of it is in the store yet."""
    at: float = 0.0
    """Unix time of the last backup, in whatever epoch; 0: none."""
    size: int = 0
    """Bytes of it."""
    digest: str = ""
    """SHA-256 of its contents before sealing: what has not changed is not put again."""
    attempts: tuple[str, ...] = ()
    """SHA-256 of every object we tried to put under the next sequence, on disk before the put: tells ours from a stranger's."""
    idle_since: float = 0.0
    """Unix time since when nobody uses the session; 0: somebody does."""


@dataclass(frozen=True, slots=True)
class PutBackup:
    row: BackupRow


@dataclass(frozen=True, slots=True)
class RemoveBackup:
    session: str


@dataclass(frozen=True, slots=True)
class PutPacing:
    """When a session's last messages went out (milliseconds since 1970, in order): its window of the rate limit."""

    session: str
    stamps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PutStarts:
    """How many executions of a command have started without an end; 0: it has ended, forget it."""

    session: str
    command_id: str
    count: int


Write = AddEvent | RemoveEvents | PutOutcome | PutSession | PutPacing | PutStarts | KeepOutcome | PutBackup | RemoveBackup


class Store(Protocol):
    """`warren.db`: registry, outbox, journal. One writer; whatever waits is committed together (`synchronous=FULL`)."""

    def write(self, *writes: Write) -> asyncio.Future[None]:
        """Queue writes as one unit; the future is done when they are on disk. Units are committed in the order of the calls, even
        if nobody awaits the future. A failing unit (disk full) fails its own future with StateError and changes nothing.
        """
        ...

    async def sessions(self) -> list[SessionRecord]: ...

    async def session(self, session: str) -> SessionRecord | None: ...

    async def outcome(self, session: str, command_id: str) -> JournalRow | None: ...

    async def last_outcomes(self, session: str, limit: int) -> list[JournalRow]:
        """The last outcomes of a session, oldest first."""
        ...

    async def backup(self, session: str) -> BackupRow | None: ...

    async def pacing(self, session: str) -> tuple[int, ...]:
        """What PutPacing has kept; empty when nothing."""
        ...

    async def starts(self, session: str, command_id: str) -> int:
        """What PutStarts has kept; 0 when nothing."""
        ...

    async def outbox_sessions(self) -> list[str]:
        """The sessions that have rows in the outbox."""
        ...

    async def outbox_page(self, session: str, after: tuple[int, int], limit: int) -> list[OutboxRow]:
        """Rows of one session after (epoch, sequence), in order."""
        ...

    async def outbox_bytes(self) -> int:
        """The sum of the bodies."""
        ...

    async def close(self) -> None: ...


# --- state directory --------------------------------------------------------------------------------------------------


class StateDir(Protocol):
    """`<state>/sessions/<id>/<epoch>/` and the `current` pointer."""

    async def current_epoch(self, session: str) -> int | None:
        """The epoch the pointer names; None when there is no pointer. Raises StateError when it exists but cannot be read."""
        ...

    async def prepare(self, session: str, epoch: int) -> Path:
        """Make the epoch's directory (0700, durable) and point `current` at it. Returns the directory. Idempotent."""
        ...

    async def remove(self, session: str) -> None:
        """Delete everything of a session (logout only)."""
        ...

    async def epochs(self, session: str) -> list[int]:
        """The epochs that have a directory, ascending, current or not."""
        ...

    async def has_state(self, session: str, epoch: int) -> bool:
        """Whether the epoch has a `state.db`, good or bad."""
        ...

    async def copied(self, session: str, copy: Callable[[Path, Path], Awaitable[T]]) -> tuple[T, bytes] | None:
        """Let `copy` write a copy of the current state: it is given the directory and the file to make. Returns what it returned
        and the file's bytes (b"" when it made none); the file is gone afterwards, however it ends. None: there is no state.
        """
        ...

    async def stage(self, session: str, database: bytes) -> None:
        """Put a database that came from a backup on disk, beside the session's epochs, and check it. Raises SealError when it is
        not whole, and StateError; nothing else has changed then.
        """
        ...

    async def install(self, session: str, epoch: int) -> None:
        """Make what was staged the state of a new epoch and point `current` at it. Older epochs stay. Crash-safe: the pointer is
        the old one or the new one, with its whole state.
        """
        ...

    async def keep(self, session: str, epoch: int) -> None:
        """Mark an epoch whose state cannot be read: `tidy` leaves it alone."""
        ...

    async def tidy(self, session: str) -> None:
        """Delete the epochs before the current one, but for those that are kept."""
        ...


# --- object store -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """An object as it was read."""

    data: bytes
    version: str
    """Changes with the content; for `replace`. Means nothing outside the store it came from."""


@dataclass(frozen=True, slots=True)
class Listed:
    name: str
    size: int
    """Bytes."""
    modified: float
    """Unix time, by the store's clock."""


class ObjectStore(Protocol):
    """Where backups live. One attempt per call, each with a deadline of its own: repeating is the caller's business.

    Every call raises StorageError for whatever goes wrong, and only then. After `unavailable` a put may have taken effect or not,
    now or a moment later: repeat it with the same bytes, and when the name then exists, read it back. Cancelling stops the
    waiting; what was asked may still happen.
    """

    async def create(self, name: str, data: bytes) -> bool:
        """Put an object that does not exist yet; all of it or nothing becomes visible. False: the name is taken."""
        ...

    async def replace(self, name: str, data: bytes, expected: str) -> bool:
        """Put over an object whose version is `expected`. False: it was changed or deleted meanwhile, and nothing was done."""
        ...

    async def get(self, name: str) -> Found | None:
        """None: there is no such object. Never None for one that is there but cannot be read."""
        ...

    async def list(self, prefix: str) -> list[Listed]:
        """Every object below the folder `prefix` (no slash at its end; "" for all), sorted by name. Complete or StorageError."""
        ...

    async def delete(self, name: str) -> None:
        """It is gone afterwards; that it was not there is fine."""
        ...

    async def close(self) -> None: ...


# --- people and monitoring --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Something for an operator. `blocking`: the daemon cannot do its work and is not ready; else it works, with less safety."""

    code: str
    message: str
    hint: str
    blocking: bool = True


class Overview(Protocol):
    """What the HTTP server shows. Nothing here waits or fails."""

    @property
    def ready(self) -> bool:
        """Whether no problem is blocking."""
        ...

    def problems(self) -> list[Problem]: ...

    def families(self) -> list[Family]:
        """Every metric."""
        ...

    def sessions(self) -> list[dict[str, Any]]:
        """Every session's status, by id (docs/message-api.md)."""
        ...

    def session(self, session: str) -> dict[str, Any] | None: ...


class Commanding(Protocol):
    """How people give commands."""

    async def run(self, command: str, session: str, args: dict[str, Any], timeout_s: float) -> Outcome | None:
        """Publish a command and wait for its outcome; None: not within the time. Raises CommandError, BrokerUnavailable."""
        ...


# --- engine -----------------------------------------------------------------------------------------------------------


class EngineProcess(Protocol):
    """One running engine: a pipe of frames and a process. Made by the edge, supervised by `services.engines`."""

    pid: int

    async def send(self, frame: bytes) -> None:
        """Write one frame (with its newline). Raises EngineError(engine_code="gone") when the process is gone."""
        ...

    async def frames(self) -> bytes | None:
        """The next line, without its newline; None when the engine is gone. Raises FrameError for an over-long line."""
        ...

    async def terminate(self, timeout_s: float) -> int:
        """Wait for the exit, kill after `timeout_s`, return the exit status."""
        ...

    def kill(self) -> None: ...


StartEngine = Callable[[], Awaitable[EngineProcess]]
