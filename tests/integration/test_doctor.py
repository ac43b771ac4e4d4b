"""`warren doctor` on broken set-ups: each time it names the cause and the cure, and nothing else is called broken."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import orjson
import pytest
from tests.conftest import Broker
from tests.emulators.servers import free_port, s3_server

from warren.cli import main
from warren.cli_doctor import SQLITE_MAGIC, Finding, lock_holder
from warren.core.backup_names import Names
from warren.core.names import Topology
from warren.core.sealing import Keyring, MasterKey
from warren.edges import amqp_topology
from warren.edges.objects import open_store
from warren.edges.settings import StorageSettings
from warren.edges.statedir import StateDirectory
from warren.services.backup_keys import check_keys

KEY = "8d969eef6ecad3c29a3a629280e686cf0c3f5d5a86aff3ca12020c923adc6c92"
OTHER_KEY = KEY[::-1]
Environment = dict[str, str]


class Setup:
    """One that is whole, for the tests to break: real RabbitMQ, a state with a session, a store with its check object."""

    def __init__(self, base: Path, broker: Broker, cleanup: ExitStack) -> None:
        self.base, self.broker, self.cleanup = base, broker, cleanup
        self.state, self.bucket = base / "state", base / "bucket"
        session = self.state / "sessions" / "acme"
        (session / "1").mkdir(parents=True, mode=0o700)
        (session / "current").write_text("1\n")
        for database in (self.state / "warren.db", session / "1" / "state.db"):
            database.write_bytes(SQLITE_MAGIC + b"\0" * 100)
        self.bucket.mkdir()
        self.environment = {
            "WARREN_STATE_DIR": str(self.state),
            "WARREN_AMQP__URL": broker.url,
            "WARREN_AMQP__PREFIX": "doctor",
            "WARREN_STORAGE__URL": f"file://{self.bucket}",
            "WARREN_STORAGE__KEY": KEY,
            "WARREN_DELIVERY__MIN_FREE_DISK_MB": "1",
        }
        asyncio.run(self._prepare())

    async def _prepare(self) -> None:
        storage = StorageSettings.model_validate({"url": f"file://{self.bucket}", "key": KEY})
        objects = open_store(storage, self.state)
        await check_keys(objects, Names(storage.prefix), Keyring(MasterKey.from_hex(KEY)))
        await objects.close()
        async with await aio_pika.connect(self.broker.url) as connection:
            channel = await connection.channel()
            await amqp_topology.declare(
                channel, Topology("doctor"), unrouted_ttl_s=86_400, unrouted_max=100_000, dead_max=100_000
            )

    # --- what breaks it; each returns what changes in the environment

    def wrong_password(self) -> Environment:
        return {"WARREN_AMQP__URL": f"amqp://guest:wrong@127.0.0.1:{urlsplit(self.broker.url).port}/"}

    def missing_permission(self) -> Environment:
        self.broker._ctl("add_user", "half", "secret")
        self.cleanup.callback(self.broker._ctl, "delete_user", "half")
        self.broker._ctl("set_permissions", "half", r"^doctor\..*", r"^doctor\..*", r"^doctor\..*")  # not amq.default
        return {"WARREN_AMQP__URL": f"amqp://half:secret@127.0.0.1:{urlsplit(self.broker.url).port}/"}

    def wrong_key(self) -> Environment:
        return {"WARREN_STORAGE__KEY": OTHER_KEY}

    def full_disk(self) -> Environment:
        return {"WARREN_DELIVERY__MIN_FREE_DISK_MB": str(10**9)}

    def unreadable_state(self) -> Environment:
        (self.state / "sessions" / "acme" / "current").write_bytes(b"\xff\x00garbage")
        return {}

    def no_database(self) -> Environment:
        (self.state / "warren.db").write_bytes(b"overwritten by something else")
        return {}

    def missing_bucket(self) -> Environment:
        url = self.cleanup.enter_context(s3_server("another", log=self.base / "s3.log"))
        return {
            "WARREN_STORAGE__URL": "s3://missing",
            "WARREN_STORAGE__ENDPOINT": url,
            "WARREN_STORAGE__ALLOW_HTTP": "true",
            "WARREN_STORAGE__REGION": "us-east-1",
            "WARREN_STORAGE__ACCESS_KEY_ID": "id",
            "WARREN_STORAGE__SECRET_ACCESS_KEY": "secret",
        }

    def old_engine(self) -> Environment:
        program = self.base / "warren-engine"
        program.write_text('#!/bin/sh\necho \'{"engine":"0.0.1","whatsmeow":"v0","protocol":0}\'\n')
        program.chmod(0o755)
        return {"WARREN_ENGINE__PATH": str(program)}

    def port_taken(self) -> Environment:
        port = free_port()
        taken = self.cleanup.enter_context(socket.socket())
        taken.bind(("127.0.0.1", port))
        taken.listen()
        return {"WARREN_HTTP__PORT": str(port)}

    def wrong_clock(self) -> Environment:
        tomorrow = time.time() + 86_400  # the clock was right when this was written, and then set back
        os.utime(self.state / "warren.db", (tomorrow, tomorrow))
        return {}

    def bad_toml(self) -> Environment:
        (self.base / "warren.toml").write_text('[amqp]\nurl = "amqp://unclosed\n')
        return {"WARREN_CONFIG": str(self.base / "warren.toml")}


Examine = Callable[[], tuple[int, list[Finding]]]


@pytest.fixture
def whole(tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    for name in [name for name in os.environ if name.startswith("WARREN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    with ExitStack() as cleanup:
        yield Setup(tmp_path, broker, cleanup)


@pytest.fixture
def examine(whole: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Examine:
    def run() -> tuple[int, list[Finding]]:
        for name, value in whole.environment.items():
            monkeypatch.setenv(name, value)
        status = main(["doctor", "--json"])
        told = orjson.loads(capsys.readouterr().out)
        assert told["ok"] == (status == 0)
        return status, [Finding(**check) for check in told["checks"]]

    return run


def test_what_is_whole_is_called_so(whole: Setup, examine: Examine, capsys: pytest.CaptureFixture[str]) -> None:
    status, findings = examine()
    assert [f for f in findings if f.level == "fail"] == []
    assert status == 0
    good = {f.check for f in findings if f.level == "ok"}
    assert good >= {"config", "state", "disk", "broker", "permissions", "topology", "bucket", "key", "engine", "http"}
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "warn  lock         No warrend runs with this state directory.\n" in text
    assert KEY not in text


BROKEN = [
    (Setup.wrong_password, "broker", "refused the login", "user and password"),
    (Setup.missing_permission, "permissions", "refused access to 'amq.default'", "set_permissions"),
    (Setup.wrong_key, "key", "not the one the backups were encrypted with", "old_keys"),
    (Setup.full_disk, "disk", "min_free_disk_mb", "Make room"),
    (Setup.unreadable_state, "state", "acme/current does not hold an epoch", "write the right number into it"),
    (Setup.no_database, "state", "warren.db is no database", "docs/operations.md"),
    (Setup.missing_bucket, "bucket", "NoSuchBucket", "must be there already"),
    (Setup.old_engine, "engine", "older than this daemon: it speaks protocol 0", "make engine"),
    (Setup.port_taken, "http", "Address already in use", "set another [http] port"),
    (Setup.wrong_clock, "clock", "warren.db is newer", "timedatectl"),
    (Setup.bad_toml, "config", "warren.toml is not TOML", "config.example.toml"),
]


@pytest.mark.parametrize(("breaks", "check", "cause", "cure"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_cause_and_cure_are_named(
    whole: Setup, examine: Examine, breaks: Callable[[Setup], Environment], check: str, cause: str, cure: str
) -> None:
    whole.environment |= breaks(whole)
    status, findings = examine()
    failed = [f for f in findings if f.level == "fail"]
    assert [f.check for f in failed] == [check], failed
    assert cause in failed[0].message
    assert cure in failed[0].hint
    assert status == 1


def test_a_lock_is_seen_without_being_taken(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    assert lock_holder(tmp_path / "lock") is None
    directory.lock()
    try:
        assert lock_holder(tmp_path / "lock") == os.getpid()
    finally:
        directory.unlock()
    assert lock_holder(tmp_path / "lock") is None
