"""The unit file, and warrend under it: systemd is played (service_manager), everything else is real."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel
from tests.acceptance.rig import until
from tests.acceptance.service_manager import UNIT, ServiceManager, systemd_analyze, unit_settings
from tests.conftest import Broker
from tests.proxy import Proxy

from warren.app import Daemon
from warren.client import Client
from warren.edges.settings import Settings, find_engine_binary
from warren.simulator import Simulator

prefixes = itertools.count(1)
MOST_EXPOSED = 1.5
OPERATIONS = UNIT.parents[1] / "docs" / "operations.md"


# --- the unit file ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with programs that are here: where packages put ours is theirs to say."""
    installed = tmp_path / "warren.service"
    installed.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    return installed


def test_systemd_has_nothing_to_say_about_the_unit(unit: Path) -> None:
    ran = subprocess.run([systemd_analyze(), "verify", str(unit)], capture_output=True, text=True, check=False)
    # What it does not know, it reports and returns 0.
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_unit_is_hardened(unit: Path) -> None:
    command = [systemd_analyze(), "security", "--offline=true", "--no-pager", f"--threshold={MOST_EXPOSED * 10:.0f}", str(unit)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    level = re.search(r"Overall exposure level for \S+: ([\d.]+)", ran.stdout)
    assert level is not None, ran.stdout + ran.stderr
    assert float(level[1]) <= MOST_EXPOSED
    assert ran.returncode == 0


@pytest.mark.parametrize(
    ("name", "program"), [("warren.sysusers.conf", "systemd-sysusers"), ("warren.tmpfiles.conf", "systemd-tmpfiles")]
)
def test_the_snippets_do_what_they_say_in_an_empty_root(tmp_path: Path, name: str, program: str) -> None:
    (tmp_path / "etc").mkdir()
    for file in ("passwd", "group"):
        (tmp_path / "etc" / file).write_text("root:x:0:0:root:/root:/bin/sh\n" if file == "passwd" else "root:x:0:\n")
    sysusers = UNIT.with_name("warren.sysusers.conf")
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", str(sysusers)], check=True, capture_output=True)
    assert re.search(r"^warren:x:\d+:\d+:.*:/var/lib/warren:/usr/sbin/nologin$", (tmp_path / "etc" / "passwd").read_text(), re.M)
    if program == "systemd-tmpfiles":
        subprocess.run([program, "--create", f"--root={tmp_path}", str(UNIT.with_name(name))], check=True, capture_output=True)
        assert (tmp_path / "var" / "lib" / "warren").stat().st_mode & 0o7777 == 0o700
        assert (tmp_path / "etc" / "warren").stat().st_mode & 0o7777 == 0o750


def test_systemd_waits_longer_than_a_stop_takes() -> None:
    patience = float(unit_settings()["TimeoutStopSec"][0])
    assert Daemon(Settings()).stop_budget_s < patience
    assert Daemon(Settings()).stop_budget_s >= sum(Settings().shutdown.model_dump().values()) + 30


def test_credentials_are_named_like_settings() -> None:
    secret = {
        f"{section}.{name}"
        for section, of in Settings.model_fields.items()
        if isinstance(of.annotation, type) and issubclass(of.annotation, BaseModel)
        for name, setting in of.annotation.model_fields.items()
        if "SecretStr" in str(setting.annotation)
    }
    credentials = dict(value.split(":") for value in unit_settings()["LoadCredential"])
    assert set(credentials) == secret - {"whatsapp.root_key"}, "of all secrets but the simulator's"
    assert all(source == f"warren.{name}" for name, source in credentials.items())
    assert all(f"`{source}`" in OPERATIONS.read_text() for source in credentials.values())


# --- warrend under it -------------------------------------------------------------------------------------------------


async def test_ready_watchdog_status_reload_and_a_clean_stop(tmp_path: Path, broker: Broker) -> None:
    prefix = f"systemd{next(prefixes)}"
    config = f'instance = "unit"\n[amqp]\nprefix = "{prefix}"\n'
    async with (
        Simulator(find_engine_binary(None, "warren-sim"), log=tmp_path / "sim.log") as sim,
        Proxy("127.0.0.1", urlsplit(broker.url).port or 0) as proxy,
    ):
        proxy.refusing = True
        url = broker.url.replace(f":{proxy.target_port}/", f":{proxy.port}/")
        unit = ServiceManager(tmp_path, sim.endpoint.environment(), {"amqp.url": url}, config=config, watchdog_s=6.0)
        async with unit:
            # RabbitMQ is away at boot: it does not fail, says why, and asks for patience.
            await unit.start()
            await unit.until_status("0 sessions; outbox empty; RabbitMQ: RabbitMQ at")
            await until(lambda: len(unit.values("EXTEND_TIMEOUT_USEC")) >= 2, "patience")
            assert not unit.ready
            proxy.refusing = False
            await until(lambda: unit.ready, f"READY=1, see {unit.log}")
            await unit.until_status("RabbitMQ: connected")

            # The watchdog is fed in time, by the daemon and nobody else.
            await until(lambda: len(unit.values("WATCHDOG")) >= 3, "watchdog")
            fed = [word.at for word in unit.words if word.name == "WATCHDOG"]
            assert max(b - a for a, b in itertools.pairwise(fed)) < 6.0
            environ = [Path(f"/proc/{pid}/environ").read_text() for pid in children(unit.pid)]
            assert environ
            assert not [given for given in environ if "NOTIFY_SOCKET" in given or "WATCHDOG" in given]

            # The status follows the sessions and RabbitMQ.
            async with Client(broker.url, prefix) as client:
                assert (await client.call("create", "acme", timeout_s=30)).ok
                await unit.until_status("1 session (1 pairing)")
                proxy.refusing = True
                proxy.cut()
                await unit.until_status("1 session", "RabbitMQ: RabbitMQ at")
                proxy.refusing = False
                await unit.until_status("RabbitMQ: connected")

            # Reload: what can change does, what cannot is named, and a bad file changes nothing.
            unit.config.write_text(config.replace("systemd", "other") + '[log]\nlevel = "warning"\n')
            await unit.reload()
            assert unit.said("log.level = warning (was info)")
            assert unit.said("Changed, but only a restart takes it up: amqp.prefix.")
            unit.config.write_text("[log]\nlevle = 'info'\n")
            await unit.reload()
            assert unit.said("line 2: log.levle is no setting. Did you mean log.level?")
            assert unit.running

            assert unit.said("Connected to RabbitMQ")
            assert await unit.stop() == 0
            assert not unit.said("SIGTERM"), "the level is warning now"
            assert "STOPPING" in [word.name for word in unit.words]
            assert unit.values("READY").count("1") == 3, "once, and once after each reload"
            assert unit.status.startswith("Stopping")
            assert unit.strangers == []


async def test_a_loop_that_is_blocked_misses_the_watchdog_and_the_next_start_is_ready_again(
    tmp_path: Path, broker: Broker
) -> None:
    config = f'[amqp]\nprefix = "systemd{next(prefixes)}"\n'
    async with (
        Simulator(find_engine_binary(None, "warren-sim"), log=tmp_path / "sim.log") as sim,
        ServiceManager(tmp_path, sim.endpoint.environment(), {"amqp.url": broker.url}, config=config, watchdog_s=3.0) as unit,
    ):
        await unit.start()
        await until(lambda: unit.ready, f"READY=1, see {unit.log}")
        os.kill(unit.pid, signal.SIGSTOP)
        # What writes the stacks looks at threads that run, and crashes on one now and then: it ends all the same.
        ended = await unit.supervise()
        assert ended in {-signal.SIGABRT, -signal.SIGSEGV}
        assert unit.missed_watchdogs == 1
        assert unit.said("Fatal Python error: Aborted")
        if ended == -signal.SIGABRT:
            assert unit.said("asyncio/base_events.py"), "where it hung"
        await unit.start()
        await until(lambda: unit.ready, f"READY=1, see {unit.log}")
        assert await unit.stop() == 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
