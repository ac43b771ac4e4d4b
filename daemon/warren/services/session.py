"""One session: an actor that runs the state machine, and a lane that sends while it is ONLINE.

The actor's mailbox takes commands, what the engine says about the connection, and its own timers. Opening and closing run
beside it and report back, so a logout is never stuck behind a slow connection; only `logout` itself waits for WhatsApp.
Messages from WhatsApp do not pass through the mailbox: they go to delivery in the order in which the engine gives them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import segno
from loguru import logger

from warren.core import events
from warren.core.backoff import delay
from warren.core.backup_names import Place
from warren.core.envelope import CreateArgs, KeptSettings, Outcome, RestoreArgs, SettingsArgs, timestamp
from warren.core.frames import EngineEvent
from warren.core.limiter import Pace, Window
from warren.core.machine import (
    CAUSES,
    CONNECTED,
    KEPT_CAUSES,
    LIVE,
    Cause,
    IllegalTrigger,
    State,
    Trigger,
    cause_of,
    halted_state,
    step,
)
from warren.core.metrics import Metrics
from warren.core.names import event_id
from warren.core.redact import hide_password
from warren.errors import CommandError, ConfigError, EngineError, SealError, StateError, StorageError
from warren.ports import Claim, Desired, Incoming, PutBackup, PutSession, SessionRecord, StateDir, Store
from warren.services.backup import Backups, no_storage
from warren.services.delivery import Delivery
from warren.services.engines import Engines, Flood
from warren.services.outcomes import Exhausted, Outcomes, Task
from warren.services.restore import Restored, Restorer, Tell
from warren.services.sending import ACK_GRACE_S, SEND_TIMEOUT_S, Pacer, Pacing, RequestSend, SendLane, expired_error

MAILBOX = 1_000
"""Far above what a healthy session can have waiting: few life-cycle events, and commands are bounded by the prefetch. Only a bug
of the engine's gets there, and ends the engine."""
UNANSWERED = 100
"""Events of one connection that wait for our answer; the protocol has one at a time."""
CLOSE_TIMEOUT_S = 12.0
LOGOUT_TIMEOUT_S = 25.0
"""Above the engine's own 20 s."""
SEND_GRACE_S = 5.0
"""How long leaving ONLINE waits for the send under way."""
LOOK_BACK_S = 60.0
"""How long commands wait for what the store knows of their session; then they are refused, and may be published again."""
OWNER_LOOK_S = 5.0
"""For the look, before a session is ended, whether another warren lives on its backups."""
SETTLE_TIMEOUT_S = 90.0
"""Longest time from `open` to the first word about it."""
REPLACED_RETRY_S = 60.0
PAIRING_CODES = 3
"""Pairing codes asked for at one `create`, each for as long as WhatsApp takes it (about 160 s)."""
KEEPALIVE_FAILURES = 2
"""Unanswered keepalives in a row, or reports of silence, after which the connection is a zombie. At the first one it is asked
once more (`probe`), and that is enough if it does not answer: within 90 s of its last sign of life it is found out."""
PROBE_S = 10.0
TICK_S = 0.01
"""So much later than a moment, it is certainly over, whatever the clock's resolution."""
OUTDATED_BASE_S = 60.0
OUTDATED_CAP_S = 3_600.0
"""Between attempts with a version that WhatsApp refuses. The first one comes as soon as after any other loss, because the engine
asks for the current version then."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    device_name: str = "warren"
    reconnect_base_s: float = 5.0
    reconnect_cap_s: float = 300.0
    alarm_after: int = 10
    stable_s: float = 60.0
    pacing: Pacing = field(default_factory=Pacing)
    idle_timeout_s: float = 0.0
    """0: never."""


@dataclass(slots=True)
class Deps:
    """What every session shares. Only `options` changes, when the configuration is read again."""

    store: Store
    state_dir: StateDir
    engines: Engines
    delivery: Delivery
    outcomes: Outcomes
    backups: Backups
    restorer: Restorer
    connecting: asyncio.Semaphore
    """Bounds how many sessions connect at the same time."""
    options: SessionOptions
    now: Callable[[], datetime]
    random01: Callable[[], float]
    on_removed: Callable[[Session], None]
    metrics: Metrics = field(default_factory=Metrics)
    changed: Callable[[str], None] = lambda session: None
    """Hears of a session whose status is not what it was."""


@dataclass(frozen=True, slots=True)
class _Happened:
    """A trigger for the machine, from generation `generation` (None: not from an engine)."""

    trigger: Trigger
    generation: int | None = None
    cause: Cause | None = None
    data: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Due:
    """A timer is up. `serial` tells it from one that was cancelled after it had fired."""

    serial: int


@dataclass(frozen=True, slots=True)
class _Halt:
    """The daemon stops."""


@dataclass(frozen=True, slots=True)
class _Forget:
    """Nobody has used the session for too long."""


@dataclass(frozen=True, slots=True)
class _Idle:
    """Nothing came or went for so long that the session may rest."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The registry knows that the session is to be removed."""


_Item = Task | _Happened | _Due | _Halt | _Forget | _Idle | _Recorded

_ENDS = frozenset(
    {
        Trigger.RESTART,
        Trigger.RENEW,
        Trigger.LOST,
        Trigger.REPLACED,
        Trigger.BANNED,
        Trigger.OUTDATED,
        Trigger.UNPAIRED,
        Trigger.LOGGED_OUT,
        Trigger.UNREADABLE,
        Trigger.CLOSED,
    }
)
"""After one of these nothing more of its generation counts."""


class Session:
    """See the module's text. Made by the fleet; `run` is its life and ends with `halt` or `logout`."""

    def __init__(self, record: SessionRecord, claim: Claim, deps: Deps) -> None:
        self.id = record.session
        self.state = halted_state(record.halted) if record.halted else State.STOPPED
        self._record, self._claim, self._deps = record, claim, deps
        self._mailbox: asyncio.Queue[_Item] = asyncio.Queue()
        self._since = deps.now()
        self._cause: Cause | None = cause_of(KEPT_CAUSES.get(record.halted, record.halted)) if record.halted else None
        kept = datetime.fromisoformat(record.until) if record.until else None
        self._until: datetime | None = kept if record.halted else None
        self._locked = kept is not None and not record.halted
        self._locked_until: datetime | None = kept if self._locked else None
        self._qr: dict[str, Any] | None = None
        self._pairing_code: dict[str, Any] | None = None
        self._codes_asked = 0
        self._just_paired = False
        self._last_message_at: str | None = None
        self._generation = 0
        self._over = 0
        self._attempt = 0
        self._outdated = 0
        self._replaced_before = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._active_at = 0.0
        self._unanswered: tuple[int, int] = (0, 0)
        """(generation, events of it that wait for our answer)."""
        self._probing: asyncio.Task[None] | None = None
        self._found_dead = 0
        self._stable_at = 0.0
        self._in_step = False
        self._timer_serial = 0
        self._heard = asyncio.Event()
        self._beside: asyncio.Task[None] | None = None
        self._lane: SendLane | None = None
        self._pacer: Pacer | None = None
        self._stopping: list[Task] = []
        self._halted: asyncio.Future[None] | None = None
        self._removed = False
        self._looking: asyncio.Task[None] | None = None
        self._order: Task | None = None
        self._rescued = False
        self._backing_up: dict[asyncio.Task[None], Task] = {}
        self._log = logger.bind(session=self.id)
        deps.delivery.begin(record)
        deps.backups.begin(self)

    # --- in, from anywhere in the event loop

    def resume(self) -> None:
        """Start it as its registry row wants, after a start of the daemon. A ban is waited out."""
        if self._record.desired is not Desired.RUNNING or self._halted is not None:
            return
        if not self._record.halted:
            self._post(_Happened(Trigger.START))
        elif self.state is State.BLOCKED and self._until is not None:
            self._set_timer(self._left_s(self._until))

    def command(self, task: Task) -> None:
        """Everything but `status` and `send`."""
        self._post(task)

    def offer(self, task: Task) -> None:
        """Take a `send`. One that comes when the session is not ONLINE stays unsettled: its channel is about to be closed."""
        if self._lane is not None:
            self._active_at = asyncio.get_running_loop().time()
            self._lane.offer(task)

    def halt(self) -> asyncio.Future[None]:
        """Close the connection without changing what the registry wants (shutdown). Done when it is closed."""
        if self._halted is None:
            self._halted = asyncio.get_running_loop().create_future()
            if self._looking is not None:
                self._looking.cancel()
            self._post(_Halt())
        return self._halted

    async def finish_sending(self) -> None:
        """Begin no further send; return when the one under way has ended. What was not begun is back in its queue then."""
        await self._stop_sending(SEND_TIMEOUT_S)

    def on_engine(self, event: EngineEvent) -> None:
        """Called by the reader of the engine's pipe, in order. Hands over; never waits. Raises Flood when it is far too much; the
        end of a connection is taken even then.
        """
        if event.event in events.ANSWERED:
            self._inbound(event)
        elif (happened := self._happened(event)) is not None:
            if self._mailbox.qsize() >= MAILBOX and happened.trigger not in _ENDS:
                raise Flood(f"The engine floods session {self.id} with {event.event} events.")
            self._post(happened)

    def superseded(self) -> None:
        """The store shows that somebody else owns the session: stand down until somebody publishes `create`."""
        self._post(_Happened(Trigger.SUPERSEDED, None, CAUSES["superseded"]))

    @property
    def unused(self) -> bool:
        """Whether nobody has it: unlinked, or disconnected by command."""
        stopped = self._record.desired is Desired.STOPPED and self.state is State.STOPPED
        return stopped or self.state is State.LOGGED_OUT

    def forget(self) -> None:
        """Remove it with everything it has, if it is still unused then."""
        self._post(_Forget())

    @property
    def record(self) -> SessionRecord:
        return self._record

    def abandoned(self) -> list[Incoming]:
        """The commands that a removed session has taken and will not execute."""
        left = [self._mailbox.get_nowait() for _ in range(self._mailbox.qsize())]
        return [item.incoming for item in left if isinstance(item, Task)]

    def status(self) -> dict[str, Any]:
        """What is known right now; see docs/message-api.md."""
        cause, account = self._cause, self._record.account
        return {
            "session": self.id,
            "state": self.state.value,
            "since": timestamp(self._since),
            "code": cause.code if cause else None,
            "message": cause.message if cause else None,
            "hint": cause.hint if cause else None,
            "until": timestamp(self._until) if self._until else None,
            "jid": account.get("jid"),
            "lid": account.get("lid"),
            "push_name": account.get("push_name"),
            "epoch": self._record.epoch,
            "desired": self._record.desired.value,
            "attempt": self._attempt,
            "last_message_at": self._last_message_at,
            "outbox": self._deps.delivery.backlog(self.id),
            "backup": self._deps.backups.status(self.id),
            "qr": self._qr if self.state is State.PAIRING else None,
            "pairing_code": self._pairing_code if self.state is State.PAIRING else None,
        }

    # --- the actor

    async def run(self) -> None:
        """The actor. A bug in handling one thing becomes a state and a log line, never the end of other sessions."""
        try:
            await self._look_back()
            while not self._removed:
                item = await self._mailbox.get()
                self._in_step = False
                try:
                    await self._handle(item)
                except Exception:
                    self._log.bind(action="session_bug").exception("The session met a bug.")
                    await self._contain(item)
        finally:
            self._cancel_timer()
            self._cancel_idle()
            for task in (self._beside, self._looking, self._probing, *self._backing_up):
                if task is not None:
                    task.cancel()

    def _post(self, item: _Item) -> None:
        """Never drops: what RabbitMQ sends is bounded by the prefetch, and what the engine says by `on_engine`."""
        self._mailbox.put_nowait(item)

    async def _handle(self, item: _Item) -> None:
        match item:
            case Task():
                # Stopping: what is not begun stays unsettled, and RabbitMQ keeps it for the next start.
                if self._halted is None:
                    await self._command(item)
            case _Due(serial) if serial == self._timer_serial:
                await self._timer_up()
            case _Idle():
                await self._rest()
            case _Recorded():
                self._remove()
            case _Halt():
                await self._halt()
            case _Forget():
                await self._forget()
            case _Happened(trigger, None, cause, data):
                await self._apply(trigger, cause, data or {})
            case _Happened(trigger, generation, cause, data) if generation == self._generation != self._over:
                if trigger in _ENDS:
                    self._over = generation
                await self._apply(trigger, cause, data or {})

    async def _contain(self, item: object) -> None:
        """After a bug: the session is in a state that everybody can see, and that it comes out of by itself."""
        if isinstance(item, Task):
            self._deps.outcomes.fail(
                item, CommandError("internal", "The command met a bug.", hint="See the log of the daemon.", final=False)
            )
            half_way = self._in_step or (self.state in CONNECTED and self._lane is None)
            if not half_way:
                return
        if self.state is State.STOPPING:
            self._close_beside(then=Trigger.CLOSED)
        elif self.state in LIVE:
            self._over = self._generation
            self._close_beside()
            try:
                await self._apply(Trigger.LOST, CAUSES["internal"], {})
            except Exception:
                self._log.bind(action="session_bug").exception("The session met a bug while it recovered from one.")
                self._enter(State.BACKING_OFF, CAUSES["internal"])
        if self.state in {State.BACKING_OFF, State.OUTDATED} and self._timer is None:
            self._set_timer(self._deps.options.reconnect_cap_s)

    # --- commands

    async def _command(self, task: Task) -> None:
        try:
            if await self._deps.outcomes.replayed(task):
                return
            if task.command.expired(self._deps.now()):
                raise expired_error()
            self._refuse_if_removed()
            await self._deps.outcomes.begin(task)
            match task.command.name:
                case "create":
                    await self._create(task)
                case "disconnect":
                    await self._disconnect(task)
                case "logout":
                    await self._logout(task)
                case "delete":
                    await self._delete(task)
                case "settings":
                    await self._settings(task)
                case "backup":
                    self._back_up(task)
                case "restore":
                    await self._restore(task)
        except Exhausted as e:
            if await self._deps.outcomes.to_dead(task.incoming, e):
                self._deps.outcomes.fail(task, e)
            else:
                self._deps.outcomes.give_back(task)
        except CommandError as e:
            self._deps.outcomes.fail(task, e)
        except StateError as e:
            self._deps.outcomes.fail(task, CommandError("internal", e.message, hint=e.hint, final=False))

    def _refuse_if_removed(self) -> None:
        if self._record.desired is Desired.REMOVING:
            raise CommandError("session_not_found", "The session is being removed.", hint="Publish `create` again.", final=False)

    async def _create(self, task: Task) -> None:
        args = task.command.args
        assert isinstance(args, CreateArgs)
        settings = {**self._record.settings, **args.settings()}
        if not self._record.paired:
            settings["phone_number"] = args.phone_number
            self._codes_asked = 0
        record = replace(self._record, desired=Desired.RUNNING, settings=settings)
        if self.state is State.LOGGED_OUT:
            # A new phone, a new life: its own epoch, so that nothing of the old one can be mistaken for it.
            record = replace(record, epoch=record.epoch + 1, sequence=0, account={})
        banned = self.state is State.BLOCKED and self._until is not None and self._left_s(self._until) > 0
        # Trying before the time makes a ban worse, and services publish `create` whenever they start.
        await self._save(record if banned else replace(record, halted=""))
        self._deps.delivery.begin(self._record)
        if not banned:
            await self._apply(Trigger.START, None, {})
        elif self._timer is None and self._until is not None:
            self._set_timer(self._left_s(self._until))
        result = {"session": self.id, "state": self.state.value, "epoch": self._record.epoch}
        self._deps.outcomes.finish(task, Outcome("create", task.command.id, result))

    async def _disconnect(self, task: Task) -> None:
        await self._save(replace(self._record, desired=Desired.STOPPED))
        await self._apply(Trigger.STOP, _REQUESTED, {})
        if self.state is State.STOPPING:
            self._stopping.append(task)
        else:
            self._disconnected(task)

    def _disconnected(self, task: Task) -> None:
        self._deps.outcomes.finish(task, Outcome("disconnect", task.command.id, {"state": self.state.value}))

    async def _halt(self) -> None:
        if self.state in LIVE:
            await self._apply(Trigger.STOP, _SHUTDOWN, {})
        self._cancel_timer()
        if self.state is not State.STOPPING:
            self._report_halted()

    async def _logout(self, task: Task) -> None:
        """Unlink at WhatsApp, then put on record that the session is to be removed, which the fleet does.

        Killed before that is on disk, the command comes again: if WhatsApp has unlinked the device, the session is LOGGED_OUT.
        """
        await self._refuse_if_anothers()
        if self.state in CONNECTED:
            await self._leave_online()
            await self._unlink()
        elif self._record.paired and self.state not in {State.LOGGED_OUT, State.QUARANTINED}:
            raise CommandError(
                "not_connected",
                f"The session is {self.state.value}, so WhatsApp cannot be told to unlink the device.",
                hint="Publish `create`, wait for `connected`, then `logout`. Or unlink it on the phone.",
                final=False,
            )
        else:
            await self._close_beside_and_wait()
        await self._end(task, _LOGGED_OUT_BY_COMMAND)

    async def _delete(self, task: Task) -> None:
        """Like a logout that WhatsApp is not told of: for a device that cannot be unlinked from here."""
        await self._refuse_if_anothers()
        if self.state in CONNECTED:
            await self._leave_online()
        await self._close_beside_and_wait()
        await self._end(task, _DELETED)

    async def _refuse_if_anothers(self) -> None:
        """What another warren lives on is not ended here. Raises CommandError, StateError."""
        another = self.state is State.QUARANTINED and self._cause is not None and self._cause.trigger is Trigger.SUPERSEDED
        if not another:
            # A store that is away is no reason to wait here: the removal looks again, and waits for it.
            with contextlib.suppress(StorageError, ConfigError, TimeoutError):
                async with asyncio.timeout(OWNER_LOOK_S):
                    another = not await self._deps.backups.newest_is_ours(self.id)
        if another:
            raise CommandError(
                "not_now",
                "Another warren has taken the session over, and its backups would be deleted too.",
                hint="End it there; or take it back with `create`, and publish this again.",
                final=False,
            )

    async def _end(self, task: Task, cause: Cause) -> None:
        """Put on record that the session, which is closed, is to be removed, and then do it."""
        self._over = self._generation
        before = self.state
        # Who hears that it is logged out may create it again at once: that `create` must not land in queues about to be deleted.
        await self._claim.unbind()
        self._answer_what_runs_beside()
        self._record = replace(self._record, desired=Desired.REMOVING, paired=False, halted="", until="")
        self._until = None
        self._cancel_timer()
        self._enter(State.STOPPED, cause)
        self._deps.delivery.submit(self.id, "logout", self._told(State.STOPPED, before.value))
        ticket = self._deps.outcomes.finish(task, Outcome(task.command.name, task.command.id), also=(PutSession(self._record),))
        # Not awaited: while the disk is full, the actor still has to answer others, and to stop.
        ticket.stored.add_done_callback(lambda _: self._post(_Recorded()))

    def _answer_what_runs_beside(self) -> None:
        """The session goes: its queues are deleted only when everything that was taken from them is answered."""
        cut = [task for running, task in self._backing_up.items() if running.cancel()]
        order, self._order = self._order, None
        for task in cut if order is None else [*cut, order]:
            self._deps.outcomes.fail(task, CommandError("not_now", "The session was removed meanwhile.", final=False))

    def _remove(self) -> None:
        """It is on disk that the session is to go."""
        waiting, self._stopping = self._stopping, []
        for earlier in waiting:
            self._disconnected(earlier)
        self._removed = True
        self._deps.on_removed(self)

    async def _unlink(self) -> None:
        try:
            await self._deps.engines.request("logout", self.id, self._generation, timeout_s=LOGOUT_TIMEOUT_S)
        except EngineError as e:
            # Nobody knows whether WhatsApp got it. Connecting again tells: either it works, or we are logged out.
            self._over = self._generation
            self._close_beside()
            await self._apply(Trigger.LOST, CAUSES["network"], {})
            raise CommandError(
                "not_connected",
                f"WhatsApp did not confirm the logout: {e.message}",
                hint="Wait for `connected` and publish `logout` again with a new id.",
                final=False,
            ) from e
        self._deps.engines.forget(self.id, self._generation)

    async def _settings(self, task: Task) -> None:
        """Change what is kept. The pace is looked up at each send; the rest is the engine's, which gets it when it opens."""
        args = task.command.args
        assert isinstance(args, SettingsArgs)
        before = self._record.settings
        kept = args.applied(before)
        await self._save(replace(self._record, settings=kept))
        told = {name: kept.get(name) for name in KeptSettings.model_fields}
        if told["proxy"] is not None:
            told["proxy"] = hide_password(told["proxy"])
        changed = [name for name in told if kept.get(name) != before.get(name)]
        at_once = {"messages_per_minute"} if self.state in LIVE else {"messages_per_minute", "mark_online", "proxy"}
        if not self._record.paired and self.state not in LIVE:
            at_once.add("device_name")
        waiting = [name for name in changed if name not in at_once]
        self._deps.outcomes.finish(task, Outcome("settings", task.command.id, {"settings": told, "waiting": waiting}))

    # --- backups

    async def _forget(self) -> None:
        if not self.unused or self._halted is not None:
            return
        before = self.state
        await self._claim.unbind()
        self._answer_what_runs_beside()
        self._record = replace(self._record, desired=Desired.REMOVING, paired=False, halted="")
        self._cancel_timer()
        self._enter(State.STOPPED, _FORGOTTEN)
        told = self._told(State.STOPPED, before.value)
        ticket = self._deps.delivery.submit(self.id, "logout", told, also=(PutSession(self._record),))
        # Not awaited, as in `_end`.
        ticket.stored.add_done_callback(lambda _: self._post(_Recorded()))

    async def _look_back(self) -> None:
        """A session that has no phone here may have had one elsewhere: nothing of it is told or done before that is known."""
        if self._record.paired or self._record.halted or not self._deps.backups.on:
            return
        self._looking = asyncio.create_task(self._until_known(), name=f"look-back.{self.id}")
        while not (await asyncio.wait({self._looking}, timeout=LOOK_BACK_S))[0]:
            self._refuse_until_known()
        looking, self._looking = self._looking, None
        if looking.cancelled() or self.state is State.RESTORING:
            self._enter(State.STOPPED, None)
        elif (bug := looking.exception()) is not None:
            # Not settled: its first `open` looks again, and says what is wrong.
            self._log.bind(action="session_bug").opt(exception=bug).error("Looking for backups of the session failed.")

    def _refuse_until_known(self) -> None:
        """What has come meanwhile is answered: it must not stay unsettled, in the prefetch, for as long as the store is away."""
        for item in [self._mailbox.get_nowait() for _ in range(self._mailbox.qsize())]:
            if isinstance(item, Task):
                away = "The store that may hold the session's backups does not answer."
                self._deps.outcomes.fail(item, CommandError("not_now", away, hint="Publish it again later.", final=False))
            else:
                self._post(item)

    async def _until_known(self) -> None:
        try:
            restored = await self._deps.restorer.check(
                self._record, lambda code, what: self._enter(State.RESTORING, _cause(code, what))
            )
        except SealError as e:
            self._enter(State.QUARANTINED, _cause("backup_damaged", str(e)))
            return
        if restored is not None:
            await self._take_up(restored)

    async def _take_up(self, restored: Restored) -> None:
        """Go on as what came back: its epoch, its settings where there are none here, its journal and limits."""
        pacing = restored.stored.beside(await self._deps.store.pacing(self.id))
        record = replace(restored.stored.merged(self._record), epoch=restored.row.epoch, sequence=0)
        await self._deps.store.write(PutSession(record), PutBackup(restored.row), *pacing)
        self._record, self._pacer = record, None
        self._deps.delivery.begin(record)
        self._deps.backups.settle(self.id, restored.row, at_once=True)
        task, self._order = self._order, None
        if task is not None:
            told = {"position": str(restored.place), "epoch": record.epoch}
            self._deps.outcomes.finish(task, Outcome("restore", task.command.id, told))

    def _back_up(self, task: Task) -> None:
        """`backup`: beside the actor, because the store may be slow."""

        async def run() -> None:
            try:
                row = await self._deps.backups.now(self.id)
            except CommandError as e:
                self._deps.outcomes.fail(task, e)
                return
            at = timestamp(datetime.fromtimestamp(row.at, UTC))
            told = {"position": f"{row.epoch}/{row.sequence}", "at": at, "size": row.size}
            self._deps.outcomes.finish(task, Outcome("backup", task.command.id, told))

        running = asyncio.create_task(run(), name=f"backup-command.{self.id}")
        self._backing_up[running] = task
        running.add_done_callback(self._backing_up.pop)

    async def _restore(self, task: Task) -> None:
        """Close the session, restore, and go on as before; the outcome comes when it is known."""
        if not self._deps.backups.on:
            raise no_storage()
        # A ban is waited out, whatever is asked for: a restore ends in a connection.
        if self._order is not None or self.state in {State.LOGGED_OUT, State.STOPPING, State.BLOCKED}:
            raise CommandError(
                "not_now",
                f"The session is {self.state.value}.",
                hint="A device that is unlinked cannot be restored: publish `create`. Else wait, and publish `restore` again.",
                final=False,
            )
        if self.state in CONNECTED:
            await self._leave_online()
        await self._close_beside_and_wait()
        self._over = self._generation
        self._order = task
        self._deps.backups.unsettle(self.id)
        await self._apply(Trigger.RESTORE, CAUSES["restoring"], {})
        self._cancel_timer()
        self._open_beside()

    async def _may_open(self, generation: int) -> bool:
        """Whether what is on this disk is what to go on with. If not, what follows is on its way to the mailbox."""
        told = False

        def tell(code: str, what: str) -> None:
            nonlocal told
            told = True
            self._post(_Happened(Trigger.RESTORE, generation, _cause(code, what)))

        try:
            if self._order is not None:
                restored = await self._restore_as_ordered(self._order, tell)
            else:
                restored = await self._deps.restorer.check(self._record, tell)
        except SealError as e:
            self._log.bind(action="backup_damaged").error("{}", e)
            self._post(_Happened(Trigger.UNREADABLE, generation, _cause("backup_damaged", str(e))))
            return False
        if restored is not None or told:
            self._go_on(generation, restored)
            return False
        return True

    def _go_on(self, generation: int, restored: Restored | None) -> None:
        data = {} if restored is None else {"restored": restored}
        if self._record.desired is Desired.RUNNING:
            self._post(_Happened(Trigger.RESTORED, generation, None, data))
        else:
            self._post(_Happened(Trigger.STOP, generation, _REQUESTED, data))

    async def _restore_as_ordered(self, task: Task, tell: Tell) -> Restored | None:
        args = task.command.args
        assert isinstance(args, RestoreArgs)
        try:
            return await self._deps.restorer.restore(self._record, Place.parse(args.at) if args.at else None, tell)
        except (StorageError, SealError, StateError) as e:
            self._order = None
            self._deps.outcomes.fail(task, CommandError("restore_failed", e.message, hint=e.hint, final=False))
            tell("restoring", "")
            return None

    async def _rescue(self, generation: int) -> bool:
        """The state on this disk cannot be used. Whether a backup takes its place; at most one does between two connections."""
        if self._rescued:
            return False  # what was restored cannot be used either
        try:
            restored = await self._deps.restorer.rescue(
                self._record, lambda code, what: self._post(_Happened(Trigger.RESTORE, generation, _cause(code, what)))
            )
        except (StorageError, SealError, StateError) as e:
            self._log.bind(action="rescue_failed").error("No backup could take the place of the damaged state: {}", e)
            return False
        if restored is not None:
            self._rescued = True
            self._go_on(generation, restored)
        return restored is not None

    async def _save(self, record: SessionRecord) -> None:
        if record != self._record:
            try:
                await self._deps.store.write(PutSession(record))
            except StateError as e:
                raise CommandError("internal", e.message, hint=e.hint, final=False) from e
            self._record = record
            self._deps.backups.changed(self.id)

    # --- the machine

    async def _apply(self, trigger: Trigger, cause: Cause | None, data: dict[str, Any]) -> None:
        """Take one step of the table and do what entering the new state asks for."""
        if trigger in {Trigger.TIME_LOCK, Trigger.UNLOCKED} and not await self._lock(trigger, data):
            return
        try:
            taken = step(self.state, trigger)
        except IllegalTrigger as e:
            self._log.bind(action="illegal_trigger").error("{}", e)
            if trigger in _ENDS and self.state in LIVE:
                # Its generation is over all the same, and nothing else would bring the session out of this state.
                await self._apply(Trigger.LOST, cause, data)
            return
        before = self.state
        if trigger in {Trigger.START, Trigger.STOP} and taken.to is before:
            return
        self._in_step = True
        if before in CONNECTED and taken.to not in CONNECTED:
            await self._leave_online()
        if (restored := data.get("restored")) is not None:
            await self._take_up(restored)
        if trigger is Trigger.PAIRED:
            await self._save(replace(self._record, paired=True))
        if trigger is Trigger.CONNECTED:
            self._rescued = False
            account = {k: data.get(k) for k in ("jid", "lid", "push_name")}
            await self._save(replace(self._record, paired=True, account=account))
        if trigger is Trigger.QR:
            self._show(data)
        self._until = _until(data)
        self._enter(taken.to, cause if trigger is not Trigger.CLOSED else self._cause)
        await self._entered(before, trigger, data)
        if taken.event is not None and taken.event != "qr":
            self._deps.delivery.submit(self.id, taken.event, self._told(taken.to, before.value))
        await self._remember()
        self._in_step = False
        if before is State.STOPPING and self.state is not State.STOPPING:
            await self._stopped()
        if trigger is Trigger.CONNECTED and self._locked:
            if self._locked_until is None:
                await self._apply(Trigger.TIME_LOCK, CAUSES["time_lock"], {})
            elif self._left_s(self._locked_until) > 0:
                await self._apply(Trigger.TIME_LOCK, CAUSES["time_lock"], {"until": timestamp(self._locked_until)})
            else:
                await self._lock(Trigger.UNLOCKED, {})

    async def _lock(self, trigger: Trigger, data: dict[str, Any]) -> bool:
        """Note what WhatsApp says of the lock; whether it changes the state now, and not only the next time online."""
        locks = trigger is Trigger.TIME_LOCK
        self._locked_until = _until(data) if locks else None
        self._locked = locks
        await self._remember()
        return self.state is State.TIME_LOCKED or (self._locked and self.state is State.ONLINE)

    def _enter(self, state: State, cause: Cause | None) -> None:
        """The one place where the state changes, with its one log line."""
        if state is not self.state:
            self._log.bind(
                action="state", state=state.value, previous=self.state.value, reason=cause.code if cause else None
            ).info("{} -> {}{}", self.state.value, state.value, f": {cause.message}" if cause else "")
            self._since = self._deps.now()
            self._deps.metrics.transition(self.state.value, state.value, cause.code if cause else None)
        self.state, self._cause = state, cause
        self._deps.changed(self.id)

    def _told(self, state: State, before: str) -> dict[str, Any]:
        """The data of a state event."""
        cause = self._cause
        told: dict[str, Any] = {"state": state.value, "previous": before}
        told |= {"code": cause.code, "message": cause.message, "hint": cause.hint} if cause else {"code": state.value}
        if self._until is not None:
            told["until"] = timestamp(self._until)
        waits = state in {State.BACKING_OFF, State.OUTDATED}
        if waits or (state is State.CONNECTING and self._attempt):
            told["attempt"] = self._attempt
        if waits and self._timer is not None:
            told["retry_in_s"] = round(self._timer.when() - asyncio.get_running_loop().time(), 1)
        if state is State.ONLINE:
            told |= self._record.account
        return told

    async def _entered(self, before: State, trigger: Trigger, data: dict[str, Any]) -> None:
        match self.state:
            case State.CONNECTING if trigger is not Trigger.PAIRED:
                self._cancel_timer()
                self._open_beside()
            case State.ONLINE | State.TIME_LOCKED:
                if before not in CONNECTED:
                    self._heard.set()
                    self._outdated = 0
                    self._stable_at = asyncio.get_running_loop().time() + self._deps.options.stable_s
                    await self._start_sending()
                    self._watch_idleness()
                self._look_again()
            case State.BACKING_OFF:
                self._back_off(before)
            case State.REPLACED if not self._replaced_before:
                self._replaced_before = True
                self._try_again_in(REPLACED_RETRY_S)
            case State.BLOCKED if self._until is not None:
                self._set_timer(max(self._deps.options.reconnect_base_s, self._left_s(self._until)))
            case State.OUTDATED:
                self._wait_for_version(before)
            case State.STOPPING if before is not State.STOPPING:
                self._close_beside(then=Trigger.CLOSED)
            case State.QUARANTINED if trigger is not Trigger.SUPERSEDED:
                self._deps.backups.unsettle(self.id)  # what cannot be read cannot be backed up
            case State.QUARANTINED:
                self._cancel_timer()
                self._over = self._generation
                self._close_beside()
            case State.STOPPED:
                self._cancel_timer()
                self._attempt = 0
                if trigger is Trigger.UNPAIRED:
                    # New codes are shown only when somebody asks for them.
                    await self._save(replace(self._record, desired=Desired.STOPPED))

    async def _stopped(self) -> None:
        """What waited for the close: answers to `disconnect`, the daemon's own stop, a `create` that came meanwhile."""
        waiting, self._stopping = self._stopping, []
        for task in waiting:
            self._disconnected(task)
        order, self._order = self._order, None
        if order is not None:
            self._deps.outcomes.fail(order, CommandError("not_now", "The session was stopped meanwhile.", final=False))
        if self._halted is not None:
            self._report_halted()
        elif self._record.desired is Desired.RUNNING and self.state is State.STOPPED:
            await self._apply(Trigger.START, None, {})

    async def _remember(self) -> None:
        """Keep over a restart that the session waits for somebody, a ban, a time-lock. Damaged state is found again by trying."""
        for_good = self.state in {State.LOGGED_OUT, State.BLOCKED} or (self.state is State.REPLACED and self._timer is None)
        halted = self.state.value if for_good else ""
        if self.state is State.QUARANTINED and self._cause is not None and self._cause.trigger is Trigger.SUPERSEDED:
            halted = self._cause.code
        ends = (self._until if self.state is State.BLOCKED else None) if halted else self._locked_until
        until = timestamp(ends) if ends else ""
        if (halted, until) != (self._record.halted, self._record.until):
            paired = self._record.paired and halted != State.LOGGED_OUT.value
            await self._save(replace(self._record, halted=halted, until=until, paired=paired))

    def _report_halted(self) -> None:
        if self._halted is not None and not self._halted.done():
            self._halted.set_result(None)

    def _back_off(self, before: State) -> None:
        options = self._deps.options
        self._attempt += 1
        pause = delay(
            self._attempt - 1, base_s=options.reconnect_base_s, cap_s=options.reconnect_cap_s, random01=self._deps.random01()
        )
        ours = self._cause is not None and self._cause.code in {"engine_lost", "engine_replaced"}
        if ours and before in CONNECTED and self._attempt == 1:
            # WhatsApp did nothing wrong. Only the first time: what kills its engine again may be this very session.
            pause = min(pause, 1.0)
        self._set_timer(pause)
        self._alarm(before)

    def _wait_for_version(self, before: State) -> None:
        options, random01 = self._deps.options, self._deps.random01()
        self._attempt += 1
        self._outdated += 1
        soon = self._outdated == 1
        base_s, cap_s = (options.reconnect_base_s, options.reconnect_cap_s) if soon else (OUTDATED_BASE_S, OUTDATED_CAP_S)
        self._try_again_in(delay(max(0, self._outdated - 2), base_s=base_s, cap_s=cap_s, random01=random01))
        self._alarm(before)

    def _try_again_in(self, seconds: float) -> None:
        self._until = self._deps.now() + timedelta(seconds=seconds)
        self._set_timer(seconds)

    def _alarm(self, before: State) -> None:
        """Once in a row of failures; the next row begins after a stable minute."""
        if self._attempt == self._deps.options.alarm_after:
            self._deps.delivery.submit(self.id, "reconnect_failed", self._told(self.state, before.value))

    # --- rest

    def _watch_idleness(self) -> None:
        self._active_at = asyncio.get_running_loop().time()
        self._look_for_idleness()

    def _look_for_idleness(self) -> None:
        """Look again when it could be idle for long enough; `_active_at` is moved by every message, the timer only here."""
        if (bound := self._deps.options.idle_timeout_s) <= 0:
            return
        loop = asyncio.get_running_loop()
        if self._lane is not None and self._lane.busy:
            self._active_at = loop.time()
        left = self._active_at + bound - loop.time()
        if left > 0:
            self._idle_timer = loop.call_later(left, self._look_for_idleness)
        else:
            self._post(_Idle())

    def _cancel_idle(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    async def _rest(self) -> None:
        """As after `disconnect`: simple to foresee, and nothing but `create` brings it back."""
        if self.state not in CONNECTED or self._active_at + self._deps.options.idle_timeout_s > asyncio.get_running_loop().time():
            return
        await self._save(replace(self._record, desired=Desired.STOPPED))
        await self._apply(Trigger.STOP, _IDLE, {})

    # --- timers

    def _left_s(self, until: datetime) -> float:
        return max(0.0, (until - self._deps.now()).total_seconds())

    def _look_again(self) -> None:
        """When a session that is online looks at itself: is it stable, is its time-lock over?"""
        stable_s = max(0.0, self._stable_at - asyncio.get_running_loop().time()) + TICK_S
        self._set_timer(stable_s if self._locked_until is None else min(stable_s, self._left_s(self._locked_until)))

    def _set_timer(self, seconds: float) -> None:
        self._cancel_timer()
        serial = self._timer_serial
        self._timer = asyncio.get_running_loop().call_later(seconds, lambda: self._post(_Due(serial)))

    def _cancel_timer(self) -> None:
        self._timer_serial += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _timer_up(self) -> None:
        self._timer = None
        match self.state:
            case State.ONLINE | State.TIME_LOCKED:
                # Only a connection that held for a while proves that the trouble is over.
                if asyncio.get_running_loop().time() >= self._stable_at:
                    self._attempt, self._replaced_before = 0, False
                    with contextlib.suppress(StateError):  # what cannot be deleted now can be deleted another time
                        await self._deps.state_dir.tidy(self.id)
                if self._locked_until is None:
                    return
                if (left := self._left_s(self._locked_until)) > 0:
                    self._set_timer(left)
                else:
                    await self._apply(Trigger.UNLOCKED, None, {})
            case State.REPLACED if not self._claim.held:
                self._try_again_in(REPLACED_RETRY_S)  # whoever holds the lock may be the one that replaced us
            case State.BACKING_OFF | State.REPLACED | State.BLOCKED | State.OUTDATED:
                await self._apply(Trigger.RETRY, None, {})

    # --- the engine

    def _open_beside(self) -> None:
        # What runs there still is a close, or an open that has just heard its end: it is awaited, not cut.
        self._generation += 1
        heard = self._heard = asyncio.Event()
        self._beside = asyncio.create_task(self._open(self._generation, self._beside, heard), name=f"open.{self.id}")

    async def _open(self, generation: int, before: asyncio.Task[None] | None, heard: asyncio.Event) -> None:
        """Open the engine's side and see that something comes of it; whatever goes wrong is reported to the mailbox."""
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        try:
            await self._try_to_open(generation, heard)
        except Exception:
            # Nobody else would hear of it, and the session would stay CONNECTING for ever.
            self._log.bind(action="session_bug").exception("Opening the session met a bug.")
            await self._request_close(generation)
            self._lost(generation, "internal")

    async def _try_to_open(self, generation: int, heard: asyncio.Event) -> None:
        try:
            if not await self._may_open(generation):
                return
            async with self._deps.connecting:
                opened = await self._request_open(generation)
                if self._record.paired and not opened.get("paired"):
                    await self._request_close(generation)
                    self._lost(generation, "logged_out")
                    return
                async with asyncio.timeout(SETTLE_TIMEOUT_S):
                    await heard.wait()
        except EngineError as e:
            self._log.bind(action="open_failed", reason=e.engine_code).warning("The engine could not open the session: {}", e)
            await self._request_close(generation)
            if e.engine_code in {"state_unreadable", "state_missing"} and await self._rescue(generation):
                return
            self._lost(generation, e.engine_code if e.engine_code in CAUSES else "engine_unavailable")
        except StateError as e:
            reason = "disk_trouble" if e.retryable else "state_unreadable"
            self._log.bind(action=reason).error("{}", e)
            self._lost(generation, reason)
        except TimeoutError:
            await self._request_close(generation)
            self._lost(generation, "network")

    async def _request_open(self, generation: int) -> dict[str, Any]:
        current = await self._deps.state_dir.current_epoch(self.id)
        if self._record.paired and current is None:
            raise EngineError("The session's directory is gone.", engine_code="state_missing")
        # What is paired stays where it is: the events of a rebuilt or restored session may be an epoch ahead of its directory.
        epoch = current if self._record.paired and current is not None else self._record.epoch
        directory = await self._deps.state_dir.prepare(self.id, epoch)
        settings = self._record.settings
        number = settings.get("phone_number")
        self._codes_asked += 1
        return await self._deps.engines.open(
            self.id,
            generation,
            self.on_engine,
            dir=str(directory),
            create=not self._record.paired,
            device_name=settings.get("device_name") or self._deps.options.device_name,
            phone_number=number.removeprefix("+") if number and not self._record.paired else None,
            mark_online=settings.get("mark_online"),
            proxy=settings.get("proxy"),
        )

    def _lost(self, generation: int, reason: str) -> None:
        cause = cause_of(reason)
        self._deps.engines.forget(self.id, generation)
        self._post(_Happened(cause.trigger, generation, cause))

    def _close_beside(self, then: Trigger | None = None) -> None:
        if self._beside is not None:
            self._beside.cancel()
        self._beside = asyncio.create_task(self._close(self._generation, self._beside, then), name=f"close.{self.id}")

    async def _close(self, generation: int, before: asyncio.Task[None] | None, then: Trigger | None) -> None:
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        await self._request_close(generation)
        if then is not None:
            self._post(_Happened(then, generation, self._cause))

    async def _request_close(self, generation: int) -> None:
        """Close a generation, whether or not it is open."""
        try:
            await self._deps.engines.request("close", self.id, generation, timeout_s=CLOSE_TIMEOUT_S)
        except EngineError as e:
            if e.engine_code not in {"not_open", "gone"}:
                self._log.bind(action="close_failed", reason=e.engine_code).warning("The engine did not close the session: {}", e)
        except Exception:
            self._log.bind(action="session_bug").exception("Closing the session met a bug.")
        self._deps.engines.forget(self.id, generation)

    async def _close_beside_and_wait(self) -> None:
        self._close_beside()
        assert self._beside is not None
        await asyncio.gather(self._beside, return_exceptions=True)

    def _happened(self, event: EngineEvent) -> _Happened | None:
        """What a life-cycle event of the engine means for the machine."""
        generation, data = event.generation, event.data
        match event.event:
            case "qr" | "pairing_code":
                self._heard.set()
                return _Happened(Trigger.QR, generation, None, data)
            case "paired":
                self._just_paired = True
                return _Happened(Trigger.PAIRED, generation, None, data)
            case "connected":
                return _Happened(Trigger.CONNECTED, generation, None, data)
            case "logged_out":
                return self._ended(generation, "logged_out", data)
            case "disconnected":
                return self._ended(generation, str(data.get("reason")), data)
            case "keepalive":
                return self._keepalive(generation, data)
            case "timelock":
                trigger = Trigger.TIME_LOCK if data.get("active") else Trigger.UNLOCKED
                return _Happened(trigger, generation, CAUSES["time_lock"] if data.get("active") else None, data)
            case "changed":
                self._deps.backups.changed(self.id, at_once=data.get("kind") == "identity")
                return None
        self._log.bind(action="engine_event_unknown").warning("The engine sent an unknown event {}.", event.event)
        return None

    def _ended(self, generation: int, reason: str, data: dict[str, Any]) -> _Happened:
        self._heard.set()
        self._deps.engines.forget(self.id, generation)
        if reason == "restart_required" and not self._just_paired:
            reason = "server"  # only pairing earns a new connection at once; a server that keeps asking meets the backoff
        self._just_paired = False
        if reason == "qr_expired" and self._record.settings.get("phone_number") and self._codes_asked < PAIRING_CODES:
            reason = "code_expired"
        cause = cause_of(reason)
        if isinstance(said := data.get("message"), str) and said:
            cause = replace(cause, message=f"{cause.message} ({said})")
        return _Happened(cause.trigger, generation, cause, data)

    def _keepalive(self, generation: int, data: dict[str, Any]) -> _Happened | None:
        failures = data.get("failures", 0)
        self._log.bind(action="keepalive", failures=failures).debug("Keepalive failures: {}", failures)
        if not failures or not self._is_online(generation):
            return None
        if failures < KEEPALIVE_FAILURES:
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._probe(generation), name=f"probe.{self.id}")
            return None
        return self._zombie(generation, data)

    def _is_online(self, generation: int) -> bool:
        return generation == self._generation and generation not in {self._over, self._found_dead} and self.state in CONNECTED

    async def _probe(self, generation: int) -> None:
        """One question to WhatsApp. Only silence counts against the connection; any other trouble is told by its own event."""
        try:
            await self._deps.engines.request(
                "probe", self.id, generation, timeout_s=PROBE_S + 2.0, timeout_ms=int(PROBE_S * 1000)
            )
        except EngineError as e:
            if e.engine_code in {"timeout", "no_answer"} and self._is_online(generation):
                self._post(self._zombie(generation, {}))

    def _zombie(self, generation: int, data: dict[str, Any]) -> _Happened:
        """It says that it is connected, and is not: told, closed and connected again."""
        cause = CAUSES["keepalive_timeout"]
        told = {"state": self.state.value, "previous": self.state.value, "code": cause.code, "message": cause.message}
        self._deps.delivery.submit(self.id, "health_check_failed", {**told, "hint": cause.hint})
        self._found_dead = generation
        self._close_beside()
        return _Happened(cause.trigger, generation, cause, data)

    def _show(self, data: dict[str, Any]) -> None:
        """Tell what the phone can link with: a QR code to scan or a pairing code to type."""
        code = str(data["code"])
        expires = timestamp(self._deps.now() + timedelta(milliseconds=int(data["ttl_ms"])))
        if "remaining" in data:
            self._qr, self._pairing_code = {"code": code, "expires_at": expires, "remaining": data["remaining"]}, None
            shown = {**self._qr, "image": qr_image(code)}
            self._deps.delivery.ephemeral(self.id, "qr", shown, event_id=event_id(self.id, "qr", code))
            return
        number = self._record.settings.get("phone_number")
        self._qr, self._pairing_code = None, {"code": code, "expires_at": expires, "phone_number": number}
        self._deps.delivery.ephemeral(
            self.id, "pairing_code", self._pairing_code, event_id=event_id(self.id, "pairing_code", code)
        )

    # --- messages in

    def _inbound(self, event: EngineEvent) -> None:
        """Row first, then the answer: WhatsApp learns "received" only when the event is safe."""
        of, waiting = self._unanswered
        self._unanswered = (event.generation, waiting + 1 if of == event.generation else 1)
        if self._unanswered[1] > UNANSWERED:
            raise Flood(f"The engine does not wait for answers of session {self.id}.")
        try:
            self._take_in(event)
        except Exception:
            self._log.bind(action="session_bug").exception("Taking in {} failed; WhatsApp keeps it.", event.event)
            self._answer(event, ok=False)

    def _take_in(self, event: EngineEvent) -> None:
        arrived = events.inbound(event)
        if arrived.event == "message":
            self._last_message_at = timestamp(self._deps.now())
            self._active_at = asyncio.get_running_loop().time()
            self._deps.changed(self.id)
        ticket = self._deps.delivery.submit(self.id, arrived.event, arrived.data, event_id=arrived.event_id)
        if ticket.safe.done():
            self._answer(event)
        else:
            ticket.safe.add_done_callback(lambda _: self._answer(event))

    def _answer(self, event: EngineEvent, *, ok: bool = True) -> None:
        of, waiting = self._unanswered
        if of == event.generation:
            self._unanswered = (of, waiting - 1)
        self._deps.engines.answer(event, ok=ok)

    # --- messages out

    def _request_send(self, generation: int) -> RequestSend:
        async def request(**arguments: Any) -> dict[str, Any]:
            return await self._deps.engines.request("send", self.id, generation, timeout_s=SEND_TIMEOUT_S + 15.0, **arguments)

        return request

    async def _start_sending(self) -> None:
        if self._pacer is None:
            window = Window(await self._deps.store.pacing(self.id))
            self._pacer = Pacer(self.id, window, self._pace, self._deps.now)
        self._lane = SendLane(
            self.id,
            self._request_send(self._generation),
            self._claim,
            self._deps.outcomes,
            self._pacer,
            refuses=lambda: self._deps.options.pacing.on_limit == "refuse",
            now=self._deps.now,
            restricted_until=lambda: self._locked_until,
        )
        # Who hears `connected` may send at once: a queue that was only just made takes commands when this returns, not before.
        await self._claim.consume_work()

    def _pace(self) -> Pace | None:
        return self._deps.options.pacing.pace(self._record.settings.get("messages_per_minute"))

    async def _leave_online(self) -> None:
        self._cancel_timer()
        self._cancel_idle()
        await self._stop_sending(SEND_GRACE_S)

    async def _stop_sending(self, timeout_s: float) -> None:
        """Finish the send under way, ack what is finished, and let the rest return to its queue, in order."""
        lane, self._lane = self._lane, None
        if lane is not None:
            await lane.stop(timeout_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._deps.outcomes.wait(self.id), ACK_GRACE_S)
        await self._claim.pause_work()


_SHUTDOWN = Cause(Trigger.STOP, "shutdown", "The daemon is stopping.", "Nothing to do: the session comes back with the daemon.")
_REQUESTED = Cause(
    Trigger.STOP, "requested", "`disconnect` was asked for.", "Publish `create` to connect again; no QR is needed."
)
_IDLE = Cause(
    Trigger.STOP,
    "idle_timeout",
    "No message came or went for as long as `[fleet] idle_timeout_s` says.",
    "Publish `create` to connect again; no QR is needed.",
)
_FORGOTTEN = Cause(
    Trigger.LOGGED_OUT,
    "forgotten",
    "Nobody has used the session for as long as `[storage] forget_after_days` says: it and its backups are removed.",
    "`create` begins a new one. The device may still be listed on the phone: unlink it there.",
)
_LOGGED_OUT_BY_COMMAND = Cause(
    Trigger.LOGGED_OUT, "logged_out", "`logout` was asked for: the device is unlinked and the session removed."
)
_DELETED = Cause(
    Trigger.LOGGED_OUT,
    "deleted",
    "`delete` was asked for: the session and its backups are removed. WhatsApp was not told.",
    "If the phone still lists the device, unlink it there.",
)


def _cause(code: str, what: str) -> Cause:
    """A cause with what exactly is the matter."""
    cause = CAUSES[code]
    return replace(cause, message=f"{cause.message} ({what})") if what else cause


def qr_image(code: str) -> str:
    """The QR as a small PNG in a data URI."""
    out = io.BytesIO()
    segno.make(code, error="l", micro=False).save(out, kind="png", scale=4, border=4)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _until(data: dict[str, Any]) -> datetime | None:
    said = data.get("until")
    return datetime.fromisoformat(said) if isinstance(said, str) else None
