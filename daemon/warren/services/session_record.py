"""The session record: what travels, sealed, with a session's state so that another machine can go on with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import orjson

from warren.core.backup_names import Place
from warren.errors import SealError
from warren.ports import Desired, JournalRow, KeepOutcome, PutPacing, SessionRecord, Write

JOURNAL_ROWS = 1_000
"""Last outcomes of a session that travel along."""
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """A session as it was when it was backed up."""

    source: str
    """Whose it is: the `source` of its events."""
    record: SessionRecord
    journal: tuple[JournalRow, ...] = ()
    pacing: tuple[int, ...] = ()

    def merged(self, here: SessionRecord) -> SessionRecord:
        """What is known here, with what the backup knows where nothing is."""
        settings = {**self.record.settings, **here.settings}
        return replace(here, settings=settings, account=here.account or self.record.account, paired=True)

    def beside(self, pacing: tuple[int, ...]) -> tuple[Write, ...]:
        """What of it goes into the registry beside the session's row; `pacing` is what is there already."""
        window = tuple(sorted({*self.pacing, *pacing}))
        return (*(KeepOutcome(row) for row in self.journal), PutPacing(self.record.session, window))


@dataclass(frozen=True, slots=True)
class End:
    """What is in a seal: the epoch of whoever took the session over."""

    next_epoch: int
    instance: str
    at: float


def encode(stored: Stored) -> bytes:
    """Without a time or a sequence, so that an unchanged session gives the same bytes."""
    record = stored.record
    return orjson.dumps(
        {
            "format": _FORMAT,
            "source": stored.source,
            "epoch": record.epoch,
            "desired": record.desired.value,
            "settings": record.settings,
            "account": record.account,
            "halted": record.halted,
            "until": record.until,
            "pacing": stored.pacing,
            "journal": [[row.command_id, row.fingerprint, row.outcome.decode()] for row in stored.journal],
        },
        option=orjson.OPT_SORT_KEYS,
    )


def decode(session: str, place: Place, body: bytes) -> Stored:
    """Fields that this version does not know are left out. Raises SealError."""
    told = _object(session, place, body)
    try:
        record = SessionRecord(
            session,
            int(told["epoch"]),
            Desired(told["desired"]),
            settings=dict(told["settings"]),
            account=dict(told["account"]),
            halted=str(told["halted"]),
            paired=True,
            until=str(told["until"]),
        )
        journal = tuple(JournalRow(session, c, f, o.encode()) for c, f, o in told["journal"])
        return Stored(str(told["source"]), record, journal, tuple(int(stamp) for stamp in told["pacing"]))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _senseless(session, place, repr(e)) from e


def encode_end(end: End) -> bytes:
    return orjson.dumps({"format": _FORMAT, "next_epoch": end.next_epoch, "instance": end.instance, "at": end.at})


def decode_end(session: str, place: Place, body: bytes) -> End:
    """Raises SealError."""
    told = _object(session, place, body)
    try:
        return End(int(told["next_epoch"]), str(told["instance"]), float(told["at"]))
    except (KeyError, TypeError, ValueError) as e:
        raise _senseless(session, place, repr(e)) from e


def _object(session: str, place: Place, body: bytes) -> dict[str, Any]:
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise _senseless(session, place, str(e)) from e
    if not isinstance(told, dict):
        raise _senseless(session, place, "it is no object")
    if told.get("format") != _FORMAT:
        raise SealError(
            f"The record in the backup {session} {place} is of format {told.get('format')!r}; this warren reads {_FORMAT}.",
            hint="A newer warren wrote it: upgrade.",
        )
    return told


def _senseless(session: str, place: Place, what: str) -> SealError:
    return SealError(f"The record in the backup {session} {place} makes no sense: {what}.", hint="An older backup may be whole.")
