"""`warren backup …` and `warren keys …` over a directory as store: what they find, say and return. No daemon, no RabbitMQ."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path
from typing import Any

import orjson
import pytest

from warren import cli_backup
from warren.cli import main
from warren.core.backup_names import Names, Place
from warren.core.sealing import Keyring, MasterKey
from warren.edges.objects_directory import DirectoryObjects
from warren.ports import Desired, SessionRecord
from warren.services.backup_keys import check_keys
from warren.services.session_record import End, Stored, encode, encode_end
from warren.services.vault import Vault

OLD, NEW = MasterKey(os.urandom(32)), MasterKey(os.urandom(32))
NAMES = Names("warren")
DAY_S = 86_400


def database(path: Path) -> bytes:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE whatsmeow_device (jid TEXT)")
    db.execute("INSERT INTO whatsmeow_device VALUES ('15551234567:3@s.whatsapp.net')")
    db.commit()
    db.close()
    return path.read_bytes()


class Bucket:
    """A store with backups, and the configuration that names it."""

    def __init__(self, base: Path) -> None:
        self.root, self.config = base / "store", base / "warren.toml"
        self.root.mkdir()
        self.state = database(base / "state.db")
        self.keys(OLD)
        self.run(self._check())

    def keys(self, key: MasterKey, *old: MasterKey, more: str = "") -> None:
        self.config.write_text(
            f'[amqp]\nurl = "amqp://127.0.0.1:1/"\n[storage]\nurl = "file://{self.root}"\nkey = "{key.secret.hex()}"\n'
            f"old_keys = {[k.secret.hex() for k in old]}\n{more}"
        )

    @staticmethod
    def run(what: Any) -> Any:
        return asyncio.run(what)

    async def _check(self) -> None:
        await check_keys(DirectoryObjects(self.root), NAMES, Keyring(OLD))

    def fill(self, session: str, *places: str, seals: tuple[str, ...] = (), state: bytes | None = None) -> None:
        async def put() -> None:
            vault = Vault(DirectoryObjects(self.root), NAMES, Keyring(OLD))
            record = encode(Stored("/warren/warren", SessionRecord(session, 1, Desired.RUNNING, paired=True)))
            for place in map(Place.parse, places):
                assert await vault.create(
                    session, place, await vault.seal_state(session, place, record, self.state if state is None else state)
                )
            for place in map(Place.parse, seals):
                end = encode_end(End(place.epoch + 1, "host-2", 1_800_000_000.0))
                assert await vault.create(session, place, await vault.seal_end(session, place, end))

        self.run(put())

    def path(self, session: str, place: str) -> Path:
        return self.root / NAMES.backup(session, Place.parse(place))

    def left(self, session: str) -> list[str]:
        folder = self.root / "warren" / session
        return [str(place) for place in NAMES.places(session, (p.relative_to(self.root).as_posix() for p in folder.rglob("*")))]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name in os.environ:
        if name.startswith("WARREN_") or name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return Bucket(tmp_path)


class Told:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self, *words: str, status: int = 0) -> str:
        assert main(list(words)) == status
        return self._capsys.readouterr().out

    def error(self, *words: str, status: int) -> str:
        assert main(list(words)) == status
        return self._capsys.readouterr().err

    def json(self, *words: str, status: int = 0) -> dict[str, Any]:
        return dict(orjson.loads(self.text(*words, "--json", status=status)))


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    return Told(capsys)


# --- list, stats --------------------------------------------------------------------------------------------------------


def test_an_empty_store_is_said_to_be_one(bucket: Bucket, told: Told) -> None:
    assert told.text("backup", "list") == "No backups.\n"
    assert told.json("backup", "list") == {"sessions": []}
    assert told.json("backup", "verify") == {"clean": True, "sessions": []}


def test_list_shows_sizes_ages_and_the_last_restore(bucket: Bucket, told: Told) -> None:
    bucket.fill("acme", "1/1", "1/2", "2/1", seals=("1/3",))
    bucket.fill("b", "1/1")
    os.utime(bucket.path("b", "1/1"), (1_000_000_000, 1_000_000_000))
    acme, b = told.json("backup", "list")["sessions"]
    assert (acme["session"], acme["newest"], acme["objects"], acme["has_key"]) == ("acme", "2/1", 4, True)
    assert acme["last_restore_at"] == "2027-01-15T08:00:00.000Z"
    assert acme["age_s"] < 600
    assert acme["bytes"] == sum(bucket.path("acme", p).stat().st_size for p in ("1/1", "1/2", "1/3", "2/1"))
    assert (b["newest_at"], b["last_restore_at"]) == ("2001-09-09T01:46:40.000Z", None)
    text = told.text("backup", "list")
    assert text.startswith("SESSION")
    assert "2/1" in text
    detail = told.json("backup", "list", "acme")["sessions"][0]["objects"]
    assert [o["position"] for o in detail] == ["1/1", "1/2", "1/3", "2/1"]
    assert "1/3" in told.text("backup", "list", "acme")


def test_stats_need_no_daemon(bucket: Bucket, told: Told) -> None:
    bucket.fill("acme", "1/1", "2/1", seals=("1/2",))
    stats = told.json("backup", "stats")
    assert (stats["sessions"], stats["objects"], stats["daemons"], stats["without_key"]) == (1, 3, None, [])
    assert stats["last_restore_at"] == "2027-01-15T08:00:00.000Z"
    assert "no daemon answers" in told.text("backup", "stats")


# --- verify -------------------------------------------------------------------------------------------------------------


def test_verify_opens_everything(bucket: Bucket, told: Told) -> None:
    bucket.fill("acme", "1/1", "1/2", "2/1", seals=("1/3",))
    result = told.json("backup", "verify")
    assert result["clean"]
    assert result["sessions"] == [
        {"session": "acme", "states": 3, "seals": 1, "bytes": result["sessions"][0]["bytes"], "restorable": "2/1", "problems": []}
    ]
    assert "3 states and 1 seals are whole" in told.text("backup", "verify", "acme")


def test_verify_finds_each_kind_of_damage(bucket: Bucket, told: Told) -> None:
    bucket.fill("flipped", "1/1", "1/2")
    path = bucket.path("flipped", "1/2")
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    bucket.fill("swapped", "1/1", "1/2")
    bucket.path("swapped", "1/1").write_bytes(bucket.path("swapped", "1/2").read_bytes())
    bucket.fill("nonsense", "1/1", state=b"no database")
    bucket.fill("keyless", "1/1")
    (bucket.root / "warren" / "keyless" / "key").unlink()
    bucket.fill("whole", "1/1")
    result = told.json("backup", "verify", status=1)
    found = {s["session"]: s for s in result["sessions"]}
    assert not result["clean"]
    assert found["flipped"]["restorable"] == "1/1"
    assert "flipped 1/2 is damaged" in found["flipped"]["problems"][0]
    assert found["swapped"]["restorable"] == "1/2"
    assert "swapped 1/1 is damaged, or was sealed for another" in found["swapped"]["problems"][0]
    assert "no SQLite database" in found["nonsense"]["problems"][0]
    assert "Nothing can be restored" in found["nonsense"]["problems"][1]
    assert found["keyless"]["problems"] == ["Its key is missing: nobody can read its backups."]
    assert found["whole"]["problems"] == []
    text = told.text("backup", "verify", status=1)
    assert "4 sessions have problems" in text


def test_verify_with_a_wrong_key_says_which(bucket: Bucket, told: Told) -> None:
    bucket.fill("acme", "1/1")
    bucket.keys(NEW)
    problems = told.json("backup", "verify", status=1)["sessions"][0]["problems"]
    assert "wrapped with the master key" in problems[0]


# --- prune --------------------------------------------------------------------------------------------------------------


def test_prune_keeps_what_the_settings_say(bucket: Bucket, told: Told) -> None:
    bucket.keys(OLD, more="keep_last = 2\nkeep_days = 0\n")
    bucket.fill("acme", *(f"1/{n}" for n in range(1, 6)), "2/1", seals=("1/6",))
    planned = told.json("backup", "prune", "--dry-run")
    assert len(planned["sessions"][0]["names"]) == 4
    assert len(bucket.left("acme")) == 7
    assert "deleted: 4 objects" in told.text("backup", "prune")
    assert bucket.left("acme") == ["1/5", "1/6", "2/1"]
    assert told.json("backup", "prune") == {"dry_run": False, "sessions": []}
    assert told.json("backup", "verify")["clean"]


def test_what_is_left_of_a_shredded_session_goes_after_a_while(bucket: Bucket, told: Told) -> None:
    bucket.fill("acme", "1/1")
    (bucket.root / "warren" / "acme" / "key").unlink()
    assert told.json("backup", "prune")["sessions"] == []
    os.utime(bucket.path("acme", "1/1"), (1_000_000_000, 1_000_000_000))
    assert told.json("backup", "prune")["sessions"][0]["reason"] == "its key is gone"
    assert not (bucket.root / "warren" / "acme").exists()


# --- keys ---------------------------------------------------------------------------------------------------------------


def test_generated_keys_are_keys_and_differ(told: Told) -> None:
    keys = {told.text("keys", "generate").strip() for _ in range(3)}
    assert len(keys) == 3
    assert all(MasterKey.from_hex(key) for key in keys)
    assert MasterKey.from_hex(told.json("keys", "generate")["key"])


def test_the_life_of_a_key(bucket: Bucket, told: Told) -> None:
    bucket.fill("acme", "1/1")
    bucket.fill("b", "1/1")
    before = bucket.path("acme", "1/1").read_bytes()
    assert "is the right one" in told.text("keys", "check")
    bucket.keys(NEW)
    assert "rotate" in told.error("keys", "check", status=2)
    assert "2 failed" in told.text("keys", "rotate", status=1)
    bucket.keys(NEW, OLD)
    assert "is the right one" in told.text("keys", "check")
    assert told.json("keys", "rotate")["rewrapped"] == ["acme", "b"]
    assert "2 had it already" in told.text("keys", "rotate")
    bucket.keys(NEW)
    assert "is the right one" in told.text("keys", "check")
    assert told.json("backup", "verify")["clean"]
    assert bucket.path("acme", "1/1").read_bytes() == before


def test_files_of_another_user_are_not_left(bucket: Bucket, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_backup.os, "geteuid", lambda: 4_711)
    assert "the user that the daemon runs as" in told.error("keys", "rotate", status=2)
    assert told.json("backup", "list") == {"sessions": []}


# --- what cannot be -----------------------------------------------------------------------------------------------------


def test_without_a_store_there_is_nothing_to_show(tmp_path: Path, bucket: Bucket, told: Told) -> None:
    bucket.config.write_text("")
    assert "has not made" in told.error("backup", "list", status=2)
    assert not (tmp_path / "var").exists()
    bucket.config.write_text(f'[storage]\nurl = "file://{tmp_path}/unmounted"\nkey = "{OLD.secret.hex()}"')
    assert "There is no directory" in told.error("backup", "list", status=5)
    assert told.json("backup", "list", status=5)["error"]["code"] == "storage"
    bucket.config.write_text('[storage]\nurl = "s3://bucket"')
    assert "warren keys generate" in told.error("backup", "verify", status=2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["backup", "now"], "Name a session, or give --all."),
        (["backup", "now", "acme", "--all"], "Name a session, or give --all."),
        (["backup", "restore", "acme", "--at", "newest"], "no place of a backup"),
        (["backup", "restore", "acme", "--at", "0/1"], "no place of a backup"),
        (["backup", "list", "not/one"], "no session id"),
        (["backup"], "COMMAND"),
        (["keys"], "COMMAND"),
    ],
)
def test_wrong_words_are_told(told: Told, words: list[str], says: str) -> None:
    assert says in told.error(*words, status=2)


def test_without_a_broker_now_and_restore_say_so(bucket: Bucket, told: Told) -> None:
    assert "cannot be reached" in told.error("backup", "now", "acme", status=3)
    assert "cannot be reached" in told.error("backup", "restore", "acme", status=3)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.0, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (7_200.0, "2 h"), (3.0 * DAY_S, "3 d")]
)
def test_ages(seconds: float | None, text: str) -> None:
    assert cli_backup._age(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(None, "-"), (0, "0 B"), (999, "999 B"), (1_000, "1.0 KB"), (338_800, "339 KB"), (10**10, "10.0 GB")]
)
def test_sizes(size: int | None, text: str) -> None:
    assert cli_backup._size(size) == text
