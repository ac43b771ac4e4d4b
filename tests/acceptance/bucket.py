"""What the tests of backup see of the object store: its settings, and everything in it, opened."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from tests.acceptance.rig import Rig

from warren.core.backup_names import Names
from warren.core.sealing import Keyring, Kind, MasterKey, Sealed
from warren.edges.database_check import database_problem
from warren.edges.objects import open_store
from warren.edges.settings import StorageSettings
from warren.services.session_record import decode, decode_end
from warren.services.vault import Vault

KEY = "8d969eef6ecad3c29a3a629280e686cf0c3f5d5a86aff3ca12020c923adc6c92"


class Bucket:
    """`settings` as `[storage]` has them; `url` may differ from the daemon's, which perhaps goes through a proxy."""

    def __init__(self, base: Path, **settings: str) -> None:
        if "url" not in settings:
            (base / "bucket").mkdir(exist_ok=True)
            settings["url"] = f"file://{base}/bucket"
        self.settings = {"key": KEY, **settings}
        self._base = base

    def environment(self, **more: str) -> dict[str, str]:
        return {f"WARREN_STORAGE__{name.upper()}": value for name, value in {**self.settings, **more}.items()}

    async def verify(self) -> dict[str, dict[str, Sealed]]:
        """Every object, opened and checked, by session and place. Fails on anything that is not whole."""
        storage = StorageSettings.model_validate(self.settings)
        objects = open_store(storage, self._base)
        vault = Vault(objects, Names(storage.prefix), Keyring(MasterKey.from_hex(KEY)))
        found: dict[str, dict[str, Sealed]] = {}
        try:
            for session, places in (await vault.sessions()).items():
                for place in places:
                    sealed = await vault.read(session, place)
                    assert sealed is not None
                    if sealed.kind is Kind.STATE:
                        assert database_problem(sealed.database) == ""
                        assert decode(session, place, sealed.record).record.epoch == place.epoch
                    else:
                        assert decode_end(session, place, sealed.record).next_epoch > place.epoch
                    found.setdefault(session, {})[str(place)] = sealed
            return found
        finally:
            await objects.close()

    async def raw(self) -> dict[str, bytes]:
        """Every object as whoever runs the store sees it."""
        objects = open_store(StorageSettings.model_validate(self.settings), self._base)
        try:
            raw = {}
            for listed in await objects.list(""):
                found = await objects.get(listed.name)
                if found is not None:  # else it was deleted at this moment
                    raw[listed.name] = found.data
            return raw
        finally:
            await objects.close()


def secrets_of(database: bytes) -> list[bytes]:
    """Keys in a session's state: what no object may show."""
    db = sqlite3.connect(":memory:")
    data = bytearray(database)
    data[18:20] = b"\x01\x01"
    db.deserialize(bytes(data))
    rows = db.execute("SELECT noise_key, identity_key, signed_pre_key, adv_key FROM whatsmeow_device").fetchall()
    rows += db.execute("SELECT key FROM whatsmeow_pre_keys LIMIT 20").fetchall()
    db.close()
    return [bytes(value) for row in rows for value in row if isinstance(value, bytes)]


async def backed_up(rig: Rig, *sessions: str) -> None:
    """Back each session up now; everything of it is in the store then."""
    for session in sessions:
        outcome = await rig.call("backup", session)
        assert outcome.ok, outcome
