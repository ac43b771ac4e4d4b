"""The session actor against a played engine: what it opens again, how soon, and when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from tests.fakes import MemoryBus, MemoryStore

from warren.core.envelope import Origin, Outcome, decode_command, timestamp
from warren.core.frames import EngineEvent
from warren.core.machine import State
from warren.core.names import Topology
from warren.errors import EngineError
from warren.ports import AddEvent, Desired, Published, PutSession, SessionRecord, Write
from warren.services import outcomes as ends
from warren.services import session as module
from warren.services.backup import BackupOptions, Backups
from warren.services.delivery import Delivery, DeliveryOptions
from warren.services.engines import Flood, OnEvent
from warren.services.outcomes import MAX_STARTS, Outcomes, Task
from warren.services.restore import RestoreOptions, Restorer
from warren.services.session import PAIRING_CODES, Deps, Session, SessionOptions

DEADLINE_S = 60.0


class PlayedEngines:
    """`Engines` with the test in WhatsApp's place: every `open` is noted and answered."""

    def __init__(self) -> None:
        self.opened: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.listener: OnEvent
        self.generation = 0
        self.paired = False
        self.asked: list[str] = []
        self.refusals: dict[str, EngineError] = {}
        """By operation; others are answered."""
        self.answered: list[EngineEvent] = []
        self.refused: list[EngineEvent] = []

    async def open(self, session: str, generation: int, on_event: OnEvent, **arguments: Any) -> dict[str, Any]:
        self.listener, self.generation = on_event, generation
        self.opened.put_nowait(arguments)
        return {"paired": self.paired}

    async def request(self, op: str, session: str, generation: int, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        self.asked.append(op)
        if op in self.refusals:
            raise self.refusals[op]
        return {"message_id": "3EB0", "timestamp": "2026-11-20T12:00:00Z"}

    def answer(self, event: EngineEvent, *, ok: bool) -> None:
        (self.answered if ok else self.refused).append(event)

    def forget(self, session: str, generation: int) -> None:
        pass

    def says(self, event: str, **data: Any) -> None:
        self.listener(EngineEvent(event, "acme", self.generation, data))


class LoggedStore(MemoryStore):
    """Remembers which events ever had a row."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.told: list[dict[str, Any]] = []
        """The data of the same."""

    def write(self, *writes: Write) -> asyncio.Future[None]:
        self.log += [w.row.event for w in writes if isinstance(w, AddEvent)]
        self.told += [orjson.loads(w.row.body)["data"] for w in writes if isinstance(w, AddEvent)]
        return super().write(*writes)


class HeldClaim:
    held = True

    async def unbind(self) -> None:
        pass

    async def consume_work(self) -> None:
        pass

    async def pause_work(self) -> None:
        pass


class HereState:
    async def current_epoch(self, session: str) -> int | None:
        return 1

    async def prepare(self, session: str, epoch: int) -> Path:
        return Path(f"/nowhere/{epoch}")

    async def tidy(self, session: str) -> None:
        pass


OPTIONS = SessionOptions(reconnect_base_s=0.02, reconnect_cap_s=0.2, alarm_after=3)


@contextlib.asynccontextmanager
async def running(
    options: SessionOptions | None = None, **record: Any
) -> AsyncIterator[tuple[Session, PlayedEngines, LoggedStore]]:
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
        options=options or OPTIONS,
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
    return await asyncio.wait_for(engines.opened.get(), DEADLINE_S)


async def reached(session: Session, state: State) -> None:
    async with asyncio.timeout(DEADLINE_S):
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
        assert pauses[-1] > 0.06  # 0.02 at first; a busy machine makes pauses longer, never shorter
        assert session.status()["attempt"] == 5
        async with asyncio.timeout(30):
            while not store.log or store.rows:
                await asyncio.sleep(0.005)
        assert store.log.count("reconnect_failed") == 1


async def test_a_device_row_that_is_gone_means_logged_out_and_no_new_qr() -> None:
    async with running(paired=True) as (session, engines, store):
        engines.paired = False
        await true(lambda: store.records["acme"].halted == "logged_out")
        assert session.state is State.LOGGED_OUT
        assert engines.opened.qsize() == 1


async def test_an_unused_session_is_forgotten_and_tells_before() -> None:
    async with running() as (session, engines, store):
        await opening(engines)
        session.forget()
        engines.says("qr", code="2@x", ttl_ms=1000, remaining=0)
        await reached(session, State.PAIRING)  # it is in use, so nothing happened
        engines.says("disconnected", reason="qr_expired", message="")
        await reached(session, State.STOPPED)
        assert session.unused
        session.forget()
        async with asyncio.timeout(30):
            while store.records["acme"].desired is not Desired.REMOVING:
                await asyncio.sleep(0.005)
        assert store.log.count("logout") == 1
        assert session.status()["code"] == "forgotten"


async def test_forgetting_that_cannot_be_recorded_holds_up_nobody() -> None:
    async with running(desired=Desired.STOPPED) as (session, _, store):
        store.failing = 1_000_000
        session.forget()
        await true(lambda: session.status()["code"] == "forgotten")
        await asyncio.wait_for(session.halt(), 30)
        assert not session._removed
        store.failing = 0
        await true(lambda: session._removed)
        assert store.records["acme"].desired is Desired.REMOVING


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


# --- states that need somebody, or time -------------------------------------------------------------------------------


class Command:
    """`ports.Incoming`: a command for `acme`."""

    exchange, routing_key = "warren.control", "acme"
    message_id: str | None = None
    reply_to: str | None = None
    correlation_id: str | None = None

    def __init__(self, name: str, args: dict[str, Any] | None = None, *, redelivered: bool = False) -> None:
        body = {"command": name, "session": "acme", "id": f"{name}-1", "args": args or {}}
        self.body, self.redelivered, self.acks, self.requeues = orjson.dumps(body), redelivered, 0, 0
        self.kind = "commands" if name == "send" else "control"

    async def ack(self) -> None:
        self.acks += 1

    async def requeue(self) -> None:
        self.requeues += 1

    def task(self) -> Task:
        return Task(decode_command(self.body, Origin(self.kind, "acme")), self)


async def true(condition: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def online(session: Session, engines: PlayedEngines) -> None:
    await opening(engines)
    engines.says("connected", jid="1:1@s.whatsapp.net", lid="2:1@lid", push_name="Ana")
    await reached(session, State.ONLINE)


def soon(seconds: float) -> str:
    return timestamp(datetime.now(UTC) + timedelta(seconds=seconds))


async def test_a_ban_is_waited_out_also_over_a_restart() -> None:
    until = soon(0.5)
    async with running(paired=True) as (session, engines, store):
        await opening(engines)
        engines.says("disconnected", reason="temporary_ban", message="spam", until=until, code=402)
        await reached(session, State.BLOCKED)
        await true(lambda: store.records["acme"].halted == "blocked")
        kept = store.records["acme"]
        told = session.status()
        assert (told["code"], told["until"]) == ("temporary_ban", until)
        assert "spam" in told["message"]
        assert told["hint"]
    async with running(**{f: getattr(kept, f) for f in ("paired", "halted", "until")}) as (session, engines, store):
        assert (session.state, session.status()["until"], session.status()["code"]) == (State.BLOCKED, until, "temporary_ban")
        create = Command("create")
        session.command(create.task())
        await true(lambda: create.acks == 1)
        assert store.told[-1]["result"]["state"] == "blocked"
        assert engines.opened.empty(), "a service that publishes `create` at its start makes no ban worse"
        await online(session, engines)
        assert datetime.now(UTC) >= datetime.fromisoformat(until)
        await true(lambda: store.records["acme"].halted == "" == store.records["acme"].until)


async def test_a_ban_can_be_tried_at_once_by_somebody_who_means_it() -> None:
    async with running(paired=True, halted="blocked", until=soon(3_600)) as (session, engines, _):
        session.command(Command("disconnect").task())
        await reached(session, State.STOPPED)
        session.command(Command("create").task())
        await opening(engines)


async def test_a_ban_without_an_end_waits_for_create() -> None:
    async with running(paired=True, halted="blocked") as (session, engines, _):
        assert session.state is State.BLOCKED
        session.command(Command("create").task())
        await opening(engines)


async def test_a_time_lock_is_a_state_in_which_messages_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        until = soon(0.6)
        engines.refusals["send"] = EngineError("?", engine_code="restricted", server_code=463)
        engines.says("timelock", active=True, until=until, type="BIZ")
        await reached(session, State.TIME_LOCKED)
        assert (session.status()["code"], session.status()["until"]) == ("time_lock", until)
        engines.listener(EngineEvent("message", "acme", engines.generation, MESSAGE, 7))
        await true(lambda: engines.answered)
        send = Command("send", {"to": "+15551234567", "text": "x"})
        session.offer(send.task())
        await true(lambda: send.acks == 1)
        assert 0 < store.told[-1]["error"]["retry_after"] <= 0.6
        assert store.records["acme"].until == until
        await reached(session, State.ONLINE)
        assert engines.opened.empty(), "the connection stayed"
        assert store.records["acme"].until == ""
        await true(lambda: store.log.count("connected") == 2)
        assert [d["code"] for d, e in zip(store.told, store.log, strict=True) if e == "error"] == ["time_lock"]


MESSAGE = {
    "chat": "15550002@s.whatsapp.net", "sender": "15550002:1@s.whatsapp.net", "from_me": False, "message_id": "A1",
    "kind": "text", "text": "hi", "timestamp": "2026-11-20T12:00:00Z",
}  # fmt: skip


async def test_a_time_lock_lasts_over_connections_and_restarts_until_whatsapp_lifts_it() -> None:
    until = soon(3_600)
    async with running(paired=True, until=until) as (session, engines, store):
        await opening(engines)
        engines.says("connected", jid="1:1@s.whatsapp.net")
        await reached(session, State.TIME_LOCKED)
        engines.says("disconnected", reason="network")
        await opening(engines)
        engines.says("connected", jid="1:1@s.whatsapp.net")
        await reached(session, State.TIME_LOCKED)
        engines.says("timelock", active=False)
        await reached(session, State.ONLINE)
        await true(lambda: store.records["acme"].until == "")
        session.command(Command("disconnect").task())
        await reached(session, State.STOPPED)


async def test_an_outdated_client_is_tried_once_soon_and_then_slowly() -> None:
    async with running(paired=True) as (session, engines, store):
        await opening(engines)
        engines.says("disconnected", reason="client_outdated", code=405)
        await opening(engines)  # 0.02 s later: the engine has asked for today's version
        engines.says("disconnected", reason="client_outdated", code=405)
        await reached(session, State.OUTDATED)
        told = session.status()
        assert told["code"] == "client_outdated"
        assert "Upgrade" in told["hint"]
        left = datetime.fromisoformat(told["until"]) - datetime.now(UTC)
        assert timedelta(seconds=25) < left <= timedelta(seconds=60)
        await true(lambda: not store.rows)
        last = [d for d, e in zip(store.told, store.log, strict=True) if e == "disconnected"][-1]
        assert (last["state"], last["attempt"]) == ("outdated", 2)
        assert last["retry_in_s"] > 25
        assert last["until"] == told["until"]


async def test_replaced_says_when_it_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPLACED_RETRY_S", 0.05)
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        engines.says("disconnected", reason="replaced")
        await reached(session, State.REPLACED)
        assert session.status()["until"] is not None
        await online(session, engines)
        engines.says("disconnected", reason="replaced")
        await reached(session, State.REPLACED)
        await true(lambda: store.records["acme"].halted == "replaced")
        assert session.status()["until"] is None


# --- zombies, rest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["timeout", "no_answer"])
async def test_one_unanswered_keepalive_and_one_unanswered_question_end_a_zombie(code: str) -> None:
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        engines.refusals["probe"] = EngineError("?", engine_code=code)
        engines.says("keepalive", failures=1)
        await opening(engines)
        assert store.log.count("health_check_failed") == 1
        assert engines.asked.count("probe") == 1


async def test_a_connection_that_answers_is_no_zombie_until_it_is_silent_twice() -> None:
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        engines.says("keepalive", failures=1)
        await true(lambda: "probe" in engines.asked)
        engines.says("keepalive", failures=0)
        await asyncio.sleep(0.05)
        assert session.state is State.ONLINE
        engines.says("keepalive", failures=2)
        await opening(engines)
        assert store.log.count("health_check_failed") == 1


async def test_a_session_without_messages_rests_when_configured() -> None:
    async with running(replace(OPTIONS, idle_timeout_s=0.3), paired=True) as (session, engines, store):
        await online(session, engines)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for n in range(4):
            await asyncio.sleep(0.1)
            engines.listener(EngineEvent("message", "acme", engines.generation, {**MESSAGE, "message_id": str(n)}, n))
        await reached(session, State.STOPPED)
        assert loop.time() - began > 0.6
        assert session.status()["code"] == "idle_timeout"
        assert store.records["acme"].desired is Desired.STOPPED
        assert engines.asked == ["close"]


# --- containment ------------------------------------------------------------------------------------------------------


async def test_a_bug_becomes_a_state_and_the_session_comes_back() -> None:
    async with running(paired=True) as (session, engines, _):
        await online(session, engines)
        engines.says("timelock", active=True, until="no time at all")
        await reached(session, State.BACKING_OFF)
        assert session.status()["code"] == "internal"
        await online(session, engines)


async def test_a_bug_in_a_wait_leaves_no_session_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(paired=True) as (session, engines, _):
        await opening(engines)
        broken = iter([True])

        def random01() -> float:
            if next(broken, False):
                raise ZeroDivisionError
            return 0.5

        monkeypatch.setattr(session, "_deps", replace(session._deps, random01=random01))
        engines.says("disconnected", reason="network")
        await opening(engines)


async def test_a_bug_while_it_opens_or_closes_leaves_no_session_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(paired=True) as (session, engines, _):
        await online(session, engines)
        whole = engines.open

        async def broken(*_: Any, **__: Any) -> dict[str, Any]:
            raise ZeroDivisionError

        monkeypatch.setattr(engines, "open", broken)
        monkeypatch.setitem(cast(Any, engines.refusals), "close", ZeroDivisionError())
        engines.says("disconnected", reason="network")
        await true(lambda: session.status()["code"] == "internal")
        monkeypatch.setattr(engines, "open", whole)
        await online(session, engines)
        session.command(Command("disconnect").task())
        await reached(session, State.STOPPED)


async def test_a_session_that_goes_answers_the_backup_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queues are deleted only when every command that was taken from them is answered."""
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        monkeypatch.setattr(session._deps.backups, "now", lambda _: asyncio.Event().wait())
        backup, logout = Command("backup"), Command("logout")
        session.command(backup.task())
        await true(lambda: session._backing_up)
        session.command(logout.task())
        await true(lambda: logout.acks == backup.acks == 1)
        assert [told["id"] for told in store.told if "ok" in told] == ["backup-1", "logout-1"]


async def test_commands_do_not_wait_for_ever_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would fill the prefetch, and with it the way in for sessions that have nothing to do with it."""
    back = asyncio.Event()

    async def check(_: Any, record: SessionRecord, tell: Any) -> None:
        if not back.is_set():
            tell("storage_unavailable", "away")
            await back.wait()

    monkeypatch.setattr(Backups, "on", property(lambda _: True))
    monkeypatch.setattr(Restorer, "check", check)
    monkeypatch.setattr(module, "LOOK_BACK_S", 0.05)
    async with running(desired=Desired.STOPPED) as (session, engines, store):
        await reached(session, State.RESTORING)
        create = Command("create")
        session.command(create.task())
        await true(lambda: create.acks == 1)
        assert store.told[-1]["error"]["code"] == "not_now"
        back.set()
        await reached(session, State.STOPPED)
        session.command(Command("create").task())
        await opening(engines)


@pytest.mark.parametrize("reason", ["state_unreadable", "qr_expired"])
async def test_an_end_that_the_table_does_not_know_is_a_lost_connection(reason: str) -> None:
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        engines.says("disconnected", reason=reason)
        await opening(engines)
        lost = next(told for told in store.told if told.get("state") == "backing_off")
        assert (lost["previous"], lost["code"]) == ("online", reason)


async def test_a_message_that_meets_a_bug_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(paired=True) as (session, engines, _):
        await online(session, engines)
        event = EngineEvent("message", "acme", engines.generation, MESSAGE, 1)
        with monkeypatch.context() as broken:
            broken.setattr(session._deps.delivery, "submit", lambda *_, **__: 1 / 0)
            engines.listener(event)
        assert (engines.refused, engines.answered) == ([event], [])
        engines.listener(event)
        await true(lambda: engines.answered == [event])
        assert session._unanswered[1] == 0


async def test_an_engine_that_floods_is_told_apart_and_its_end_is_heard() -> None:
    async with running(paired=True) as (session, engines, _):
        await online(session, engines)
        for _ in range(module.MAILBOX):
            engines.says("qr", code="2@x", ttl_ms=1, remaining=1)
        with pytest.raises(Flood):
            engines.says("qr", code="2@x", ttl_ms=1, remaining=1)
        engines.says("disconnected", reason="engine_lost")
        await opening(engines)


async def test_an_engine_that_waits_for_no_answers_floods() -> None:
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        store.failing = 1_000_000
        messages = [EngineEvent("message", "acme", engines.generation, {**MESSAGE, "message_id": str(n)}, n) for n in range(101)]
        for message in messages[: module.UNANSWERED]:
            engines.listener(message)
        with pytest.raises(Flood):
            engines.listener(messages[module.UNANSWERED])
        store.failing = 0


async def test_a_create_that_kills_the_daemon_goes_to_the_dead_queue() -> None:
    async with running(paired=True, desired=Desired.STOPPED) as (session, engines, store):
        store.started["acme", "create-1"] = MAX_STARTS
        create = Command("create", redelivered=True)
        session.command(create.task())
        await true(lambda: create.acks == 1)
        assert store.told[-1]["error"]["code"] == "gave_up"
        assert engines.opened.empty()


async def test_what_the_dead_queue_does_not_take_is_not_tried_in_a_hot_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "GIVE_BACK_S", 0.3)
    async with running(paired=True, desired=Desired.STOPPED) as (session, _, store):
        store.started["acme", "create-1"] = MAX_STARTS
        cast(Any, session._deps.outcomes)._bus.answers = lambda _: Published.REFUSED
        create = Command("create", redelivered=True)
        began = asyncio.get_running_loop().time()
        session.command(create.task())
        await true(lambda: create.requeues == 1)
        assert asyncio.get_running_loop().time() - began > 0.2
        assert create.acks == 0


async def test_an_alarm_comes_once_in_a_row_of_failures() -> None:
    """Also when it gets online for a moment in between; after a stable time, the next row has its own."""
    async with running(paired=True) as (session, engines, store):
        for _ in range(6):
            await online(session, engines)
            engines.says("disconnected", reason="network")
        await true(lambda: session.status()["attempt"] == 6)
        assert store.log.count("reconnect_failed") == 1
        session._deps.options = replace(OPTIONS, stable_s=0.01)
        await online(session, engines)
        await true(lambda: session.status()["attempt"] == 0)
        for _ in range(OPTIONS.alarm_after):
            engines.says("disconnected", reason="network")
            await opening(engines)
        await true(lambda: store.log.count("reconnect_failed") == 2)


async def test_settings_are_kept_and_tell_what_waits_for_a_connection() -> None:
    async with running(paired=True, settings={"device_name": "Shop", "mark_online": True}) as (session, engines, store):
        await online(session, engines)
        asked = {"proxy": "socks5://u:geheim@127.0.0.1:1", "messages_per_minute": 7, "reset": ["mark_online"]}
        session.command(Command("settings", asked).task())
        await true(lambda: any("result" in told for told in store.told))
        result = next(told for told in store.told if "result" in told)["result"]
        assert result["settings"] == {
            "device_name": "Shop",
            "mark_online": None,
            "proxy": "socks5://u:***@127.0.0.1:1",
            "messages_per_minute": 7,
        }
        assert result["waiting"] == ["mark_online", "proxy"]
        kept = {"device_name": "Shop", "proxy": "socks5://u:geheim@127.0.0.1:1", "messages_per_minute": 7}
        assert store.records["acme"].settings == kept
        assert session.state is State.ONLINE


@pytest.mark.parametrize("state", ["online", "backing_off", "logged_out"])
async def test_delete_closes_and_removes_without_whatsapp(state: str) -> None:
    halted = "logged_out" if state == "logged_out" else ""
    async with running(paired=not halted, halted=halted) as (session, engines, store):
        if state == "backing_off":
            await opening(engines)
            engines.says("disconnected", reason="network")
            await reached(session, State.BACKING_OFF)
        elif state == "online":
            await online(session, engines)
        session.command(Command("delete").task())
        await true(lambda: store.records["acme"].desired is Desired.REMOVING)
        await true(lambda: any(told.get("command") == "delete" and told["ok"] for told in store.told))
        assert "logout" not in engines.asked
        assert "close" in engines.asked
        assert [told["code"] for told in store.told if told.get("code") == "deleted"] == ["deleted"]


@pytest.mark.parametrize("name", ["delete", "logout"])
@pytest.mark.parametrize("known", [True, False])
async def test_what_somebody_else_owns_is_not_ended(name: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_ours(*_: object) -> bool:
        return False

    if not known:  # it was connected here all the time, or disconnected long ago
        monkeypatch.setattr(Backups, "newest_is_ours", not_ours)
    async with running(paired=True, halted="superseded" if known else "") as (session, engines, store):
        if not known:
            await online(session, engines)
        session.command(Command(name).task())
        await true(lambda: any("error" in told for told in store.told))
        assert "logout" not in engines.asked
        assert next(told for told in store.told if "error" in told)["error"]["code"] == "not_now"
        assert store.records["acme"].desired is Desired.RUNNING


async def test_a_logout_that_cannot_be_recorded_holds_up_nobody() -> None:
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        store.failing = 1_000_000
        logout, other = Command("logout"), Command("disconnect")
        session.command(logout.task())
        session.command(other.task())
        await true(lambda: "logout" in engines.asked)
        await asyncio.wait_for(session.halt(), 30)
        assert (logout.acks, other.acks) == (0, 0)
        store.failing = 0
        await true(lambda: (logout.acks, other.acks) == (1, 1))
        assert [d["error"]["code"] for d in store.told if "error" in d] == ["session_not_found"]


async def test_status_is_answered_while_nothing_can_be_stored() -> None:
    async with running(paired=True) as (session, engines, store):
        await online(session, engines)
        store.failing = 1_000_000
        status = Command("status")
        status.reply_to = "replies"
        outcomes = session._deps.outcomes
        outcomes.finish(status.task(), Outcome("status", "status-1", session.status()), journal=False)
        bus = cast(Any, outcomes)._bus
        await true(lambda: bus.replies)
        assert status.acks == 0
        store.failing = 0
