"""`warren doctor`: looks at everything that warren needs, and names cause and cure of what is wrong.

It changes nothing but a queue and an exchange of its own on RabbitMQ, gone when it ends, and a file of a moment in the state
directory. It may be run beside a daemon, as the user that the daemon runs as, and with its settings.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import aio_pika
import orjson

from warren import __version__
from warren.cli_base import EXIT_FAILED, EXIT_OK, broker_url, print_json, settings_of
from warren.core.backup_names import Names
from warren.core.frames import PROTOCOL
from warren.core.names import Topology
from warren.edges import amqp_topology
from warren.edges.amqp_link import BusOptions, Link, bounded, describe
from warren.edges.objects import open_store
from warren.edges.settings import Settings, find_engine_binary
from warren.edges.statedir import StateDirectory
from warren.edges.storage_keys import KEY_FILE, disk_warning, load_keyring
from warren.edges.terminal import printable
from warren.errors import BrokerUnavailable, ConfigError, WarrenError
from warren.services import backup_keys

Level = Literal["ok", "warn", "fail"]

CLOCK_SLACK_S = 120.0
VERSION_OLD_S = 14 * 86_400.0
"""WhatsApp serves a version for weeks, and refuses it months later."""
BUILT_AT = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
"""No clock that is right shows an earlier time to this version."""
SQLITE_MAGIC = b"SQLite format 3\0"
CLOSE_S = 3.0
_UNSYNCHRONISED = 5
"""TIME_ERROR of adjtimex(2)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `hint`: what to do; "" when there is nothing to do."""

    check: str
    level: Level
    message: str
    hint: str = ""


class Doctor:
    """The checks, in the order in which one explains the next."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.findings: list[Finding] = []
        self._current = ""
        self._modified: list[tuple[float, str]] = []
        """Times that other things bear, and what they are: a right clock is behind none of them."""

    async def examine(self) -> None:
        """All checks. What goes wrong in a way that nobody foresaw is a finding, too."""
        checks = [self._state, self._broker, self._key_and_bucket, self._engine, self._whatsapp_version, self._http, self._clock]
        for check in checks:
            self._current = check.__name__.strip("_").split("_")[0]
            try:
                await check()
            except WarrenError as e:
                self._tell(self._current, "fail", e.message, e.hint)
            except OSError as e:
                self._tell(
                    self._current, "fail", f"{e.filename or self._current}: {e.strerror or e}.", "Check its owner and mode."
                )

    def _tell(self, check: str, level: Level, message: str, hint: str = "") -> None:
        self.findings.append(Finding(check, level, message, hint))

    # --- the state directory

    async def _state(self) -> None:
        path = self._settings.state_dir
        if not path.exists():
            self._tell(
                "state", "warn", f"{path} is not there yet.", "The daemon makes it at its first start; else check `state_dir`."
            )
            return
        if path.is_dir() and path.stat().st_uid != os.geteuid():
            whose = f"belongs to user {path.stat().st_uid}, and this is user {os.geteuid()}"
            self._tell(
                "state", "fail", f"{path} {whose}.", "Run this as the user that the daemon runs as, or give it the directory."
            )
            return
        directory = StateDirectory(path)
        sessions = await directory.sessions()
        for session in sessions:
            if (epoch := await directory.current_epoch(session)) is not None:
                self._database(path / "sessions" / session / str(epoch) / "state.db")
        self._database(path / "warren.db")
        with tempfile.NamedTemporaryFile(dir=path, prefix=".doctor-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
        self._tell("state", "ok", f"{path} can be read and written; it has {len(sessions)} sessions.")
        pid = lock_holder(path / "lock")
        if pid is None:
            self._tell("lock", "warn", "No warrend runs with this state directory.", "Start it: `systemctl start warren`.")
        else:
            self._tell("lock", "ok", f"warrend (process {pid}) runs with it.")
        self._space(path)

    def _database(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                head = file.read(len(SQLITE_MAGIC))
            self._modified.append((path.stat().st_mtime, str(path)))
        except FileNotFoundError:
            return  # nothing is there before pairing; what is missing and should not be, the daemon says
        if head not in {b"", SQLITE_MAGIC}:
            raise ConfigError(
                f"{path} is no database any more.",
                hint="The daemon restores it from the backup if there is one; check the disk (dmesg), then docs/operations.md.",
            )

    def _space(self, path: Path) -> None:
        free, least = shutil.disk_usage(path).free, self._settings.delivery.min_free_disk_mb * 1_000_000
        told = f"{free / 1e6:,.0f} MB are free on the disk of {path}"
        hint = "Make room, or give the state directory a larger disk."
        if free <= least:
            needed = f"at {least / 1e6:,.0f} MB ([delivery] min_free_disk_mb) the daemon takes no more messages"
            self._tell("disk", "fail", f"{told}: {needed}.", hint)
        elif free < 4 * least:
            self._tell("disk", "warn", f"{told}, not much above [delivery] min_free_disk_mb.", hint)
        else:
            self._tell("disk", "ok", f"{told}.")

    # --- RabbitMQ

    async def _broker(self) -> None:
        a = self._settings.amqp
        try:
            url = broker_url(self._settings)
        except BrokerUnavailable as e:
            self._tell("broker", "warn", e.message, e.hint)
            return
        options = BusOptions(url, Topology(a.prefix), "doctor", connect_timeout_s=a.connect_timeout_s)
        with _described(options):
            link = await Link.open(options, "doctor")
        try:
            self._tell("broker", "ok", f"RabbitMQ at {options.endpoint} is reached, and the login is right.")
            if await link.blocked():
                self._tell(
                    "broker",
                    "warn",
                    "RabbitMQ takes no messages: memory or disk alarm.",
                    "`rabbitmq-diagnostics alarms` says which.",
                )
            self._current = "permissions"
            with _described(options):
                await self._permissions(link, options)
            self._tell("permissions", "ok", f"The user may do what warren does with `{a.prefix}.*`.")
            self._current = "topology"
            with _described(options):
                await self._topology(link, options)
        finally:
            await link.close(CLOSE_S)

    async def _permissions(self, link: Link, options: BusOptions) -> None:
        """Each right once, on something of our own: configure, write and read, and the default exchange."""
        name = f"{options.topology.prefix}.doctor.{uuid.uuid4().hex[:8]}"
        channel = await link.channel(confirms=True)

        async def use() -> None:
            exchange = await channel.declare_exchange(name, auto_delete=True)
            queue = await channel.declare_queue(name, exclusive=True)
            await queue.bind(exchange, name)
            for target in (exchange, channel.default_exchange):
                await target.publish(aio_pika.Message(b"{}"), name, mandatory=False)
            await queue.get(no_ack=True, fail=False)
            await queue.delete(if_unused=False, if_empty=False)

        await bounded(use(), options.request_timeout_s)

    async def _topology(self, link: Link, options: BusOptions) -> None:
        names = options.topology
        channel = await link.channel()
        try:
            await bounded(channel.declare_exchange(names.out, passive=True), options.request_timeout_s)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            self._tell(
                "topology",
                "warn",
                f"No daemon with the prefix {names.prefix} has run here.",
                "Start warrend, or check [amqp] prefix.",
            )
            return
        # All of it is there, then, and declaring it once more only compares.
        declared = amqp_topology.declare(
            channel, names, unrouted_ttl_s=options.unrouted_ttl_s, unrouted_max=options.unrouted_max, dead_max=options.dead_max
        )
        await bounded(declared, options.request_timeout_s)
        self._tell("topology", "ok", "Exchanges and queues are as warren needs them.")
        for queue, what, cure in (
            (names.dead, "commands could not be executed", "warren dead list"),
            (names.unrouted, "events had no subscriber", "warren events replay"),
        ):
            count = (await channel.declare_queue(queue, passive=True)).declaration_result.message_count
            if count:
                self._tell("topology", "warn", f"{count} {what} and are kept in {queue}.", f"See `{cure}`.")

    # --- backups

    async def _key_and_bucket(self) -> None:
        settings = self._settings
        storage = settings.storage
        if storage.mode == "local":
            self._tell("bucket", "warn", '[storage] mode is "local": a lost disk loses every session.', "Set it to `hybrid`.")
            return
        own = settings.state_dir / "backups"
        if storage.url is None and storage.key is None and not (settings.state_dir / KEY_FILE).exists():
            self._tell("key", "warn", "There is no key yet.", "The daemon makes one at its first start.")
            return
        keyring = load_keyring(storage, settings.state_dir)
        short = backup_keys.short(keyring.write.id)
        folder = Path(urlsplit(storage.url).path) if storage.url else own
        if storage.scheme == "file" and not folder.is_dir():
            self._tell("bucket", "fail", f"The directory {folder} for backups is not there.", "Make it, or check [storage] url.")
            return
        objects = open_store(storage if storage.url else storage.model_copy(update={"url": f"file://{own}"}), settings.state_dir)
        names = Names(storage.prefix)
        try:
            listed = await objects.list(names.prefix)
            where = storage.url or str(own)
            if not any(found.name == names.key_check() for found in listed):
                self._tell("bucket", "ok", f"{where} can be read; it holds {len(listed)} objects.")
                self._tell("key", "warn", f"Nothing in it tells whether the key {short} is right.", "The daemon's start does.")
                return
            self._modified += [(found.modified, f"the object {found.name}") for found in listed]
            try:
                await backup_keys.check_keys(objects, names, keyring)
            except ConfigError as e:
                self._tell("key", "fail", e.message, e.hint)
                return
            self._tell("bucket", "ok", f"{where} can be used; it holds {len(listed)} objects.")
            self._tell("key", "ok", f"The key {short} is the right one.")
            if warning := disk_warning(settings):
                self._tell(
                    "bucket", "warn", warning.split(". Set")[0] + ".", "Set [storage] url to a bucket, or to another disk."
                )
        except WarrenError as e:
            self._tell("bucket", "fail", e.message, e.hint)
        finally:
            await objects.close()

    # --- this machine

    async def _engine(self) -> None:
        program = find_engine_binary(self._settings.engine.path)
        rebuild = "Install engine and daemon of the same version (`make engine`)."
        try:
            ran = await asyncio.to_thread(_version_of, program)
            told = orjson.loads(ran.stdout)
            version, protocol = told["engine"], told["protocol"]
        except (OSError, subprocess.SubprocessError, ValueError, TypeError, KeyError) as e:
            self._tell("engine", "fail", f"{program} is no warren-engine that runs here ({type(e).__name__}).", rebuild)
            return
        if protocol != PROTOCOL:
            older = "older" if isinstance(protocol, int) and protocol < PROTOCOL else "newer"
            said = f"{program} is {older} than this daemon: it speaks protocol {protocol}, not {PROTOCOL}."
            self._tell("engine", "fail", said, rebuild)
        elif version != __version__:
            self._tell("engine", "warn", f"{program} is version {version}, and this is {__version__}.", rebuild)
        else:
            self._tell("engine", "ok", f"{program}: version {version}, whatsmeow {told.get('whatsmeow')}.")

    async def _whatsapp_version(self) -> None:
        if (endpoint := self._settings.whatsapp.endpoint) is not None:
            self._tell("whatsapp", "ok", f"Sessions connect to a simulator, {endpoint}, not to WhatsApp.")
            return
        if pinned := self._settings.whatsapp.version:
            self._tell("whatsapp", "warn", f"[whatsapp] version is fixed to {pinned}.", "Remove it, unless that is meant.")
            return
        path = self._settings.state_dir / "whatsapp-version"
        try:
            told = orjson.loads(path.read_bytes())
            version, at = str(told["version"]), datetime.fromisoformat(told["confirmed_at"]).timestamp()
        except FileNotFoundError:
            self._tell("whatsapp", "ok", "The engine's own version of WhatsApp Web is used: none was asked for yet.")
            return
        except (ValueError, TypeError, KeyError):
            self._tell("whatsapp", "warn", f"{path} cannot be read.", "Delete it: it is made again.")
            return
        self._modified.append((at, str(path)))
        age_s = time.time() - at
        if age_s > VERSION_OLD_S:
            hint = "Is https://web.whatsapp.com reached from here? Else upgrade warren."
            self._tell("whatsapp", "warn", f"WhatsApp has not confirmed version {version} for {age_s / 86_400:.0f} days.", hint)
        else:
            self._tell("whatsapp", "ok", f"Version {version}, confirmed {max(0.0, age_s) / 3600:.0f} hours ago.")

    async def _http(self) -> None:
        http = self._settings.http
        if http.port is None:
            self._tell("http", "ok", "Off ([http] port is not set).")
            return
        where = f"{http.address}:{http.port}"
        if lock_holder(self._settings.state_dir / "lock") is not None:
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(http.address, http.port), CLOSE_S)
            except (OSError, TimeoutError):
                self._tell("http", "fail", f"warrend runs, and nobody answers on {where}.", "See its log.")
                return
            writer.close()
            self._tell("http", "ok", f"{where} answers.")
            return
        family = socket.AF_INET6 if ":" in http.address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((http.address, http.port))
        except OSError as e:
            hint = f"`ss -ltnp 'sport = :{http.port}'` shows by whom. End that, or set another [http] port."
            self._tell("http", "fail", f"{where} cannot be used: {e.strerror}.", hint)
        else:
            self._tell("http", "ok", f"{where} is free.")

    async def _clock(self) -> None:
        now = time.time()
        hint = "Set the clock (`timedatectl set-ntp true`): deadlines, backups and WhatsApp depend on it."
        at, what = max([(BUILT_AT, "this version of warren"), *self._modified])
        if at > now + CLOCK_SLACK_S:
            behind = f"The clock is wrong: it shows {datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC, and {what} is newer"
            self._tell("clock", "fail", f"{behind} ({datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}).", hint)
        elif kernel_clock() == _UNSYNCHRONISED:
            self._tell("clock", "warn", "The kernel says that nothing keeps the clock right.", hint)
        else:
            self._tell("clock", "ok", f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC.")


@contextmanager
def _described(options: BusOptions) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        raise describe(e, options) from e


def lock_holder(path: Path) -> int | None:
    """The process that has the file flock'ed, read without trying: a daemon that starts now must find it free."""
    try:
        inode = path.stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    for line in locks.splitlines():
        words = line.split()
        if "FLOCK" in words and words[-3].rpartition(":")[2] == str(inode):
            return int(words[-4])
    return None


def _version_of(program: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([program, "--version"], capture_output=True, timeout=10, check=True)


def kernel_clock() -> int:
    """What adjtimex(2) returns, without changing anything; -1 where there is none."""
    buffer = ctypes.create_string_buffer(512)  # larger than struct timex; modes 0: only read
    try:
        return int(ctypes.CDLL(None).adjtimex(buffer))
    except (OSError, AttributeError):
        return -1


def _doctor(args: argparse.Namespace) -> int:
    try:
        doctor = Doctor(settings_of(args))
    except ConfigError as e:
        findings = [Finding("config", "fail", e.message, e.hint or "Correct it; `warren check-config` checks again.")]
    else:
        asyncio.run(doctor.examine())
        findings = [Finding("config", "ok", "The settings can be read."), *doctor.findings]
    failed = any(f.level == "fail" for f in findings)
    if args.json:
        print_json({"ok": not failed, "checks": [asdict(f) for f in findings]})
    else:
        for f in findings:
            print(printable(f"{f.level:<4}  {f.check:<11}  {f.message}"))
            if f.hint and f.level != "ok":
                print(printable(f"{'':19}{f.hint}"))
    return EXIT_FAILED if failed else EXIT_OK


def add_command(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    """`warren doctor`."""
    add(
        commands,
        "doctor",
        _doctor,
        "check everything that warren needs: status 1 when something is broken",
        "warren doctor --json",
    )
