"""Names: session ids, RabbitMQ objects, event and message ids. Changing any of these is a migration."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_@+=-]{0,63}")
"""Safe as routing key, file name and object name at once."""

NO_SESSION = "_"
"""Stands for the session in routing keys and ids of outcomes whose command named none; it is no valid session id."""


def is_session_id(text: str) -> bool:
    return SESSION_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Topology:
    """Every exchange and queue of one warren, derived from its prefix (DESIGN, "The contract on RabbitMQ")."""

    prefix: str

    @property
    def control(self) -> str:
        return f"{self.prefix}.control"

    @property
    def commands(self) -> str:
        return f"{self.prefix}.commands"

    @property
    def queries(self) -> str:
        return f"{self.prefix}.queries"

    @property
    def unclaimed(self) -> str:
        return f"{self.prefix}.unclaimed"

    @property
    def out(self) -> str:
        return f"{self.prefix}.out"

    @property
    def events(self) -> str:
        return f"{self.prefix}.events"

    @property
    def tap(self) -> str:
        return f"{self.prefix}.tap"

    @property
    def unrouted(self) -> str:
        return f"{self.prefix}.events.unrouted"

    @property
    def dead(self) -> str:
        return f"{self.prefix}.dead"

    @property
    def notices(self) -> str:
        """A copy of what comes to `dead`, from which the daemon tells the outcome of what RabbitMQ itself put there."""
        return f"{self.prefix}.dead.notices"

    def control_queue(self, session: str) -> str:
        return f"{self.prefix}.control.{session}"

    def work_queue(self, session: str) -> str:
        return f"{self.prefix}.session.{session}"

    def new_queue(self, session: str) -> str:
        """Exists while no command was ever routed to the session's work queue (see `edges.amqp_claim`)."""
        return f"{self.prefix}.session.{session}.new"

    def owner_queue(self, session: str) -> str:
        return f"{self.prefix}.owner.{session}"

    def queries_queue(self, instance: str) -> str:
        return f"{self.prefix}.queries.{instance}"

    def owns(self, queue: str) -> bool:
        """Whether a queue's name is one of warren's own, or could become one: everything behind the prefix and a dot."""
        return queue.startswith(f"{self.prefix}.")

    @property
    def source(self) -> str:
        """CloudEvents `source`: stable over hosts and restarts."""
        return f"/warren/{self.prefix}"


def event_routing_key(session: str, event: str) -> str:
    return f"{session}.{event}"


def _digest(*parts: str) -> bytes:
    """SHA-256 over length-prefixed parts, so that no two lists of parts share an input."""
    h = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        h.update(len(raw).to_bytes(4, "big"))
        h.update(raw)
    return h.digest()


def _short(*parts: str) -> str:
    return base64.b32encode(_digest(*parts)).decode().lower()[:26]


def event_id(session: str, *parts: str) -> str:
    """The id of an event: the same parts give the same id, so a repeated delivery is recognised by subscribers.

    For what WhatsApp may deliver twice the parts are (kind, chat, sender device, message id, part): a message id alone is
    chosen by the sender and could be forged to collide.
    """
    return f"{session}/{_short(*parts)}"


def whatsapp_message_id(session: str, command_id: str) -> str:
    """The WhatsApp message id of a `send`: derived, so a command redelivered after a crash sends the *same* message.

    The shape is that of WhatsApp Web clients: `3EB0` and 18 upper-case hex digits.
    """
    return "3EB0" + _digest("send", session, command_id).hex().upper()[:18]


def command_fingerprint(command: str, canonical_args: bytes) -> str:
    """Tells a repeated command from another one that reuses its id (`id_conflict`)."""
    return hashlib.sha256(command.encode() + b"\0" + canonical_args).hexdigest()
