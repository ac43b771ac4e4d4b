"""The Python client of the control API against the real simulator; what the requests do is tested in engine/internal/sim."""

from __future__ import annotations

import pytest

from warren.edges.settings import find_engine_binary
from warren.simulator import Simulator, SimulatorError

ANA, BOB = "15550001", "15550002"


async def test_phones_and_groups() -> None:
    async with Simulator(find_engine_binary(None, "warren-sim"), seed=7) as sim:
        for number in (ANA, BOB):
            await sim.add_phone(number, "")
        group = await sim.create_group(ANA, [BOB], "Two")
        await sim.set_addressing(ANA, "lid")
        [direct] = await sim.send(ANA, BOB, "to one")
        [to_group] = await sim.send(ANA, group, "to all")
        shown = (await sim.received(BOB))["shown"]
        assert [(m["message_id"], m["group"], m["text"]) for m in shown] == [(direct, "", "to one"), (to_group, group, "to all")]
        first = sim.endpoint.root_key
        with pytest.raises(SimulatorError) as refused:
            await sim.pair_code(ANA, "ABCD-1234")
        assert refused.value.reason == "unknown_code"
    async with Simulator(find_engine_binary(None, "warren-sim"), seed=7) as again:
        assert again.endpoint.root_key == first


async def test_faults() -> None:
    async with Simulator(find_engine_binary(None, "warren-sim")) as sim:
        await sim.add_phone(ANA, "")
        once = await sim.add_fault("send_error", ANA, code=463)
        await sim.add_fault("freeze", seconds=60)
        assert [(f["id"], f["kind"], f.get("phone"), f["left"]) for f in await sim.faults()] == [
            (once, "send_error", ANA, 1),
            (once + 1, "freeze", None, None),
        ]
        await sim.lift_fault(once)
        await sim.lift_fault()
        assert await sim.faults() == []
        for strike in (
            sim.stream_error(ANA, conflict="replaced"),
            sim.failure(ANA, code=402, expire_s=60),
            sim.malformed(ANA),
        ):
            with pytest.raises(SimulatorError) as refused:
                await strike
            assert refused.value.reason == "not_connected"
        with pytest.raises(SimulatorError) as refused:
            await sim.stream_error(ANA, 1, code=515)
        assert refused.value.reason == "unknown_device"
