"""Who may see what over HTTP, and who may do what. The page itself is tested in a browser: tests/page."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from warren.core.envelope import Outcome
from warren.core.metrics import Family, Metrics, gauge
from warren.edges import http_page
from warren.edges.http import HttpOptions, HttpServer
from warren.errors import BrokerUnavailable, CommandError, ConfigError
from warren.ports import Problem

TOKEN = "a-token-for-the-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
AWAY = Problem("rabbitmq_away", "RabbitMQ cannot be reached.", "Start it.")
LATE = Problem("backup_failing", "Backups fail.", "Look at the bucket.", blocking=False)

Make = Callable[..., Awaitable["Served"]]


class World:
    """What the server shows and asks for."""

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.known: dict[str, dict[str, Any]] = {}
        self.metrics = Metrics()
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.answer: Outcome | Exception | None = Outcome("create", "page-1", {"state": "connecting"})

    @property
    def ready(self) -> bool:
        return not any(p.blocking for p in self.found)

    def problems(self) -> list[Problem]:
        return list(self.found)

    def families(self) -> list[Family]:
        return [*self.metrics.families(), gauge("warren_ready", "Whether it is.", self.ready), gauge("warren_unknown", "?", None)]

    def sessions(self) -> list[dict[str, Any]]:
        return list(self.known.values())

    def session(self, session: str) -> dict[str, Any] | None:
        return self.known.get(session)

    async def run(self, command: str, session: str, args: dict[str, Any], timeout_s: float) -> Outcome | None:
        self.asked.append((command, session, args))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def put(self, session: str, state: str, **more: Any) -> None:
        self.known[session] = {"session": session, "state": state, "since": "2026-11-20T12:00:00.000Z", "outbox": 0, **more}


class Served:
    """A running server and a browser's session with it."""

    def __init__(self, world: World, server: HttpServer, port: int, http: aiohttp.ClientSession) -> None:
        self.world, self.server, self.http = world, server, http
        self.base = f"http://127.0.0.1:{port}"

    async def get(self, path: str, **headers: str) -> tuple[int, Any]:
        async with self.http.get(self.base + path, headers=headers) as response:
            body = await response.read()
            return response.status, json.loads(body) if "json" in response.content_type else body.decode()

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        async with self.http.post(self.base + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def sign_in(self) -> str:
        status, me = await self.post("/page/sign-in", {"token": TOKEN})
        assert status == 200
        return str(me["csrf"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Served] = []

    async def serve(token: str | None = TOKEN) -> Served:
        world, port = World(), free_port()
        server = HttpServer(world, world, HttpOptions("127.0.0.1", port, token))
        await server.start()
        # By address: aiohttp keeps no cookies of IP addresses unless told.
        served = Served(world, server, port, aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)))
        made.append(served)
        return served

    yield serve
    for served in made:
        await served.http.close()
        await served.server.stop()


@pytest.fixture
async def served(make: Make) -> Served:
    return await make()


# --- for machines -----------------------------------------------------------------------------------------------------


async def test_health_is_for_everybody(served: Served) -> None:
    assert await served.get("/healthz") == (200, "ok\n")


async def test_ready_or_not_is_for_everybody_and_the_reasons_for_readers(served: Served) -> None:
    served.world.found = [LATE]
    assert await served.get("/readyz") == (200, {"ready": True})
    served.world.found = [AWAY, LATE]
    assert await served.get("/readyz") == (503, {"ready": False})
    status, told = await served.get("/readyz", **BEARER)
    assert status == 503
    assert [(p["code"], p["blocking"]) for p in told["problems"]] == [("rabbitmq_away", True), ("backup_failing", False)]
    assert told["problems"][0]["hint"] == "Start it."


@pytest.mark.parametrize("path", ["/metrics", "/sessions", "/page/events"])
async def test_numbers_and_sessions_need_the_token(served: Served, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Cookie": "warren=guessed"}):
        status, _ = await served.get(path, **headers)
        assert status == 401, headers


async def test_sessions_as_json(served: Served) -> None:
    served.world.put("acme", "online")
    status, told = await served.get("/sessions", **BEARER)
    assert (status, [s["session"] for s in told["sessions"]]) == (200, ["acme"])


async def test_metrics_are_what_prometheus_reads(served: Served) -> None:
    served.world.metrics.published("confirmed", 0.004)
    served.world.metrics.command(Outcome("send", "1"), 0.3)
    status, text = await served.get("/metrics", **BEARER)
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = {(s.name, tuple(s.labels.items())): s.value for f in families.values() for s in f.samples}
    assert samples["warren_ready", ()] == 1
    assert samples["warren_commands_total", (("command", "send"), ("outcome", "completed"))] == 1
    assert samples["warren_confirm_seconds_bucket", (("le", "0.005"),)] == 1
    assert samples["warren_confirm_seconds_bucket", (("le", "0.0025"),)] == 0
    assert samples["warren_confirm_seconds_sum", ()] == pytest.approx(0.004)
    assert families["warren_unknown"].samples == []
    assert "process_resident_memory_bytes" in families


async def test_without_a_token_only_this_machine_reads(make: Make) -> None:
    served = await make(None)
    served.world.put("acme", "online")
    for host in ("127.0.0.1", "localhost:9464", "[::1]:9464"):
        assert (await served.get("/sessions", Host=host))[0] == 200, host
    # A page of an attacker whose name leads to 127.0.0.1.
    for host in ("attacker.example", "127.0.0.1.attacker.example:9464", "192.0.2.1"):
        assert (await served.get("/sessions", Host=host))[0] == 401, host
    assert (await served.post("/page/command", {"command": "create", "session": "acme"}))[0] == 403
    assert (await served.post("/page/sign-in", {"token": ""}))[0] == 403
    assert served.world.asked == []


async def test_every_answer_forbids_what_the_page_does_not_need(served: Served) -> None:
    for path in ("/", "/page/app.js", "/healthz", "/sessions", "/nothing-here"):
        async with served.http.get(served.base + path) as response:
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy, path
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Server"] == "warren"


async def test_a_port_that_is_taken_is_told_at_the_start(served: Served) -> None:
    port = int(served.base.rsplit(":", 1)[1])
    other = HttpServer(served.world, served.world, HttpOptions("127.0.0.1", port))
    with pytest.raises(ConfigError, match=rf"port {port} on 127\.0\.0\.1.*choose another port"):
        await other.start()


async def test_a_bug_is_an_answer_and_not_the_end(served: Served) -> None:
    served.world.known["broken"] = {"session": object()}
    status, told = await served.get("/sessions", **BEARER)
    assert (status, told["error"]["code"]) == (500, "internal")
    assert (await served.get("/healthz"))[0] == 200


# --- the page: who it is ------------------------------------------------------------------------------------------------


async def test_signing_in_gives_a_cookie_that_scripts_and_other_sites_cannot_use(served: Served) -> None:
    assert (await served.get("/page/me"))[1] == {"reader": False, "token": True, "csrf": None}
    async with served.http.post(served.base + "/page/sign-in", json={"token": TOKEN}) as response:
        cookie = response.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert "Secure" not in cookie
        assert TOKEN not in cookie
    assert (await served.get("/page/me"))[1]["reader"] is True
    assert (await served.get("/sessions"))[0] == 200
    async with served.http.post(
        served.base + "/page/sign-in", json={"token": TOKEN}, headers={"X-Forwarded-Proto": "https"}
    ) as response:
        assert "Secure" in response.headers["Set-Cookie"]


async def test_a_wrong_token_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_page, "WRONG_TOKEN_PAUSE_S", 0.01)
    for token in ("wrong", "", None, 7, TOKEN + "x"):
        status, told = await served.post("/page/sign-in", {"token": token})
        assert (status, told["error"]["code"]) == (403, "wrong_token")
    assert (await served.get("/page/me"))[1]["reader"] is False


async def test_signing_in_ends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    word = await served.sign_in()
    assert (await served.post("/page/sign-out", {}, **{"X-Warren-Csrf": word}))[0] == 200
    assert (await served.get("/sessions"))[0] == 401
    monkeypatch.setattr(http_page, "SIGNED_IN_S", -1.0)
    async with served.http.post(served.base + "/page/sign-in", json={"token": TOKEN}) as response:
        cookie = response.headers["Set-Cookie"].split(";")[0]
    assert (await served.get("/sessions", Cookie=cookie))[0] == 401


# --- the page: what it does ---------------------------------------------------------------------------------------------

CREATE = {"command": "create", "session": "acme"}


async def test_a_command_needs_the_word_that_other_sites_do_not_know(served: Served) -> None:
    assert (await served.post("/page/command", CREATE))[0] == 403
    word = await served.sign_in()
    for headers in ({}, {"X-Warren-Csrf": "guessed"}, {"X-Warren-Csrf": ""}):
        status, told = await served.post("/page/command", CREATE, **headers)
        assert (status, told["error"]["code"]) == (403, "token_needed")
    async with served.http.post(served.base + "/page/command", data=CREATE, headers={"X-Warren-Csrf": word}) as response:
        assert response.status == 422  # a form, which other sites can send
    assert served.world.asked == []
    status, told = await served.post("/page/command", CREATE, **{"X-Warren-Csrf": word})
    assert (status, told["ok"], told["result"]) == (200, True, {"state": "connecting"})
    assert served.world.asked == [("create", "acme", {})]


async def test_programs_give_commands_with_the_bearer_token(served: Served) -> None:
    assert (await served.post("/page/command", CREATE, **BEARER))[0] == 200
    assert (await served.post("/page/command", CREATE, Authorization="Bearer wrong"))[0] == 403


async def test_what_becomes_of_a_command(served: Served) -> None:
    async def ask() -> tuple[int, Any]:
        return await served.post("/page/command", CREATE, **BEARER)

    served.world.answer = None
    assert await ask() == (202, {"pending": True})
    served.world.answer = Outcome.failed("create", "page-1", CommandError("session_limit", "Full.", hint="Less."))
    status, told = await ask()
    assert (status, told["error"]["code"]) == (200, "session_limit")
    served.world.answer = CommandError("invalid_session", "That is no session id.")
    assert (await ask())[0] == 422
    served.world.answer = BrokerUnavailable("RabbitMQ is away.", hint="Wait.")
    assert await ask() == (503, {"error": {"code": "broker_unavailable", "message": "RabbitMQ is away.", "hint": "Wait."}})


@pytest.mark.parametrize("body", [[], "x", {"command": "create"}, {"command": 1, "session": "a"}, {**CREATE, "args": []}])
async def test_nonsense_is_refused(served: Served, body: Any) -> None:
    status, told = await served.post("/page/command", body, **BEARER)
    assert status == 422
    assert told["error"]["message"]
    assert served.world.asked == []


# --- the page: what it shows --------------------------------------------------------------------------------------------


class Stream:
    """Server-sent events, one by one."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            while line := await self._response.content.readline():
                if line.startswith(b"data: "):
                    told: dict[str, Any] = json.loads(line[6:])
                    return told
        raise AssertionError("the stream ended")

    async def end(self) -> None:
        async with asyncio.timeout(10):
            while await self._response.content.readline():
                pass


async def test_the_stream_begins_with_everything_and_goes_on_with_changes(served: Served) -> None:
    world = served.world
    world.put("acme", "online", jid="1@s.whatsapp.net")
    world.put("zebra", "stopped")
    async with served.http.get(served.base + "/page/events", headers=BEARER) as response:
        assert response.content_type == "text/event-stream"
        stream = Stream(response)
        first = await stream.next()
        assert [(s["session"], s["state"]) for s in first["sessions"]] == [("acme", "online"), ("zebra", "stopped")]
        assert (first["gone"], first["problems"]) == ([], [])

        world.put("zebra", "pairing", qr={"code": "2@abc", "expires_at": "2026-11-20T12:00:20.000Z", "remaining": 3})
        served.server.changed("zebra")
        (zebra,) = (await stream.next())["sessions"]
        assert zebra["state"] == "pairing"
        assert zebra["qr"]["path"].startswith("M4 4h1v1h-1z")  # behind the quiet zone of four
        assert zebra["qr"]["size"] >= 21 + 8

        del world.known["acme"]
        world.found = [AWAY]
        served.server.changed("acme")
        told = await stream.next()
        assert (told["sessions"], told["gone"], told["problems"][0]["code"]) == ([], ["acme"], "rabbitmq_away")


async def test_what_changes_without_saying_so_is_found(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_page, "TICK_S", 0.05)
    async with served.http.get(served.base + "/page/events", headers=BEARER) as response:
        stream = Stream(response)
        assert (await stream.next())["sessions"] == []
        served.world.put("acme", "online", outbox=7)
        assert (await stream.next())["sessions"][0]["outbox"] == 7
        served.world.known.clear()
        assert (await stream.next())["gone"] == ["acme"]


async def test_the_stream_ends_with_signing_out_and_with_the_server(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_page, "TICK_S", 0.05)
    word = await served.sign_in()
    async with served.http.get(served.base + "/page/events") as response:
        await Stream(response).next()
        await served.post("/page/sign-out", {}, **{"X-Warren-Csrf": word})
        await Stream(response).end()
    async with served.http.get(served.base + "/page/events", headers=BEARER) as response:
        await Stream(response).next()
        await served.server.stop()
        await Stream(response).end()


async def test_too_many_open_pages_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_page, "MAX_WATCHING", 1)
    async with served.http.get(served.base + "/page/events", headers=BEARER) as response:
        await Stream(response).next()
        assert (await served.get("/page/events", **BEARER))[0] == 503
