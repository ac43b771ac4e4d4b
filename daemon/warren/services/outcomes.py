"""The one place where a command ends: outcome event through delivery, reply, then the ack. Nothing else acks a command."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import orjson
from loguru import logger

from warren.core.envelope import JSON, Command, Outcome, outcome_event_id
from warren.core.names import NO_SESSION, Topology
from warren.core.names import command_fingerprint as fingerprint
from warren.errors import CommandError
from warren.ports import Bus, Incoming, JournalRow, Published, Store, Write
from warren.services.delivery import Delivery, Ticket


@dataclass(frozen=True, slots=True)
class Task:
    """A command together with the AMQP message it came in. Exactly one of the verbs of Outcomes ends it, or `requeue`."""

    command: Command
    incoming: Incoming


class Outcomes:
    """Publishes outcomes and settles commands. A command is acked only after RabbitMQ confirmed its outcome event."""

    def __init__(self, bus: Bus, store: Store, delivery: Delivery, topology: Topology) -> None:
        self._bus, self._store, self._delivery, self._topology = bus, store, delivery, topology
        self._settling: dict[asyncio.Task[None], str] = {}

    async def replayed(self, task: Task) -> bool:
        """Settle a command whose final outcome is in the journal; False when it is not there and must be executed.

        Raises CommandError `id_conflict` when the id was used for something else.
        """
        command = task.command
        if command.id is None or (row := await self._store.outcome(command.session, command.id)) is None:
            return False
        if row.fingerprint != command.fingerprint:
            raise CommandError(
                "id_conflict",
                f"The id `{command.id}` was used before for a different command.",
                hint="Give every new command an id of its own; repeat an id only with the same command and arguments.",
            )
        outcome = Outcome.parse(row.outcome)
        if self._delivery.serves(command.session):
            self.finish(task, outcome, journal=False)
        else:
            self._spawn(command.session, self._refuse(task.incoming, outcome, command.session, command.fingerprint))
        return True

    def finish(self, task: Task, outcome: Outcome, *, journal: bool = True, also: tuple[Write, ...] = ()) -> Ticket:
        """End a command of one of our sessions. `journal`: the outcome is final and kept. Returns the event's ticket."""
        command = task.command
        ticket = self._delivery.submit(
            command.session,
            outcome.event,
            outcome.body(),
            # Without an id nothing could tell two commands apart, so each outcome gets an event id of its own.
            event_id=outcome_event_id(command.session, outcome, command.fingerprint) if command.id else None,
            causation_id=command.id,
            journal=self._journal_row(command, outcome) if journal else None,
            also=also,
            awaited=True,
        )
        self._spawn(command.session, self._settle(task.incoming, outcome, ticket))
        return ticket

    def fail(self, task: Task, error: CommandError) -> Ticket:
        """End a command of one of our sessions with an error; a final one goes to the journal."""
        # A conflicting id must not overwrite the outcome it conflicts with.
        final = error.final and error.reason != "id_conflict"
        return self.finish(task, Outcome.failed(task.command.name, task.command.id, error), journal=final)

    def refuse(
        self, incoming: Incoming, error: CommandError, *, session: str = NO_SESSION, command_id: str | None, command: str = ""
    ) -> None:
        """End a command that concerns no session of ours: its outcome has no sequence and no journal."""
        outcome = Outcome.failed(command, command_id, error)
        self._spawn(session, self._refuse(incoming, outcome, session, fingerprint("", incoming.body)))

    def bury(self, incoming: Incoming, error: CommandError, *, session: str, command_id: str | None) -> None:
        """End what cannot be decoded: a copy goes to the dead exchange, with the reason; the outcome event tells of it."""
        self._spawn(session, self._bury(incoming, error, session, command_id))

    def answer(self, incoming: Incoming, outcome: Outcome) -> None:
        """End a query: a reply, no event."""
        self._spawn("", self._settle(incoming, outcome, None))

    def drop(self, incoming: Incoming) -> None:
        """End a query that asks for no answer."""
        self._spawn("", incoming.ack())

    async def wait(self, session: str | None = None) -> None:
        """Until every command that was ended, of one session or of all, is settled."""
        while waiting := {task for task, of in self._settling.items() if session in {None, of}}:
            await asyncio.wait(waiting)

    def cancel(self) -> None:
        """Give up waiting: what is not settled is redelivered by RabbitMQ and answered from the journal."""
        for task in self._settling:
            task.cancel()

    # --- inside

    @staticmethod
    def _journal_row(command: Command, outcome: Outcome) -> JournalRow | None:
        if command.id is None:
            return None
        return JournalRow(command.session, command.id, command.fingerprint, orjson.dumps(outcome.body()))

    def _spawn(self, session: str, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._settling[task] = session
        task.add_done_callback(self._settling.pop)

    async def _settle(self, incoming: Incoming, outcome: Outcome, ticket: Ticket | None) -> None:
        if ticket is not None:
            await asyncio.shield(ticket.stored)
        await self._reply(incoming, outcome)
        if ticket is not None:
            await asyncio.shield(ticket.confirmed)
        await incoming.ack()

    async def _refuse(self, incoming: Incoming, outcome: Outcome, session: str, told_by: str) -> None:
        """`told_by` tells this outcome's event from others with the same command id."""
        await self._reply(incoming, outcome)
        await self._end(incoming, session, outcome, told_by)

    async def _bury(self, incoming: Incoming, error: CommandError, session: str, command_id: str | None) -> None:
        outcome = Outcome.failed("", command_id, error)
        await self._reply(incoming, outcome)
        logger.bind(action="command_dead", session=session).warning("A command went to the dead queue: {}", error)
        headers = {"x-warren-reason": error.reason, "x-warren-message": error.message, "x-warren-exchange": incoming.exchange}
        dead = await self._bus.publish(
            self._topology.dead,
            incoming.routing_key,
            incoming.body,
            message_id=f"dead-{fingerprint(incoming.routing_key, incoming.body)}",
            content_type=JSON,
            headers=headers,
        )
        if dead is Published.CONFIRMED:
            await self._end(incoming, session, outcome, fingerprint("", incoming.body))
        else:
            await incoming.requeue()

    async def _end(self, incoming: Incoming, session: str, outcome: Outcome, told_by: str) -> None:
        told = await self._delivery.direct(
            session,
            outcome.event,
            outcome.body(),
            event_id=outcome_event_id(session, outcome, told_by),
            causation_id=outcome.command_id,
        )
        await (incoming.ack() if told else incoming.requeue())

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
