"""The master key against the store: refused when wrong, before anything is written; changed without touching backups."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.fakes import MemoryObjects

from warren.core.backup_names import KEY_CHECK, Names, Place
from warren.core.sealing import Keyring, MasterKey, Position, new_data_key, open_sealed, seal_state, unwrap, wrap
from warren.edges import storage_keys
from warren.edges.settings import Settings, StorageSettings
from warren.edges.storage_keys import disk_warning, load_keyring
from warren.errors import ConfigError, StorageError
from warren.ports import Listed
from warren.services import backup_keys
from warren.services.backup_keys import check_keys, rotate, short

NAMES = Names("warren")
OLD, NEW, OTHER = (MasterKey(os.urandom(32)) for _ in range(3))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup_keys, "RETRY_S", 0.0)


async def filled(keyring: Keyring, *sessions: str) -> MemoryObjects:
    """A store with a key, a backup each, and the check object."""
    store = MemoryObjects()
    await check_keys(store, NAMES, keyring)
    for session in sessions:
        key = new_data_key()
        await store.create(NAMES.key(session), wrap(keyring, session, key))
        sealed = seal_state(key, Position(session, Place(1, 1)), b"{}", session.encode())
        await store.create(NAMES.backup(session, Place(1, 1)), sealed)
    return store


async def content(store: MemoryObjects, keyring: Keyring, session: str) -> bytes:
    key, sealed = await store.get(NAMES.key(session)), await store.get(NAMES.backup(session, Place(1, 1)))
    assert key is not None
    assert sealed is not None
    return open_sealed(unwrap(keyring, session, key.data), Position(session, Place(1, 1)), sealed.data).database


# --- at the start -------------------------------------------------------------------------------------------------------


async def test_the_right_key_passes_again_and_again() -> None:
    store = await filled(Keyring(OLD), "acme")
    before = dict(store.objects)
    await check_keys(store, NAMES, Keyring(OLD))
    await check_keys(store, NAMES, Keyring(NEW, (OLD,)))
    assert store.objects == before


async def test_a_wrong_key_is_refused_before_anything_is_written() -> None:
    store = await filled(Keyring(OLD), "acme")
    for check_object in (True, False):
        if not check_object:
            await store.delete(NAMES.key_check())
        before = dict(store.objects)
        store.calls.clear()
        with pytest.raises(ConfigError, match="is not the one the backups were encrypted with") as told:
            await check_keys(store, NAMES, Keyring(OTHER))
        assert short(OLD.id) in told.value.message
        assert short(OTHER.id) in told.value.message
        assert "warren keys rotate" in told.value.hint
        assert store.objects == before
        assert {verb for verb, _ in store.calls} <= {"get", "list"}


async def test_a_damaged_session_key_does_not_hide_the_others() -> None:
    store = await filled(Keyring(OLD), "acme", "b")
    await store.delete(NAMES.key_check())
    store.objects[NAMES.key("acme")] = (b"damaged", "v", 0.0)
    with pytest.raises(ConfigError, match="is not the one"):
        await check_keys(store, NAMES, Keyring(OTHER))
    await check_keys(store, NAMES, Keyring(OLD))


async def test_a_page_in_place_of_the_store_is_refused() -> None:
    store = MemoryObjects()
    store.objects[NAMES.key_check()] = (b"<html>Welcome</html>", "v", 0.0)
    with pytest.raises(ConfigError, match="is not what warren puts there"):
        await check_keys(store, NAMES, Keyring(OLD))


class Overwrites(MemoryObjects):
    async def create(self, name: str, data: bytes) -> bool:
        self.objects.pop(name, None)
        return await super().create(name, data)


class Forgets(MemoryObjects):
    async def list(self, prefix: str) -> list[Listed]:
        return []


class Swallows(MemoryObjects):
    async def create(self, name: str, data: bytes) -> bool:
        return True


@pytest.mark.parametrize(
    ("store", "told"),
    [(Overwrites(), "overwrites objects"), (Forgets(), "list of objects is not complete"), (Swallows(), "does not give back")],
)
async def test_a_store_that_cannot_hold_backups_is_refused(store: MemoryObjects, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        await check_keys(store, NAMES, Keyring(OLD))


async def test_a_store_that_is_away_is_no_wrong_key() -> None:
    store = MemoryObjects()
    store.failing = 1
    with pytest.raises(StorageError):
        await check_keys(store, NAMES, Keyring(OLD))


async def test_two_daemons_may_check_for_the_first_time_at_once() -> None:
    store = MemoryObjects()
    store.losing_answers = 1
    with pytest.raises(StorageError):
        await check_keys(store, NAMES, Keyring(OLD))
    await check_keys(store, NAMES, Keyring(OLD))


# --- rotation -----------------------------------------------------------------------------------------------------------


async def test_rotation_wraps_every_key_and_touches_no_backup() -> None:
    sessions = [f"s{n}" for n in range(20)]
    store = await filled(Keyring(OLD), *sessions)
    backups = {name: o for name, o in store.objects.items() if not name.endswith("key") and KEY_CHECK not in name}
    seen: list[tuple[int, int]] = []
    done = await rotate(store, NAMES, Keyring(NEW, (OLD,)), progress=lambda i, n: seen.append((i, n)))
    assert (done.rewrapped, done.current, done.failed) == (tuple(sorted(sessions)), (), {})
    assert seen == [(i, 21) for i in range(1, 22)]
    assert {name: store.objects[name] for name in backups} == backups
    for session in sessions:
        assert await content(store, Keyring(NEW), session) == session.encode()
    await check_keys(store, NAMES, Keyring(NEW))
    with pytest.raises(ConfigError):
        await check_keys(store, NAMES, Keyring(OLD))
    again = await rotate(store, NAMES, Keyring(NEW, (OLD,)))
    assert (again.rewrapped, again.current) == ((), tuple(sorted(sessions)))


async def test_a_rotation_that_ends_half_way_loses_nothing_and_goes_on() -> None:
    sessions = [f"s{n}" for n in range(10)]
    both = Keyring(NEW, (OLD,))
    for stop_after in range(0, 22, 3):
        store = await filled(Keyring(OLD), *sessions)
        dying = Dying(store, stop_after)
        with pytest.raises((BaseExceptionGroup, Killed)):
            await rotate(dying, NAMES, both, concurrency=1)
        for session in sessions:
            assert await content(store, both, session) == session.encode()
        await check_keys(store, NAMES, both)
        with pytest.raises(ConfigError):
            await check_keys(store, NAMES, Keyring(NEW))  # not before all is done
        assert not (await rotate(store, NAMES, both)).failed
        await check_keys(store, NAMES, Keyring(NEW))


class Killed(BaseException):
    pass


class Dying(MemoryObjects):
    """The store of another one, until the process is killed at its n-th call."""

    def __init__(self, store: MemoryObjects, calls: int) -> None:
        super().__init__()
        self.objects, self._left, self._versions = store.objects, calls, 1_000

    async def _called(self, verb: str, name: str) -> None:
        await super()._called(verb, name)
        if verb in ("get", "replace"):
            self._left -= 1
            if self._left < 0:
                raise Killed


async def test_lost_answers_are_asked_again() -> None:
    store = await filled(Keyring(OLD), "acme")
    store.losing_answers = 1
    done = await rotate(store, NAMES, Keyring(NEW, (OLD,)))
    assert not done.failed
    assert await content(store, Keyring(NEW), "acme") == b"acme"


async def test_what_cannot_be_wrapped_is_told_and_keeps_the_old_key_in_force() -> None:
    store = await filled(Keyring(OLD), "acme", "b", "c")
    store.objects[NAMES.key("b")] = (b"damaged", "v", 0.0)
    store.objects[NAMES.key("c")] = (wrap(Keyring(OTHER), "c", new_data_key()), "v", 0.0)
    done = await rotate(store, NAMES, Keyring(NEW, (OLD,)))
    assert done.rewrapped == ("acme",)
    assert set(done.failed) == {"b", "c"}
    assert short(OTHER.id) in done.failed["c"]
    with pytest.raises(ConfigError):
        await check_keys(store, NAMES, Keyring(NEW))


# --- from the settings --------------------------------------------------------------------------------------------------


def test_without_a_store_a_key_is_made_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has not made"):
        load_keyring(StorageSettings(), tmp_path / "state")
    made = load_keyring(StorageSettings(), tmp_path / "state", make=True)
    path = tmp_path / "state" / "storage.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert MasterKey.from_hex(path.read_text().strip()) == made.write
    assert load_keyring(StorageSettings(), tmp_path / "state", make=True) == made
    assert load_keyring(StorageSettings(), tmp_path / "state") == made


def test_what_stands_in_its_place_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "storage.key"
    path.write_text("damaged")
    with pytest.raises(ConfigError, match="holds no key"):
        load_keyring(StorageSettings(), tmp_path, make=True)
    assert path.read_text() == "damaged"
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keyring(StorageSettings(), tmp_path, make=True)


def test_no_second_key_is_made_beside_backups_of_the_first(tmp_path: Path) -> None:
    session = tmp_path / "backups" / "warren" / "acme"
    session.mkdir(parents=True)
    load_keyring(StorageSettings(), tmp_path, make=True)
    (tmp_path / "storage.key").unlink()
    (session / "key").write_bytes(b"wrapped")
    with pytest.raises(ConfigError, match="Nothing was written") as told:
        load_keyring(StorageSettings(), tmp_path, make=True)
    assert "Bring the file back" in told.value.hint
    assert not (tmp_path / "storage.key").exists()
    (tmp_path / "backups").rename(tmp_path / "away")
    load_keyring(StorageSettings(), tmp_path, make=True)


def test_a_half_written_key_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_power(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage_keys.os, "fsync", no_power)
    with pytest.raises(ConfigError, match="cannot be made"):
        load_keyring(StorageSettings(), tmp_path, make=True)
    monkeypatch.undo()
    assert not (tmp_path / "storage.key").exists()
    load_keyring(StorageSettings(), tmp_path, make=True)


def test_a_store_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key to encrypt") as told:
        load_keyring(StorageSettings(url="s3://bucket"), tmp_path, make=True)
    assert "warren keys generate" in told.value.hint
    assert not (tmp_path / "storage.key").exists()


def test_given_keys_are_taken(tmp_path: Path) -> None:
    texts = [key.secret.hex() for key in (NEW, OLD, OTHER)]
    storage = StorageSettings(url="s3://b", key=SecretStr(texts[0]), old_keys=SecretStr(f"{texts[1]}\n{texts[2]}"))
    assert load_keyring(storage, tmp_path) == Keyring(NEW, (OLD, OTHER))
    with pytest.raises(ConfigError, match=r"storage\.key: this key is not random"):
        load_keyring(StorageSettings(key=SecretStr("00" * 32)), tmp_path)


def test_only_backups_beside_the_state_are_warned_of(tmp_path: Path) -> None:
    def warned(**storage: str) -> bool:
        return bool(disk_warning(Settings(state_dir=tmp_path, storage=StorageSettings.model_validate(storage))))

    assert warned()
    assert not warned(mode="local")
    assert not warned(url="s3://bucket")
