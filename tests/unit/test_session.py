"""The session actor against a played engine: what it opens again, how soon, and when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from tests.fakes import MemoryBus, MemoryStore

from warren.core.frames import EngineEvent
from warren.core.machine import State
from warren.core.names import Topology
from warren.ports import AddEvent, Desired, PutSession, SessionRecord, Write
from warren.services.backup import BackupOptions, Backups
from warren.services.delivery import Delivery, DeliveryOptions
from warren.services.engines import OnEvent
from warren.services.outcomes import Outcomes
from warren.services.restore import RestoreOptions, Restorer
from warren.services.session import PAIRING_CODES, Deps, Session, SessionOptions


class PlayedEngines:
    """`Engines` with the test in WhatsApp's place: every `open` is noted and answered."""

    def __init__(self) -> None:
        self.opened: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.listener: OnEvent
        self.generation = 0
        self.paired = False

    async def open(self, session: str, generation: int, on_event: OnEvent, **arguments: Any) -> dict[str, Any]:
        self.listener, self.generation = on_event, generation
        self.opened.put_nowait(arguments)
        return {"paired": self.paired}

    async def request(self, op: str, session: str, generation: int, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        return {}

    def forget(self, session: str, generation: int) -> None:
        pass

    def says(self, event: str, **data: Any) -> None:
        self.listener(EngineEvent(event, "acme", self.generation, data))


class LoggedStore(MemoryStore):
    """Remembers which events ever had a row."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def write(self, *writes: Write) -> asyncio.Future[None]:
        self.log += [w.row.event for w in writes if isinstance(w, AddEvent)]
        return super().write(*writes)


class HeldClaim:
    held = True

    async def consume_work(self) -> None:
        pass

    async def pause_work(self) -> None:
        pass


class HereState:
    async def current_epoch(self, session: str) -> int | None:
        return 1

    async def prepare(self, session: str, epoch: int) -> Path:
        return Path(f"/nowhere/{epoch}")


@contextlib.asynccontextmanager
async def running(**record: Any) -> AsyncIterator[tuple[Session, PlayedEngines, LoggedStore]]:
    engines, store, bus = PlayedEngines(), LoggedStore(), MemoryBus()
    now = lambda: datetime.now(UTC)  # noqa: E731
    delivery = Delivery(
        cast(Any, bus), store, Topology("warren"), DeliveryOptions("t"), now=now, random01=lambda: 0.5, disk_ok=lambda: True
    )
    await delivery.start()
    kept = SessionRecord(**{"session": "acme", "epoch": 1, "desired": Desired.RUNNING, **record})
    engines.paired = kept.paired
    await store.write(PutSession(kept))
    backups = Backups(
        None,
        store,
        cast(Any, HereState()),
        cast(Any, engines),
        delivery=delivery,
        options=BackupOptions("t", "t"),
        now=now,
        random01=lambda: 0.5,
    )
    restorer = Restorer(
        None, store, cast(Any, HereState()), backups, options=RestoreOptions("t", "t"), now=now, random01=lambda: 0.5
    )
    deps = Deps(
        backups=backups,
        restorer=restorer,
        store=store,
        state_dir=cast(Any, HereState()),
        engines=cast(Any, engines),
        delivery=delivery,
        outcomes=Outcomes(cast(Any, bus), store, delivery, Topology("warren")),
        connecting=asyncio.Semaphore(1),
        options=SessionOptions(reconnect_base_s=0.02, reconnect_cap_s=0.2, alarm_after=3),
        now=now,
        random01=lambda: 0.99,
        on_removed=lambda _: None,
    )
    session = Session(kept, cast(Any, HeldClaim()), deps)
    actor = asyncio.create_task(session.run())
    session.resume()
    try:
        yield session, engines, store
    finally:
        actor.cancel()
        await asyncio.gather(actor, return_exceptions=True)
        await delivery.stop()


async def opening(engines: PlayedEngines) -> dict[str, Any]:
    return await asyncio.wait_for(engines.opened.get(), 2)


async def reached(session: Session, state: State) -> None:
    async with asyncio.timeout(2):
        while session.state is not state:
            await asyncio.sleep(0.005)


async def test_pairing_codes_are_renewed_and_then_it_stops() -> None:
    async with running(settings={"phone_number": "+15551234567"}) as (session, engines, store):
        for n in range(PAIRING_CODES):
            assert (await opening(engines))["phone_number"] == "15551234567"
            engines.says("pairing_code", code=f"ABCD-000{n}", ttl_ms=1000)
            await reached(session, State.PAIRING)
            assert session.status()["pairing_code"]["code"] == f"ABCD-000{n}"
            engines.says("disconnected", reason="qr_expired", message="")
        await reached(session, State.STOPPED)
        assert session.status()["code"] == "qr_expired"
        assert store.records["acme"].desired is Desired.STOPPED, "new codes only when somebody asks for them"
        assert engines.opened.empty()


async def test_only_pairing_earns_a_new_connection_at_once() -> None:
    async with running() as (session, engines, _):
        await opening(engines)
        engines.says("qr", code="2@x", ttl_ms=1000, remaining=5)
        engines.says("paired", jid="1:1@s.whatsapp.net")
        engines.paired = True
        engines.says("disconnected", reason="restart_required")
        assert (await opening(engines))["create"] is False
        assert session.status()["attempt"] == 0
        engines.says("disconnected", reason="restart_required")
        await reached(session, State.BACKING_OFF)
        assert session.status()["code"] == "server"


async def test_attempts_that_get_nowhere_back_off_and_raise_one_alarm() -> None:
    async with running(paired=True) as (session, engines, store):
        loop = asyncio.get_running_loop()
        times = []
        for _ in range(5):
            await opening(engines)
            times.append(loop.time())
            engines.says("disconnected", reason="network")
        await reached(session, State.BACKING_OFF)
        pauses = [b - a for a, b in itertools.pairwise(times)]
        assert pauses[-1] > pauses[0]
        assert session.status()["attempt"] == 5
        async with asyncio.timeout(2):
            while not store.log or store.rows:
                await asyncio.sleep(0.005)
        assert store.log.count("reconnect_failed") == 1


async def test_a_device_row_that_is_gone_means_logged_out_and_no_new_qr() -> None:
    async with running(paired=True) as (session, engines, store):
        engines.paired = False
        await reached(session, State.LOGGED_OUT)
        assert store.records["acme"].halted == "logged_out"
        assert engines.opened.qsize() == 1


async def test_words_of_an_old_generation_change_nothing() -> None:
    async with running(paired=True) as (session, engines, _):
        await opening(engines)
        engines.says("connected", jid="1:1@s.whatsapp.net")
        await reached(session, State.ONLINE)
        engines.listener(EngineEvent("logged_out", "acme", engines.generation - 1, {"code": 401}))
        engines.says("disconnected", reason="network")
        await reached(session, State.BACKING_OFF)
        engines.says("logged_out", code=401)  # the same generation has ended already
        await opening(engines)
        assert session.state is State.CONNECTING


async def test_a_paired_session_opens_the_directory_that_current_names_whatever_its_epoch() -> None:
    async with running(epoch=4, paired=True) as (_, engines, _):
        assert (await opening(engines))["dir"] == "/nowhere/1"
    async with running(epoch=4) as (_, engines, _):
        assert (await opening(engines))["dir"] == "/nowhere/4"
