"""The backups as an operator sees them: what is there, whether it opens, what may go. Needs the store alone, and no daemon."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from warren.core.backup_names import Names, Place
from warren.core.backup_plan import DAY_S, Read, Restore, choose, prune
from warren.core.sealing import Kind, Sealed
from warren.errors import SealError, StorageError
from warren.ports import Listed, ObjectStore
from warren.services.session_record import decode, decode_end
from warren.services.vault import Vault

T = TypeVar("T")

Tell = Callable[[int, int], None]
"""Progress: how many are done, of how many."""
CheckDatabase = Callable[[bytes], str]
"""What is wrong with a database, "" when nothing is; runs in a thread."""
MAX_SEAL_BYTES = 1_000
"""A seal has about 200 bytes, a state tens of thousands: saves reading those to learn that they are none."""
ATTEMPTS = 3
"""Of a read that brings no answer, or half of one."""
RETRY_S = 0.5


@dataclass(slots=True)
class Inventory:
    """What lies in the store for one session."""

    session: str
    has_key: bool = False
    """Without its key nobody can read the backups."""
    objects: dict[Place, Listed] = field(default_factory=dict)
    """Ascending."""

    @property
    def size(self) -> int:
        return sum(listed.size for listed in self.objects.values())

    @property
    def newest(self) -> Place | None:
        return max(self.objects, default=None)


async def inventory(objects: ObjectStore, names: Names, sessions: Iterable[str] = ()) -> list[Inventory]:
    """Of every session that has anything in the store, or of the given ones, by name. One listing, or one each."""
    wanted = sorted(set(sessions))
    listings = (
        [await objects.list(names.session(session)) for session in wanted] if wanted else [await objects.list(names.prefix)]
    )
    found = {session: Inventory(session) for session in wanted}
    for listed in (listed for listing in listings for listed in listing):
        told = names.parse(listed.name)
        if told is None:
            continue
        session, place = told
        of = found.setdefault(session, Inventory(session))
        if place is None:
            of.has_key = True
        else:
            of.objects[place] = listed
    for of in found.values():
        of.objects = dict(sorted(of.objects.items()))
    return [found[session] for session in sorted(found)]


# --- when it was restored -----------------------------------------------------------------------------------------------


async def last_restores(vault: Vault, inventories: Sequence[Inventory], *, concurrency: int) -> dict[str, float]:
    """When each session last began a new epoch, which is what a restore does: Unix time, from its newest seal.

    Sessions without a seal that opens are left out. One or two small reads each.
    """

    async def one(session: str, places: list[Place]) -> tuple[str, float] | None:
        for place in places:
            with contextlib.suppress(SealError):
                sealed = await vault.read(session, place)
                if sealed is not None and sealed.kind is Kind.SEAL:
                    return session, decode_end(session, place, sealed.record).at
        return None

    found = await _all([partial(one, of.session, _maybe_seals(of)) for of in inventories if of.has_key], concurrency)
    return dict(told for told in found if told is not None)


def _maybe_seals(of: Inventory) -> list[Place]:
    """Where the newest seal can be: the newest object, while the new epoch has no backup, or the last one of the epoch before."""
    last = of.newest
    if last is None:
        return []
    newest = [last] if of.objects[last].size <= MAX_SEAL_BYTES else []
    return newest + sorted(place for place in of.objects if place.epoch < last.epoch)[-1:]


# --- verify -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checked:
    """One session after `verify`."""

    session: str
    states: int
    seals: int
    bytes: int
    restorable: str
    """The place a restore would take now; "" when none can be restored."""
    problems: tuple[str, ...]


async def verify(
    vault: Vault, inventories: Sequence[Inventory], check: CheckDatabase, *, concurrency: int, tell: Tell
) -> list[Checked]:
    """Open every object as a restore would, without restoring: key, seal, record, SQLite's check, device.

    What is deleted meanwhile counts as never having been there. Raises StorageError when the store cannot be used.
    """
    total = sum(len(of.objects) for of in inventories)
    done = 0

    async def one(session: str, place: Place, size: int) -> tuple[str, Place, Kind | str | None]:
        nonlocal done
        result = await _opened(vault, session, place, size, check)
        done += 1
        tell(done, total)
        return session, place, result

    jobs = [
        partial(one, of.session, place, listed.size) for of in inventories if of.has_key for place, listed in of.objects.items()
    ]
    results: dict[str, dict[Place, Kind | str | None]] = {of.session: {} for of in inventories}
    for session, place, result in await _all(jobs, concurrency):
        results[session][place] = result
    return [_checked(of, results[of.session]) for of in inventories]


async def _opened(vault: Vault, session: str, place: Place, size: int, check: CheckDatabase) -> Kind | str | None:
    """What an object is, or what is wrong with it; None: it is gone."""
    try:
        sealed = await _patiently(lambda: vault.read(session, place, size))
        if sealed is None:
            return None
        problem = await asyncio.to_thread(_content_problem, session, place, sealed, check)
    except SealError as e:
        return e.message
    return f"The backup {session} {place}: {problem}." if problem else sealed.kind


def _content_problem(session: str, place: Place, sealed: Sealed, check: CheckDatabase) -> str:
    if sealed.kind is Kind.SEAL:
        decode_end(session, place, sealed.record)
        return ""
    decode(session, place, sealed.record)
    return check(sealed.database)


def _checked(of: Inventory, results: dict[Place, Kind | str | None]) -> Checked:
    problems = [] if of.has_key or not of.objects else ["Its key is missing: nobody can read its backups."]
    problems += [result for _, result in sorted(results.items()) if isinstance(result, str)]
    kinds = {place: result if isinstance(result, Kind) else None for place, result in results.items()}
    choice = choose([place for place, result in results.items() if result is not None], kinds)
    if isinstance(choice, Read):
        raise TypeError("every object was opened")
    if not isinstance(choice, Restore) and of.has_key and of.objects:
        problems.append(f"Nothing can be restored. {choice.reason}")
    return Checked(
        of.session,
        states=sum(kind is Kind.STATE for kind in kinds.values()),
        seals=sum(kind is Kind.SEAL for kind in kinds.values()),
        bytes=of.size,
        restorable=str(choice.place) if isinstance(choice, Restore) else "",
        problems=tuple(dict.fromkeys(problems)),
    )


async def _patiently(read: Callable[[], Awaitable[T]]) -> T:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await read()
        except StorageError as e:
            if not e.retryable or attempt == ATTEMPTS:
                raise
            await asyncio.sleep(RETRY_S * attempt)
    raise AssertionError


# --- prune --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Doomed:
    """What may be deleted of a session, and why."""

    session: str
    names: tuple[str, ...]
    bytes: int
    reason: str


def doomed(
    inventories: Sequence[Inventory], now: float, *, keep_last: int, keep_days: int, forget_after_days: int
) -> list[Doomed]:
    """What `warren backup prune` deletes: old backups; and what is left of sessions whose key is gone, after a while."""
    found: list[Doomed] = []
    for of in inventories:
        if of.has_key:
            modified = {place: listed.modified for place, listed in of.objects.items()}
            gone = [of.objects[place] for place in prune(modified, now, keep_last, keep_days)]
            reason = "newer ones are kept"
        else:
            age = now - max((listed.modified for listed in of.objects.values()), default=now)
            gone = list(of.objects.values()) if forget_after_days and age > forget_after_days * DAY_S else []
            reason = "its key is gone"
        if gone:
            found.append(Doomed(of.session, tuple(o.name for o in gone), sum(o.size for o in gone), reason))
    return found


async def delete(objects: ObjectStore, what: Sequence[Doomed], *, concurrency: int, tell: Tell) -> None:
    """Raises StorageError; what was deleted until then stays so, and it may be repeated."""
    names = [name for of in what for name in of.names]
    done = 0

    async def one(name: str) -> None:
        nonlocal done
        await _patiently(lambda: objects.delete(name))
        done += 1
        tell(done, len(names))

    await _all([partial(one, name) for name in names], concurrency)


async def _all(jobs: Sequence[Callable[[], Awaitable[T]]], concurrency: int) -> list[T]:
    """The results in order. Of errors the first is raised, when everything under way has ended; nothing is begun after it."""
    gate = asyncio.Semaphore(concurrency)
    errors: list[Exception] = []

    async def one(job: Callable[[], Awaitable[T]]) -> list[T]:
        async with gate:
            if errors:
                return []
            try:
                return [await job()]
            except Exception as e:
                errors.append(e)
                return []

    results = await asyncio.gather(*(one(job) for job in jobs))
    if errors:
        raise errors[0]
    return [result for found in results for result in found]
