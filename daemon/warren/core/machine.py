"""The life of one session, as a table.

Rules:

- `TABLE[(state, trigger)]` says where a trigger leads and which event tells the world. A pair that is not in the table is
  illegal: it raises, and nothing changes.
- Entering a state is what makes things happen (services.session does them): CONNECTING opens the engine, BACKING_OFF starts
  the timer, STOPPING closes the engine. The table itself does nothing.
- Only what a person or WhatsApp's account rules caused stops a session. Everything that may be the network, a server, an
  engine or our own bug leads to BACKING_OFF and so back to CONNECTING, for ever.
- TIME_LOCKED is ONLINE in all but one thing: WhatsApp refuses messages to people with whom there is no conversation yet. So what
  arrives goes on arriving, and what is sent to others goes on going out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from warren.errors import WarrenError


class State(Enum):
    STOPPED = "stopped"
    RESTORING = "restoring"
    CONNECTING = "connecting"
    PAIRING = "pairing"
    ONLINE = "online"
    TIME_LOCKED = "time_locked"
    BACKING_OFF = "backing_off"
    STOPPING = "stopping"
    LOGGED_OUT = "logged_out"
    REPLACED = "replaced"
    BLOCKED = "blocked"
    OUTDATED = "outdated"
    QUARANTINED = "quarantined"


class Trigger(Enum):
    START = "start"
    """Somebody wants it running: `create`, or the daemon resumes it."""
    RETRY = "retry"
    """The timer of BACKING_OFF, REPLACED, BLOCKED or OUTDATED is up."""
    QR = "qr"
    PAIRED = "paired"
    CONNECTED = "connected"
    RESTART = "restart"
    """WhatsApp asks for a new connection (515): always right after pairing, now and then in between."""
    LOST = "lost"
    REPLACED = "replaced"
    BANNED = "banned"
    OUTDATED = "outdated"
    """WhatsApp no longer takes this version of the client."""
    TIME_LOCK = "time_lock"
    """WhatsApp lets the account not begin conversations (463), for a while."""
    UNLOCKED = "unlocked"
    UNPAIRED = "unpaired"
    """Pairing ended without a phone."""
    RENEW = "renew"
    """The pairing code ran out, and there is another one to be had."""
    LOGGED_OUT = "logged_out"
    UNREADABLE = "unreadable"
    RESTORE = "restore"
    """The state comes from a backup, or waits for the store."""
    RESTORED = "restored"
    SUPERSEDED = "superseded"
    """Somebody else has taken the session over, as the store shows."""
    STOP = "stop"
    CLOSED = "closed"
    """The engine has closed what STOP asked it to."""


@dataclass(frozen=True, slots=True)
class Step:
    to: State
    event: str | None = None


class IllegalTrigger(WarrenError):
    code = "illegal_trigger"


LIVE = (State.RESTORING, State.CONNECTING, State.PAIRING, State.ONLINE, State.TIME_LOCKED)
"""States in which the engine may have the session open, or is about to."""


def _table() -> dict[tuple[State, Trigger], Step]:
    s, t = State, Trigger
    table = {
        (s.STOPPED, t.START): Step(s.CONNECTING),
        (s.STOPPED, t.STOP): Step(s.STOPPED),
        (s.CONNECTING, t.QR): Step(s.PAIRING, "qr"),
        (s.PAIRING, t.QR): Step(s.PAIRING, "qr"),
        (s.PAIRING, t.PAIRED): Step(s.CONNECTING),
        (s.PAIRING, t.RENEW): Step(s.CONNECTING),
        (s.CONNECTING, t.RENEW): Step(s.CONNECTING),
        (s.CONNECTING, t.RESTART): Step(s.CONNECTING),
        (s.CONNECTING, t.CONNECTED): Step(s.ONLINE, "connected"),
        (s.ONLINE, t.TIME_LOCK): Step(s.TIME_LOCKED, "error"),
        (s.TIME_LOCKED, t.TIME_LOCK): Step(s.TIME_LOCKED, "error"),
        (s.TIME_LOCKED, t.UNLOCKED): Step(s.ONLINE, "connected"),
        (s.CONNECTING, t.UNPAIRED): Step(s.STOPPED, "disconnected"),
        (s.PAIRING, t.UNPAIRED): Step(s.STOPPED, "disconnected"),
        (s.CONNECTING, t.UNREADABLE): Step(s.QUARANTINED, "error"),
        (s.BACKING_OFF, t.STOP): Step(s.STOPPED, "disconnected"),
        (s.REPLACED, t.STOP): Step(s.STOPPED),
        (s.BLOCKED, t.STOP): Step(s.STOPPED),
        (s.OUTDATED, t.STOP): Step(s.STOPPED),
        (s.LOGGED_OUT, t.STOP): Step(s.LOGGED_OUT),
        (s.QUARANTINED, t.STOP): Step(s.QUARANTINED),
        (s.STOPPING, t.LOGGED_OUT): Step(s.LOGGED_OUT, "logout"),
        (s.LOGGED_OUT, t.START): Step(s.CONNECTING),
        (s.QUARANTINED, t.START): Step(s.CONNECTING),
        (s.RESTORING, t.RESTORED): Step(s.CONNECTING),
        (s.RESTORING, t.UNREADABLE): Step(s.QUARANTINED, "error"),
    }
    for state in s:
        if state not in {s.LOGGED_OUT, s.STOPPING}:
            table[state, t.RESTORE] = Step(s.RESTORING)
            table[state, t.SUPERSEDED] = Step(s.QUARANTINED, "error")
    for live in LIVE:
        table[live, t.START] = Step(live)
        table[live, t.LOST] = Step(s.BACKING_OFF, "disconnected")
        table[live, t.REPLACED] = Step(s.REPLACED, "disconnected")
        table[live, t.BANNED] = Step(s.BLOCKED, "disconnected")
        table[live, t.OUTDATED] = Step(s.OUTDATED, "disconnected")
        table[live, t.LOGGED_OUT] = Step(s.LOGGED_OUT, "logout")
        table[live, t.STOP] = Step(s.STOPPING)
    for late in (t.START, t.STOP, t.QR, t.PAIRED, t.CONNECTED, t.RESTORE, t.RESTORED, t.SUPERSEDED):
        table[s.STOPPING, late] = Step(s.STOPPING)
    for end in (t.CLOSED, t.RESTART, t.RENEW, t.LOST, t.REPLACED, t.BANNED, t.OUTDATED, t.UNPAIRED, t.UNREADABLE):
        table[s.STOPPING, end] = Step(s.STOPPED, "disconnected")
    # After pairing it means "at once" (CONNECTING, above). In the middle of a life it is a lost connection like any other: a
    # server that keeps asking must meet the backoff.
    for live in (s.PAIRING, s.ONLINE, s.TIME_LOCKED):
        table[live, t.RESTART] = Step(s.BACKING_OFF, "disconnected")
    for waiting in (s.BACKING_OFF, s.REPLACED, s.BLOCKED, s.OUTDATED):
        table[waiting, t.RETRY] = Step(s.CONNECTING, "reconnecting")
        table[waiting, t.START] = Step(s.CONNECTING, "reconnecting")
    return table


TABLE = _table()


def step(state: State, trigger: Trigger) -> Step:
    """Where `trigger` leads from `state`. Raises IllegalTrigger, having changed nothing."""
    try:
        return TABLE[state, trigger]
    except KeyError:
        raise IllegalTrigger(f"a session that is {state.value} cannot take {trigger.value}") from None


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a session left its state: what it means for the machine, and the words for people."""

    trigger: Trigger
    code: str
    message: str
    hint: str = ""


_RETRIES = "Nothing to do: warren connects again by itself."

CAUSES: dict[str, Cause] = {
    c.code: c
    for c in (
        Cause(Trigger.RESTART, "restart_required", "WhatsApp asked for a new connection.", _RETRIES),
        Cause(Trigger.LOST, "network", "The connection to WhatsApp was lost or could not be made.", _RETRIES),
        Cause(Trigger.LOST, "server", "WhatsApp's server closed the connection with an error.", _RETRIES),
        Cause(Trigger.LOST, "keepalive_timeout", "The connection looked open but WhatsApp stopped answering.", _RETRIES),
        Cause(Trigger.LOST, "handler_timeout", "An incoming message could not be stored in time, so WhatsApp keeps it.",
              "Check RabbitMQ and the disk of the state directory. " + _RETRIES),
        Cause(Trigger.LOST, "engine_lost", "The engine process of this session ended.", _RETRIES),
        Cause(Trigger.LOST, "engine_replaced", "The engine process of this session used too much memory.", _RETRIES),
        Cause(Trigger.LOST, "engine_unavailable", "The engine could not open the session.", _RETRIES),
        Cause(Trigger.LOST, "state_locked", "Another process still has this session's state open.",
              "It is usually an engine that is about to exit. " + _RETRIES),
        Cause(Trigger.LOST, "disk_trouble", "The disk with the session's state takes no writes.",
              "Free some space, or make it writable again. " + _RETRIES),
        Cause(Trigger.LOST, "internal", "The session or its engine met an error it did not expect.", "See the log. " + _RETRIES),
        Cause(Trigger.LOST, "failure", "WhatsApp refused the connection.", _RETRIES),
        Cause(Trigger.OUTDATED, "client_outdated", "WhatsApp refuses this version of the client.",
              "Upgrade warren, or set `[whatsapp] version` to that of WhatsApp Web. It is tried again, less and less often."),
        Cause(Trigger.REPLACED, "replaced", "The same linked device connected from somewhere else.",
              "Make sure no other program uses this session's state; then publish `create`."),
        Cause(Trigger.BANNED, "temporary_ban", "WhatsApp banned the account for a while.",
              "Nothing is tried before the time in `until`; open WhatsApp on the phone to see why."),
        Cause(Trigger.TIME_LOCK, "time_lock", "WhatsApp lets the account not write to people it has no conversation with.",
              "Send only to people who have written, until the time in `until`. Messages arrive as before."),
        Cause(Trigger.UNPAIRED, "qr_expired", "Nobody scanned the QR code or entered the pairing code.",
              "Publish `create` for new codes."),
        Cause(Trigger.RENEW, "code_expired", "The pairing code ran out; another one follows.",
              "Type the next one into the phone."),
        Cause(Trigger.UNPAIRED, "pairing_failed", "Pairing with the phone failed.", "Publish `create` and scan again."),
        Cause(Trigger.LOGGED_OUT, "logged_out", "The device was unlinked on the phone or by WhatsApp.",
              "Publish `create` and scan the new QR code, or `logout` to remove the session."),
        Cause(Trigger.UNREADABLE, "state_unreadable", "The session's state on disk cannot be read.",
              "Its files were left as they are. Repair or restore them, then publish `create`."),
        Cause(Trigger.UNREADABLE, "state_missing", "The session was paired, but its state is no longer on disk.",
              "Bring the state directory back, then publish `create`; or `logout` to give the session up."),
        Cause(Trigger.UNREADABLE, "backup_damaged", "The session's backups cannot be restored.",
              "Nothing was changed. `warren backup verify` tells more; then `create`, or `restore` one that is whole."),
        Cause(Trigger.RESTORE, "restoring", "The session's state is being restored from its backup.", "Nothing to do."),
        Cause(Trigger.RESTORE, "storage_unavailable", "The store that holds the session's backups does not answer.",
              "Check `[storage]` and the store. The session goes on by itself."),
        Cause(Trigger.SUPERSEDED, "superseded", "Another warren has taken the session over.",
              "Make sure that only one of them is to have it. `create` takes it back, from the other one's last backup."),
    )
}  # fmt: skip
"""Every reason the engine gives for an end (docs/engine-protocol.md), and our own, by code."""


CONNECTED = frozenset({State.ONLINE, State.TIME_LOCKED})
"""States in which messages come and go."""

KEPT_CAUSES = {"blocked": "temporary_ban"}
"""The code that explains a state which is kept over a restart, where it is not the state's own name."""


def halted_state(halted: str) -> State:
    """The state of a session that its registry row says to be `halted`."""
    return State.QUARANTINED if halted == "superseded" else State(halted)


def cause_of(reason: str) -> Cause:
    """The cause for an engine's word; an unknown one counts as `internal`, so that it is retried and seen."""
    return CAUSES.get(reason, CAUSES["internal"])
