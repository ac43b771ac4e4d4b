"""The sealed objects of every session: `core.sealing` under the names of `core.backup_names`, over an object store."""

from __future__ import annotations

import asyncio
import hashlib

from warren.core.backup_names import Names, Place
from warren.core.sealing import DataKey, Keyring, Position, Sealed, new_data_key, open_sealed, seal_end, seal_state, unwrap, wrap
from warren.errors import ConfigError, SealError, StorageError
from warren.ports import Listed, ObjectStore
from warren.services.backup_keys import check_keys


class Shelf:
    """The objects of sessions, for who needs their names only: no key. One try each; everything raises StorageError."""

    def __init__(self, objects: ObjectStore, names: Names) -> None:
        self._objects, self._names = objects, names

    async def _store(self) -> ObjectStore:
        return self._objects

    async def _list(self, prefix: str) -> list[Listed]:
        return await (await self._store()).list(prefix)

    async def listed(self, session: str) -> dict[Place, Listed]:
        """The objects of a session, ascending, whatever they turn out to be."""
        objects = await self._list(self._names.session(session))
        parsed = ((self._names.parse(found.name), found) for found in objects)
        return dict(sorted((told[1], found) for told, found in parsed if told is not None and told[1] is not None))

    async def digest(self, session: str, place: Place) -> str | None:
        """SHA-256 of an object as it lies in the store; None: it is not there."""
        found = await (await self._store()).get(self._names.backup(session, place))
        return None if found is None else sha256(found.data)

    async def delete(self, session: str, place: Place) -> None:
        await (await self._store()).delete(self._names.backup(session, place))

    async def forget(self, session: str) -> None:
        """Delete everything of a session; the key first, which makes the rest unreadable at once."""
        await (await self._store()).delete(self._names.key(session))
        for listed in await self._list(self._names.session(session)):
            await (await self._store()).delete(listed.name)


class Vault(Shelf):
    """Everything raises StorageError, and SealError for what does not open."""

    def __init__(self, objects: ObjectStore, names: Names, keyring: Keyring, *, checked: bool = False) -> None:
        """`checked`: `check` is not needed, for who only reads."""
        super().__init__(objects, names)
        self._keyring = keyring
        self._keys: dict[str, DataKey] = {}
        self._checked = self._reading = checked
        self._checking = asyncio.Lock()

    async def check(self) -> None:
        """See that key and store are the right ones; nothing is read or written before. Raises ConfigError, StorageError."""
        async with self._checking:
            if not self._checked:
                await check_keys(self._objects, self._names, self._keyring)
                self._checked = True

    async def _store(self) -> ObjectStore:
        """The store, once it is checked: at the start it may have been away."""
        if not self._checked:
            try:
                await self.check()
            except ConfigError as e:
                raise StorageError(e.message, kind="misconfigured", hint=e.hint) from e
        return self._objects

    async def _list(self, prefix: str) -> list[Listed]:
        found = await (await self._store()).list(prefix)
        if not found:
            await self._prove_there()
        return found

    async def _prove_there(self) -> None:
        """Before something counts as missing: a disk that was unmounted looks like an empty store. Raises StorageError."""
        if not self._reading and await (await self._store()).get(self._names.key_check()) is None:
            raise StorageError(
                f"The store has lost everything: even {self._names.key_check()}, which was there before, is gone.",
                kind="unavailable",
                hint="Is the disk of `[storage] url` mounted? If the store was emptied on purpose, restart the daemon.",
            )

    # --- looking

    async def sessions(self) -> dict[str, list[Place]]:
        """Every session that has objects, with their places, ascending."""
        found: dict[str, list[Place]] = {}
        for listed in await self._list(self._names.prefix):
            told = self._names.parse(listed.name)
            if told is not None and told[1] is not None:
                found.setdefault(told[0], []).append(told[1])
        return {session: sorted(places) for session, places in sorted(found.items())}

    async def read(self, session: str, place: Place, size: int | None = None) -> Sealed | None:
        """Open an object; None: it is not there. `size` is what the listing said: less is a read that was cut, not damage."""
        key = await self.key(session)
        found = await (await self._store()).get(self._names.backup(session, place))
        if found is None:
            return None
        if size is not None and len(found.data) != size:
            raise StorageError(f"Of the {size} bytes of {session} {place} came {len(found.data)}.", kind="unavailable")
        try:
            return await asyncio.to_thread(open_sealed, key, Position(session, place), found.data)
        except SealError:
            # Logged out and created again elsewhere, it has another key than the one that was read before.
            del self._keys[session]
            if (there := await self.key(session)) == key:
                raise
            return await asyncio.to_thread(open_sealed, there, Position(session, place), found.data)

    async def key(self, session: str, *, make: bool = False) -> DataKey:
        """The session's data key. Raises SealError when there is none (its backups are shredded then), unless it may be made."""
        if session not in self._keys:
            self._keys[session] = await self._key(session, make=make)
        return self._keys[session]

    async def _key(self, session: str, *, make: bool) -> DataKey:
        name = self._names.key(session)
        found = await (await self._store()).get(name)
        if found is not None:
            return unwrap(self._keyring, session, found.data)
        if not make:
            await self._prove_there()
            raise SealError(
                f"The key of session {session} is not in the store: its backups cannot be read by anybody.",
                hint="It goes first when a session is logged out. What is left of its backups can be deleted.",
            )
        await self._refuse_beside_backups(session)
        key = new_data_key()
        if await (await self._store()).create(name, wrap(self._keyring, session, key)):
            return key
        raise StorageError(f"The key of session {session} was made by somebody else at this moment.", kind="unavailable")

    async def see_key(self, session: str) -> None:
        """See that what is put can be read again: the key is still in the store. Made, when the session has nothing there.

        Raises StorageError. The key in memory is kept: once its object is back, everything goes on.
        """
        if session in self._keys and await (await self._store()).get(self._names.key(session)) is None:
            await self._refuse_beside_backups(session)
            del self._keys[session]
        await self.key(session, make=True)

    async def _refuse_beside_backups(self, session: str) -> None:
        """A second key beside backups of the first: whichever of the two came back would make the other one's noise."""
        if await self.listed(session):
            raise StorageError(
                f"The key of session {session}, {self._names.key(session)}, is gone from the store: its backups cannot be read.",
                kind="corrupt",
                hint="Bring that object back from the bucket's versions. If it is lost for good, delete everything under "
                f"{self._names.session(session)}/: the next backup begins anew, with a new key.",
            )

    # --- putting

    async def seal_state(self, session: str, place: Place, record: bytes, database: bytes) -> bytes:
        key = await self.key(session, make=True)
        return await asyncio.to_thread(seal_state, key, Position(session, place), record, database)

    async def seal_end(self, session: str, place: Place, record: bytes) -> bytes:
        return seal_end(await self.key(session), Position(session, place), record)

    async def create(self, session: str, place: Place, sealed: bytes) -> bool:
        """False: the place is taken."""
        return await (await self._store()).create(self._names.backup(session, place), sealed)

    # --- deleting

    async def forget(self, session: str) -> None:
        self._keys.pop(session, None)
        await super().forget(session)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
