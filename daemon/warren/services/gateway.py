"""Where commands come in: decoded, found their session, and handed to it. What cannot be served is answered here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

from loguru import logger

from warren.core.envelope import Command, Origin, Outcome, Rejected, decode_command
from warren.core.names import Topology
from warren.errors import CommandError
from warren.ports import Bus, Incoming
from warren.services.fleet import Fleet
from warren.services.outcomes import Outcomes, Task
from warren.services.sending import expired_error
from warren.services.session import Session

REMOVAL_WAIT_S = 10.0
"""How long a `create` waits for the removal of an earlier session of the same name."""


def _being_removed() -> CommandError:
    return CommandError("session_not_found", "The session is being removed.", hint="Publish `create` again.", final=False)


def _lapsed(reason: str) -> CommandError:
    """Why a command failed that RabbitMQ itself ended."""
    match reason:
        case "expired":
            return CommandError(
                "expired",
                "The command expired in RabbitMQ, by an `expiration` or a policy, before it was its turn.",
                hint="Publish it again with a new id if it still matters.",
            )
        case "delivery_limit":
            return CommandError(
                "gave_up",
                "RabbitMQ gave the command up: it was delivered too often.",
                hint="It may have had its effect. Repeating it with the same id has it once.",
                final=False,
            )
    return CommandError(
        "internal",
        f"RabbitMQ dropped the command ({reason}).",
        hint="Look for policies that limit the length of the session's queues; then publish it again.",
        final=False,
    )


class Gateway:
    """The callbacks that the bus calls for each command. They hand over; work for nobody's sessions runs in one task."""

    def __init__(
        self, bus: Bus, fleet: Fleet, outcomes: Outcomes, topology: Topology, instance: str, *, now: Callable[[], datetime]
    ) -> None:
        self._bus, self._fleet, self._outcomes = bus, fleet, outcomes
        self._topology, self._instance, self._now = topology, instance, now
        self._kinds = {topology.control: "control", topology.commands: "commands", topology.queries: "queries"}
        self._unserved: asyncio.Queue[tuple[Task, bool]] = asyncio.Queue()
        """Commands, and whether they come from a session's own queue, which is then being drained and deleted."""
        self._open = True
        self._parked: set[asyncio.Task[None]] = set()
        self._worker = asyncio.create_task(self._serve_unserved(), name="gateway.unserved")

    def close(self) -> None:
        """Take no more commands: what still arrives stays unsettled, and RabbitMQ keeps it for the next start."""
        self._open = False

    async def stop(self) -> None:
        tasks = [self._worker, *self._parked]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- from the bus

    def on_command(self, incoming: Incoming) -> None:
        """From a session's control or work queue, or from the queue of unclaimed commands."""
        if (task := self._decoded(incoming)) is None:
            return
        session = self._fleet.get(task.command.session)
        if session is not None:
            self._hand_over(session, task)
        else:
            self._unserved.put_nowait((task, True))

    def on_unclaimed(self, incoming: Incoming) -> None:
        """From the queue of unclaimed commands: a `send` there missed its session's queue, so the session was not up."""
        if (task := self._decoded(incoming)) is not None:
            # In one queue with `create`, so that what follows a `create` finds its session.
            self._unserved.put_nowait((task, False))

    def on_query(self, incoming: Incoming) -> None:
        """`list`: answered by every daemon for its own sessions; nothing is published."""
        if (task := self._decoded(incoming)) is None:
            return
        if incoming.reply_to is None:
            self._outcomes.drop(incoming)
            return
        if task.command.expired(self._now()):
            outcome = Outcome.failed("list", task.command.id, expired_error())
        else:
            outcome = Outcome("list", task.command.id, {"instance": self._instance, "sessions": self._fleet.statuses()})
        self._outcomes.answer(incoming, outcome)

    def on_dead(self, incoming: Incoming, reason: str) -> None:
        """A copy of what went to the dead queue. What RabbitMQ itself put there has no outcome yet; what we did has its own."""
        if not reason:
            self._outcomes.drop(incoming)
        elif (task := self._decoded(incoming, dead=True)) is not None:
            self._outcomes.lapse(task, _lapsed(reason))

    # --- inside

    def _decoded(self, incoming: Incoming, *, dead: bool = False) -> Task | None:
        if not self._open:
            return None
        origin = Origin(self._kinds.get(incoming.exchange, ""), incoming.routing_key, incoming.message_id)
        try:
            command = decode_command(incoming.body, origin)
        except Rejected as e:
            self._reject(incoming, e, dead=dead)
            return None
        except Exception:
            # Left unsettled it would come back for ever, and meanwhile take a place in the prefetch.
            logger.bind(action="gateway_bug").exception("Reading a command met a bug.")
            error = CommandError("internal", "Reading the command met a bug.", hint="See the log of the daemon.", final=False)
            self._outcomes.refuse(incoming, error, command_id=incoming.message_id)
            return None
        self._log(command)
        return Task(command, incoming)

    def _reject(self, incoming: Incoming, error: Rejected, *, dead: bool) -> None:
        logger.bind(action="command_rejected", session=error.session, reason=error.reason).info("Command rejected: {}", error)
        if error.undecodable and not dead:
            self._outcomes.bury(incoming, error, session=error.session, command_id=error.command_id)
        else:
            self._outcomes.refuse(incoming, error, session=error.session, command_id=error.command_id, command=error.command)

    def _log(self, command: Command) -> None:
        logger.bind(action="command", session=command.session, command=command.name, id=command.id).debug(
            "Command {}.", command.name
        )

    def _hand_over(self, session: Session, task: Task) -> None:
        match task.command.name:
            case "status":
                self._status(session, task)
            case "send":
                session.offer(task)
            case _:
                session.command(task)

    def _status(self, session: Session, task: Task) -> None:
        if task.command.expired(self._now()):
            self._outcomes.fail(task, expired_error())
        else:
            self._outcomes.finish(task, Outcome("status", task.command.id, session.status()), journal=False)

    async def _serve_unserved(self) -> None:
        while True:
            task, drained = await self._unserved.get()
            try:
                await self._serve(task, drained=drained)
            except CommandError as e:
                self._refuse(task, e)
            except Exception:
                logger.bind(action="gateway_bug", session=task.command.session).exception("Serving a command met a bug.")
                self._refuse(task, CommandError("internal", "The command met a bug.", hint="See the log.", final=False))

    async def _serve(self, task: Task, *, drained: bool) -> None:
        command = task.command
        session = self._fleet.get(command.session)
        if session is None and await self._outcomes.replayed(task):
            return
        if session is None and command.name == "create":
            if command.expired(self._now()):
                raise expired_error()
            if self._fleet.removing(command.session):
                if drained:
                    raise _being_removed()  # the removal waits for this very command to be settled
                self._park(task)
                return
            session = await self._fleet.create(command.session)
        if session is None:
            raise CommandError("session_not_found", "Nobody serves this session.", hint="Publish `create` first.", final=False)
        if command.name == "send":
            raise CommandError(
                "not_connected",
                "The session, or its queue in RabbitMQ, has only just been made.",
                hint="Wait for its first `connected` event, or a few seconds; later, sends may be published at any time.",
                final=False,
            )
        self._hand_over(session, task)

    def _park(self, task: Task) -> None:
        """Wait beside the worker for a removal: the removal itself waits for commands that the worker has to answer."""
        parked = asyncio.create_task(self._after_removal(task), name=f"gateway.parked.{task.command.session}")
        self._parked.add(parked)
        parked.add_done_callback(self._parked.discard)

    async def _after_removal(self, task: Task) -> None:
        if await self._fleet.removed(task.command.session, REMOVAL_WAIT_S):
            self._unserved.put_nowait((task, False))
        else:
            self._refuse(task, _being_removed())

    def _refuse(self, task: Task, error: CommandError) -> None:
        command = task.command
        self._outcomes.refuse(task.incoming, error, session=command.session, command_id=command.id, command=command.name)
