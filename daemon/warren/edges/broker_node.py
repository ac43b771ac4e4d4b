"""The embedded RabbitMQ: a private node on loopback, run as a child and adopted after a crash of the daemon.

One directory holds everything of a node: data, logs, configuration, `node.json` (who it is and what runs) and `url`.
The node is in a session of its own, so it survives a SIGKILL of the daemon; the next `BrokerNode.start` finds it
through `node.json` and goes on with it.

Every process of the node carries the node's random name in its environment (`WARREN_BROKER_NODE`). That is how
processes are recognised that nobody recorded (a daemon killed between fork and write, Erlang's helpers), and why a
recycled process id is never taken for ours. Reading /proc and process file descriptors make this Linux only.

The caller holds a lock on the state directory: two `BrokerNode`s must never use one directory at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from loguru import logger
from pydantic import BaseModel, ConfigDict, ValidationError

from warren.errors import BrokerUnavailable, StateError

P = ParamSpec("P")
T = TypeVar("T")

SBIN_PATTERNS: Final = ("usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin", "opt/rabbitmq/sbin")
"""Where packages put RabbitMQ's own scripts, below /. Debian's and Red Hat's packages, and the official images."""

MARK: Final = "WARREN_BROKER_NODE"
PORTS: Final = range(20_000, 32_000)
"""Below the range from which kernels give ports to outgoing connections, so that a stopped node's port is seldom taken."""

POLL_S: Final = 0.05
PROBE_S: Final = 2.0
ADOPT_S: Final = 5.0
"""How long a running node from before may take to answer before it counts as hung (longer while it boots)."""
KILLED_S: Final = 10.0
"""How long a process may take to vanish after SIGKILL; only uninterruptible disk I/O takes longer than moments."""
LOG_LINES: Final = 15

AMQP_HEADER: Final = b"AMQP\x00\x00\x09\x01"
METHOD_FRAME: Final = b"\x01"


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node that answers AMQP. `url` is `amqp://user:password@127.0.0.1:port/`; `adopted`: it ran before this start."""

    url: str
    pid: int
    adopted: bool


class _Pid(BaseModel):
    """A process, told from a later one with the same id by its start time (clock ticks since boot)."""

    pid: int
    started: int


class _Node(BaseModel):
    """`node.json`. Name, user and password are for life: the data directory knows them. Ports are kept while they are free."""

    model_config = ConfigDict(hide_input_in_errors=True)

    name: str
    user: str
    password: str
    amqp_port: int
    epmd_port: int
    dist_port: int
    broker: _Pid | None = None

    @property
    def url(self) -> str:
        return f"amqp://{self.user}:{self.password}@127.0.0.1:{self.amqp_port}/"


def find_rabbitmq() -> Path:
    """The directory of RabbitMQ's own scripts; the newest version if there are several.

    Not /usr/sbin: Debian's wrappers there change user and directory. Raises `BrokerUnavailable` with what to install.
    """
    candidates = [path for pattern in SBIN_PATTERNS for path in Path("/").glob(pattern)]
    if on_path := shutil.which("rabbitmq-server"):
        candidates.append(Path(on_path).resolve().parent)
    # `rabbitmq-env` lies next to the real scripts only, not next to a wrapper.
    usable = [path for path in candidates if (path / "rabbitmq-server").is_file() and (path / "rabbitmq-env").is_file()]
    if not usable:
        raise BrokerUnavailable(
            "RabbitMQ is not installed, and no [amqp] url names one.",
            hint="Install it (on Debian and Ubuntu: apt-get install --no-install-recommends rabbitmq-server) or set [amqp] url.",
        )
    for tool in ("erl", "epmd"):
        if shutil.which(tool) is None:
            raise BrokerUnavailable(
                f"RabbitMQ is installed, but Erlang's `{tool}` is not on the PATH.",
                hint="Install Erlang (on Debian and Ubuntu: apt-get install erlang-base) or set [amqp] url.",
            )
    return max(usable, key=_version)


class BrokerNode:
    """A private RabbitMQ node below `base` (created with mode 0700).

    `start_timeout_s` bounds one start, from the fork to the first AMQP answer; 3 to 5 s are usual.
    """

    def __init__(self, base: Path, *, start_timeout_s: float = 60.0) -> None:
        self._base = base.absolute()
        self._url_file = self._base / "url"
        self._start_timeout_s = start_timeout_s
        self._node: _Node | None = None
        self._info: NodeInfo | None = None
        self._broker: Process | None = None
        self._children: list[Process] = []
        self._log = logger.bind(component="broker_node")

    @property
    def info(self) -> NodeInfo | None:
        """The node of the last successful `start`; None before it and after `stop`."""
        return self._info

    async def start(self) -> NodeInfo:
        """Adopt the node that runs already, or else start one; returns when it answers AMQP.

        A node that runs but does not answer is killed and started again on the same data. Raises `BrokerUnavailable`
        (not installed, ended while booting, too slow) and `StateError` (`node.json` unreadable, no disk). When cancelled or
        failing, everything that this call started is gone before it returns; a node that ran before is left alone.
        """
        try:
            return await self._start()
        except OSError as error:
            raise StateError(
                f"The private RabbitMQ cannot be started in {self._base}: {error.strerror or error}.",
                hint="Check the free space, owner and mode of that directory.",
                retryable=True,
            ) from error

    async def _start(self) -> NodeInfo:
        self._info = self._broker = None
        node = self._node = await _in_thread(self._load)
        if node.broker in await asyncio.to_thread(_marked, node.name):
            if await self._answers(node, node.broker, patience_s=self._patience(node.broker)):
                self._log.info("adopted the running RabbitMQ node, pid {}", node.broker.pid, action="broker_adopted")
                return await self._ready(node, node.broker.pid, adopted=True)
            self._log.warning("RabbitMQ, pid {}, does not answer; starting anew", node.broker.pid, action="broker_hung")
        sbin = await asyncio.to_thread(find_rabbitmq)
        await self._kill_all(node)
        try:
            return await self._launch(sbin, node)
        except BaseException:
            await _to_the_end(self._kill_all(node))
            raise

    async def stop(self, timeout_s: float = 15.0) -> None:
        """Stop the node cleanly; nothing of it is left afterwards. Harmless when it does not run.

        SIGTERM first; what has not ended after `timeout_s` is killed, as it is at once if this call is cancelled.
        Killing costs no confirmed message, except in a quorum queue declared within the last second (docs/adr/0003).
        """
        node = self._node
        if node is None:
            return
        self._info = None
        try:
            if node.broker is not None:
                await _signal(node.broker, signal.SIGTERM)
                await _exited(node.broker, timeout_s)
        finally:
            await _to_the_end(self._stopped(node))

    async def wait_exit(self) -> int | None:
        """Wait until the broker process ends, for whatever reason; its exit status (negative: a signal), None if it was adopted.

        Returns at once when nothing runs. Safe to cancel and to call while `stop` runs.
        """
        if self._broker is not None:
            return await self._broker.wait()
        if self._node is not None and self._node.broker is not None:
            await _exited(self._node.broker, None)
        return None

    # --- starting -----------------------------------------------------------------------------------------------------

    def _load(self) -> _Node:
        """Read `node.json`, or make up a new node if the directory holds none."""
        self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._base.chmod(0o700)
        path = self._base / "node.json"
        try:
            return _Node.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            if any((self._base / "data").glob("*")):
                raise self._unreadable(f"{path} is missing, but there is data beside it") from None
        except (OSError, ValidationError) as error:
            raise self._unreadable(f"{path} cannot be read: {error}") from error
        return _Node(
            name=f"warren-{secrets.token_hex(6)}@localhost",
            user="warren",
            password=secrets.token_urlsafe(24),
            amqp_port=0,
            epmd_port=0,
            dist_port=0,
        )

    def _unreadable(self, message: str) -> StateError:
        return StateError(
            message, hint=f"Put the file back from a copy, or move {self._base} away to begin with an empty RabbitMQ."
        )

    def _patience(self, broker: _Pid) -> float:
        """How long to wait for a running node to answer: the rest of its start, if it never answered yet."""
        if self._url_file.exists():
            return ADOPT_S
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - broker.started / os.sysconf("SC_CLK_TCK")
        return max(ADOPT_S, self._start_timeout_s - age_s)

    async def _launch(self, sbin: Path, node: _Node) -> NodeInfo:
        started_at = time.monotonic()
        environment = await _in_thread(self._prepare, node)
        await _in_thread(self._save, node)
        console = self._base / "log" / "console.log"
        output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            # epmd as a child of ours, in the foreground: left to itself, Erlang starts one that outlives everything.
            await self._spawn(("epmd", "-port", str(node.epmd_port), "-address", "127.0.0.1"), environment, output)
            broker = await self._spawn((str(sbin / "rabbitmq-server"), "-noinput"), environment, output)
        finally:
            os.close(output)
        started = await asyncio.to_thread(_started, broker.pid)
        self._broker = broker
        if started is not None:  # else it has ended already
            node.broker = _Pid(pid=broker.pid, started=started)
            await _in_thread(self._save, node)
            if await self._answers(node, node.broker, patience_s=self._start_timeout_s):
                seconds = time.monotonic() - started_at
                self._log.info("RabbitMQ is up after {:.1f} s, pid {}", seconds, broker.pid, action="broker_started")
                return await self._ready(node, broker.pid, adopted=False)
        raise await self._failed(broker, console)

    def _prepare(self, node: _Node) -> dict[str, str]:
        """Choose ports, write the configuration, and return the node's whole environment (nothing but PATH is inherited)."""
        taken: set[int] = set()
        node.amqp_port = _free_port(node.amqp_port, taken)
        node.epmd_port = _free_port(node.epmd_port, taken)
        node.dist_port = _free_port(node.dist_port, taken)
        node.broker = None
        self._url_file.unlink(missing_ok=True)
        base = self._base
        for folder in ("home", "data", "log", "conf.d"):
            (base / folder).mkdir(mode=0o700, exist_ok=True)
        cookie = base / "home" / ".erlang.cookie"
        if not cookie.exists():
            _write(cookie, secrets.token_hex(16).encode(), mode=0o400)
        configuration = f"""\
# Written by warren at each start.
listeners.tcp.1 = 127.0.0.1:{node.amqp_port}
default_user = {node.user}
default_pass = {node.password}
default_user_tags.administrator = true
log.console = false
log.file.level = info
log.file.rotation.size = 10485760
log.file.rotation.count = 3
disk_free_limit.absolute = 200MB
# RabbitMQ keeps the whole write-ahead log in memory: 32 MiB instead of 512 cost no speed.
raft.wal_max_size_bytes = 33554432
"""
        _write(base / "rabbitmq.conf", configuration.encode())
        _write(base / "rabbitmq-env.conf", b"")
        _write(base / "enabled_plugins", b"[].\n")
        return {
            MARK: node.name,
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(base / "home"),
            "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": node.name,
            "RABBITMQ_CONF_ENV_FILE": str(base / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(base / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(base / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(base / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(base / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(base / "data"),
            "RABBITMQ_LOG_BASE": str(base / "log"),
            "RABBITMQ_PID_FILE": str(base / "rabbitmq.pid"),
            "RABBITMQ_DIST_PORT": str(node.dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # The script then becomes the broker instead of its parent, so the process id and signals are the broker's.
            "RABBITMQ_ALLOW_INPUT": "1",
            "ERL_EPMD_PORT": str(node.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP_SECONDS": "0",
        }

    async def _spawn(self, command: tuple[str, ...], environment: dict[str, str], output: int) -> Process:
        try:
            child = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                cwd=self._base,
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                start_new_session=True,
                umask=0o077,
            )
        except OSError as error:
            raise BrokerUnavailable(f"{command[0]} cannot be started: {error}") from error
        self._children.append(child)
        return child

    async def _answers(self, node: _Node, broker: _Pid, *, patience_s: float) -> bool:
        """Whether the node speaks AMQP within `patience_s`; False as soon as its process has ended.

        RabbitMQ opens its listener at the end of the boot, so the first frame means that it is usable.
        """
        deadline = time.monotonic() + patience_s
        while _started(broker.pid) == broker.started:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            if await _speaks_amqp(node.amqp_port, min(PROBE_S, left_s)):
                return True
            await asyncio.sleep(POLL_S)
        return False

    async def _ready(self, node: _Node, pid: int, *, adopted: bool) -> NodeInfo:
        await _in_thread(self._publish, node.url.encode())
        self._info = NodeInfo(url=node.url, pid=pid, adopted=adopted)
        return self._info

    def _publish(self, url: bytes) -> None:
        # Nothing is written for a node that is adopted, which works on a full disk, too.
        if not self._url_file.exists() or self._url_file.read_bytes() != url:
            _write(self._url_file, url)

    async def _failed(self, broker: Process, console: Path) -> BrokerUnavailable:
        words = _last_words(await asyncio.to_thread(console.read_text, errors="replace"))
        if _started(broker.pid) is None:
            what = f"ended while starting (status {await broker.wait()})"
        else:
            what = f"gave no answer within {self._start_timeout_s:g} s"
        return BrokerUnavailable(f"RabbitMQ {what}. Its last words:\n{words}\n", hint=f"The logs are in {console.parent}.")

    def _save(self, node: _Node) -> None:
        _write(self._base / "node.json", node.model_dump_json(indent=2).encode())

    # --- stopping -----------------------------------------------------------------------------------------------------

    async def _stopped(self, node: _Node) -> None:
        await self._kill_all(node)
        node.broker = None
        self._broker = None
        try:
            await _in_thread(self._forget, node)
        except OSError as error:  # a full disk; the next start sees by itself that nothing runs
            self._log.warning("The end of RabbitMQ is not noted in {}: {}", self._base, error, action="broker_not_noted")

    def _forget(self, node: _Node) -> None:
        self._url_file.unlink(missing_ok=True)
        self._save(node)

    async def _kill_all(self, node: _Node) -> None:
        """SIGKILL to everything of the node, recorded or not, until nothing is left.

        Killing epmd and Erlang's helpers costs nothing: they keep no state.
        """
        deadline = time.monotonic() + KILLED_S
        while left := await asyncio.to_thread(_marked, node.name):
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"Processes of RabbitMQ cannot be ended: {[process.pid for process in left]}.",
                    hint="See what they wait for (ps -o pid,stat,wchan,args).",
                )
            for process in left:
                await _signal(process, signal.SIGKILL)
            for process in left:
                await _exited(process, PROBE_S)
        if node.broker is not None:  # killed by somebody else a moment ago
            await _exited(node.broker, KILLED_S)
        while self._children:
            await self._children[-1].wait()
            self._children.pop()


# --- processes --------------------------------------------------------------------------------------------------------


def _started(pid: int, *, dead: bool = False) -> int | None:
    """Start time of a process in clock ticks since boot; None if there is none, or only a zombie and not `dead`."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold anything; state is the first field after it, start time the 20th.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" and not dead else int(fields[19])


def _marked(name: str) -> list[_Pid]:
    """The living processes of the node `name`."""
    mark = f"{MARK}={name}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # it ended, or belongs to another user
            continue
        if mark in environment.split(b"\0") and (started := _started(int(entry.name))) is not None:
            found.append(_Pid(pid=int(entry.name), started=started))
    return found


@contextlib.contextmanager
def _pidfd(process: _Pid) -> Iterator[int | None]:
    """A descriptor that stands for this very process, whatever becomes of its id; None if it has ended."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # A zombie counts: its other threads may still be ending, with the port open. The descriptor waits for them, too.
        yield descriptor if _started(process.pid, dead=True) == process.started else None
    finally:
        os.close(descriptor)


async def _signal(process: _Pid, number: signal.Signals) -> None:
    with _pidfd(process) as descriptor, contextlib.suppress(ProcessLookupError):
        if descriptor is not None:
            signal.pidfd_send_signal(descriptor, number)


async def _exited(process: _Pid, timeout_s: float | None) -> bool:
    """Wait until a process ends, a child or not; False after `timeout_s`."""
    loop = asyncio.get_running_loop()
    with _pidfd(process) as descriptor:
        if descriptor is None:
            return True
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(descriptor)
        return True


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run what must not stop half way, such as clean-up: a cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Work on files, off the event loop; a cancelled caller does not leave the thread behind, writing."""
    return await _to_the_end(asyncio.to_thread(function, *args, **kwargs))


# --- ports and files --------------------------------------------------------------------------------------------------


async def _speaks_amqp(port: int, timeout_s: float) -> bool:
    """Whether the first byte of an answer to the AMQP header is that of Connection.Start."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(AMQP_HEADER)
                return await reader.read(1) == METHOD_FRAME
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def _free_port(preferred: int, taken: set[int]) -> int:
    """`preferred` if it is free on loopback, else a random free port of `PORTS`; not one of `taken`, to which it is added."""
    for port in (preferred, *(secrets.choice(PORTS) for _ in range(100))):
        if port == 0 or port in taken:
            continue
        with socket.socket() as probe:
            # As Erlang does: connections of an earlier listener that linger in TIME_WAIT do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                taken.add(port)
                return port
    raise BrokerUnavailable(f"No free port for RabbitMQ between {PORTS.start} and {PORTS.stop - 1} on 127.0.0.1.")


def _write(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace a file as a whole, durably; nobody ever sees half of it, nor one that others may read."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _last_words(console: str) -> str:
    """What a broker said before it gave up: around its "BOOT FAILED", because pages of crash reports follow that."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", console).splitlines() if line.strip()]
    failed = next((number for number, line in enumerate(lines) if line.startswith("BOOT FAILED")), None)
    if failed is None:
        return "\n".join(lines[-LOG_LINES:])
    return "\n".join(lines[max(0, failed - LOG_LINES // 2) : failed + LOG_LINES // 2])


def _version(sbin: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", sbin.parent.name))
