"""A whole warren for a test: simulator, warrend as a child process, and a subscriber with a durable queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aio_pika
import orjson
from tests.contract import faults_of

from warren.client import Client
from warren.core.envelope import Outcome
from warren.demo import Warrend
from warren.edges.amqp_link import QuietConnection
from warren.edges.settings import find_engine_binary
from warren.simulator import Simulator

DEADLINE_S = 30.0


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, deadline_s: float = DEADLINE_S) -> None:
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                met = condition()
                if met if isinstance(met, bool) else await met:
                    return
                await asyncio.sleep(0.03)
    except TimeoutError:
        raise AssertionError(f"waited {deadline_s:g} s in vain for: {what}") from None


class Subscriber:
    """Takes everything from a durable queue, as a backend service would, and remembers every delivery."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.deliveries: Counter[str] = Counter()
        self.sequence_faults: list[str] = []
        """Gaps; looked for in every delivery, because what repeats an event id may have a number of its own."""
        self.contract_faults: list[str] = []
        """Events that do not fit their schema in `schemas/`, or have a field that is not in it."""
        self._last: dict[tuple[str, int], int] = defaultdict(int)
        self._seen = asyncio.Event()

    def take(self, event: dict[str, Any]) -> None:
        if "sequence" in event:
            self._count(event)
        if event["id"] not in self.deliveries:
            self.contract_faults += faults_of(event)
        self.deliveries[event["id"]] += 1
        if self.deliveries[event["id"]] == 1:
            self.events.append(event)
        self._seen.set()

    def of(self, name: str, session: str | None = None) -> list[dict[str, Any]]:
        """Distinct events, in order of arrival."""
        return [e for e in self.events if e["type"] == f"warren.{name}" and session in (None, e["session"])]

    async def event(
        self, name: str, session: str, wanted: Callable[[dict[str, Any]], bool] = lambda _: True, *, after: int = 0
    ) -> dict[str, Any]:
        """The first such event at or behind position `after`; waits for it."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    for e in self.events[after:]:
                        if e["type"] == f"warren.{name}" and e["session"] == session and wanted(e["data"]):
                            return e
                    self._seen.clear()
                    await self._seen.wait()
        except TimeoutError:
            got = [(e["type"], e["data"].get("code")) for e in self.events[after:] if e["session"] == session]
            raise AssertionError(f"no event {name} of {session} within {DEADLINE_S:g} s; got {got}") from None

    def _count(self, event: dict[str, Any]) -> None:
        """Numbers rise by one within (session, epoch); a delivery repeated by RabbitMQ or the outbox repeats its number."""
        key, number = (event["session"], event["epoch"]), int(event["sequence"])
        if number > self._last[key] + 1:
            self.sequence_faults.append(f"{key}: {self._last[key]} -> {number} ({event['type']})")
        self._last[key] = max(self._last[key], number)


class Rig:
    """`async with Rig(tmp_path, url, "prefix")`; ends everything it started and fails if the daemon ended uncleanly."""

    def __init__(self, base: Path, url: str, prefix: str, **settings: str) -> None:
        self.base, self.url, self.prefix = base, url, prefix
        self._settings = settings
        self.got = Subscriber()
        self._numbers: dict[str, str] = {}
        self._lent: Simulator | None = None

    def lend(self, sim: Simulator) -> None:
        """Use somebody else's simulator instead of one of its own."""
        self._lent = sim

    async def __aenter__(self) -> Self:
        self._stack = contextlib.AsyncExitStack()
        self.sim = self._lent or await self._stack.enter_async_context(
            Simulator(find_engine_binary(None, "warren-sim"), log=self.base / "sim.log")
        )
        self.client = await self._stack.enter_async_context(Client(self.url, self.prefix))
        state = self.base / "state"
        state.mkdir(mode=0o700)
        self._environment = {
            **self.sim.endpoint.environment(),
            "WARREN_STATE_DIR": str(state),
            "WARREN_AMQP__URL": self.url,
            "WARREN_AMQP__PREFIX": self.prefix,
            "WARREN_INSTANCE": "rig",
            "WARREN_LOG__LEVEL": "debug",
            "WARREN_PACING__MESSAGES_PER_MINUTE": "0",
            **self._settings,
        }
        self.warrend = Warrend(state, self._environment)
        await self.warrend.start()
        await self.ready()
        self._subscriber = asyncio.create_task(self._subscribe())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            status = await self.warrend.stop()
        finally:
            self._subscriber.cancel()
            await asyncio.gather(self._subscriber, return_exceptions=True)
            await self._stack.aclose()
        if error is None:
            assert status == 0, f"warrend ended with {status}; see {self.warrend.log}"
            assert self.got.contract_faults == []

    async def _subscribe(self) -> None:
        """Survives the broker's restarts, as a service does."""
        while True:
            with contextlib.suppress(aio_pika.exceptions.AMQPError, OSError, TimeoutError):
                connection = await aio_pika.connect(self.url, timeout=5, connection_class=QuietConnection)
                async with connection:
                    channel = await connection.channel()
                    await channel.set_qos(prefetch_count=200)
                    queue = await channel.declare_queue(f"{self.prefix}-subscriber", durable=True)
                    await queue.bind(f"{self.prefix}.events", "#")
                    async with queue.iterator() as messages:
                        async for message in messages:
                            self.got.take(orjson.loads(message.body))
                            await message.ack()
            await asyncio.sleep(0.2)

    async def ready(self) -> None:
        async def answers() -> bool:
            try:
                await self.client.list_sessions(timeout_s=1.0)
            except Exception:
                return False
            return True

        await until(answers, f"an answer of warrend (see {self.warrend.log})")

    def machine(self, name: str, **settings: str) -> Warrend:
        """A daemon with a state directory of its own, not started. As `rig.warrend` it is the one that the rig ends."""
        base = self.base / name
        state = base / "state"
        if not state.exists():
            state.mkdir(mode=0o700, parents=True)
        environment = {**self._environment, "WARREN_STATE_DIR": str(state), "WARREN_INSTANCE": name, **settings}
        return Warrend(state, environment)

    async def restart(self) -> None:
        await self.warrend.start()
        await self.ready()

    # --- sessions

    def number(self, session: str) -> str:
        return self._numbers[session]

    async def pair(self, session: str, number: str) -> dict[str, Any]:
        """Create a session and scan its QR; returns the `connected` event."""
        self._numbers[session] = number
        await self.sim.add_phone(number, session)
        after = len(self.got.events)
        outcome = await self.call("create", session)
        assert outcome.ok, outcome
        qr = await self.got.event("qr", session, after=after)
        await self.sim.scan(number, qr["data"]["code"])
        return await self.got.event("connected", session, after=after)

    async def call(self, command: str, session: str, args: dict[str, Any] | None = None, **more: Any) -> Outcome:
        return await self.client.call(command, session, args, **more)

    async def publish_sends(self, session: str, to: str, count: int, *, start: int = 1) -> None:
        """Publish `send` commands `<session>-N` with text `out N`, confirmed, without waiting for outcomes."""
        connection = await aio_pika.connect(self.url)
        async with connection:
            exchange = await (await connection.channel()).get_exchange(f"{self.prefix}.commands", ensure=False)
            for n in range(start, start + count):
                body = {
                    "command": "send",
                    "session": session,
                    "id": f"{session}-{n}",
                    "args": {"to": f"+{to}", "text": f"out {n}"},
                }
                await exchange.publish(aio_pika.Message(orjson.dumps(body), delivery_mode=2), session, mandatory=False)
