"""What a durable subscriber saw, kept small: numbers instead of events, so that hours of traffic fit."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

TEXT = re.compile(r"(in|out) (\S+) (\d+)")
COMMAND_ID = re.compile(r"(\S+)-(\d+)")


class Ledger:
    """`take` every delivery. Messages carry the text `in <session> <number>`, commands the id `<session>-<number>`."""

    def __init__(self) -> None:
        self.deliveries = 0
        self.repeated = 0
        """Deliveries of an event id that was delivered before. Allowed."""
        self.types: Counter[str] = Counter()
        """Distinct events by name."""
        self.ends: Counter[str] = Counter()
        """Why connections to WhatsApp ended, by code."""
        self.messages: dict[str, dict[int, str]] = defaultdict(dict)
        """session -> number -> event id."""
        self.outcomes: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        """session -> number -> event ids."""
        self.sent: dict[str, set[int]] = defaultdict(set)
        """Commands that were completed."""
        self.failed: list[str] = []
        """Commands that failed, with code and time."""
        self.doubled: list[str] = []
        """The same message, or the same outcome, with another event id."""
        self.gaps: list[str] = []
        self.disorder: list[str] = []
        self.last: dict[str, int] = defaultdict(int)
        """session -> the highest number of a message."""
        self.ended: dict[str, int] = defaultdict(int)
        """session -> the highest number of a command that has an outcome."""
        self._ids: set[str] = set()
        self._sequences: dict[tuple[str, int], int] = defaultdict(int)

    def take(self, event: dict[str, Any]) -> None:
        self.deliveries += 1
        name = str(event["type"]).removeprefix("warren.")
        if "sequence" in event:
            self._count(event)
        if event["id"] in self._ids:
            self.repeated += 1
            return
        self._ids.add(event["id"])
        self.types[name] += 1
        if name == "message":
            self._message(event)
        elif name in {"command_completed", "command_failed"}:
            self._outcome(name, event)
        elif name == "disconnected":
            self.ends[event["data"]["code"]] += 1

    def _count(self, event: dict[str, Any]) -> None:
        """Numbers rise by one within (session, epoch). What is delivered again has its number again."""
        key, number = (event["session"], event["epoch"]), int(event["sequence"])
        if number > self._sequences[key] + 1:
            self.gaps.append(f"{key}: {self._sequences[key]} -> {number} ({event['type']})")
        elif number <= self._sequences[key] and event["id"] not in self._ids:
            self.gaps.append(f"{key}: {number} again, or late, for {event['id']} ({event['type']})")
        self._sequences[key] = max(self._sequences[key], number)

    def _message(self, event: dict[str, Any]) -> None:
        if (match := TEXT.fullmatch(str(event["data"].get("text")))) is None:
            return
        session, number = match[2], int(match[3])
        if (first := self.messages[session].get(number)) is not None:
            self.doubled.append(f"message {session} {number}: {first}, {event['id']}")
            return
        self.messages[session][number] = event["id"]
        if number < self.last[session]:
            self.disorder.append(f"message {session}: {number} after {self.last[session]}")
        self.last[session] = max(self.last[session], number)

    def _outcome(self, name: str, event: dict[str, Any]) -> None:
        if (match := COMMAND_ID.fullmatch(str(event["data"].get("id")))) is None:
            return
        session, number = match[1], int(match[2])
        ids = self.outcomes[session][number]
        ids.add(event["id"])
        if len(ids) > 1:
            self.doubled.append(f"outcome {session}-{number}: {sorted(ids)}")
        if name == "command_completed":
            self.sent[session].add(number)
        else:
            self.failed.append(f"{session}-{number} {event['data']['error']['code']} {event['time']}")
        if number < self.ended[session] and len(ids) == 1:
            self.disorder.append(f"outcome {session}: {number} after {self.ended[session]}")
        self.ended[session] = max(self.ended[session], number)
