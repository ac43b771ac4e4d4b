"""`warrend`: the composition root. `Daemon.start` and `Daemon.stop` read as two lists, top to bottom."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import random
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from loguru import logger

from warren import __version__
from warren.core.backup_names import Names
from warren.core.envelope import Outcome
from warren.core.metrics import Metrics
from warren.core.names import Topology
from warren.edges.amqp import AmqpBus, BusOptions
from warren.edges.broker_node import BrokerNode
from warren.edges.engine_pipe import start_engine
from warren.edges.leaving import leave
from warren.edges.logs import configure_logging
from warren.edges.objects import open_store
from warren.edges.sdnotify import Condition, ServiceManager, status_line
from warren.edges.settings import Settings, find_engine_binary, load_settings
from warren.edges.statedir import StateDirectory
from warren.edges.storage_keys import disk_warning, load_keyring
from warren.edges.store import SqliteStore
from warren.edges.store_rebuild import Rebuilt, open_database
from warren.errors import StorageError, WarrenError
from warren.ports import EngineProcess, ObjectStore
from warren.services.backup import BackupOptions, Backups
from warren.services.delivery import Delivery, DeliveryOptions
from warren.services.desk import Desk
from warren.services.engines import EngineOptions, Engines
from warren.services.fleet import Fleet, FleetOptions
from warren.services.gateway import Gateway
from warren.services.health import Health
from warren.services.outcomes import Outcomes
from warren.services.restore import RestoreOptions, Restorer
from warren.services.sending import Pacing
from warren.services.session import Deps, Session, SessionOptions
from warren.services.vault import Shelf, Vault

if TYPE_CHECKING:
    from warren.edges.http import HttpServer

REBUILT = "The daemon's database was damaged and made again: the session goes on in a new epoch."
REBUILT_HINT = (
    "Events of the epoch before, settings of the session, and outcomes of commands may be lost; see the daemon's log. Give the "
    "session's settings again with `create`."
)
EXIT_UNCLEAN = 1
EXIT_CONFIG = 2
ENGINE_LEVELS = {"debug": "debug", "info": "info", "warning": "warn", "error": "error"}
"""Our words for log levels to Go's."""
BROKER_RESTART_S = 2.0
ENGINE_STOP_S = 10.0
"""For an engine whose sessions are closed already."""
STOP_MARGIN_S = 20.0
"""For the steps of a stop that have no setting: actors, the connection to RabbitMQ, the disk."""


def _now() -> datetime:
    return datetime.now(UTC)


def _lock_lost(session: str) -> None:
    logger.bind(action="lock_lost", session=session).error(
        "Another daemon holds session {}. Two daemons must not share one session's state: remove it from one of them.", session
    )


@dataclass(slots=True)
class _Parts:
    """What `start` has made so far, for `stop` to end; None: not made."""

    state_dir: StateDirectory | None = None
    store: SqliteStore | None = None
    node: BrokerNode | None = None
    node_keeper: asyncio.Task[None] | None = None
    bus: AmqpBus | None = None
    engines: Engines | None = None
    delivery: Delivery | None = None
    outcomes: Outcomes | None = None
    objects: ObjectStore | None = None
    backups: Backups | None = None
    restorer: Restorer | None = None
    fleet: Fleet | None = None
    gateway: Gateway | None = None
    metrics: Metrics = field(default_factory=Metrics)
    health: Health | None = None
    desk: Desk | None = None
    http: HttpServer | None = None


@dataclass(slots=True)
class Daemon:
    """One warrend. `start`, then wait for what should end it, then `stop`, which also ends a start that failed half-way."""

    settings: Settings
    _parts: _Parts = field(default_factory=_Parts)
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)
    _clean: bool = True
    _step_under_way: str = ""

    async def start(self) -> None:
        """Raises WarrenError when something it cannot do without is missing; `stop` then ends what was begun."""
        s, p = self.settings, self._parts
        topology = Topology(s.amqp.prefix)

        # 1. Nobody else may use this state. A daemon that hangs keeps the lock; one that was killed does not.
        p.state_dir = StateDirectory(s.state_dir)
        p.state_dir.lock()
        # 2. What we know: registry, outbox, journal.
        p.store, rebuilt = await open_database(s.state_dir / "warren.db", p.state_dir)
        # 3. Where backups go. A wrong key is refused before anything is written.
        vault = await self._open_vault()
        # 4. RabbitMQ: the configured one, or our own node (adopted, when an earlier daemon was killed).
        url = await self._broker_url()
        # 5. The bus connects in the background. A session connects once its lock is ours, and then goes on without RabbitMQ.
        p.bus = AmqpBus(
            self._amqp_options(url, topology),
            on_unclaimed=lambda m: p.gateway.on_unclaimed(m) if p.gateway else None,
            on_query=lambda m: p.gateway.on_query(m) if p.gateway else None,
            on_dead=lambda m, reason: p.gateway.on_dead(m, reason) if p.gateway else None,
            on_lock_lost=_lock_lost,
        )
        # 6. Engines: the first one now, so that a missing or wrong binary is noticed at the start.
        find_engine_binary(s.engine.path)
        p.engines = Engines(self._start_engine, self._engine_options(), random01=random.random, metrics=p.metrics)
        await p.engines.start()
        # 7. Delivery publishes what an earlier run left, before anything new can happen.
        p.delivery = Delivery(
            p.bus,
            p.store,
            topology,
            self._delivery_options(),
            now=_now,
            random01=random.random,
            disk_ok=self._disk_ok,
            metrics=p.metrics,
        )
        await p.delivery.start()
        p.desk = Desk(p.bus, topology)
        p.outcomes = Outcomes(p.bus, p.store, p.delivery, topology, ended=self._ended)
        self._make_backups(vault, topology)
        # 8. The sessions and the way in to them; only then the bus, so that every command finds its session.
        p.fleet = Fleet(p.bus, p.store, self._session_deps, FleetOptions(s.fleet.max_sessions, s.storage.forget_after_days))
        p.gateway = Gateway(p.bus, p.fleet, p.outcomes, topology, s.instance, now=_now)
        # A port that is taken is noticed before any session connects.
        p.health = self._make_health()
        await self._start_http()
        await p.fleet.start(p.gateway.on_command, p.gateway.on_command)
        if rebuilt is not None:
            self._tell_rebuilt(rebuilt)
        await p.bus.start()
        p.health.started = True
        logger.bind(action="started", instance=s.instance).info(
            "warrend {} has started; sessions connect to {}.", __version__, s.whatsapp.endpoint or "WhatsApp"
        )

    async def stop(self) -> bool:
        """Stop in order, each step within its budget. True when everything was clean: nothing cut, the outbox empty.

        What is cut is not lost: commands stay in RabbitMQ, events in the outbox, messages at WhatsApp.
        """
        p, budget = self._parts, self.settings.shutdown
        if p.health is not None:
            p.health.stopping = True
        # 1. No more commands. RabbitMQ keeps them.
        if p.gateway is not None:
            p.gateway.close()
        # 2. The sends under way get their outcome.
        if p.fleet is not None and p.outcomes is not None:
            await self._step("commands", budget.commands_s, self._finish_commands)
        # 3. Sockets close, side by side; nobody is logged out. Messages whose event is stored are receipted first.
        if p.fleet is not None:
            await self._step("sessions", budget.sessions_s, p.fleet.halt)
            await p.fleet.stop()
        if p.gateway is not None:
            await p.gateway.stop()
        # 4. What is in the outbox leaves; what does not stays on disk.
        if p.delivery is not None and p.outcomes is not None:
            await self._step("drain", budget.drain_s, self._drained)
            p.outcomes.cancel()
        # 5. Last backups, all sessions at once, while the engines can still copy and nobody else may own them. Then the engines.
        if p.backups is not None:
            await self._step("backup", budget.backup_s, self._last_backups)
            await p.backups.close()
        if p.engines is not None:
            self._clean &= await p.engines.stop(ENGINE_STOP_S)
        if p.delivery is not None:
            await p.delivery.stop()
        if p.objects is not None:
            await p.objects.close()
        # 6. The locks go with the connection; then the disk.
        if p.http is not None:
            await p.http.stop()
        if p.bus is not None:
            await p.bus.close()
        if p.store is not None:
            await p.store.close()
        await self._stop_node(budget.broker_s)
        if p.state_dir is not None:
            p.state_dir.unlock()
        logger.bind(action="stopped", clean=self._clean).info("Stopped{}.", "" if self._clean else ", but not cleanly: see above")
        return self._clean

    def hurry(self) -> None:
        """Cut the waits of `stop`, not its writes (the second signal)."""
        self._hurry.set()

    @property
    def stop_budget_s(self) -> float:
        """The longest that `stop` takes. systemd's TimeoutStopSec= must be above it."""
        return float(sum(self.settings.shutdown.model_dump().values())) + ENGINE_STOP_S + STOP_MARGIN_S

    def condition(self) -> Condition:
        """How it is, in one line. Ready: RabbitMQ is reached, and the sessions resume (`start` connects the bus behind them)."""
        p = self._parts
        if self._step_under_way:
            return Condition(False, f"Stopping: {self._step_under_way}.")
        if p.bus is None or p.fleet is None or p.delivery is None:
            return Condition(False, "Starting the private RabbitMQ." if p.node is not None and p.bus is None else "Starting.")
        connected = p.bus.connected.is_set()
        trouble = p.bus.trouble or ("" if connected else "connecting")
        return Condition(connected, status_line(p.fleet.states(), p.delivery.outbox_bytes, trouble))

    def reload(self, new: Settings) -> None:
        """Take up what of `new` can change while sessions run, and say what cannot."""
        told = self.settings.reloaded(new)
        self.settings = told.settings
        if (fleet := self._parts.fleet) is not None:
            fleet.use(self._session_deps(lambda _: None).options)
        if (backups := self._parts.backups) is not None:
            backups.use(self._backup_options())
        what = "; ".join(told.taken) or "nothing has changed that can change while it runs"
        # Warnings, so that they are seen at any usual level: somebody has asked, and waits for the answer.
        logger.bind(action="reloaded").warning("The configuration was read again: {}.", what)
        if any(sentence.startswith(("log.level ", "log.trace ")) for sentence in told.taken):
            logger.bind(action="reloaded").warning("Engines that run keep their log level; the next ones have the new one.")
        if told.waiting:
            logger.bind(action="restart_needed").warning("Changed, but only a restart takes it up: {}.", ", ".join(told.waiting))
        configure_log(told.settings)

    # --- inside

    async def _step(self, name: str, budget_s: float, wait: Callable[[], Awaitable[object]]) -> None:
        self._step_under_way = name
        waiting = asyncio.ensure_future(wait())
        hurry = asyncio.ensure_future(self._hurry.wait())
        done, _ = await asyncio.wait({waiting, hurry}, timeout=budget_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if waiting not in done:
            self._clean = False
            waiting.cancel()
            logger.bind(action="shutdown_cut", step=name).warning("Stopping: `{}` was not done within {:g} s.", name, budget_s)
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        if isinstance(result, Exception):
            self._clean = False
            logger.bind(action="shutdown_bug", step=name).opt(exception=result).error("Stopping: `{}` failed.", name)

    def _tell_rebuilt(self, rebuilt: Rebuilt) -> None:
        fleet, delivery = self._parts.fleet, self._parts.delivery
        assert fleet is not None
        assert delivery is not None
        for name in rebuilt.sessions:
            if (session := fleet.get(name)) is not None:
                state = session.state.value
                told = {"state": state, "previous": state, "code": "registry_rebuilt", "message": REBUILT, "hint": REBUILT_HINT}
                delivery.submit(name, "error", told)

    async def _finish_commands(self) -> None:
        fleet, outcomes = self._parts.fleet, self._parts.outcomes
        assert fleet is not None
        assert outcomes is not None
        await fleet.finish_sending()
        await outcomes.wait()

    async def _drained(self) -> None:
        delivery, outcomes = self._parts.delivery, self._parts.outcomes
        assert delivery is not None
        assert outcomes is not None
        await delivery.drain()
        await outcomes.wait()

    async def _last_backups(self) -> None:
        assert self._parts.backups is not None
        if not await self._parts.backups.finish():
            self._clean = False
            logger.bind(action="backup_missed").warning("Some last backups failed: what changed since is on this disk only.")

    async def _open_vault(self) -> Vault | None:
        """None: `[storage] mode` is `local`."""
        s = self.settings.storage
        if s.mode == "local":
            return None
        objects = self._parts.objects = open_store(s, self.settings.state_dir)
        vault = Vault(objects, Names(s.prefix), load_keyring(s, self.settings.state_dir, make=True))
        try:
            async with asyncio.timeout(s.start_wait_s):
                await vault.check()
        except StorageError as e:
            logger.bind(action="storage_unavailable", reason=e.kind).error("The store of the backups cannot be used now: {}", e)
        except TimeoutError:
            logger.bind(action="storage_unavailable", reason="slow").error("The store of the backups does not answer yet.")
        if warning := disk_warning(self.settings):
            logger.bind(action="storage_default").warning("{}", warning)
        return vault

    def _leftovers(self) -> Shelf | None:
        """In `local` mode: where backups of earlier days would be. Opened for who needs it, which may be nobody."""
        s, p = self.settings.storage, self._parts
        if s.url is None and not (self.settings.state_dir / "backups").is_dir():
            return None
        if p.objects is None:
            p.objects = open_store(s, self.settings.state_dir)
        return Shelf(p.objects, Names(s.prefix))

    def _backup_options(self) -> BackupOptions:
        s = self.settings.storage
        return BackupOptions(
            instance=self.settings.instance,
            source=Topology(self.settings.amqp.prefix).source,
            interval_s=s.interval_s,
            concurrency=s.concurrency,
            alarm_after=s.alarm_after,
            keep_last=s.keep_last,
            keep_days=s.keep_days,
        )

    def _make_backups(self, vault: Vault | None, topology: Topology) -> None:
        s, p = self.settings.storage, self._parts
        assert p.store is not None
        assert p.state_dir is not None
        assert p.engines is not None
        assert p.delivery is not None
        p.backups = Backups(
            vault,
            p.store,
            p.state_dir,
            p.engines,
            delivery=p.delivery,
            options=self._backup_options(),
            now=_now,
            random01=random.random,
            metrics=p.metrics,
            leftovers=self._leftovers,
        )
        p.restorer = Restorer(
            vault,
            p.store,
            p.state_dir,
            p.backups,
            options=RestoreOptions(self.settings.instance, topology.source, s.start_wait_s, concurrency=s.concurrency),
            now=_now,
            random01=random.random,
        )

    def _ended(self, outcome: Outcome, seconds: float) -> None:
        self._parts.metrics.command(outcome, seconds)
        if self._parts.desk is not None:
            self._parts.desk.ended(outcome)

    def _changed(self, session: str) -> None:
        if self._parts.http is not None:
            self._parts.http.changed(session)

    def _make_health(self) -> Health:
        p = self._parts
        assert p.bus is not None
        assert p.fleet is not None
        assert p.delivery is not None
        assert p.engines is not None
        return Health(
            p.bus,
            p.fleet,
            p.delivery,
            p.engines,
            p.metrics,
            backups=p.backups if p.backups is not None and p.backups.on else None,
            free_bytes=self._free_bytes,
            min_free_bytes=self.settings.delivery.min_free_disk_mb * 1_000_000,
            now=_now,
        )

    async def _start_http(self) -> None:
        s, p = self.settings.http, self._parts
        if s.port is None:
            return
        # Ten megabytes that only those pay who want it.
        from warren.edges.http import HttpOptions, HttpServer  # noqa: PLC0415

        assert p.health is not None
        assert p.desk is not None
        options = HttpOptions(s.address, s.port, s.token.get_secret_value() if s.token else None)
        server = HttpServer(p.health, p.desk, options)
        await server.start()
        p.http = server

    async def _broker_url(self) -> str:
        if (address := self.settings.amqp.address) is not None:
            return address
        node = self._parts.node = BrokerNode(self.settings.state_dir / "rabbitmq")
        info = await node.start()
        self._parts.node_keeper = asyncio.create_task(self._keep_node(node), name="broker.keeper")
        logger.bind(action="broker_ready", adopted=info.adopted, pid=info.pid).info(
            "Private RabbitMQ {}.", "of an earlier run goes on" if info.adopted else "started"
        )
        return info.url

    async def _keep_node(self, node: BrokerNode) -> None:
        """Start the private node again when it ends; its port, and so our URL, stays."""
        while True:
            status = await node.wait_exit()
            logger.bind(action="broker_ended", status=status).error("The private RabbitMQ ended; starting it again.")
            while True:
                try:
                    await node.start()
                    break
                except (WarrenError, OSError) as e:
                    logger.bind(action="broker_failed").error("The private RabbitMQ does not start: {}", e)
                    await asyncio.sleep(BROKER_RESTART_S)

    async def _stop_node(self, timeout_s: float) -> None:
        keeper, node = self._parts.node_keeper, self._parts.node
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if node is not None:
            await node.stop(timeout_s)

    async def _start_engine(self) -> EngineProcess:
        s = self.settings
        args = [
            "--max-sessions",
            str(s.engine.sessions_per_process),
            "--log-level",
            ENGINE_LEVELS["debug" if s.log.trace else s.log.level],
        ]
        args += ["--memory-limit-mb", str(s.engine.memory_limit_mb)] if s.engine.memory_limit_mb else []
        args += ["--wa-version", s.whatsapp.version] if s.whatsapp.version else []
        if s.whatsapp.endpoint is None:
            args += ["--version-cache", str(s.state_dir / "whatsapp-version")]
        else:
            args += ["--endpoint", s.whatsapp.endpoint]
            assert s.whatsapp.root_key is not None
            args += ["--root-key", s.whatsapp.root_key.get_secret_value(), "--ca-file", str(s.whatsapp.ca_file)]
        return await start_engine(find_engine_binary(s.engine.path), args)

    def _free_bytes(self) -> int | None:
        try:
            return shutil.disk_usage(self.settings.state_dir).free
        except OSError as e:
            logger.bind(action="disk_unknown").error("The free space of the state directory cannot be read: {}", e)
            return None

    def _disk_ok(self) -> bool:
        free = self._free_bytes()
        return free is not None and free > self.settings.delivery.min_free_disk_mb * 1_000_000

    def _amqp_options(self, url: str, topology: Topology) -> BusOptions:
        a = self.settings.amqp
        return BusOptions(
            url=url,
            topology=topology,
            instance=self.settings.instance,
            heartbeat_s=a.heartbeat_s,
            connect_timeout_s=a.connect_timeout_s,
            publish_timeout_s=a.publish_timeout_s,
            work_prefetch=a.work_prefetch,
        )

    def _engine_options(self) -> EngineOptions:
        e = self.settings.engine
        return EngineOptions(
            e.sessions_per_process, e.ping_interval_s, e.ping_timeout_s, memory_ceiling=e.memory_ceiling_mb * 1_000_000
        )

    def _delivery_options(self) -> DeliveryOptions:
        d = self.settings.delivery
        return DeliveryOptions(
            instance=self.settings.instance,
            # In `cloud` mode the disk is no safe place: WhatsApp is answered when RabbitMQ has it.
            answer_after_s=None if self.settings.storage.mode == "cloud" else d.answer_after_ms / 1000,
            max_bytes=d.outbox_max_mb * 1_000_000,
            publishes_at_once=d.publishes_at_once,
        )

    def _pacing(self) -> Pacing:
        p = self.settings.pacing
        return Pacing(p.messages_per_minute, p.burst, p.on_limit)

    def _session_deps(self, on_removed: Callable[[Session], None]) -> Deps:
        s, p = self.settings, self._parts
        assert p.store is not None
        assert p.state_dir is not None
        assert p.engines is not None
        assert p.delivery is not None
        assert p.outcomes is not None
        assert p.backups is not None
        assert p.restorer is not None
        r = s.reconnect
        return Deps(
            store=p.store,
            state_dir=p.state_dir,
            engines=p.engines,
            delivery=p.delivery,
            outcomes=p.outcomes,
            backups=p.backups,
            restorer=p.restorer,
            connecting=asyncio.Semaphore(s.fleet.connects_at_once),
            options=SessionOptions(
                s.whatsapp.device_name, r.base_s, r.cap_s, r.alarm_after, r.stable_s, self._pacing(), s.fleet.idle_timeout_s
            ),
            now=_now,
            random01=random.random,
            on_removed=on_removed,
            metrics=p.metrics,
            changed=self._changed,
        )


def configure_log(settings: Settings) -> None:
    """The log as `[log]` wants it."""
    log = settings.log
    configure_logging(log.level, log.format, redact=log.redact, trace=log.trace)


async def serve(settings: Settings, load: Callable[[], Settings]) -> int:
    """Run until SIGTERM or SIGINT. The exit status: 0 after a clean stop, 1 otherwise. SIGHUP takes up what `load` gives."""
    daemon, signalled, systemd = Daemon(settings), asyncio.Event(), ServiceManager.from_environment(os.environ)

    def on_signal(name: str) -> None:
        if signalled.is_set():
            logger.bind(action="signal", signal=name).warning("{} again: cutting the waits.", name)
            daemon.hurry()
        else:
            logger.bind(action="signal", signal=name).info("{}: stopping.", name)
            systemd.stopping(daemon.stop_budget_s)
            signalled.set()

    def on_hangup() -> None:
        with systemd.reloading():
            try:
                daemon.reload(load())
            except WarrenError as e:
                logger.bind(action="reload_failed").error("The configuration is wrong, so nothing changes: {}", e)

    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, on_signal, sig.name)
    if sys.stderr.isatty():  # a terminal that is closed
        loop.add_signal_handler(signal.SIGHUP, on_signal, "SIGHUP")
    else:
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    systemd.start(daemon.condition)
    failed = not await _start_unless(signalled, daemon)
    if not failed:
        await signalled.wait()
    clean = await daemon.stop()
    await systemd.close()
    return EXIT_UNCLEAN if failed or not clean else 0


async def _start_unless(signalled: asyncio.Event, daemon: Daemon) -> bool:
    """Start, or stop starting when a signal comes first. False when the start failed; the reason is logged."""
    starting, told = asyncio.ensure_future(daemon.start()), asyncio.ensure_future(signalled.wait())
    await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    starting.cancel()
    try:
        await starting
    except asyncio.CancelledError:
        return True
    except WarrenError as e:
        logger.bind(action="start_failed").error("{}", e)
        return False
    except Exception:
        logger.bind(action="start_failed").exception("The start met a bug.")
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """The command `warrend`."""
    parser = argparse.ArgumentParser(
        prog="warrend", description="WhatsApp sessions as a service on RabbitMQ: the daemon.", epilog="See also: warren --help"
    )
    parser.add_argument("--config", type=Path, help="TOML file (default: ./warren.toml or /etc/warren/warren.toml, if there)")
    parser.add_argument(
        "--trace",
        action="append",
        metavar="SESSION",
        help="tell everything of this session, as level debug does of all; repeatable",
    )
    parser.add_argument("--version", action="version", version=f"warrend {__version__}")
    arguments = parser.parse_args(argv)

    def load() -> Settings:
        return load_settings(arguments.config, {"log.trace": arguments.trace})

    try:
        settings = load()
    except WarrenError as e:
        sys.stderr.write(f"warrend: {e}\n")
        return EXIT_CONFIG
    configure_log(settings)
    # systemd's watchdog ends what hangs with SIGABRT: the log then shows where, without the values of variables.
    faulthandler.enable()
    return asyncio.run(serve(settings, load))


def program() -> NoReturn:
    """What `warrend` runs."""
    leave(main())


if __name__ == "__main__":
    program()
