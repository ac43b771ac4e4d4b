"""The one place where a command ends: outcome event through delivery, reply, then the ack. Nothing else acks a command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import orjson
from loguru import logger

from warren.core.envelope import COMMANDS, JSON, Command, Outcome, outcome_event_id
from warren.core.names import NO_SESSION, Topology
from warren.core.names import command_fingerprint as fingerprint
from warren.errors import CommandError, StateError
from warren.ports import Bus, Incoming, JournalRow, Published, PutStarts, Store, Write
from warren.services.delivery import Delivery, Ticket

MAX_STARTS = 5
"""Executions of a command that may start; what has no outcome after that goes to the dead queue."""
UNACKED_S = 240.0
"""How long a command may stay unsettled because its outcome is not confirmed: then it goes back, comes again and gets the same
one. RabbitMQ takes a consumer that holds a message for half an hour for dead; sends go back earlier (`SendLane`).
"""
GIVE_BACK_S = 1.0
"""Wait before a command goes back because its outcome was not taken, or the journal cannot be read."""
REMEMBERED_S = 60.0
"""How long a confirmed outcome that is not in the journal answers the same command, brought again because its ack was lost."""
REMEMBERED_FINAL_S = 5.0
"""The same for one that is: after that the event is published once more, with the same id."""


@dataclass(frozen=True, slots=True)
class Task:
    """A command together with the AMQP message it came in. Exactly one of the verbs of Outcomes ends it, or `requeue`.

    `at`: when it came, by the monotonic clock.
    """

    command: Command
    incoming: Incoming
    at: float = field(default_factory=time.monotonic, compare=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.command.session, self.command.id or ""


class Exhausted(CommandError):
    """The command's executions have started so often without an outcome that it is given up."""

    def __init__(self, starts: int) -> None:
        super().__init__(
            "gave_up",
            f"The command was tried {starts} times and never came to an end.",
            hint="It may have had its effect. Repeating it with the same id has it once: a send goes out as the same message.",
            final=False,
        )


@dataclass(frozen=True, slots=True)
class _Told:
    """An outcome on its way, or not long confirmed."""

    fingerprint: str
    outcome: Outcome
    ticket: Ticket
    final: bool

    def answers(self, task: Task) -> bool:
        """Whether `task` is the same command again and needs no event of its own. RabbitMQ's repetition is no new try; a sender's
        is, when the outcome is not final or may have been read.
        """
        under_way = self.final and not self.ticket.confirmed.done()
        return self.fingerprint == task.command.fingerprint and (under_way or task.incoming.redelivered)


class Outcomes:
    """Publishes outcomes and settles commands. A command is acked only after RabbitMQ confirmed its outcome event."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        delivery: Delivery,
        topology: Topology,
        *,
        ended: Callable[[Outcome, float], None] = lambda outcome, seconds: None,
    ) -> None:
        """`ended` hears of every outcome that becomes an event, and how many seconds after its command came in."""
        self._bus, self._store, self._delivery, self._topology = bus, store, delivery, topology
        self._ended = ended
        self._settling: dict[str, dict[asyncio.Task[None], float]] = {}
        """By session; since when the command is with us."""
        self._told: dict[tuple[str, str], _Told] = {}
        self._starts: dict[tuple[str, str], int] = {}

    async def replayed(self, task: Task) -> bool:
        """Settle a command that has its outcome already, in the journal or on its way; False when it must be executed.

        Raises CommandError `id_conflict` when the id was used for something else.
        """
        command = task.command
        if command.id is None:
            return False
        told = self._told.get(task.key)
        if told is not None and told.answers(task):
            self._spawn(command.session, self._settle(task, told.outcome, told.ticket), task.at)
            return True
        if told is not None and told.final and told.fingerprint != command.fingerprint:
            raise _conflict(command.id)
        if (row := await self._store.outcome(command.session, command.id)) is None:
            return False
        if row.fingerprint != command.fingerprint:
            raise _conflict(command.id)
        outcome = Outcome.parse(row.outcome)
        if self._delivery.serves(command.session):
            self._finish(task, outcome)
        else:
            self._spawn(command.session, self._refuse(task.incoming, outcome, command.session, command.fingerprint))
        return True

    def finish(self, task: Task, outcome: Outcome, *, journal: bool = True, also: tuple[Write, ...] = ()) -> Ticket:
        """End a command of one of our sessions. `journal`: the outcome is final and kept. `also` is written with it.

        Returns the event's ticket.
        """
        if self._starts.pop(task.key, 0):
            also = (*also, PutStarts(*task.key, 0))
        ticket = self._finish(task, outcome, self._journal_row(task.command, outcome) if journal else None, also)
        if task.command.id is not None:
            self._remember(task, outcome, ticket, final=journal)
        return ticket

    def _finish(self, task: Task, outcome: Outcome, journal: JournalRow | None = None, also: tuple[Write, ...] = ()) -> Ticket:
        command = task.command
        ticket = self._delivery.submit(
            command.session,
            outcome.event,
            outcome.body(),
            # Without an id nothing could tell two commands apart, so each outcome gets an event id of its own.
            event_id=outcome_event_id(command.session, outcome, command.fingerprint) if command.id else None,
            causation_id=command.id,
            journal=journal,
            also=also,
            awaited=True,
        )
        self._ended(outcome, time.monotonic() - task.at)
        self._spawn(command.session, self._settle(task, outcome, ticket), task.at)
        return ticket

    def _remember(self, task: Task, outcome: Outcome, ticket: Ticket, *, final: bool) -> None:
        told = self._told[task.key] = _Told(task.command.fingerprint, outcome, ticket, final)

        def forget() -> None:
            if self._told.get(task.key) is told:
                del self._told[task.key]

        loop, seconds = asyncio.get_running_loop(), REMEMBERED_FINAL_S if final else REMEMBERED_S
        ticket.confirmed.add_done_callback(lambda _: loop.call_later(seconds, forget))

    def fail(self, task: Task, error: CommandError, *, also: tuple[Write, ...] = ()) -> Ticket:
        """End a command of one of our sessions with an error; a final one goes to the journal."""
        # A conflicting id must not overwrite the outcome it conflicts with.
        if error.reason == "id_conflict":
            return self._finish(task, Outcome.failed(task.command.name, task.command.id, error), also=also)
        return self.finish(task, Outcome.failed(task.command.name, task.command.id, error), journal=error.final, also=also)

    # --- what is executed again and again

    async def starts(self, task: Task) -> int:
        """How many executions of the command have started and not ended."""
        if task.key not in self._starts and task.incoming.redelivered:
            self._starts[task.key] = await self._store.starts(*task.key)
        return self._starts.get(task.key, 0)

    async def begin(self, task: Task) -> None:
        """Count that an execution starts, before it can do anything. Raises Exhausted, or StateError when it cannot be counted.

        A command that ends our process, or the engine's, comes again: only the disk can know how often it did. Nobody waits for a
        first execution's mark: it goes to the disk while the execution runs, in a commit that it shares, and goes with the
        outcome's. An execution that kills faster than the disk writes counts from its second time on, so it gets one more. That
        second time is told by RabbitMQ's `redelivered`, or by the first one's end in this process; from then on the mark must be
        on disk before anything happens. A command that is redelivered but never started has no mark and costs nothing.
        """
        count = await self.starts(task)
        if count >= MAX_STARTS:
            raise Exhausted(count)
        self._starts[task.key] = count + 1
        written = self._store.write(PutStarts(*task.key, count + 1))
        if count or task.incoming.redelivered:
            await written
        else:
            written.add_done_callback(_ignored)

    def not_begun(self, task: Task) -> None:
        """Take back what `begin` counted: the execution came to nothing before it could have an effect."""
        if count := self._starts.get(task.key, 0):
            self._starts[task.key] = count - 1
            self._store.write(PutStarts(*task.key, count - 1)).add_done_callback(_ignored)

    def forget(self, session: str) -> None:
        """The session is gone, and what its commands were doing with it."""
        for key in [key for key in self._starts if key[0] == session]:
            del self._starts[key]

    async def to_dead(self, incoming: Incoming, error: CommandError) -> bool:
        """Put a copy of a command into the dead queue, with the reason. False: RabbitMQ did not confirm it."""
        logger.bind(action="command_dead", reason=error.reason).warning("A command goes to the dead queue: {}", error)
        headers = {"x-warren-reason": error.reason, "x-warren-message": error.message, "x-warren-exchange": incoming.exchange}
        if incoming.message_id is not None:
            headers["x-warren-message-id"] = incoming.message_id  # may be all that names the command, when it is replayed
        published = await self._bus.publish(
            self._topology.dead,
            incoming.routing_key,
            incoming.body,
            message_id=f"dead-{fingerprint(incoming.routing_key, incoming.body)}",
            content_type=JSON,
            headers=headers,
        )
        return published is Published.CONFIRMED

    def refuse(
        self, incoming: Incoming, error: CommandError, *, session: str = NO_SESSION, command_id: str | None, command: str = ""
    ) -> None:
        """End a command that concerns no session of ours: its outcome has no sequence and no journal."""
        outcome = Outcome.failed(command, command_id, error)
        self._spawn(session, self._refuse(incoming, outcome, session, fingerprint("", incoming.body)))

    def bury(self, incoming: Incoming, error: CommandError, *, session: str, command_id: str | None) -> None:
        """End what cannot be decoded: a copy goes to the dead exchange, with the reason; the outcome event tells of it."""
        self._spawn(session, self._bury(incoming, error, session, command_id))

    def give_back(self, task: Task) -> None:
        """Return a command that can have no end now to its queue, after a moment."""
        self._spawn(task.command.session, _give_back(task.incoming), task.at)

    def lapse(self, task: Task, error: CommandError) -> None:
        """End a command that RabbitMQ took out of its queue, with `error` unless it has an outcome already."""
        self._spawn(task.command.session, self._lapse(task, error), task.at)

    def answer(self, incoming: Incoming, outcome: Outcome) -> None:
        """End a query: a reply, no event."""
        self._spawn("", self._answer(incoming, outcome))

    def drop(self, incoming: Incoming) -> None:
        """End a query that asks for no answer."""
        self._spawn("", incoming.ack())

    async def wait(self, session: str | None = None) -> None:
        """Until every command that was ended, of one session or of all, is settled."""
        while waiting := {t for of, tasks in self._settling.items() if session in {None, of} for t in tasks}:
            await asyncio.wait(waiting)

    def oldest(self, session: str) -> float | None:
        """When the oldest command came that has ended and is not settled yet."""
        return min(self._settling.get(session, {}).values(), default=None)

    async def told(self, session: str) -> None:
        """Until RabbitMQ has confirmed every outcome of the session so far."""
        while waiting := {t.ticket.confirmed for k, t in self._told.items() if k[0] == session and not t.ticket.confirmed.done()}:
            await asyncio.wait(waiting)

    def cancel(self) -> None:
        """Give up waiting: what is not settled is redelivered by RabbitMQ and answered from the journal."""
        for tasks in self._settling.values():
            for task in tasks:
                task.cancel()

    # --- inside

    @staticmethod
    def _journal_row(command: Command, outcome: Outcome) -> JournalRow | None:
        if command.id is None:
            return None
        return JournalRow(command.session, command.id, command.fingerprint, orjson.dumps(outcome.body()))

    def _spawn(self, session: str, coroutine: Coroutine[Any, Any, None], since: float | None = None) -> None:
        task = asyncio.create_task(coroutine)
        self._settling.setdefault(session, {})[task] = time.monotonic() if since is None else since

        def settled(done: asyncio.Task[None]) -> None:
            of = self._settling[session]
            del of[done]
            if not of:
                del self._settling[session]

        task.add_done_callback(settled)

    async def _settle(self, task: Task, outcome: Outcome, ticket: Ticket) -> None:
        try:
            async with asyncio.timeout(max(0.0, task.at + UNACKED_S - time.monotonic())):
                if not COMMANDS[task.command.name].effect:
                    await self._reply(task.incoming, outcome)  # also while nothing can be stored: nothing was done
                await asyncio.shield(ticket.stored)
                if COMMANDS[task.command.name].effect:
                    await self._reply(task.incoming, outcome)
                await asyncio.shield(ticket.confirmed)
        except TimeoutError:
            await task.incoming.requeue()
        else:
            await task.incoming.ack()

    async def _answer(self, incoming: Incoming, outcome: Outcome) -> None:
        await self._reply(incoming, outcome)
        await incoming.ack()

    async def _refuse(self, incoming: Incoming, outcome: Outcome, session: str, told_by: str) -> None:
        """`told_by` tells this outcome's event from others with the same command id."""
        self._ended(outcome, 0.0)
        await self._reply(incoming, outcome)
        await self._end(incoming, session, outcome, told_by)

    async def _bury(self, incoming: Incoming, error: CommandError, session: str, command_id: str | None) -> None:
        outcome = Outcome.failed("", command_id, error)
        self._ended(outcome, 0.0)
        await self._reply(incoming, outcome)
        if await self.to_dead(incoming, error):
            await self._end(incoming, session, outcome, fingerprint("", incoming.body))
        else:
            await _give_back(incoming)

    async def _lapse(self, task: Task, error: CommandError) -> None:
        command = task.command
        try:
            if await self.replayed(task):
                return
            if command.id is not None and (starts := await self._store.starts(*task.key)):
                error = Exhausted(starts)  # it may have had its effect
        except CommandError as conflict:
            error = conflict
        except StateError:
            await _give_back(task.incoming)
            return
        if self._delivery.serves(command.session):
            self.fail(task, error)
        else:
            outcome = Outcome.failed(command.name, command.id, error)
            await self._refuse(task.incoming, outcome, command.session, command.fingerprint)

    async def _end(self, incoming: Incoming, session: str, outcome: Outcome, told_by: str) -> None:
        told = await self._delivery.direct(
            session,
            outcome.event,
            outcome.body(),
            event_id=outcome_event_id(session, outcome, told_by),
            causation_id=outcome.command_id,
        )
        await (incoming.ack() if told else _give_back(incoming))

    async def _reply(self, incoming: Incoming, outcome: Outcome) -> None:
        if incoming.reply_to is None:
            return
        if self._topology.owns(incoming.reply_to):
            # It would come back to us as a command, or fill a queue that people read. The outcome event comes all the same.
            logger.bind(action="reply_refused", reply_to=incoming.reply_to).warning(
                "A reply was not sent: its reply_to is one of warren's own names."
            )
        else:
            await self._bus.reply(incoming.reply_to, incoming.correlation_id, orjson.dumps(outcome.body()))


async def _give_back(incoming: Incoming) -> None:
    """Not settled at once: what RabbitMQ goes on refusing would go round and round."""
    await asyncio.sleep(GIVE_BACK_S)
    await incoming.requeue()


def _conflict(command_id: str) -> CommandError:
    return CommandError(
        "id_conflict",
        f"The id `{command_id}` was used before for a different command.",
        hint="Give every new command an id of its own; repeat an id only with the same command and arguments.",
    )


def _ignored(written: asyncio.Future[None]) -> None:
    """A mark that could not be written costs a try more, nothing else."""
    if not written.cancelled():
        written.exception()
