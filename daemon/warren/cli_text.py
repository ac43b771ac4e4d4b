"""What the command line says: outcomes, statuses and events as text for a person. Pure.

All of it may hold text that strangers wrote (names, messages), so all of it goes through `printable`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import datetime
from typing import Any

import orjson

from warren.core.envelope import Outcome
from warren.edges.terminal import printable


def outcome_text(session: str, outcome: Outcome) -> str:
    """What a successful command brought."""
    return "\n".join(printable(line) for line in _OUTCOMES[outcome.command](session, outcome.result))


def _told_create(session: str, result: dict[str, Any]) -> list[str]:
    state = result.get("state")
    return [
        f"{session}: {state}"
        + ("" if state in ("online", "time_locked") else f"; `warren qr {session}` shows how it goes on, and the code to scan")
    ]


def _told_status(session: str, s: dict[str, Any]) -> list[str]:
    details = {
        "account": account(s) if s.get("jid") else None,
        "reason": f"{s['message']} ({s.get('code')})" if s.get("message") else None,
        "to do": s.get("hint"),
        "until": s.get("until"),
        "attempt": s.get("attempt"),
        "last message": s.get("last_message_at"),
        "backup": _backup(s.get("backup")),
        "outbox": f"{s['outbox']} events wait for RabbitMQ" if s.get("outbox") else None,
        "QR code": f"`warren qr {session}` shows it" if s.get("qr") else None,
    }
    return [f"{session}: {s.get('state')} since {s.get('since')}", *(f"  {k:<12} {v}" for k, v in details.items() if v)]


def _told_settings(session: str, result: dict[str, Any]) -> list[str]:
    settings: dict[str, Any] = result.get("settings", {})
    lines = [f"{name} = {'(default)' if value is None else orjson.dumps(value).decode()}" for name, value in settings.items()]
    lines = [f"{session}: settings"] + [f"  {line}" for line in lines]
    if waiting := result.get("waiting"):
        when = "the next pairing" if waiting == ["device_name"] else "`disconnect` and `create`"
        lines.append(f"{session}: {', '.join(waiting)} in force after {when}")
    return lines


def _backup(told: Any) -> str | None:
    if not isinstance(told, dict):
        return None
    if told.get("failures"):
        return f"failed {told['failures']} times: {told.get('message')}"
    return f"{told.get('position') or 'of an earlier epoch'} at {told['at']}" if told.get("at") else "none yet"


_OUTCOMES: dict[str, Callable[[str, dict[str, Any]], list[str]]] = {
    "create": _told_create,
    "send": lambda session, r: [f"{session}: sent as {r.get('message_id')} at {r.get('timestamp')}"],
    "disconnect": lambda session, r: [
        f"{session}: {r.get('state')}; `warren session create {session}` connects again without a QR code"
    ],
    "logout": lambda session, _: [f"{session}: unlinked and removed"],
    "delete": lambda session, _: [f"{session}: deleted; if the phone still lists the device, unlink it there"],
    "settings": _told_settings,
    "status": _told_status,
    "backup": lambda session, r: [f"{session}: backed up as {r.get('position')} at {r.get('at')}, {r.get('size')} bytes"],
    "restore": lambda session, r: [f"{session}: restored from {r.get('position')}; its events go on in epoch {r.get('epoch')}"],
}


def account(status: dict[str, Any]) -> str:
    """Number and name of a status or a `connected` event."""
    number = str(status.get("jid")).partition("@")[0].partition(":")[0]
    name = status.get("push_name")
    return f"+{number}" + (f" ({name})" if name else "")


def sessions_table(sessions: list[dict[str, Any]]) -> list[str]:
    """The lines of `session list`."""
    rows: list[tuple[str, ...]] = [("SESSION", "STATE", "SINCE", "ACCOUNT", "INSTANCE", "REASON")]
    for s in sessions:
        who = account(s) if s.get("jid") else "-"
        row = (s.get("session"), s.get("state"), s.get("since"), who, s.get("instance"), s.get("code") or "-")
        rows.append(tuple(printable(str(cell)) for cell in row))
    return columns(rows)


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows, padded so that their cells stand below each other."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def because(data: dict[str, Any]) -> str:
    """The reason in a status or state event, to be put behind its state."""
    return f": {data['message']}" if data.get("message") else ""


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def event_line(event: dict[str, Any]) -> str:
    """One event for a person: local time, session, event, and what matters of its data."""
    name = str(event.get("type", "")).removeprefix("warren.")
    data = event.get("data")
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        at = parse_time(event["time"]).astimezone().strftime("%H:%M:%S")
        return f"{at}  {event['session']:<12} {name:<18} {_gist(name, data if isinstance(data, dict) else {})}".rstrip()
    return orjson.dumps(event).decode()


def _gist(name: str, d: dict[str, Any]) -> str:
    match name:
        case "message":
            said = d.get("text") if d.get("kind") == "text" else f"[{d.get('type') or d.get('kind')}]"
            where = "" if d.get("chat") == d.get("from") else f" in {d.get('chat')}"
            return f"{d.get('push_name') or ''} {d.get('from')}{where}: {said}".strip()
        case "receipt":
            return f"{d.get('type')} by {d.get('from')}: {', '.join(map(str, d.get('message_ids') or []))}"
        case "command_completed":
            return f"{d.get('command')} {d.get('id') or ''}".rstrip()
        case "command_failed":
            error = d.get("error") or {}
            return f"{d.get('command')} {d.get('id') or ''} {error.get('code')}: {error.get('message')}"
        case "connected":
            return f"as {account(d)}"
        case "qr":
            return f"a code to scan until {d.get('expires_at')}, {d.get('remaining')} more"
        case _:
            change = f"{d['previous']} -> {d['state']}" if d.get("previous") and d.get("state") else str(d.get("code") or "")
            return change + because(d) + (f" Next try in {d['retry_in_s']} s." if d.get("retry_in_s") else "")
