"""The master key against what is in the store: checked before anything is written, and changed without touching a backup."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from warren.core.backup_names import KEY_CHECK, Names
from warren.core.sealing import Keyring, master_key_id, new_data_key, unwrap, wrap
from warren.errors import ConfigError, SealError, StorageError, StorageKeyError
from warren.ports import ObjectStore

ATTEMPTS = 4
"""Of a re-wrap that meets somebody else's, or gets no answer."""
RETRY_S = 0.25


async def check_keys(objects: ObjectStore, names: Names, keyring: Keyring) -> None:
    """Refuse to start with a key that does not open what is there, or with a store that cannot hold backups.

    The object `.key-check` is wrapped like a session's key; it is made when the store is used for the first time, which also
    proves that the store keeps, lists and does not overwrite. Raises ConfigError, and StorageError when the store cannot be used
    at this moment. Safe beside other daemons, and to be repeated.
    """
    name = names.key_check()
    found = await objects.get(name)
    if found is None:
        await _check_sessions(objects, names, keyring)
        await objects.create(name, wrap(keyring, KEY_CHECK, new_data_key()))
        found = await objects.get(name)
        if found is None:
            raise _no_store("it does not give back what was put there")
    try:
        unwrap(keyring, KEY_CHECK, found.data)
    except StorageKeyError as e:
        raise _wrong_key(master_key_id(KEY_CHECK, found.data), keyring) from e
    except SealError as e:
        raise ConfigError(
            f"The object {name} in the store is not what warren puts there.",
            hint="Is something else answering at `[storage] url` and `endpoint`? If it was damaged, delete it: it is made again.",
        ) from e
    if await objects.create(name, found.data):
        raise _no_store("it overwrites objects that are to be created (no `If-None-Match`)")
    if name not in {listed.name for listed in await objects.list(names.prefix)}:
        raise _no_store("its list of objects is not complete")


async def _check_sessions(objects: ObjectStore, names: Names, keyring: Keyring) -> None:
    """Without the check object, the sessions' own keys tell: any of them does."""
    for session in await _sessions_with_key(objects, names):
        found = await objects.get(names.key(session))
        if found is None:
            continue
        try:
            unwrap(keyring, session, found.data)
        except StorageKeyError as e:
            raise _wrong_key(master_key_id(session, found.data), keyring) from e
        except SealError:
            continue  # damage is that session's affair
        return


def _wrong_key(wanted: bytes, keyring: Keyring) -> ConfigError:
    return ConfigError(
        f"[storage] key is not the one the backups were encrypted with: they need the key {short(wanted)}, this is "
        f"{short(keyring.write.id)}. Nothing was written.",
        hint="Set the right key; or, if it was changed, list the one before in `old_keys` and then run `warren keys rotate`.",
    )


def _no_store(why: str) -> ConfigError:
    return ConfigError(
        f"The store cannot hold backups: {why}.",
        hint="Check `[storage] url` and `endpoint`; an S3-compatible store must know conditional puts.",
    )


def short(key_id: bytes) -> str:
    """A master key's id, as people see it."""
    return key_id.hex()[:8]


# --- rotation -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rotation:
    """What `rotate` did. Sessions are named; nothing else is."""

    rewrapped: tuple[str, ...]
    current: tuple[str, ...]
    """Had the new key already."""
    failed: dict[str, str]
    """Session -> why. The old keys must stay listed for these."""


async def rotate(
    objects: ObjectStore,
    names: Names,
    keyring: Keyring,
    *,
    concurrency: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Rotation:
    """Wrap every session's key with the keyring's `write` key. Backups are not touched.

    Each key object is replaced as a whole and only if it is still the one that was read, so this can be killed and repeated at
    any moment while both keys are listed; what has the new key is left alone. `.key-check` goes last: as long as it has the old
    key, a daemon that lists only the new one does not start. Raises StorageError when the store cannot even be listed.
    """
    sessions = await _sessions_with_key(objects, names)
    outcome: dict[str, bool | str] = {}
    gate = asyncio.Semaphore(concurrency)

    async def one(session: str, name: str) -> None:
        async with gate:
            try:
                outcome[session] = await _rewrap(objects, name, session, keyring)
            except (StorageError, SealError) as e:
                outcome[session] = str(e)
        if progress is not None:
            progress(len(outcome), len(sessions) + 1)

    async with asyncio.TaskGroup() as group:
        for session in sessions:
            group.create_task(one(session, names.key(session)))
    failed = {session: told for session, told in sorted(outcome.items()) if isinstance(told, str)}
    if not failed:
        await one(KEY_CHECK, names.key_check())
        told = outcome.pop(KEY_CHECK)
        failed = {KEY_CHECK: told} if isinstance(told, str) else {}
    return Rotation(
        rewrapped=tuple(sorted(session for session, told in outcome.items() if told is True)),
        current=tuple(sorted(session for session, told in outcome.items() if told is False)),
        failed=failed,
    )


async def _rewrap(objects: ObjectStore, name: str, session: str, keyring: Keyring) -> bool:
    """Whether it had to be done. A session that was logged out meanwhile has no key, and that is fine."""
    problem = StorageError(
        f"The key of session {session} keeps changing.", kind="unavailable", hint="Is another rotation going on?"
    )
    for attempt in range(ATTEMPTS):
        try:
            found = await objects.get(name)
            if found is None:
                return False
            key = unwrap(keyring, session, found.data)
            if master_key_id(session, found.data) == keyring.write.id:
                return False
            if await objects.replace(name, wrap(keyring, session, key), found.version):
                return True
        except StorageError as e:
            if not e.retryable:
                raise
            problem = e
        await asyncio.sleep(RETRY_S * 2**attempt)
    raise problem


async def _sessions_with_key(objects: ObjectStore, names: Names) -> list[str]:
    parsed = (names.parse(listed.name) for listed in await objects.list(names.prefix))
    return sorted(told[0] for told in parsed if told is not None and told[1] is None)
