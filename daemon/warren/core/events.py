"""What the engine says, in the words of the contract with clients (docs/message-api.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from warren.core.frames import EngineEvent
from warren.core.names import event_id


@dataclass(frozen=True, slots=True)
class Inbound:
    """An event for subscribers that WhatsApp may deliver twice; the same delivery always gives the same id."""

    event: str
    event_id: str
    data: dict[str, Any]


def inbound(event: EngineEvent) -> Inbound:
    """The client event for a `message`, `receipt` or `undecryptable`. Raises KeyError for a frame without its fields."""
    return _INBOUND[event.event](event)


ANSWERED = frozenset({"message", "receipt", "undecryptable"})
"""The engine's events that wait for an answer."""


def _message(event: EngineEvent) -> Inbound:
    d = event.data
    return Inbound(
        "message",
        event_id(event.session, "message", d["chat"], d["sender"], d["message_id"], "0"),
        {
            "chat": d["chat"],
            "chat_alt": d.get("chat_alt"),
            "from": d["sender"],
            "from_alt": d.get("sender_alt"),
            "from_me": d["from_me"],
            "group": d.get("group", False),
            "message_id": d["message_id"],
            "kind": d["kind"],
            "text": d.get("text"),
            "type": d.get("type"),
            "timestamp": d["timestamp"],
            "push_name": d.get("push_name"),
            "quoted": d.get("quoted"),
            "offline": d.get("offline", False),
            "truncated": d.get("truncated", False),
        },
    )


def _receipt(event: EngineEvent) -> Inbound:
    d = event.data
    ids = [str(i) for i in d["message_ids"]]
    return Inbound(
        "receipt",
        event_id(event.session, "receipt", d["chat"], d["sender"], d["type"], *sorted(ids)),
        {
            "chat": d["chat"],
            "chat_alt": d.get("chat_alt"),
            "from": d["sender"],
            "from_alt": d.get("sender_alt"),
            "from_me": d["from_me"],
            "message_ids": ids,
            "type": d["type"],
            "timestamp": d["timestamp"],
        },
    )


def _undecryptable(event: EngineEvent) -> Inbound:
    d = event.data
    return Inbound(
        "error",
        event_id(event.session, "undecryptable", d["chat"], d["sender"], d["message_id"]),
        {
            "code": "undecryptable",
            "message": "A message arrived that could not be decrypted.",
            "hint": "Nothing to do: the sender's phone was asked to send it again. If it stays away, ask the sender.",
            "chat": d["chat"],
            "from": d["sender"],
            "message_id": d["message_id"],
            "timestamp": d["timestamp"],
        },
    )


_INBOUND = {"message": _message, "receipt": _receipt, "undecryptable": _undecryptable}


@dataclass(frozen=True, slots=True)
class SendFailure:
    """What an engine's refusal to send means for the command. `final`: the same command can never succeed."""

    code: str
    message: str
    hint: str
    final: bool
    retry_after: float | None = None


UNKNOWN_OUTCOME = frozenset({"timeout", "disconnected", "gone", "no_answer"})
"""Engine codes after which the message may or may not be out: the command is repeated with the same message id."""
NOT_SENT = frozenset({"not_open", "not_connected", "busy", "disk_trouble"})
"""Engine codes after which nothing went out: the command goes back to its queue."""

_SEND_FAILURES = {
    f.code: f
    for f in (
        SendFailure("invalid_recipient", "WhatsApp does not take this recipient.", "Check `to`.", final=True),
        SendFailure("recipient_not_found", "This number has no WhatsApp account.", "Check `to`.", final=True),
        SendFailure(
            "recipient_unreachable", "No device of the recipient could be encrypted to.", "Send it again later.", final=False
        ),
        SendFailure(
            "restricted",
            "WhatsApp restricts this account from writing to people it has no conversation with (463).",
            "Let the recipient write first, or wait; sending more makes it worse.",
            final=False,
        ),
        SendFailure(
            "rate_limited", "WhatsApp asks for fewer requests.", "Wait, then send it again.", final=False, retry_after=60.0
        ),
        SendFailure("rejected", "WhatsApp's server refused the message.", "See the code in the message.", final=False),
    )
}


def send_failure(engine_code: str, engine_message: str, server_code: int | None) -> SendFailure:
    """For an engine code that is neither in UNKNOWN_OUTCOME nor in NOT_SENT."""
    known = _SEND_FAILURES.get(engine_code)
    if known is None:
        return SendFailure("internal", f"The engine failed: {engine_message}", "See the log of the daemon.", final=False)
    if server_code is None:
        return known
    return SendFailure(known.code, f"{known.message} (server code {server_code})", known.hint, known.final, known.retry_after)
