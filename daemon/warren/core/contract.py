"""What goes out, as types: the data of every event, outcome and reply. `make schemas` turns them into `schemas/`.

The daemon builds plain dicts and does not check them against these types; the tests do, for every event that a real warren
publishes. A field that is not `NotRequired` is always there. These types take no field they do not know, so that a test notices
one nobody wrote down; the published schemas leave events, replies and outcomes open, because fields may be added.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, NotRequired, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter

# Pydantic cannot use typing's own TypedDict before Python 3.12.
from typing_extensions import TypedDict

from warren.core.envelope import TIME
from warren.core.names import NO_SESSION, SESSION_ID

Time = Annotated[str, Field(pattern=f"^{TIME.pattern}$", json_schema_extra={"format": "date-time"})]
"""RFC 3339 with a zone."""
Jid = Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")]
"""`15551234567@s.whatsapp.net`, `987654321@lid`, `120363012345678901@g.us`; a sender's may have a device (`…:3@…`)."""
SessionId = Annotated[str, Field(pattern=f"^{SESSION_ID.pattern}$")]
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
"""A code or reason for programs. More may be added, so they are no enumeration."""
Count = Annotated[int, Field(ge=0)]
StateName = Literal[
    "stopped",
    "restoring",
    "connecting",
    "pairing",
    "online",
    "time_locked",
    "backing_off",
    "stopping",
    "logged_out",
    "replaced",
    "blocked",
    "outdated",
    "quarantined",
]


class _Exact(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)  # type: ignore[misc]


# --- the data of events -----------------------------------------------------------------------------------------------


class Qr(_Exact):
    """A code to scan with the phone, before it expires; the next one follows by itself."""

    code: Annotated[str, Field(min_length=1)]
    """What to draw as a QR code, whatever it holds."""
    expires_at: Time
    remaining: Count
    """How many codes follow this one."""


class ShownQr(Qr):
    """A code to scan with the phone, before it expires; the next one follows by itself."""

    image: Annotated[str, Field(pattern=r"^data:image/png;base64,")]
    """The same as a picture."""


class PairingCode(_Exact):
    """A code to type into the phone, before it expires."""

    code: Annotated[str, Field(min_length=1)]
    """As people are shown it, for example `ABCD-1234`."""
    expires_at: Time
    phone_number: Annotated[str, Field(pattern=r"^\+[1-9][0-9]{6,14}$")]
    """The phone it is for."""


class StateChange(_Exact):
    """The session is in another state, or about to be."""

    state: StateName
    previous: StateName
    code: Word
    """Why, for programs."""
    message: NotRequired[str]
    """Why, for people."""
    hint: NotRequired[str]
    """What to do about it."""
    until: NotRequired[Time]
    """When it goes on by itself."""
    attempt: NotRequired[Count]
    """Failed connections in a row."""
    retry_in_s: NotRequired[float]


class Connected(StateChange):
    """The session is online, as WhatsApp confirmed."""

    jid: Jid
    lid: Jid | Literal[""] | None
    push_name: str | None


class Quoted(_Exact):
    message_id: str
    sender: str | None


class Message(_Exact):
    """A message that arrived, or was sent from another device of the account (`from_me`)."""

    chat: Jid
    chat_alt: Jid | None
    """The other address of the same chat: its LID for a phone number and the reverse."""
    from_: Annotated[Jid, Field(alias="from")]
    """Who sent it, with the device."""
    from_alt: Jid | None
    from_me: bool
    group: bool
    message_id: Annotated[str, Field(min_length=1)]
    kind: Literal["text", "other"]
    text: str | None
    """For `text`."""
    type: str | None
    """For `other`: what it is (`image`, `reaction`, …)."""
    timestamp: Time
    push_name: str | None
    quoted: Quoted | None
    offline: bool
    """It had waited at WhatsApp while the session was away."""
    truncated: bool
    """The text was longer than a frame of the engine holds, and is cut."""


class Receipt(_Exact):
    """Messages were delivered, read or played."""

    chat: Jid
    chat_alt: Jid | None
    from_: Annotated[Jid, Field(alias="from")]
    from_alt: Jid | None
    from_me: bool
    message_ids: Annotated[list[str], Field(min_length=1)]
    type: Literal["delivered", "read", "played", "sent_elsewhere", "other"]
    timestamp: Time


class Undecryptable(_Exact):
    """A message came that could not be decrypted. It usually arrives again by itself, as a `message`."""

    code: Literal["undecryptable"]
    message: str
    hint: str
    chat: Jid
    from_: Annotated[Jid, Field(alias="from")]
    message_id: str
    timestamp: Time


# --- outcomes and replies ---------------------------------------------------------------------------------------------


class Error(_Exact):
    """Why a command failed; see the table of errors in docs/message-api.md."""

    code: Word
    """For programs; stable."""
    message: Annotated[str, Field(min_length=1)]
    hint: str
    retry_after: NotRequired[Annotated[float, Field(ge=0)]]
    """Seconds."""


class CreateResult(_Exact):
    session: SessionId
    state: StateName
    epoch: Count


class SendResult(_Exact):
    message_id: Annotated[str, Field(pattern=r"^[0-9A-F]+$")]
    timestamp: Time
    """WhatsApp's clock."""


class DisconnectResult(_Exact):
    state: StateName


class LogoutResult(_Exact):
    """Empty."""


class DeleteResult(_Exact):
    """Empty."""


class KeptSettings(_Exact):
    """As kept with the session; null: the daemon's default."""

    device_name: str | None
    mark_online: bool | None
    proxy: str | None
    """Without its password."""
    messages_per_minute: Count | None


class SettingsResult(_Exact):
    settings: KeptSettings
    waiting: list[Word]
    """Which of the changed ones are not in force yet: `mark_online` and `proxy` are with the next connection (`disconnect`, then
    `create`), `device_name` with the next pairing.
    """


Position = Annotated[str, Field(pattern=r"^[0-9]+/[0-9]+$")]
"""Of a backup: epoch/sequence."""


class BackupResult(_Exact):
    """The session's newest backup: a new one, or the one before when nothing has changed since."""

    position: Position
    at: Time
    size: Count
    """Bytes in the store."""


class RestoreResult(_Exact):
    position: Position
    """The backup that was restored."""
    epoch: Count
    """The session's new epoch."""


class BackupStatus(_Exact):
    """How far the session is backed up."""

    position: Position | None
    """The newest backup of this epoch; null: none yet."""
    at: Time | None
    """When the newest backup was made."""
    size: Count
    """Bytes of it in the store."""
    pending: bool
    """Something may have changed since."""
    failures: Count
    """Failed tries in a row."""
    message: str | None
    """Why the last one failed."""


class BackupFailed(_Exact):
    """Backups of the session fail, again and again; they are tried for ever."""

    code: Word
    message: str
    hint: str
    failures: Count
    """Failed tries in a row."""
    last_backup_at: Time | None


class Status(_Exact):
    """What is known of a session right now; null is what is not known or does not apply."""

    session: SessionId
    state: StateName
    since: Time
    code: Word | None
    message: str | None
    hint: str | None
    until: Time | None
    jid: Jid | None
    lid: Jid | Literal[""] | None
    push_name: str | None
    epoch: Count
    desired: Literal["running", "stopped", "removing", "gone"]
    attempt: Count
    """Failed connections in a row."""
    last_message_at: Time | None
    outbox: Count
    """Events that RabbitMQ has not confirmed yet."""
    backup: BackupStatus | None
    """Null when `[storage] mode` is `local`."""
    qr: Qr | None
    """While `pairing` by QR code."""
    pairing_code: PairingCode | None
    """While `pairing` by code."""


class ListResult(_Exact):
    """The sessions of one daemon."""

    instance: str
    sessions: list[Status]


Name = TypeVar("Name")
Result = TypeVar("Result")
Data = TypeVar("Data")


class Completed(_Exact, Generic[Name, Result]):
    """The end of a command that went well."""

    id: str | None
    """The command's id; null for a query without one."""
    command: Name
    ok: Literal[True]
    result: Result


class Failed(_Exact):
    """The end of a command that failed. `command` is what the publisher wrote: "" when it could not be read."""

    id: str | None
    """The command's id; null when it had none that could be read."""
    command: str
    ok: Literal[False]
    error: Error


# --- CloudEvents ------------------------------------------------------------------------------------------------------


class _CloudEvent(_Exact, Generic[Name, Data]):
    specversion: Literal["1.0"]
    id: Annotated[str, Field(pattern=r"^[^/]+/[a-z2-7]{26}$")]
    """The same event always has the same id: drop what you have seen."""
    source: Annotated[str, Field(pattern=r"^/warren/.+$")]
    type: Name
    subject: str
    time: Time
    datacontenttype: Literal["application/json"]
    session: SessionId
    instance: str
    """The daemon that published it."""
    data: Data


class Ephemeral(_CloudEvent[Name, Data]):
    """An event that is worthless later: it has no place in the order and is dropped while RabbitMQ is away."""


Epoch = Annotated[int, Field(ge=1, le=2_147_483_647)]
Sequence = Annotated[str, Field(pattern=r"^\d{10}$")]


class Sequenced(_CloudEvent[Name, Data]):
    """An event with its place in the session's order."""

    epoch: Epoch
    """Rises with every new life of the session."""
    sequence: Sequence
    """From 1 without gaps within session and epoch; sorts as text."""


class CompletedEvent(Sequenced[Name, Data]):
    """An event with its place in the session's order."""

    causationid: NotRequired[str]
    """The command's id."""


class FailedEvent(_CloudEvent[Name, Data]):
    """Has a place in the order if its session is served here; `session` is "_" when the command named none."""

    session: Annotated[str, Field(pattern=f"^({SESSION_ID.pattern}|{NO_SESSION})$")]
    epoch: NotRequired[Epoch]
    sequence: NotRequired[Sequence]
    causationid: NotRequired[str]
    """The command's id, if it had one that could be read."""


REPLIES: dict[str, TypeAdapter[Any]] = {
    "create": TypeAdapter(Completed[Literal["create"], CreateResult] | Failed),
    "send": TypeAdapter(Completed[Literal["send"], SendResult] | Failed),
    "disconnect": TypeAdapter(Completed[Literal["disconnect"], DisconnectResult] | Failed),
    "logout": TypeAdapter(Completed[Literal["logout"], LogoutResult] | Failed),
    "delete": TypeAdapter(Completed[Literal["delete"], DeleteResult] | Failed),
    "settings": TypeAdapter(Completed[Literal["settings"], SettingsResult] | Failed),
    "status": TypeAdapter(Completed[Literal["status"], Status] | Failed),
    "backup": TypeAdapter(Completed[Literal["backup"], BackupResult] | Failed),
    "restore": TypeAdapter(Completed[Literal["restore"], RestoreResult] | Failed),
    "list": TypeAdapter(Completed[Literal["list"], ListResult] | Failed),
}
"""The reply to a command, by command: its outcome."""

AnyCompleted = (
    Completed[Literal["create"], CreateResult]
    | Completed[Literal["send"], SendResult]
    | Completed[Literal["disconnect"], DisconnectResult]
    | Completed[Literal["logout"], LogoutResult]
    | Completed[Literal["delete"], DeleteResult]
    | Completed[Literal["settings"], SettingsResult]
    | Completed[Literal["status"], Status]
    | Completed[Literal["backup"], BackupResult]
    | Completed[Literal["restore"], RestoreResult]
)

OUTCOMES: dict[str, TypeAdapter[Any]] = {"command_completed": TypeAdapter(AnyCompleted), "command_failed": TypeAdapter(Failed)}
"""The data of the two outcome events. `list` has a reply only."""

EVENTS: dict[str, TypeAdapter[Any]] = {
    "qr": TypeAdapter(Ephemeral[Literal["warren.qr"], ShownQr]),
    "pairing_code": TypeAdapter(Ephemeral[Literal["warren.pairing_code"], PairingCode]),
    "connected": TypeAdapter(Sequenced[Literal["warren.connected"], Connected]),
    "disconnected": TypeAdapter(Sequenced[Literal["warren.disconnected"], StateChange]),
    "reconnecting": TypeAdapter(Sequenced[Literal["warren.reconnecting"], StateChange]),
    "reconnect_failed": TypeAdapter(Sequenced[Literal["warren.reconnect_failed"], StateChange]),
    "logout": TypeAdapter(Sequenced[Literal["warren.logout"], StateChange]),
    "message": TypeAdapter(Sequenced[Literal["warren.message"], Message]),
    "receipt": TypeAdapter(Sequenced[Literal["warren.receipt"], Receipt]),
    "command_completed": TypeAdapter(CompletedEvent[Literal["warren.command_completed"], AnyCompleted]),
    "command_failed": TypeAdapter(FailedEvent[Literal["warren.command_failed"], Failed]),
    "health_check_failed": TypeAdapter(Sequenced[Literal["warren.health_check_failed"], StateChange]),
    "backup_failed": TypeAdapter(Sequenced[Literal["warren.backup_failed"], BackupFailed]),
    "error": TypeAdapter(Sequenced[Literal["warren.error"], StateChange | Undecryptable]),
}
"""Every event, as it is published, by name."""
