"""Names of objects in the store. The name of a backup is its compare-and-swap, so changing any of this is a migration.

<prefix>/<session>/key                            the session's data key, wrapped by a master key
<prefix>/<session>/<epoch>/<sequence>             a sealed object, both numbers with ten digits: names sort as positions do
<prefix>/.key-check                               wrapped like a key: tells a wrong master key before anything is written
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from warren.core.names import is_session_id

MAX_NUMBER = 9_999_999_999
"""Of epochs and sequences: what ten digits hold."""
KEY_CHECK = ".key-check"
"""Takes the place of a session; no session id begins with a dot."""

_POSITION = re.compile(r"([0-9]{10})/([0-9]{10})", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Epoch and sequence within a session's backups: ordered as they were written."""

    epoch: int
    sequence: int

    def __post_init__(self) -> None:
        if not (1 <= self.epoch <= MAX_NUMBER and 1 <= self.sequence <= MAX_NUMBER):
            raise ValueError(f"{self} is no place of a backup: both numbers count from 1 to {MAX_NUMBER}")

    def __str__(self) -> str:
        return f"{self.epoch}/{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """The reverse of `str`. Raises ValueError."""
        epoch, slash, sequence = text.partition("/")
        if not (slash and epoch.isascii() and sequence.isascii() and epoch.isdecimal() and sequence.isdecimal()):
            raise ValueError(f"`{text[:40]}` is no place of a backup; one looks like 3/17 (epoch/sequence)")
        return cls(int(epoch), int(sequence))

    def following(self) -> Place:
        """The next one of the same epoch."""
        return Place(self.epoch, self.sequence + 1)


@dataclass(frozen=True, slots=True)
class Names:
    """Every name below one prefix."""

    prefix: str

    def session(self, session: str) -> str:
        """The folder of everything of a session."""
        if not is_session_id(session):
            raise ValueError(f"{session!r} is no session id")
        return f"{self.prefix}/{session}"

    def key(self, session: str) -> str:
        return f"{self.session(session)}/key"

    def key_check(self) -> str:
        return f"{self.prefix}/{KEY_CHECK}"

    def backup(self, session: str, place: Place) -> str:
        return f"{self.session(session)}/{place.epoch:010d}/{place.sequence:010d}"

    def parse(self, name: str) -> tuple[str, Place | None] | None:
        """(session, place) of a backup, (session, None) of a key; None for whatever else lies in the bucket."""
        session, _, rest = name.removeprefix(f"{self.prefix}/").partition("/")
        if not name.startswith(f"{self.prefix}/") or not is_session_id(session):
            return None
        if rest == "key":
            return session, None
        numbers = _POSITION.fullmatch(rest)
        if numbers is None or "0000000000" in numbers.groups():
            return None
        return session, Place(int(numbers[1]), int(numbers[2]))

    def places(self, session: str, names: Iterable[str]) -> list[Place]:
        """The places of a session among names, ascending."""
        parsed = (self.parse(name) for name in names)
        return sorted(place for told in parsed if told is not None and told[0] == session and (place := told[1]) is not None)
