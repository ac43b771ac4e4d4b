"""A warren whose every part can be struck: real processes, and a proxy between the daemon and RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from tests.acceptance.rig import until
from tests.conftest import Broker
from tests.faults.ledger import TEXT, Ledger
from tests.faults.traffic import TROUBLE, Service, Traffic, subscribe
from tests.proxy import Proxy

from warren.client import Client, NoAnswer
from warren.demo import Warrend
from warren.edges.settings import find_engine_binary
from warren.simulator import Simulator

PEER = "15559990000"
RECOVERY_S = 180.0
"""Deadline of one recovery; the figures are what counts."""
HEARTBEAT_S = 2
BOTH = 0.25
"""The share of rounds that have two disturbances at the same time."""


class World:
    """`async with World(base, broker, prefix, sessions=20)`: daemon, two engines, simulator, paired sessions, subscriber."""

    def __init__(self, base: Path, broker: Broker, prefix: str, *, sessions: int, **settings: str) -> None:
        self.base, self.broker, self.prefix = base, broker, prefix
        self.numbers = {f"s{n:02}": f"1555010{n:04}" for n in range(sessions)}
        self.url = broker.url
        """RabbitMQ past the proxy; it keeps while RabbitMQ is away."""
        self.ledger = Ledger()
        self.qrs = 0
        """QR codes that pairing took."""
        self._settings = settings

    async def __aenter__(self) -> Self:
        self._stack = contextlib.AsyncExitStack()
        try:
            await self._begin()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = 0
        try:
            status = await self.warrend.stop()
        finally:
            await self._stack.aclose()
        if error is None:
            assert status == 0, f"warrend ended with {status}; see {self.warrend.log}"

    async def _begin(self) -> None:
        stack = self._stack
        self.sim = await stack.enter_async_context(Simulator(find_engine_binary(None, "warren-sim"), log=self.base / "sim.log"))
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.proxy = await stack.enter_async_context(Proxy(parts.hostname, parts.port))
        through_proxy = parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{self.proxy.port}"))
        state = self.base / "state"
        state.mkdir(mode=0o700)
        self.warrend = Warrend(
            state,
            {
                **self.sim.endpoint.environment(),
                "WARREN_STATE_DIR": str(state),
                "WARREN_AMQP__URL": urlunsplit(through_proxy),
                "WARREN_AMQP__PREFIX": self.prefix,
                "WARREN_AMQP__HEARTBEAT_S": str(HEARTBEAT_S),
                "WARREN_RECONNECT__BASE_S": "0.5",
                "WARREN_RECONNECT__CAP_S": "5",
                "WARREN_AMQP__CONNECT_TIMEOUT_S": "2",
                "WARREN_PACING__MESSAGES_PER_MINUTE": "0",
                "WARREN_ENGINE__SESSIONS_PER_PROCESS": str(max(1, len(self.numbers) // 2)),
                "WARREN_INSTANCE": "faults",
                "WARREN_LOG__FORMAT": "json",
                **self._settings,
            },
        )
        await self.warrend.start()
        stack.push_async_callback(self._end_daemon)
        await until(self.answers, f"an answer of warrend (see {self.warrend.log})", RECOVERY_S)
        subscriber = asyncio.create_task(subscribe(lambda: self.url, self.prefix, self.ledger))
        stack.push_async_callback(_cancelled, subscriber)
        self.service = Service(lambda: self.url, self.prefix)
        stack.push_async_callback(self.service.close)
        await self.sim.add_phone(PEER, "Peer")
        async with Client(self.url, self.prefix) as client:
            await asyncio.gather(*(self._pair(client, s, n) for s, n in self.numbers.items()))
        self.qrs = self.ledger.types["qr"]

    async def _end_daemon(self) -> None:
        if self.warrend.running:
            await self.warrend.kill()

    async def _pair(self, client: Client, session: str, number: str) -> None:
        await self.sim.add_phone(number, session)
        async with client.subscribe(f"{session}.*") as events:
            assert (await client.call("create", session)).ok
            async with asyncio.timeout(RECOVERY_S):
                async for event in events:
                    if event["type"] == "warren.qr":
                        await self.sim.scan(number, event["data"]["code"])
                    elif event["type"] == "warren.connected":
                        return

    # --- what can be asked

    async def states(self) -> dict[str, str]:
        """Session -> state, asked past the proxy; empty when the daemon does not answer."""
        with contextlib.suppress(NoAnswer, *TROUBLE):
            async with Client(self.url, self.prefix, name="faults-list") as client:
                return {s["session"]: s["state"] for s in await client.list_sessions(timeout_s=3.0)}
        return {}

    async def answers(self) -> bool:
        assert self.warrend.running, f"warrend has ended; see {self.warrend.log}"
        with contextlib.suppress(NoAnswer, *TROUBLE):
            async with Client(self.url, self.prefix, name="faults-list") as client:
                await client.list_sessions(timeout_s=1.0)
                return True
        return False

    async def all_online(self) -> bool:
        states = await self.states()
        return set(states) == set(self.numbers) and set(states.values()) == {"online"}

    def traffic(self, period_s: float, *, window: float = math.inf) -> Traffic:
        traffic = Traffic(self.sim, self.service, PEER, self.numbers, self.ledger, period_s=period_s, window=window)
        self._stack.push_async_callback(traffic.abort)
        return traffic

    async def recovered(self, traffic: Traffic) -> None:
        """Until each session is online and has passed on, both ways, something that was begun after this call."""
        # The number behind the highest may have been begun before.
        written = {s: traffic.written[s] + 2 for s in self.numbers}
        asked = {s: traffic.asked[s] + 2 for s in self.numbers}

        def passed() -> bool:
            traffic.check()
            return all(self.ledger.last[s] >= written[s] and self.ledger.ended[s] >= asked[s] for s in self.numbers)

        try:
            await until(passed, "each session to pass on messages both ways", RECOVERY_S)
            await until(self.all_online, "every session to be online", RECOVERY_S)
        except AssertionError as e:
            stuck = {
                s: f"in {self.ledger.last[s]}/{written[s]}, out {self.ledger.ended[s]}/{asked[s]}"
                for s in self.numbers
                if self.ledger.last[s] < written[s] or self.ledger.ended[s] < asked[s]
            }
            raise AssertionError(f"{e}: {stuck}; states {await self.states()}; see {self.warrend.log}") from None

    async def broker_back(self) -> None:
        """Start RabbitMQ again, on its data."""
        await self.broker.start()
        self.url = self.broker.url
        port = urlsplit(self.url).port
        assert port is not None
        self.proxy.target_port = port

    async def settled(self, traffic: Traffic, deadline_s: float = 300.0) -> None:
        """Until everything that was written and asked for has arrived. `traffic` has stopped."""

        def everything() -> bool:
            return all(
                len(self.ledger.messages[s]) >= traffic.written[s] and len(self.ledger.outcomes[s]) >= traffic.asked[s]
                for s in self.numbers
            )

        with contextlib.suppress(AssertionError):  # what is missing is counted
            await until(everything, "all messages and outcomes", deadline_s)

    def logged(self, offset: int) -> bytes:
        """What the daemon's log has behind `offset`."""
        with self.warrend.log.open("rb") as log:
            log.seek(offset)
            return log.read()

    def rss_mb(self) -> tuple[float, float]:
        """Resident memory of the daemon, and of its engines together."""
        return _rss_mb(self.warrend.pid), sum(map(_rss_mb, self.warrend.engine_pids()))

    # --- counting

    async def count(self, traffic: Traffic) -> Counts:
        received = await self.sim.received(PEER)
        shown: dict[str, list[int]] = defaultdict(list)
        for message in received["shown"]:
            if (match := TEXT.fullmatch(str(message["text"]))) is not None:
                shown[match[2]].append(int(match[3]))
        counts = Counts()
        ledger = self.ledger
        for s in self.numbers:
            counts.missing += [f"{s} {n}" for n in range(1, traffic.written[s] + 1) if n not in ledger.messages[s]]
            counts.outcomes += [
                f"{s}-{n}: {len(ledger.outcomes[s].get(n, ()))} outcomes"
                for n in range(1, traffic.asked[s] + 1)
                if len(ledger.outcomes[s].get(n, ())) != 1
            ]
            counts.shown_twice += [f"{s} {n}" for n in set(shown[s]) if shown[s].count(n) > 1] if _doubled(shown[s]) else []
            counts.not_shown += [f"{s} {n}" for n in ledger.sent[s] - set(shown[s])]
            counts.disorder += [f"phone {s}: {b} after {a}" for a, b in zip(shown[s], shown[s][1:], strict=False) if b < a]
        counts.disorder += ledger.disorder
        counts.doubled, counts.gaps = ledger.doubled, ledger.gaps
        counts.qrs = ledger.types["qr"] - self.qrs
        counts.bugs = [
            line
            for line in self.warrend.log.read_text().splitlines()
            if '_bug"' in line or ("Traceback" in line and '"action":"library"' not in line)
        ]
        counts.messages, counts.commands = sum(traffic.written.values()), sum(traffic.asked.values())
        counts.stanzas_repeated = received["stanzas"] - len(received["shown"])
        counts.undecryptable = received["undecryptable"]
        counts.failed = ledger.failed
        return counts


class Counts:
    """What the issue counts. Each list holds the offenders, so that a failure says which."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.outcomes: list[str] = []
        self.shown_twice: list[str] = []
        self.not_shown: list[str] = []
        self.doubled: list[str] = []
        self.gaps: list[str] = []
        self.disorder: list[str] = []
        self.bugs: list[str] = []
        self.qrs = self.messages = self.commands = self.stanzas_repeated = self.undecryptable = 0
        self.failed: list[str] = []

    def must_be_zero(self) -> dict[str, list[str] | int]:
        return {
            "messages from phones missing at a durable subscriber": self.missing,
            "commands without exactly one final outcome": self.outcomes,
            "messages shown twice on a phone": self.shown_twice,
            "commands completed and not shown on the phone": self.not_shown,
            "duplicates at the subscriber with a different event id": self.doubled,
            "gaps in sequence within an epoch": self.gaps,
            "disorder per session, both directions": self.disorder,
            "sessions that needed a QR": self.qrs,
            "commands that failed": self.failed,
            "bugs in the daemon's log": self.bugs,
        }

    def offenders(self) -> dict[str, list[str] | int]:
        return {what: value if isinstance(value, int) else value[:10] for what, value in self.must_be_zero().items() if value}

    def lines(self, ledger: Ledger) -> list[str]:
        counted = {what: value if isinstance(value, int) else len(value) for what, value in self.must_be_zero().items()}
        return [
            *(row(what, n, "must be 0") for what, n in counted.items()),
            row("messages from phones", self.messages),
            row("commands", self.commands),
            row("stanzas repeated", self.stanzas_repeated),
            row("deliveries repeated, with the same event id", ledger.repeated),
            row("events", sum(ledger.types.values())),
        ]


# --- disturbances


class Disturbances:
    """Each kind is a method that returns when it is over on its part; recovery is the warren's."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self._world, self._chance = world, chance

    def of_a_round(self) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        """Every kind once; and in one round of four, two at the same time."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill -9 daemon": self.kill_daemon,
            "kill -9 engine": self.kill_engine,
            "kill -9 RabbitMQ": self.kill_rabbitmq,
            "connections cut": self.cut,
            "half-open": self.half_open,
            "SIGTERM": self.sigterm,
        }
        if self._chance.random() < BOTH:
            kinds["kill -9 daemon and RabbitMQ"] = self.kill_both
        order = list(kinds.items())
        self._chance.shuffle(order)
        return order

    async def kill_daemon(self) -> None:
        await self._world.warrend.kill()
        await self._world.warrend.start()

    async def kill_engine(self) -> None:
        pids = self._world.warrend.engine_pids()
        assert len(pids) == 2, pids
        victim = self._chance.choice(sorted(pids))
        os.kill(victim, signal.SIGKILL)
        await until(lambda: victim not in self._world.warrend.engine_pids(), "the daemon to take notice", RECOVERY_S)

    async def kill_rabbitmq(self) -> None:
        self._world.broker.kill()
        await self._world.broker_back()

    async def kill_both(self) -> None:
        """The daemon dies while RabbitMQ is away, and is back first: what it has is on disk alone."""
        world = self._world
        before = world.proxy.accepted
        world.broker.kill()
        await until(lambda: world.proxy.accepted > before, "the daemon to notice", RECOVERY_S)
        await world.warrend.kill()
        await world.warrend.start()
        await world.broker_back()

    async def cut(self) -> None:
        self._world.proxy.cut()

    async def half_open(self) -> None:
        """Until the daemon has given its connections up and tries new ones."""
        proxy = self._world.proxy
        before = proxy.accepted
        proxy.black_hole()
        await until(lambda: proxy.accepted > before, "the daemon to notice the dead network", RECOVERY_S)
        proxy.heal()

    async def sigterm(self) -> None:
        status = await self._world.warrend.stop()
        assert status == 0, f"SIGTERM: warrend ended with {status}; see {self._world.warrend.log}"
        await self._world.warrend.start()


class Recoveries:
    """Seconds from the blow until everything runs again, by kind."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[kind].append(time.monotonic() - began)

    def last(self, kind: str) -> float:
        return self._seconds[kind][-1]

    def lines(self) -> list[str]:
        return [
            row(f"recovery after {kind}", len(s), f"p50 {statistics.median(s):.1f} s, max {max(s):.1f} s")
            for kind, s in sorted(self._seconds.items())
        ]


def row(what: str, figure: float, note: str = "") -> str:
    """A line of the table."""
    return f"{what:60} {figure:>9.10g}  {note}".rstrip()


def _doubled(numbers: list[int]) -> bool:
    return len(set(numbers)) < len(numbers)


def _rss_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return 0.0


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
