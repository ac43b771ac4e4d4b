"""An object store that fails in every way a cloud can, between a real daemon and an S3 emulator."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.acceptance.bucket import Bucket, backed_up
from tests.acceptance.rig import Rig, until
from tests.acceptance.test_backup import PEER, restores, talks
from tests.conftest import Broker
from tests.emulators.faulty_http import FaultyHttp
from tests.emulators.servers import s3_server
from tests.faults.plan import plan

from warren.core.sealing import Kind, Sealed

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server("bucket", log=tmp_path_factory.mktemp("s3") / "log") as url:
        yield url


@pytest.fixture
def prefix() -> str:
    return f"bfaults{next(numbers)}"


@pytest.fixture
def buckets(tmp_path: Path, s3: str, prefix: str) -> Callable[[str], Bucket]:
    """The same folder of the same bucket, seen through an endpoint."""

    def through(endpoint: str) -> Bucket:
        return Bucket(
            tmp_path,
            url=f"s3://bucket/{prefix}",
            endpoint=endpoint,
            allow_http="true",
            region="us-east-1",
            access_key_id="a",
            secret_access_key="b",
        )

    return through


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def kinds(whole: dict[str, dict[str, Sealed]], session: str) -> list[str]:
    return [f"{place} {sealed.kind.name}" for place, sealed in whole[session].items()]


QUICK = {"interval_s": "1", "timeout_s": "2", "start_wait_s": "3", "alarm_after": "2"}


@pytest.mark.timeout(900)
async def test_a_store_that_is_away_slow_or_broken_stops_nobody(
    tmp_path: Path, broker: Broker, prefix: str, s3: str, buckets: Callable[[str], Bucket]
) -> None:
    async with FaultyHttp(port_of(s3)) as proxy:
        bucket = buckets(proxy.url)
        async with Rig(tmp_path, broker.url, prefix, **bucket.environment(**QUICK)) as rig:
            await rig.sim.add_phone(PEER, "Peer")
            await rig.pair("acme", "15557010001")
            await backed_up(rig, "acme")
            puts = Counter({key: n for key, n in proxy.requests.items() if key[0] == "PUT"})
            assert all(n == 1 for key, n in puts.items() if "/acme/" in key[1]), "one put per backup"

            # Away.
            proxy.down = True
            after = len(rig.got.events)
            await talks(rig, "acme", "while it is away")
            alarm = await rig.got.event("backup_failed", "acme", after=after)
            assert alarm["data"]["code"] == "unavailable"
            assert alarm["data"]["last_backup_at"]
            failed = await rig.call("backup", "acme")
            assert failed.error is not None
            assert failed.error["code"] == "backup_failed"
            await asyncio.sleep(plan().bucket_outage_s)  # the length of the outage, not a wait for something
            status = (await rig.call("status", "acme")).result
            assert status["state"] == "online"
            assert status["backup"]["failures"] >= 2
            assert len(rig.got.of("backup_failed")) == 1
            complaints = rig.warrend.log.read_text().count('"action":"backup_failed"')
            assert complaints <= 2 + plan().bucket_outage_s / 60, "a line a minute"
            proxy.down = False

            async def recovered() -> bool:
                backup = (await rig.call("status", "acme")).result["backup"]
                return backup["failures"] == 0 and not backup["pending"]

            # The pause before the next try has grown with the outage.
            await until(recovered, "a backup after the outage", 60 + 2 * plan().bucket_outage_s)
            assert rig.warrend.log.read_text().count('"action":"backup_recovered"') == 1

            # Slow, and failing now and then.
            proxy.slow_s = 0.7
            await talks(rig, "acme", "while it is slow")
            await backed_up(rig, "acme")
            proxy.slow_s, proxy.errors = 0.0, 3
            await talks(rig, "acme", "while it fails")
            await until(recovered, "a backup in spite of the errors", 60)

            # A put that succeeds and whose answer is lost: known again as ours, nothing overwritten, nobody steps down.
            before = set(await buckets(s3).raw())
            await talks(rig, "acme", "before the answer is lost")
            proxy.losing = 1
            lost = await rig.call("backup", "acme")
            if lost.ok:  # the timer's backup had met it before ours came
                await until(lambda: proxy.losing == 0, "the lost answer")
            await until(recovered, "a backup after the lost answer", 60)
            assert len(set(await buckets(s3).raw()) - before) >= 1
            assert (await rig.call("status", "acme")).result["state"] == "online"

            # Its disk is lost, and what is read back is cut off half-way at first.
            await rig.warrend.kill()
            shutil.rmtree(rig.warrend.state / "sessions")
            proxy.cutting = 2
            after = len(rig.got.events)
            await rig.restart()
            await rig.got.event("connected", "acme", after=after)
            assert proxy.cutting == 0
            await talks(rig, "acme", "after it all")
            assert rig.got.sequence_faults == []
        whole = await buckets(s3).verify()
        order = [place for place, sealed in whole["acme"].items() if sealed.kind is Kind.SEAL]
        assert len(order) == 1, "restored once, from the newest"


@pytest.mark.timeout(400)
async def test_killed_during_upload_prune_and_restore(
    tmp_path: Path, broker: Broker, prefix: str, s3: str, buckets: Callable[[str], Bucket]
) -> None:
    async with FaultyHttp(port_of(s3)) as proxy:
        slow = {"interval_s": "0", "timeout_s": "20", "keep_last": "1", "keep_days": "0"}
        async with Rig(tmp_path, broker.url, prefix, **buckets(proxy.url).environment(**slow)) as rig:
            await rig.sim.add_phone(PEER, "Peer")
            await rig.pair("acme", "15557020001")
            await backed_up(rig, "acme")

            async def back_again(text: str) -> None:
                after = len(rig.got.events)
                await rig.restart()
                await rig.got.event("connected", "acme", after=after)
                await talks(rig, "acme", text)
                await buckets(s3).verify()

            # Upload.
            await talks(rig, "acme", "one")
            proxy.held = {"PUT"}
            proxy.holding.clear()
            asking = asyncio.create_task(rig.call("backup", "acme", timeout_s=5.0))
            await asyncio.wait_for(proxy.holding.wait(), 20)
            await rig.warrend.kill()
            proxy.release()
            await asyncio.gather(asking, return_exceptions=True)
            await back_again("after a kill during the upload")

            # Prune: at the first backup of a day, so of a life of the daemon.
            proxy.held = {"DELETE"}
            for _ in range(3):
                await talks(rig, "acme", "more")
                asking = asyncio.create_task(rig.call("backup", "acme", timeout_s=5.0))
                await asyncio.wait({asking, asyncio.create_task(proxy.holding.wait())}, return_when=asyncio.FIRST_COMPLETED)
                if proxy.holding.is_set():
                    break
                await asking
                await rig.warrend.kill()
                await rig.restart()
            assert proxy.holding.is_set(), "a deletion was under way"
            await rig.warrend.kill()
            proxy.release()
            await asyncio.gather(asking, return_exceptions=True)
            await back_again("after a kill during the prune")
            await backed_up(rig, "acme")

            # Restore: killed while the state is read, and while the seal is put.
            for held in ({"GET"}, {"PUT"}):
                await rig.warrend.kill()
                shutil.rmtree(rig.warrend.state / "sessions", ignore_errors=True)
                await rig.warrend.start()
                proxy.holding.clear()
                proxy.held = held
                await asyncio.wait_for(proxy.holding.wait(), 30)
            await rig.warrend.kill()
            proxy.release()
            await back_again("after kills during the restore")
            assert restores(rig.warrend.log) >= 1
            await backed_up(rig, "acme")
            assert rig.got.sequence_faults == []
        whole = await buckets(s3).verify()
        print(kinds(whole, "acme"))


@pytest.mark.timeout(300)
async def test_two_warrens_on_one_session(
    tmp_path: Path, broker: Broker, prefix: str, s3: str, buckets: Callable[[str], Bucket]
) -> None:
    """Two prefixes on RabbitMQ, so the lock keeps nobody out; one bucket. Exactly one keeps writing."""
    bucket = buckets(s3)
    async with Rig(tmp_path, broker.url, prefix, **bucket.environment(**QUICK)) as rig:
        await rig.sim.add_phone(PEER, "Peer")
        await rig.pair("acme", "15557030001")
        await backed_up(rig, "acme")
        (tmp_path / "second").mkdir()
        other = Rig(tmp_path / "second", broker.url, f"{prefix}x", **bucket.environment(**QUICK))
        other.lend(rig.sim)
        async with other:
            # It is another warren's, so it is left alone until somebody insists.
            assert await other.client.list_sessions() == []
            created = await other.call("create", "acme")
            assert created.ok, created
            assert created.result["epoch"] == 2
            await other.got.event("connected", "acme")
            # The first one is replaced at WhatsApp. What it wants to write down next meets the other one's seal.
            assert (await rig.call("disconnect", "acme")).ok

            async def stood_down() -> bool:
                status = (await rig.call("status", "acme")).result
                return (status["state"], status["code"]) == ("quarantined", "superseded")

            await until(stood_down, "the first one to stand down", 60)
            before = await bucket.raw()
            other._numbers["acme"] = rig.number("acme")
            await talks(other, "acme", "mine")
            await backed_up(other, "acme")
            refused = await rig.call("backup", "acme")
            assert refused.error is not None
            now = await bucket.raw()
            assert all(now.get(name, data) == data for name, data in before.items()), "nothing is ever overwritten"
            new = {name for name in now if name not in before}
            assert {name.split("/")[-2] for name in new} == {"0000000002"}, "only the owner of epoch 2 writes"
            # It stays so over a restart.
            assert await rig.warrend.stop() == 0
            await rig.restart()
            assert (await rig.call("status", "acme")).result["code"] == "superseded"
        assert kinds(await bucket.verify(), "acme")[-1].endswith("STATE")
