"""Commands from the page: published like everybody's, waited for by id."""

from __future__ import annotations

import asyncio

import pytest
from tests.fakes import MemoryBus

from warren.core.envelope import Outcome
from warren.core.names import Topology
from warren.errors import BrokerUnavailable, CommandError
from warren.ports import Published
from warren.services.desk import Desk


@pytest.fixture
async def bus() -> MemoryBus:
    return MemoryBus()


def desk(bus: MemoryBus) -> Desk:
    return Desk(bus, Topology("warren"))  # type: ignore[arg-type]


async def published(bus: MemoryBus) -> str:
    async with asyncio.timeout(10):
        while not bus.published:
            await asyncio.sleep(0)
    return bus.published[-1][0]


async def test_the_outcome_with_the_commands_id_is_the_answer(bus: MemoryBus) -> None:
    page = desk(bus)
    asking = asyncio.create_task(page.run("create", "acme", {}, 10))
    command_id = await published(bus)
    assert bus.published == [(command_id, "acme")]
    page.ended(Outcome("create", "somebody-elses"))
    page.ended(Outcome("create", None))
    assert not asking.done()
    page.ended(Outcome("create", command_id, {"state": "connecting"}))
    page.ended(Outcome("create", command_id, {"state": "again"}))
    assert await asking == Outcome("create", command_id, {"state": "connecting"})


async def test_without_an_outcome_in_time_it_goes_on_by_itself(bus: MemoryBus) -> None:
    assert await desk(bus).run("logout", "acme", {}, 0.01) is None
    assert len(bus.published) == 1


@pytest.mark.parametrize("answer", [Published.UNKNOWN, Published.REFUSED])
async def test_what_rabbitmq_did_not_confirm_is_told(bus: MemoryBus, answer: Published) -> None:
    bus.answers = lambda _: answer
    with pytest.raises(BrokerUnavailable, match="did not confirm"):
        await desk(bus).run("create", "acme", {}, 10)


async def test_what_cannot_be_asked_for_is_not_published(bus: MemoryBus) -> None:
    for command, session in (("send", "acme"), ("dance", "acme"), ("create", "a.b"), ("create", "")):
        with pytest.raises(CommandError):
            await desk(bus).run(command, session, {}, 10)
    bus.connected.clear()
    with pytest.raises(BrokerUnavailable, match="nothing was asked"):
        await desk(bus).run("create", "acme", {}, 10)
    assert bus.published == []
