"""The contract with clients: commands in, outcomes and CloudEvents out. Pydantic guards the way in; the way out is plain."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from warren.core.backup_names import Place
from warren.core.names import (
    NO_SESSION,
    SESSION_ID,
    Topology,
    command_fingerprint,
    event_id,
    is_session_id,
)
from warren.errors import CommandError

MAX_BODY_BYTES = 262_144
"""A command's body. Texts are far smaller; media travels by reference."""
MAX_TEXT_CHARS = 65_536
"""WhatsApp's own limit for a text message."""
MAX_ID_CHARS = 200
MAX_QUOTED_CHARS = 64
"""How much of a name that somebody made up is repeated in an error: a quarter of a megabyte would help nobody."""
CLOUDEVENT = "application/cloudevents+json"
JSON = "application/json"

_PHONE = re.compile(r"\+[1-9][0-9]{6,14}")
TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?(Z|[+-]\d{2}:\d{2})", re.ASCII)
_JID = re.compile(r"[0-9]{5,20}@(s\.whatsapp\.net|lid)|[0-9-]{5,40}@g\.us")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class NoArgs(_Strict):
    """`disconnect`, `logout`, `delete`, `status`, `backup`, `list`."""


class KeptSettings(_Strict):
    """What is kept with a session; what is not given stays as it is."""

    device_name: Annotated[str, StringConstraints(min_length=1, max_length=50)] | None = None
    """What the phone shows under "Linked devices". Taken when pairing; default: `[whatsapp] device_name`."""
    mark_online: bool | None = None
    """Whether contacts see the account as online while the session is. Kept; default: false."""
    proxy: Annotated[str, StringConstraints(pattern=r"^(http|https|socks5)://[^\s/]+$", max_length=500)] | None = None
    """`http://`, `https://` or `socks5://` with host, port and, if need be, user and password. Kept; default: none."""

    messages_per_minute: Annotated[int, Field(ge=0, le=6_000)] | None = None
    """How many messages the session sends in a minute at most; 0: no limit. Kept; default: `[pacing] messages_per_minute`."""

    def settings(self) -> dict[str, Any]:
        """The given ones."""
        return self.model_dump(include=set(KeptSettings.model_fields), exclude_none=True)


class CreateArgs(KeptSettings):
    """`create`: start a session, and pair it if it has no phone yet."""

    phone_number: Annotated[str, StringConstraints(pattern=f"^{_PHONE.pattern}$")] | None = None
    """Pair by a code that is typed into this phone, instead of a QR code: E.164 with `+`."""


SettingName = Literal["device_name", "mark_online", "proxy", "messages_per_minute"]


class SettingsArgs(KeptSettings):
    """`settings`: change what `create` has set, without starting anything; without arguments it only tells."""

    reset: list[SettingName] | None = None
    """Names of settings that are to have their default again."""

    @model_validator(mode="after")
    def _set_or_reset(self) -> SettingsArgs:
        if both := [name for name in self.reset or () if getattr(self, name) is not None]:
            raise ValueError(f"`{both[0]}` is given and in `reset`")
        return self

    def applied(self, before: dict[str, Any]) -> dict[str, Any]:
        """What a session keeps then."""
        gone = set(self.reset or ())
        return {**{k: v for k, v in before.items() if k not in gone}, **self.settings()}


class SendArgs(_Strict):
    """`send`: one text message."""

    to: Annotated[str, Field(json_schema_extra={"pattern": f"^({_PHONE.pattern}|{_JID.pattern})$"})]
    """E.164 with `+`, or a JID (`<digits>@s.whatsapp.net`, `<digits>@lid`, `<id>@g.us`)."""
    text: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]

    @field_validator("to")
    @classmethod
    def _recipient(cls, to: str) -> str:
        if _PHONE.fullmatch(to) or _JID.fullmatch(to):
            return to
        raise ValueError("a recipient is a phone number with its +, like +15551234567, or a JID like 15551234567@s.whatsapp.net")

    @property
    def jid(self) -> str:
        return f"{self.to[1:]}@s.whatsapp.net" if self.to.startswith("+") else self.to


class RestoreArgs(_Strict):
    """`restore`: bring the session's state back from a backup."""

    at: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}/[0-9]{1,10}$")] | None = None
    """Which one, as epoch/sequence; default: the newest."""

    @field_validator("at")
    @classmethod
    def _place(cls, at: str | None) -> str | None:
        if at is not None:
            Place.parse(at)
        return at


Args = NoArgs | CreateArgs | SettingsArgs | SendArgs | RestoreArgs


@dataclass(frozen=True, slots=True)
class Spec:
    """What a command is: its arguments, the exchange it belongs on, and whether it has an effect (and so needs an id)."""

    args: type[NoArgs | CreateArgs | SettingsArgs | SendArgs | RestoreArgs]
    exchange: str
    effect: bool = True


COMMANDS: dict[str, Spec] = {
    "create": Spec(CreateArgs, "control"),
    "disconnect": Spec(NoArgs, "control"),
    "logout": Spec(NoArgs, "control"),
    "delete": Spec(NoArgs, "control"),
    "settings": Spec(SettingsArgs, "control"),
    "status": Spec(NoArgs, "control", effect=False),
    "backup": Spec(NoArgs, "control"),
    "restore": Spec(RestoreArgs, "control"),
    "send": Spec(SendArgs, "commands"),
    "list": Spec(NoArgs, "queries", effect=False),
}


class _Envelope(_Strict):
    """The outer shape of a command; `args` is checked by the command's own model."""

    command: str
    session: str | None = None
    id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS)] | None = None
    expires_at: AwareDatetime | None = None
    args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("expires_at", mode="before")
    @classmethod
    def _rfc3339(cls, value: object) -> object:
        # Strict mode takes only datetime objects; JSON has strings. Python by itself would read more than RFC 3339 allows.
        if not isinstance(value, str):
            return value
        with contextlib.suppress(ValueError):
            if TIME.fullmatch(value):
                return datetime.fromisoformat(value)
        raise ValueError("a time looks like 2030-11-20T12:00:00Z (RFC 3339, with a zone)")


@dataclass(frozen=True, slots=True)
class Command:
    """A command that was understood. `session` is "" for `list`."""

    name: str
    session: str
    id: str | None
    args: Args
    fingerprint: str
    expires_at: datetime | None = None

    def expired(self, now: datetime) -> bool:
        return self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True, slots=True)
class Origin:
    """What an AMQP message says besides its body. `exchange` is the kind (`control`, `commands`, `queries`), not the name; "" is
    any other, the default exchange for one.
    """

    exchange: str
    routing_key: str
    message_id: str | None = None


class Rejected(CommandError):
    """A command that could not be understood, with what could be read of it, so that an outcome can still be addressed.

    `undecodable` says that not even its sender could be told which command it was: it goes to `warren.dead`.
    """

    def __init__(
        self,
        error: CommandError,
        *,
        session: str = NO_SESSION,
        command_id: str | None = None,
        command: str = "",
        undecodable: bool = False,
    ) -> None:
        super().__init__(error.reason, error.message, hint=error.hint)
        self.session = session
        self.command = command
        self.command_id = command_id
        self.undecodable = undecodable


def decode_command(body: bytes, origin: Origin) -> Command:
    """The command in an AMQP message. Raises Rejected with a precise reason for everything that is wrong with it."""
    raw = _json_object(body, origin)
    session = raw.get("session")
    address = session if isinstance(session, str) and is_session_id(session) else NO_SESSION
    command = _quoted(raw["command"]) if isinstance(raw.get("command"), str) else ""
    try:
        return _checked(raw, origin)
    except CommandError as e:
        raise Rejected(e, session=address, command_id=_told_id(raw.get("id"), origin), command=command) from None


def _told_id(in_body: object, origin: Origin) -> str | None:
    """The id under which the publisher may recognise a command that is refused."""
    return next((i for i in (in_body, origin.message_id) if isinstance(i, str) and 1 <= len(i) <= MAX_ID_CHARS), None)


def _quoted(name: str) -> str:
    return name if len(name) <= MAX_QUOTED_CHARS else name[: MAX_QUOTED_CHARS - 1] + "…"


def _json_object(body: bytes, origin: Origin) -> dict[str, Any]:
    def unreadable(code: str, message: str, hint: str) -> Rejected:
        session = origin.routing_key if is_session_id(origin.routing_key) else NO_SESSION
        error = CommandError(code, message, hint=hint)
        return Rejected(error, session=session, command_id=_told_id(None, origin), undecodable=True)

    if len(body) > MAX_BODY_BYTES:
        raise unreadable("too_large", f"The body has {len(body)} bytes.", f"The limit is {MAX_BODY_BYTES}.")
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise unreadable("invalid_json", f"The body is not JSON: {e}.", "Publish one JSON object per message.") from None
    if not isinstance(raw, dict):
        raise unreadable("invalid_json", "The body is JSON but no object.", 'It starts like {"command": "send", …}.')
    return raw


def _checked(raw: dict[str, Any], origin: Origin) -> Command:
    try:
        outer = _Envelope.model_validate(raw)
    except ValidationError as e:
        raise _field_error("invalid_command", e) from None
    spec = COMMANDS.get(outer.command)
    if spec is None:
        said = _quoted(outer.command)
        raise CommandError("unknown_command", f"There is no command `{said}`.", hint=f"Known: {', '.join(COMMANDS)}.")
    if spec.exchange != origin.exchange:
        raise CommandError(
            "wrong_exchange",
            f"`{outer.command}` does not belong on the exchange it was published to.",
            hint=f"Publish it to the exchange `<prefix>.{spec.exchange}`.",
        )
    session = _session(outer.session, spec, origin)
    command_id = _id(outer.id, origin.message_id, spec, outer.command)
    try:
        args = spec.args.model_validate(outer.args)
    except ValidationError as e:
        raise _field_error("invalid_argument", e) from None
    # What was not given does not count, so that an argument that a later version adds changes no fingerprint.
    canonical = orjson.dumps(args.model_dump(exclude_none=True), option=orjson.OPT_SORT_KEYS)
    return Command(outer.command, session, command_id, args, command_fingerprint(outer.command, canonical), outer.expires_at)


def _session(session: str | None, spec: Spec, origin: Origin) -> str:
    if spec.exchange == "queries":
        return ""
    if session is None or not is_session_id(session):
        raise CommandError(
            "invalid_session",
            "The command names no session." if session is None else "That is no session id.",
            hint=f"A session id matches ^{SESSION_ID.pattern}$.",
        )
    if origin.routing_key != session:
        raise CommandError(
            "invalid_session",
            "The routing key is not the session id.",
            hint="Publish with the session id as routing key, so that the command reaches the session's owner.",
        )
    return session


def _id(in_body: str | None, in_property: str | None, spec: Spec, command: str) -> str | None:
    # Some clients fill `message_id` with a random value by themselves (aio-pika does): the body is what somebody wrote.
    command_id = in_body if in_body is not None else in_property
    if command_id is None and spec.effect:
        raise CommandError(
            "id_required",
            f"`{command}` needs an id.",
            hint="Set `id` to something unique to this request, and to the same when you repeat it: that makes repeating safe.",
        )
    if command_id is not None and not 1 <= len(command_id) <= MAX_ID_CHARS:
        raise CommandError(
            "invalid_command",
            f"The `message_id` property is empty or over {MAX_ID_CHARS} characters.",
            hint="Set `id` in the body instead.",
        )
    return command_id


def _field_error(code: str, error: ValidationError) -> CommandError:
    """The first problem pydantic found, in words; unknown fields first, because they explain missing ones."""
    problems = sorted(error.errors(include_url=False, include_input=False), key=lambda p: p["type"] != "extra_forbidden")
    first = problems[0]
    where = _quoted(".".join(str(part) for part in first["loc"])) or "the command"
    if first["type"] == "extra_forbidden":
        return CommandError(code, f"There is no field `{where}`.", hint="Check the spelling against docs/message-api.md.")
    said = first["msg"].removeprefix("Value error, ")
    return CommandError(code, f"`{where}`: {said}.", hint="See docs/message-api.md for its type and limits.")


# --- outcomes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """The one end of a command: `error` is None when it went well."""

    command: str
    command_id: str | None
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def event(self) -> str:
        return "command_completed" if self.ok else "command_failed"

    def body(self) -> dict[str, Any]:
        """As clients see it, in the reply and as the event's data."""
        base: dict[str, Any] = {"id": self.command_id, "command": self.command, "ok": self.ok}
        return {**base, "result": self.result} if self.ok else {**base, "error": self.error}

    @staticmethod
    def failed(command: str, command_id: str | None, error: CommandError) -> Outcome:
        told: dict[str, Any] = {"code": error.reason, "message": error.message, "hint": error.hint}
        if error.retry_after is not None:
            told["retry_after"] = error.retry_after
        return Outcome(command, command_id, error=told)

    @staticmethod
    def parse(body: bytes) -> Outcome:
        """From a journal row or a reply. Raises ValueError when it is none."""
        match orjson.loads(body):
            case {"command": str(command), "id": str() | None as command_id, "ok": True, "result": dict(result)}:
                return Outcome(command, command_id, result)
            case {"command": str(command), "id": str() | None as command_id, "ok": False, "error": dict(error)}:
                return Outcome(command, command_id, error=error)
        raise ValueError("that is no outcome")


def outcome_event_id(session: str, outcome: Outcome, fingerprint: str) -> str:
    """The same command with the same outcome kind is the same event; without an id, nothing could recognise a repetition."""
    return event_id(session, "outcome", outcome.command_id or "", fingerprint, "ok" if outcome.ok else str(outcome.error))


# --- events -----------------------------------------------------------------------------------------------------------

EPHEMERAL = frozenset({"qr", "pairing_code"})
"""Events that are worthless later: no sequence, no outbox, dropped while RabbitMQ is away."""


def cloud_event(
    topology: Topology,
    *,
    event: str,
    event_id: str,
    session: str,
    instance: str,
    time: datetime,
    data: dict[str, Any] | orjson.Fragment,
    epoch: int | None = None,
    sequence: int | None = None,
    causation_id: str | None = None,
) -> bytes:
    """A CloudEvents 1.0 event in structured JSON. `sequence` is a string there, as CloudEvents' own extension defines it."""
    envelope: dict[str, Any] = {
        "specversion": "1.0",
        "id": event_id,
        "source": topology.source,
        "type": f"warren.{event}",
        "subject": session,
        "time": timestamp(time),
        "datacontenttype": JSON,
        "session": session,
        "instance": instance,
    }
    if epoch is not None:
        envelope["epoch"] = epoch
    if sequence is not None:
        envelope["sequence"] = f"{sequence:010d}"
    if causation_id is not None:
        envelope["causationid"] = causation_id
    envelope["data"] = data
    return orjson.dumps(envelope)


def event_time(body: bytes) -> datetime:
    """When an event of ours happened, as `cloud_event` wrote it."""
    return datetime.fromisoformat(orjson.loads(body)["time"])


def timestamp(time: datetime) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.microsecond // 1000:03d}Z"
