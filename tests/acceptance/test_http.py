"""Health and metrics of a real daemon: what they say while it works, and when something is wrong."""

from __future__ import annotations

import itertools
import os
import signal
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.acceptance.rig import Rig, until
from tests.conftest import Broker
from tests.proxy import Proxy

TOKEN = "a-token-for-the-tests"
numbers = itertools.count(1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Watcher:
    """What Prometheus and a load balancer ask."""

    def __init__(self, port: int, http: aiohttp.ClientSession) -> None:
        self._base, self._http = f"http://127.0.0.1:{port}", http

    async def get(self, path: str) -> tuple[int, bytes]:
        async with self._http.get(self._base + path, headers={"Authorization": f"Bearer {TOKEN}"}) as response:
            return response.status, await response.read()

    async def value(self, name: str, **labels: str) -> float:
        """A sample; 0 when it is not there (yet)."""
        for family in text_string_to_metric_families((await self.get("/metrics"))[1].decode()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return 0.0

    async def problems(self) -> list[str]:
        _, body = await self.get("/readyz")
        told: dict[str, Any] = orjson.loads(body)
        return [problem["code"] for problem in told["problems"]]


@pytest.fixture
def settings() -> dict[str, str]:
    return {"WARREN_HTTP__PORT": str(free_port()), "WARREN_HTTP__TOKEN": TOKEN}


@pytest.fixture
def prefix() -> str:
    return f"http{next(numbers)}"


async def test_the_metrics_tell_what_happened_and_readiness_what_is_wrong(
    tmp_path: Path, broker: Broker, prefix: str, settings: dict[str, str]
) -> None:
    parts = urlsplit(broker.url)
    async with Proxy(parts.hostname or "", parts.port or 0) as proxy, aiohttp.ClientSession() as http:
        through = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{proxy.port}").geturl()
        # The test's own subscriber and client go straight to RabbitMQ: what is cut off is the daemon.
        async with Rig(tmp_path, broker.url, prefix, **settings, WARREN_AMQP__URL=through) as rig:
            watch = Watcher(int(settings["WARREN_HTTP__PORT"]), http)
            await rig.pair("acme", "15550200001")
            await rig.sim.add_phone("15550200002", "Ben")
            outcome = await rig.call("send", "acme", {"to": "+15550200002", "text": "out"})
            assert outcome.ok
            await rig.sim.send("15550200002", "15550200001", "in")
            await rig.got.event("message", "acme")

            assert await watch.get("/healthz") == (200, b"ok\n")
            assert (await watch.get("/readyz"))[0] == 200
            assert await watch.value("warren_sessions", state="online") == 1
            assert await watch.value("warren_messages_sent_total") == 1
            assert await watch.value("warren_messages_received_total") == 1
            assert await watch.value("warren_commands_total", command="create", outcome="completed") == 1
            assert await watch.value("warren_confirm_seconds_count") > 3
            assert await watch.value("warren_engines_up") == await watch.value("warren_engines") == 1
            await until(_positive(watch, "warren_engine_resident_memory_bytes", engine="0"), "the first ping's answer")
            await until(_positive(watch, "warren_backups_total"), "the first backup")
            assert await watch.value("warren_backup_bytes_total") > 0

            # An engine that dies is counted; its session reconnects.
            os.kill(rig.warrend.engine_pids()[0], signal.SIGKILL)
            await until(_positive(watch, "warren_engine_restarts_total"), "the restart to be counted")
            lost = _positive(watch, "warren_session_transitions_total", state="backing_off", reason="engine_lost")
            await until(lost, "the session to notice")
            await until(_positive(watch, "warren_reconnects_total"), "an attempt to reconnect")
            await until(_positive(watch, "warren_sessions", state="online"), "the session online again")

            # RabbitMQ is cut off.
            proxy.refusing = True
            proxy.cut()
            await until(_not_ready(watch, "rabbitmq_away"), "that RabbitMQ is away")
            assert (await watch.get("/readyz"))[0] == 503
            assert await watch.value("warren_ready") == await watch.value("warren_rabbitmq_connected") == 0
            await rig.sim.send("15550200002", "15550200001", "while it is away")
            await until(_positive(watch, "warren_outbox_bytes"), "a waiting event")
            proxy.refusing = False
            await until(_positive(watch, "warren_ready"), "ready again")
            await rig.got.event("message", "acme", lambda data: data["text"] == "while it is away")


def _positive(watch: Watcher, name: str, **labels: str) -> Any:
    async def positive() -> bool:
        return await watch.value(name, **labels) > 0

    return positive


def _not_ready(watch: Watcher, problem: str) -> Any:
    async def there() -> bool:
        return problem in await watch.problems()

    return there
