"""Backups and restores as services: a real state directory, a store in memory with faults, an engine that copies files."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.fakes import MemoryBus, MemoryObjects, MemoryStore

from warren.core.backup_names import Names, Place
from warren.core.names import Topology
from warren.core.sealing import Keyring, Kind, MasterKey
from warren.edges.objects_directory import DirectoryObjects
from warren.edges.statedir import StateDirectory
from warren.errors import CommandError, EngineError, SealError, StorageError
from warren.ports import Desired, JournalRow, PutBackup, PutOutcome, PutPacing, PutSession, RemoveBackup, SessionRecord
from warren.services.backup import BackupOptions, Backups
from warren.services.delivery import Delivery, DeliveryOptions
from warren.services.fleet import Fleet, FleetOptions
from warren.services.restore import Restored, RestoreOptions, Restorer
from warren.services.session_record import decode, decode_end
from warren.services.vault import Shelf, Vault, sha256

BACKUP_ERRORS = {"no_storage", "backup_failed", "restore_failed", "not_now"}
"""The rows of the table of errors that are tested in tests/unit/test_backup*.py."""
MASTER = MasterKey.from_hex("00112233445566778899aabbccddeeff" * 2)
SOURCE = "/warren/warren"


def database(text: str, *, devices: int = 1) -> bytes:
    """A small SQLite database with a device row, as bytes."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE whatsmeow_device (jid TEXT)")
    db.executemany("INSERT INTO whatsmeow_device VALUES (?)", [("15550001:2@s.whatsapp.net",)] * devices)
    db.execute("CREATE TABLE t (text TEXT)")
    db.execute("INSERT INTO t VALUES (?)", (text,))
    db.commit()
    data = db.serialize()
    db.close()
    return data


def text_of(data: bytes) -> str:
    db = sqlite3.connect(":memory:")
    db.deserialize(data)
    (text,) = db.execute("SELECT text FROM t").fetchone()
    db.close()
    return str(text)


class CopyingEngines:
    """`Engines.snapshot` as a file copy."""

    def __init__(self) -> None:
        self.paired = True
        self.failing = ""
        self.snapshots = 0

    async def snapshot(self, session: str, directory: Path, to: Path) -> dict[str, Any]:
        self.snapshots += 1
        if self.failing:
            raise EngineError("No copy today.", engine_code=self.failing)
        data = (directory / "state.db").read_bytes()
        to.write_bytes(data)
        return {"paired": self.paired, "bytes": len(data)}


class Owner:
    """A session, as its backups see it."""

    def __init__(self, record: SessionRecord) -> None:
        self.id, self.record = record.session, record
        self.gone = asyncio.Event()

    def superseded(self) -> None:
        self.gone.set()


class Machine:
    """One daemon's half of backup and restore, over a store that several may share."""

    def __init__(self, base: Path, objects: MemoryObjects, instance: str = "a", **options: Any) -> None:
        self.base, self.objects, self.instance = base, objects, instance
        self.store, self.states, self.engines = MemoryStore(), StateDirectory(base), CopyingEngines()
        self.log: list[str] = []
        self.owners: dict[str, Owner] = {}
        self.told: list[str] = []
        self._options = options
        self.vault = Vault(objects, Names("warren"), Keyring(MASTER))

    async def start(self) -> None:
        (self.base / "sessions").mkdir(mode=0o700, parents=True, exist_ok=True)
        now = lambda: datetime.now(UTC)  # noqa: E731
        self.delivery = Delivery(
            cast(Any, MemoryBus()),
            self.store,
            Topology("warren"),
            DeliveryOptions("t"),
            now=now,
            random01=lambda: 0.5,
            disk_ok=lambda: True,
        )
        await self.delivery.start()
        options = {
            "interval_s": 0,
            "at_once_s": 0.01,
            "gap_s": 0.0,
            "retry_base_s": 0.01,
            "retry_cap_s": 0.05,
            "alarm_after": 3,
            **self._options,
        }
        self.backups = Backups(
            self.vault,
            self.store,
            self.states,
            cast(Any, self.engines),
            delivery=self.delivery,
            options=BackupOptions(self.instance, SOURCE, **options),
            now=now,
            random01=lambda: 0.5,
        )
        self.restorer = Restorer(
            self.vault,
            self.store,
            self.states,
            self.backups,
            options=RestoreOptions(self.instance, SOURCE, wait_s=0.1, retry_base_s=0.01, retry_cap_s=0.02, concurrency=2),
            now=now,
            random01=lambda: 0.5,
        )

    async def stop(self) -> None:
        await self.backups.close()
        await self.delivery.stop()

    async def again(self) -> None:
        """As after a kill: what is on disk stays, what is in memory is gone."""
        await self.stop()
        self.vault = Vault(self.objects, Names("warren"), Keyring(MASTER))
        owners, self.owners = self.owners, {}
        await self.start()
        for owner in owners.values():
            self.serve(owner.record)

    def serve(self, record: SessionRecord) -> Owner:
        owner = self.owners[record.session] = Owner(record)
        self.backups.begin(owner)
        return owner

    async def create(self, session: str, text: str, epoch: int = 1) -> Owner:
        """A session that was paired here just now."""
        owner = self.serve(SessionRecord(session, epoch, Desired.RUNNING, settings={"proxy": "http://h:1"}, paired=True))
        await self.store.write(PutSession(owner.record))
        await self.states.prepare(session, epoch)
        await self.write(session, text)
        assert await self.check(session) is None
        return owner

    async def write(self, session: str, text: str) -> None:
        """The engine changes the session's state."""
        epoch = await self.states.current_epoch(session)
        (self.base / "sessions" / session / str(epoch) / "state.db").write_bytes(database(text))

    async def text(self, session: str) -> str:
        epoch = await self.states.current_epoch(session)
        return text_of((self.base / "sessions" / session / str(epoch) / "state.db").read_bytes())

    async def check(self, session: str) -> Restored | None:
        """What a session does before it opens."""
        owner = self.owners[session]
        restored = await self.restorer.check(owner.record, lambda code, _: self.told.append(code))
        if restored is not None:
            await self.take_up(session, restored)
        return restored

    async def take_up(self, session: str, restored: Restored) -> None:
        owner = self.owners[session]
        owner.record = replace(restored.stored.merged(owner.record), epoch=restored.row.epoch)
        await self.store.write(PutSession(owner.record), PutBackup(restored.row), *restored.stored.beside(()))
        self.backups.settle(session, restored.row)

    async def back_up(self, session: str, text: str) -> str:
        """Change the state and back it up; the position."""
        await self.write(session, text)
        row = await self.backups.now(session)
        return f"{row.epoch}/{row.sequence}"

    def places(self, session: str) -> list[str]:
        return [str(p) for p in Names("warren").places(session, self.objects.objects)]

    async def kinds(self, session: str) -> list[Kind]:
        """What every object is; each of them opens."""
        sealed = [await self.vault.read(session, Place.parse(p)) for p in self.places(session)]
        return [s.kind for s in sealed if s is not None]


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects()


@pytest.fixture
async def machines(tmp_path: Path, objects: MemoryObjects) -> AsyncIterator[Any]:
    made: list[Machine] = []

    async def make(instance: str = "a", **options: Any) -> Machine:
        machine = Machine(tmp_path / instance, objects, instance, **options)
        await machine.start()
        made.append(machine)
        return machine

    yield make
    for machine in made:
        await machine.stop()


async def until(condition: Any, what: str) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)
    assert condition(), what


# --- a backup ---------------------------------------------------------------------------------------------------------


async def test_a_backup_is_one_put_and_an_unchanged_session_costs_none(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    assert await a.back_up("acme", "one") == "1/1"
    objects.calls.clear()
    assert await a.back_up("acme", "two") == "1/2"
    assert [c for c in objects.calls if c[0] == "create"] == [("create", "warren/acme/0000000001/0000000002")]
    objects.calls.clear()
    assert await a.back_up("acme", "two") == "1/2"
    assert objects.calls == []
    assert await a.kinds("acme") == [Kind.STATE, Kind.STATE]


async def test_what_travels_along(machines: Any) -> None:
    a = await machines()
    owner = await a.create("acme", "one")
    rows = [JournalRow("acme", f"order-{n}", "f", b'{"ok":true}') for n in range(3)]
    await a.store.write(*(PutOutcome(row) for row in rows), PutPacing("acme", (1_000, 2_000)))
    await a.back_up("acme", "one")
    sealed = await a.vault.read("acme", Place(1, 1))
    stored = decode("acme", Place(1, 1), sealed.record)
    assert stored.journal == tuple(rows)
    assert stored.pacing == (1_000, 2_000)
    assert stored.record == owner.record
    assert stored.source == SOURCE
    assert text_of(sealed.database) == "one"


async def test_without_a_device_nothing_is_put(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    owner = await a.create("acme", "one")
    a.engines.paired = False
    with pytest.raises(CommandError) as told:
        await a.backups.now("acme")
    assert told.value.reason == "backup_failed"
    a.engines.paired = True
    assert await a.back_up("acme", "good") == "1/1"
    # Logged out by WhatsApp: the library has deleted the device, and the good state stays the newest.
    owner.record = replace(owner.record, paired=False)
    await a.write("acme", "ruins")
    a.backups.changed("acme", at_once=True)
    await until(lambda: not a.backups.status("acme")["pending"], "the backup to be over")
    assert a.places("acme") == ["1/1"]


async def test_identity_changes_are_backed_up_at_once_others_by_the_timer(machines: Any) -> None:
    a = await machines()
    await a.create("acme", "one")
    a.backups.changed("acme")
    await a.write("acme", "two")
    a.backups.changed("acme", at_once=True)
    await until(lambda: a.places("acme") == ["1/1"], "a backup at once")
    b = await machines("b", interval_s=0.05)
    await b.create("other", "one")
    b.backups.changed("other")
    await until(lambda: b.places("other") == ["1/1"], "a backup by the timer")


async def test_a_session_that_changes_all_the_time_is_not_put_all_the_time(machines: Any) -> None:
    a = await machines(gap_s=60.0)
    await a.create("acme", "one")
    a.backups.changed("acme", at_once=True)
    await until(lambda: a.places("acme") == ["1/1"], "the first backup, at once")
    for n in range(20):
        await a.write("acme", f"two {n}")
        a.backups.changed("acme", at_once=True)
        await asyncio.sleep(0.005)
    assert a.places("acme") == ["1/1"]
    assert await a.backups.finish(), "a stop does not wait for the gap"
    assert a.places("acme") == ["1/1", "1/2"]


async def test_a_stop_backs_up_everything_that_changed(machines: Any) -> None:
    a = await machines(concurrency=2)
    for n in range(7):
        await a.create(f"s{n}", "one")
        await a.back_up(f"s{n}", "one")
    for n in range(5):
        await a.write(f"s{n}", "two")
        a.backups.changed(f"s{n}")
    assert await a.backups.finish()
    assert [len(a.places(f"s{n}")) for n in range(7)] == [2] * 5 + [1] * 2
    await a.write("s0", "three")
    a.backups.changed("s0")
    a.objects.failing = 9
    assert not await a.backups.finish(), "a stop says that something is on this disk only"


async def test_a_backup_on_command_of_a_session_that_changes_meanwhile_is_one(machines: Any) -> None:
    a = await machines()
    await a.create("acme", "one")
    copy = a.engines.snapshot

    async def busy(*args: Any) -> Any:
        copied = await copy(*args)
        a.backups.changed("acme")
        return copied

    a.engines.snapshot = busy
    assert await a.back_up("acme", "two") == "1/1"
    assert a.backups.status("acme")["pending"], "and what came meanwhile is not forgotten"


async def test_few_backups_at_once(machines: Any, objects: MemoryObjects) -> None:
    a = await machines(concurrency=2)
    for n in range(6):
        await a.create(f"s{n}", "one")
        await a.vault.key(f"s{n}", make=True)
    objects.calls.clear()
    objects.gate.clear()
    finishing = asyncio.create_task(a.backups.finish())
    for _ in range(200):
        await asyncio.sleep(0.001)
    assert len(objects.calls) == 2
    objects.gate.set()
    assert await finishing


# --- trouble with the store -------------------------------------------------------------------------------------------


async def test_what_changes_while_a_retry_succeeds_is_backed_up_too(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    copy, changes = a.engines.snapshot, iter([True])

    async def busy(*args: Any) -> Any:
        copied = await copy(*args)
        if not objects.failing and next(changes, False):
            a.backups.changed("acme")
        return copied

    a.engines.snapshot = busy
    objects.failing = 2
    a.backups.changed("acme", at_once=True)
    await until(lambda: a.places("acme") and not a.backups.status("acme")["pending"], "nothing to be left")
    assert a.backups.status("acme")["failures"] == 0
    assert next(changes, None) is None, "it changed meanwhile"


async def test_a_failing_store_is_told_once_and_recovers(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.vault.key("acme", make=True)
    objects.failing = 5
    a.backups.changed("acme", at_once=True)
    await until(lambda: a.places("acme") == ["1/1"], "the backup, in the end")
    assert a.backups.status("acme")["failures"] == 0
    assert a.backups.trouble == ""
    told = [row.event for row in a.store.rows.values()]
    await until(lambda: not a.backups.status("acme")["pending"], "nothing to be left")
    assert told.count("backup_failed") <= 1
    assert a.delivery._sequences == {("acme", 0): 1}, "one alarm for five failures in a row"


async def test_a_put_whose_answer_is_lost_is_recognised(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    objects.losing_answers = 1
    await a.write("acme", "two")
    a.backups.changed("acme", at_once=True)
    await until(lambda: not a.backups.status("acme")["pending"], "the second try")
    row = await a.store.backup("acme")
    assert not a.owners["acme"].gone.is_set()
    # The first try of 1/2 had arrived; the second found it, knew it for its own, and went on behind it.
    assert a.places("acme") == ["1/1", "1/2", "1/3"]
    assert (row.sequence, row.attempts) == (3, ())


async def test_half_a_read_of_our_own_put_is_no_stranger(machines: Any, objects: MemoryObjects, monkeypatch: Any) -> None:
    a = await machines()
    owner = await a.create("acme", "one")
    await a.back_up("acme", "one")
    create, get, cut = objects.create, objects.get, [True, True]

    async def answer_lost(name: str, data: bytes) -> bool:
        created = await create(name, data)
        if created:
            raise StorageError("The answer is lost.", kind="unavailable")
        return created

    async def short(name: str) -> Any:
        found = await get(name)
        return replace(found, data=found.data[:-5]) if found is not None and name.endswith("2") and cut and cut.pop() else found

    monkeypatch.setattr(objects, "create", answer_lost)
    monkeypatch.setattr(objects, "get", short)
    await a.write("acme", "two")
    a.backups.changed("acme", at_once=True)
    await until(lambda: not cut, "the short reads")
    monkeypatch.setattr(objects, "create", create)
    await until(lambda: not a.backups.status("acme")["pending"], "the backup")
    assert not owner.gone.is_set()
    assert a.places("acme")[:3] == ["1/1", "1/2", "1/3"]


async def test_a_kill_between_put_and_position_is_no_stranger(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    before = await a.store.backup("acme")
    await a.back_up("acme", "two")
    after = await a.store.backup("acme")
    # What a kill right behind the put leaves on disk: the attempt, not the position.
    lost = objects.objects["warren/acme/0000000001/0000000002"][0]
    await a.store.write(PutBackup(replace(before, attempts=(sha256(lost),))))
    await a.again()
    assert await a.check("acme") is None, "the local state is the newest"
    found = await a.store.backup("acme")
    assert (found.epoch, found.sequence) == (after.epoch, after.sequence)
    assert await a.back_up("acme", "three") == "1/3"


async def test_a_truncated_read_is_no_damage(machines: Any, objects: MemoryObjects) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    await a.back_up("acme", "two")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    await b.vault.key("acme")
    objects.truncating = 2
    restored = await b.check("acme")
    assert restored.place == Place(1, 2), "a read that was cut is repeated, not taken for damage"
    assert await b.text("acme") == "two"


# --- a restore --------------------------------------------------------------------------------------------------------


async def test_from_a_to_b_and_back_to_a(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "a1")
    await a.write("acme", "a2, never backed up")

    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    restored = await b.check("acme")
    assert (restored.place, restored.row.epoch) == (Place(1, 1), 2)
    assert await b.text("acme") == "a1"
    assert b.owners["acme"].record.settings == {"proxy": "http://h:1"}
    assert await b.back_up("acme", "b1") == "2/1"

    await a.again()
    restored = await a.check("acme")
    assert (restored.place, restored.row.epoch) == (Place(2, 1), 3)
    assert await a.text("acme") == "b1", "A's older local state is not used"
    assert await a.states.epochs("acme") == [1, 3], "and it is not overwritten"
    assert await a.kinds("acme") == [Kind.STATE, Kind.SEAL, Kind.STATE, Kind.SEAL]
    assert await a.back_up("acme", "a3") == "3/1"


async def test_whoever_was_overtaken_steps_down_and_overwrites_nothing(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    owner = await a.create("acme", "one")
    await a.back_up("acme", "a1")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    await b.check("acme")
    before = dict(a.objects.objects)
    await a.write("acme", "a2")
    a.backups.changed("acme", at_once=True)
    await asyncio.wait_for(owner.gone.wait(), 30)
    assert a.objects.objects == before
    a.backups.changed("acme", at_once=True)
    with pytest.raises(CommandError):
        await a.backups.now("acme")
    assert await b.back_up("acme", "b1") == "2/1"
    assert a.objects.objects.keys() - before.keys() == {"warren/acme/0000000002/0000000001"}


async def test_two_that_restore_at_once_cannot_both_win(machines: Any) -> None:
    a, b, c = await machines("a"), await machines("b"), await machines("c")
    await a.create("acme", "one")
    await a.back_up("acme", "a1")
    for machine in (b, c):
        machine.serve(SessionRecord("acme", 1, Desired.RUNNING))
    await asyncio.gather(b.check("acme"), c.check("acme"))
    epochs = sorted(m.owners["acme"].record.epoch for m in (b, c))
    assert len(set(epochs)) == 2, "each has an epoch of its own"
    for machine in (b, c):
        await machine.write("acme", f"by {machine.instance}")
        machine.backups.changed("acme", at_once=True)
    loser, winner = sorted((b, c), key=lambda m: m.owners["acme"].record.epoch)
    await asyncio.wait_for(loser.owners["acme"].gone.wait(), 30)
    await until(lambda: not winner.backups.status("acme")["pending"], "the winner's backup")
    assert not winner.owners["acme"].gone.is_set()


async def test_a_restore_that_was_killed_happens_again(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "a1")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    # Killed behind the seal, behind the pointer: what is on record is as before.
    for _ in range(2):
        restored = await b.restorer.check(b.owners["acme"].record, lambda *_: None)
        assert restored is not None
        await b.again()
    restored = await b.check("acme")
    assert restored.place == Place(1, 1)
    assert await b.text("acme") == "a1"
    assert (await b.kinds("acme")).count(Kind.SEAL) == 3
    assert decode_end("acme", Place(1, 2), (await b.vault.read("acme", Place(1, 2))).record).next_epoch == 2
    assert await b.back_up("acme", "b1") == f"{b.owners['acme'].record.epoch}/1"


async def test_the_local_state_wins_when_it_is_the_newest(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    await a.write("acme", "newer than its backup")
    await a.again()
    assert await a.check("acme") is None
    assert await a.text("acme") == "newer than its backup"
    assert a.told == []
    assert a.places("acme") == ["1/1"]


async def test_a_session_that_does_not_change_is_backed_up_in_another_store_too(machines: Any) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    a.objects = MemoryObjects()
    await a.again()
    assert await a.check("acme") is None
    assert await a.back_up("acme", "one") == "1/2"
    assert a.places("acme") == ["1/2"]
    assert await a.kinds("acme") == [Kind.STATE]


async def test_local_mode_left_before_the_first_backup(machines: Any) -> None:
    """local -> hybrid: what exists is backed up; nothing in the store speaks against it."""
    a = await machines()
    await a.create("acme", "one", epoch=4)
    assert await a.back_up("acme", "one") == "4/1"


async def test_few_look_at_the_store_at_once_and_who_waits_for_its_turn_learns_that_it_is_away(
    machines: Any, objects: MemoryObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await machines()
    for n in range(8):
        await a.create(f"s{n}", "one")
        await a.back_up(f"s{n}", "one")
    looking, most, looks, answer = 0, 0, 0, asyncio.Event()
    listed = Vault.listed

    async def slow(vault: Vault, session: str) -> Any:
        nonlocal looking, most, looks
        looks += 1
        looking += 1
        most = max(most, looking)
        try:
            async with asyncio.timeout(0.5):
                await answer.wait()
            return await listed(vault, session)
        except TimeoutError:
            raise StorageError("No answer.", kind="unavailable") from None
        finally:
            looking -= 1

    await a.again()
    monkeypatch.setattr(Vault, "listed", slow)
    answer.set()
    assert await asyncio.gather(*(a.check(f"s{n}") for n in range(8))) == [None] * 8
    assert (most, looks) == (2, 8)
    await a.again()
    answer.clear()
    async with asyncio.timeout(30):
        assert await asyncio.gather(*(a.check(f"s{n}") for n in range(8))) == [None] * 8, "they go on with what is here"
    assert most == 2
    assert looks < 16, "not each of them has to find out by itself"


async def test_a_missing_state_waits_for_the_store_for_ever(machines: Any, objects: MemoryObjects) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    objects.failing = 25
    restored = await b.check("acme")
    assert restored.place == Place(1, 1)
    assert b.told.count("storage_unavailable") == 25
    assert b.told[-1] == "restoring"


async def test_a_local_state_waits_a_while_and_goes_on(machines: Any, objects: MemoryObjects) -> None:
    a, b = await machines("a"), await machines("b")
    owner = await a.create("acme", "one")
    await a.back_up("acme", "one")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    await b.check("acme")
    await a.again()
    owner = a.owners["acme"]
    objects.denied = True
    assert await a.check("acme") is None
    assert a.backups.settled("acme")
    assert "storage_unavailable" in a.told
    # Nobody could know that B has it; the first backup finds out, and nothing of B's is overwritten.
    objects.denied = False
    await a.write("acme", "a2")
    a.backups.changed("acme", at_once=True)
    await asyncio.wait_for(owner.gone.wait(), 30)
    assert a.places("acme") == ["1/1", "1/2"]


async def test_damage_falls_back_to_the_newest_whole_state(machines: Any, objects: MemoryObjects) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    for text in ("one", "two", "three"):
        await a.back_up("acme", text)
    name = "warren/acme/0000000001/0000000003"
    data, version, at = objects.objects[name]
    objects.objects[name] = (data[:-1] + bytes([data[-1] ^ 1]), version, at)
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    restored = await b.check("acme")
    assert restored.place == Place(1, 2)
    assert await b.text("acme") == "two"
    assert b.places("acme") == ["1/1", "1/2", "1/3", "1/4"], "the seal is behind everything, damaged or not"


async def test_what_cannot_be_proved_is_refused(machines: Any, objects: MemoryObjects) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    key = objects.objects.pop("warren/acme/key")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    with pytest.raises(SealError, match="key of session acme is not in the store"):
        await b.check("acme")
    objects.objects["warren/acme/key"] = key
    for name, (data, version, at) in list(objects.objects.items()):
        if name.startswith("warren/acme/0"):
            objects.objects[name] = (data[:-1] + bytes([data[-1] ^ 1]), version, at)
    with pytest.raises(SealError, match="cannot be restored"):
        await b.check("acme")
    assert b.places("acme") == ["1/1"], "nothing was sealed on the way"
    assert await b.states.current_epoch("acme") is None


async def test_a_backup_whose_database_is_broken_is_not_taken(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    (a.base / "sessions" / "acme" / "1" / "state.db").write_bytes(database("two")[:5000])
    await a.backups.now("acme")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    assert (await b.check("acme")).place == Place(1, 1)
    assert await b.text("acme") == "one"


async def test_a_chosen_backup_is_restored_over_a_newer_one(machines: Any) -> None:
    a = await machines()
    await a.create("acme", "one")
    for text in ("one", "two", "three"):
        await a.back_up("acme", text)
    a.backups.unsettle("acme")
    restored = await a.restorer.restore(a.owners["acme"].record, Place(1, 1), lambda *_: None)
    await a.take_up("acme", restored)
    assert await a.text("acme") == "one"
    assert await a.back_up("acme", "one, and on") == "2/1"
    assert a.places("acme") == ["1/1", "1/2", "1/3", "1/4", "2/1"]
    for wrong in (Place(7, 7), Place(1, 4)):
        with pytest.raises(SealError):
            await a.restorer.restore(a.owners["acme"].record, wrong, lambda *_: None)


async def test_an_unreadable_state_is_set_aside_and_replaced_by_a_backup_that_is_as_new(machines: Any) -> None:
    a = await machines()
    owner = await a.create("acme", "one")
    await a.back_up("acme", "one")
    ruin = a.base / "sessions" / "acme" / "1" / "state.db"
    ruin.write_bytes(b"ruins")
    restored = await a.restorer.rescue(owner.record, lambda *_: None)
    await a.take_up("acme", restored)
    assert await a.text("acme") == "one"
    await a.states.tidy("acme")
    assert ruin.read_bytes() == b"ruins"
    # Nothing in the store is as new as what is lost here: somebody has to look at it.
    await a.create("other", "one")
    assert await a.restorer.rescue(a.owners["other"].record, lambda *_: None) is None


async def test_while_a_damaged_state_is_replaced_nothing_is_backed_up_under_the_old_position(machines: Any) -> None:
    a = await machines()
    owner = await a.create("acme", "one")
    await a.back_up("acme", "one")
    (a.base / "sessions" / "acme" / "1" / "state.db").write_bytes(b"ruins")
    assert await a.restorer.rescue(owner.record, lambda *_: None) is not None
    # The session was stopped before it could take that up, so the registry knows nothing of it.
    await a.write("acme", "two")
    a.backups.changed("acme", at_once=True)
    with pytest.raises(CommandError):
        await a.backups.now("acme")
    assert not owner.gone.is_set(), "our own seal is no stranger"
    await a.take_up("acme", await a.restorer.check(owner.record, lambda *_: None))
    assert await a.text("acme") == "one"


async def test_a_damaged_state_is_replaced_also_before_the_first_backup_of_its_epoch(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    owner = b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    epoch = (await b.check("acme")).row.epoch
    (b.base / "sessions" / "acme" / str(epoch) / "state.db").write_bytes(b"ruins")
    restored = await b.restorer.rescue(owner.record, lambda *_: None)
    await b.take_up("acme", restored)
    assert await b.text("acme") == "one"


async def test_a_damaged_state_beside_a_rebuilt_registry_is_replaced_but_not_by_a_phone_of_before(machines: Any) -> None:
    a = await machines()
    owner = await a.create("acme", "one")
    await a.back_up("acme", "one")
    await a.create("other", "one")
    await a.back_up("other", "one")
    (a.base / "sessions" / "acme" / "1" / "state.db").write_bytes(b"ruins")
    assert await a.restorer.rescue(replace(owner.record, epoch=2), lambda *_: None) is not None
    # Linked anew, and never backed up since: the backup is of a device that WhatsApp has unlinked.
    await a.states.prepare("other", 2)
    (a.base / "sessions" / "other" / "2" / "state.db").write_bytes(b"ruins")
    assert await a.restorer.rescue(replace(a.owners["other"].record, epoch=2), lambda *_: None) is None


async def test_a_new_pairing_that_was_cut_off_before_it_had_a_state_does_not_bring_back_the_unlinked_phone(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    owner = await a.create("acme", "unlinked")
    await a.back_up("acme", "unlinked")
    owner.record = replace(owner.record, epoch=2, paired=False)
    await a.states.prepare("acme", 2)
    await a.again()
    assert await a.check("acme") is None
    assert not await a.states.has_state("acme", 2)
    # The phone that was linked, without its state, comes back as ever; and so does what another one has put since.
    a.owners["acme"].record = replace(owner.record, epoch=1, paired=True)
    await a.again()
    assert (await a.check("acme")).row.epoch == 3
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    assert (await b.check("acme")).row.epoch == 4
    assert await b.back_up("acme", "b1") == "4/1"
    a.owners["acme"].record = replace(owner.record, epoch=4, paired=False)
    await a.states.remove("acme")
    await a.states.prepare("acme", 4)
    await a.again()
    assert (await a.check("acme")).row.epoch == 5


async def test_an_epoch_that_has_passed_another_owners_makes_nothing_newer(machines: Any) -> None:
    """A registry that was rebuilt counts its epochs on, whatever has happened in the store."""
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "a1")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    await b.check("acme")
    await b.back_up("acme", "b1")
    await a.again()
    a.owners["acme"].record = replace(a.owners["acme"].record, epoch=3)
    assert await a.check("acme") is not None
    assert await a.text("acme") == "b1"


async def test_an_epoch_that_the_store_has_passed_is_not_written_to(machines: Any, objects: MemoryObjects) -> None:
    a = await machines(keep_last=1, keep_days=0)
    await a.create("acme", "one", epoch=3)
    await a.back_up("acme", "one")
    await a.again()
    owner = a.owners["acme"]
    owner.record = replace(owner.record, epoch=2)  # rebuilt from its directory only
    await a.store.write(RemoveBackup("acme"))
    objects.denied = True
    assert await a.check("acme") is None
    objects.denied = False
    await a.write("acme", "two")
    a.backups.changed("acme", at_once=True)
    await asyncio.wait_for(owner.gone.wait(), 30)
    assert a.places("acme") == ["3/1"]


# --- on an empty machine ----------------------------------------------------------------------------------------------


async def test_strangers_are_found_and_another_warrens_are_left_alone(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    for session in ("s1", "s2", "s3"):
        await a.create(session, "one")
        await a.back_up(session, "one")
    assert await b.restorer.strangers({"s2": 99}) == ["s1", "s3"]
    assert await b.restorer.strangers({"s2": 0}) == ["s1", "s2", "s3"], "created anew elsewhere since it ended here"
    peeked = await b.restorer.peek("s1")
    assert (peeked.stored.record.session, peeked.epoch, peeked.last) == ("s1", 2, Place(1, 1))
    b.restorer._options = replace(b.restorer._options, source="/warren/staging")
    assert await b.restorer.peek("s1") is None


async def test_a_logout_shreds_and_deletes(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    await a.create("acme2", "one")
    await a.back_up("acme2", "one")
    objects.calls.clear()
    a.backups.end("acme")
    objects.failing = 1
    with pytest.raises(StorageError):
        await a.backups.forget("acme")
    await a.backups.forget("acme")
    deleted = [name for verb, name in objects.calls if verb == "delete"]
    assert deleted[0] == "warren/acme/key"
    assert {n.split("/")[1] for n in objects.objects} == {"acme2", ".key-check"}
    assert await a.store.backup("acme") is None


async def test_how_long_nobody_has_used_a_session_is_kept_over_restarts(machines: Any) -> None:
    a = await machines()
    owner = await a.create("acme", "one")
    assert await a.backups.unused_s("acme", unused=True) == 0.0, "never backed up, so nothing to remove"
    await a.back_up("acme", "one")
    assert await a.backups.unused_s("acme", unused=True) == 0.0
    await a.store.write(PutBackup(replace(await a.store.backup("acme"), idle_since=1_000.0)))
    await a.again()
    assert await a.backups.unused_s("acme", unused=True) > 30 * 86_400
    assert await a.check("acme") is None
    assert await a.back_up("acme", "two") == "1/2"
    assert await a.backups.unused_s("acme", unused=True) > 30 * 86_400, "a backup is no use"
    assert await a.backups.unused_s("acme", unused=False) == 0.0
    assert await a.backups.unused_s("acme", unused=True) < 60
    assert owner.id == "acme"


async def test_what_is_used_for_some_minutes_a_day_is_in_use(machines: Any) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    await a.store.write(PutBackup(replace(await a.store.backup("acme"), idle_since=1_000.0)))
    a.backups.changed("acme")  # `create` and `disconnect`, between two looks
    assert await a.backups.unused_s("acme", unused=True) < 60
    await a.store.write(PutBackup(replace(await a.store.backup("acme"), idle_since=1_000.0)))
    await a.again()
    await a.check("acme")
    a.backups.changed("acme")
    await a.back_up("acme", "two")
    await a.again()  # before anybody has looked
    assert await a.backups.unused_s("acme", unused=True) < 60


async def test_whose_the_newest_backup_is(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    assert await a.backups.newest_is_ours("acme")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    await b.check("acme")
    for _ in range(2):
        assert not await a.backups.newest_is_ours("acme"), "removing it here would delete what b lives on"
        assert await b.backups.newest_is_ours("acme")
        await b.back_up("acme", "b1")


async def test_the_removal_of_a_stale_owner_leaves_the_others_backups_alone(machines: Any, objects: MemoryObjects) -> None:
    a, b = await machines("a"), await machines("b")
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    b.serve(SessionRecord("acme", 1, Desired.RUNNING))
    await b.check("acme")
    before = dict(objects.objects)
    a.backups.end("acme")
    objects.failing = 1
    with pytest.raises(StorageError):
        await a.backups.forget("acme")
    await a.backups.forget("acme")
    assert objects.objects == before
    assert await a.store.backup("acme") is None
    assert await b.back_up("acme", "b1") == "2/1"
    b.backups.end("acme")
    await b.backups.forget("acme")
    assert set(objects.objects) == {"warren/.key-check"}


async def test_a_put_whose_answer_was_lost_is_ours_to_remove(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    objects.losing_answers = 1
    with pytest.raises(CommandError):
        await a.back_up("acme", "two")
    a.backups._jobs["acme"].timer.cancel()
    assert a.places("acme") == ["1/1", "1/2"]
    assert await a.backups.newest_is_ours("acme")
    a.backups.end("acme")
    await a.backups.forget("acme")
    assert set(objects.objects) == {"warren/.key-check"}


async def test_a_session_that_was_created_again_elsewhere_has_a_key_of_its_own(machines: Any) -> None:
    a, b = await machines("a"), await machines("b")
    await b.create("acme", "one")
    await b.back_up("acme", "b1")
    assert await a.restorer.peek("acme") is not None
    b.backups.end("acme")
    await b.backups.forget("acme")
    await b.create("acme", "two")
    await b.back_up("acme", "b2")
    a.serve(SessionRecord("acme", 1, Desired.RUNNING))
    await a.check("acme")
    assert await a.text("acme") == "b2"


async def test_a_key_that_is_gone_is_told_and_no_second_one_is_made(machines: Any, objects: MemoryObjects) -> None:
    a = await machines(alarm_after=1)
    await a.create("acme", "one")
    assert await a.back_up("acme", "one") == "1/1"
    key = objects.objects.pop("warren/acme/key")
    a.backups._jobs["acme"].key_seen_at -= 86_400  # a day later
    with pytest.raises(CommandError, match=r"warren/acme/key, is gone") as told:
        await a.back_up("acme", "two")
    assert told.value.reason == "backup_failed"
    assert a.backups.status("acme")["failures"] == 1
    await a.again()
    await a.check("acme")
    with pytest.raises(CommandError, match=r"warren/acme/key, is gone"):
        await a.back_up("acme", "two")
    assert "warren/acme/key" not in objects.objects
    assert a.places("acme") == ["1/1"]
    objects.objects["warren/acme/key"] = key
    assert await a.back_up("acme", "two") == "1/2"
    assert await a.kinds("acme") == [Kind.STATE] * 2


async def test_who_has_lost_a_key_for_good_begins_anew(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    await a.create("acme", "one")
    await a.back_up("acme", "one")
    del objects.objects["warren/acme/key"]
    del objects.objects["warren/acme/0000000001/0000000001"]
    a.backups._jobs["acme"].key_seen_at -= 86_400
    assert await a.back_up("acme", "two") == "1/2"
    a.vault = Vault(objects, Names("warren"), Keyring(MASTER))
    assert await a.kinds("acme") == [Kind.STATE]


async def test_a_disk_that_was_unmounted_is_no_empty_store(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    vault = Vault(DirectoryObjects(root), Names("warren"), Keyring(MASTER))
    await vault.check()
    assert await vault.listed("acme") == {}
    root.rename(tmp_path / "unmounted")
    root.mkdir()
    for ask in (vault.listed("acme"), vault.sessions(), vault.key("acme", make=True), vault.forget("acme")):
        with pytest.raises(StorageError, match="lost everything"):
            await ask
    assert not (root / "warren").exists()


async def test_one_session_that_cannot_be_read_keeps_no_other_from_being_taken_up() -> None:
    looked_at: list[str] = []
    connected = asyncio.Event()
    connected.set()

    class Restorer:
        async def strangers(self, known: object) -> list[str]:
            return ["a", "b", "c"]

        async def peek(self, session: str, before: object = None) -> None:
            looked_at.append(session)
            if session == "b":
                raise StorageError("This file cannot be read.", kind="unavailable")

    deps: Any = SimpleNamespace(restorer=Restorer(), random01=lambda: 0.5)
    bus: Any = SimpleNamespace(connected=connected)
    adopting = asyncio.create_task(Fleet(bus, MemoryStore(), lambda _: deps, FleetOptions())._adopt_all())
    await until(lambda: "c" in looked_at, "the session behind the bad one")
    adopting.cancel()
    await asyncio.gather(adopting, return_exceptions=True)


@pytest.mark.parametrize("meanwhile", ["backed up", "logged out", "store away", "nothing"])
async def test_what_happens_until_the_claim_is_ours_counts(machines: Any, objects: MemoryObjects, meanwhile: str) -> None:
    a, b = await machines("a"), await machines("b")
    owner = await a.create("acme", "one")
    await a.back_up("acme", "one")
    released: list[bool] = []
    added: list[SessionRecord] = []

    class Held:
        async def release(self, *, remove: bool = False) -> None:
            released.append(remove)

    async def claim(session: str, **_: object) -> Held:
        if meanwhile == "backed up":
            owner.record = replace(owner.record, desired=Desired.STOPPED)
            await a.back_up("acme", "two")
        elif meanwhile == "logged out":
            a.backups.end("acme")
            await a.backups.forget("acme")
        elif meanwhile == "store away":
            objects.failing = 1
        objects.calls.clear()
        return Held()

    fleet = Fleet(cast(Any, SimpleNamespace(claim=claim)), b.store, lambda _: cast(Any, b), FleetOptions())
    fleet._on_control = fleet._on_work = cast(Any, None)
    fleet._add = cast(Any, lambda record, _: (added.append(record), SimpleNamespace(resume=lambda: None))[1])
    if meanwhile == "store away":
        with pytest.raises(StorageError):
            await fleet._adopt("acme")
    else:
        await fleet._adopt("acme")
    assert [r.desired for r in added] == {"backed up": [Desired.STOPPED], "nothing": [Desired.RUNNING]}.get(meanwhile, [])
    assert released == {"logged out": [True], "store away": [False]}.get(meanwhile, [])
    assert len(objects.calls) == 1 or meanwhile != "nothing", "what has not changed is not read again"


async def test_old_backups_go(machines: Any, objects: MemoryObjects) -> None:
    a = await machines(keep_last=2, keep_days=0)
    await a.create("acme", "one")
    for n in range(5):
        await a.back_up("acme", f"{n}")
    await a.again()
    assert await a.check("acme") is None
    await a.back_up("acme", "last")
    await until(lambda: a.places("acme") == ["1/5", "1/6"], "the old ones to be deleted")


async def test_in_cloud_mode_nothing_is_safe_before_rabbitmq_has_it(machines: Any) -> None:
    a = await machines()
    bus = MemoryBus()
    bus.gate.clear()
    delivery = Delivery(
        cast(Any, bus),
        a.store,
        Topology("warren"),
        DeliveryOptions("t", answer_after_s=None),
        now=lambda: datetime.now(UTC),
        random01=lambda: 0.5,
        disk_ok=lambda: True,
    )
    await delivery.start()
    ticket = delivery.submit("acme", "message", {})
    await asyncio.wait_for(asyncio.shield(ticket.stored), 30)
    for _ in range(50):
        await asyncio.sleep(0.01)
    assert not ticket.safe.done(), "on disk for longer than `answer_after_ms`, and still not safe"
    bus.gate.set()
    await asyncio.wait_for(asyncio.shield(ticket.safe), 30)
    await delivery.stop()


# --- without a store --------------------------------------------------------------------------------------------------


async def test_without_a_store_nothing_happens(tmp_path: Path, objects: MemoryObjects) -> None:
    machine = Machine(tmp_path, objects)
    machine.vault = cast(Any, None)
    await machine.start()
    with contextlib.suppress(AssertionError):
        machine.serve(SessionRecord("acme", 1, Desired.RUNNING, paired=True))
    assert machine.backups.settled("acme")
    assert machine.backups.status("acme") is None
    assert await machine.check("acme") is None
    assert await machine.backups.finish()
    with pytest.raises(CommandError) as told:
        await machine.backups.now("acme")
    assert told.value.reason == "no_storage"
    assert objects.calls == []
    await machine.stop()


async def test_in_local_mode_the_backups_of_earlier_days_go_with_their_session(machines: Any, objects: MemoryObjects) -> None:
    a = await machines()
    for session in ("acme", "other"):
        await a.create(session, "one")
        await a.back_up(session, "one")
    a.backups._vault, a.backups._leftovers = None, lambda: Shelf(objects, Names("warren"))
    objects.failing = 1
    with pytest.raises(StorageError):
        await a.backups.forget("acme")
    await a.backups.forget("acme")
    assert {n.split("/")[1] for n in objects.objects} == {"other", ".key-check"}
    assert await a.store.backup("acme") is None
    objects.calls.clear()
    await a.backups.forget("never-backed-up")
    assert objects.calls == [], "who never used a store needs none"
