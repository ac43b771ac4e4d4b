"""The page for people: its files, signing in, what is live on it (server-sent events), and the commands it gives.

Whoever signs in with the token gets a cookie that scripts cannot read and other sites cannot send, and a word that every command
must carry in a header, which other sites cannot know. A request with the bearer token itself needs neither.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any

import orjson
import segno
from aiohttp import web
from loguru import logger

from warren.errors import CommandError
from warren.ports import Commanding, Overview, Problem

COOKIE = "warren"
CSRF_HEADER = "X-Warren-Csrf"
SIGNED_IN_S = 12 * 3600.0
MAX_SIGNED_IN = 1_000
MAX_WATCHING = 100
WRONG_TOKEN_PAUSE_S = 1.0
COMMAND_TIMEOUT_S = 20.0
COLLECT_S = 0.15
"""How long changes are collected before they are sent: a burst of messages is one update."""
TICK_S = 10.0
"""How often everything is looked through, for what changes without saying so (the backlog, a backup, RabbitMQ)."""
FILES = {
    "/": ("index.html", "text/html"),
    "/page/app.js": ("app.js", "text/javascript"),
    "/page/app.css": ("app.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
FIELDS = ("session", "state", "since", "message", "hint", "until", "jid", "push_name", "last_message_at", "outbox", "backup")
"""What the page shows of a status."""

READER = web.RequestKey("reader", bool)
"""Whether whoever asks may read."""
Row = dict[str, Any]


class Page:
    """`check_token` None: there is no token, and so nobody can sign in or give commands."""

    def __init__(self, overview: Overview, commanding: Commanding, *, check_token: Callable[[str], bool] | None) -> None:
        self._overview, self._commanding, self._check_token = overview, commanding, check_token
        self._signed_in: dict[str, tuple[str, float]] = {}
        """Cookie to the word for commands and the end, by the monotonic clock."""
        self._watching: set[_Watcher] = set()
        self._guessing = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        return [
            *(web.get(path, _file(name, content_type)) for path, (name, content_type) in FILES.items()),
            web.get("/page/me", self._me),
            web.post("/page/sign-in", self._sign_in),
            web.post("/page/sign-out", self._sign_out),
            web.get("/page/events", self._events),
            web.post("/page/command", self._command),
        ]

    def changed(self, session: str) -> None:
        for watcher in self._watching:
            watcher.changed(session)

    def close(self) -> None:
        """End every open stream of events."""
        for watcher in self._watching:
            watcher.close()

    # --- who it is

    def signed_in(self, request: web.Request) -> bool:
        return self._word(request) is not None

    def _word(self, request: web.Request) -> str | None:
        word, until = self._signed_in.get(request.cookies.get(COOKIE, ""), ("", 0.0))
        return word if until > time.monotonic() else None

    async def _me(self, request: web.Request) -> web.Response:
        """What the page needs to know about its reader."""
        return web.json_response({"reader": request[READER], "token": self._check_token is not None, "csrf": self._word(request)})

    async def _sign_in(self, request: web.Request) -> web.Response:
        token = (await _body(request)).get("token")
        if self._check_token is None:
            raise CommandError("no_token", "This warren has no token.", hint="Set [http] token and start warrend again.")
        if not isinstance(token, str) or not self._check_token(token):
            logger.bind(action="sign_in_refused", remote=request.remote).warning("Somebody tried a wrong token on the page.")
            async with self._guessing:  # one guess a second, whoever guesses
                await asyncio.sleep(WRONG_TOKEN_PAUSE_S)
            return web.json_response({"error": {"code": "wrong_token", "message": "That is not the token."}}, status=403)
        self._forget_old()
        cookie, word = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self._signed_in[cookie] = (word, time.monotonic() + SIGNED_IN_S)
        logger.bind(action="signed_in", remote=request.remote).info("Somebody signed in to the page.")
        response = web.json_response({"reader": True, "token": True, "csrf": word})
        response.set_cookie(
            COOKIE,
            cookie,
            max_age=int(SIGNED_IN_S),
            path="/",
            httponly=True,
            samesite="Strict",
            secure=request.headers.get("X-Forwarded-Proto", request.scheme) == "https",
        )
        return response

    async def _sign_out(self, request: web.Request) -> web.Response:
        self._require_commander(request)
        self._signed_in.pop(request.cookies.get(COOKIE, ""), None)
        response = web.json_response({"reader": False})
        response.del_cookie(COOKIE, path="/")
        return response

    def _forget_old(self) -> None:
        now = time.monotonic()
        self._signed_in = {cookie: entry for cookie, entry in self._signed_in.items() if entry[1] > now}
        while len(self._signed_in) >= MAX_SIGNED_IN:
            del self._signed_in[next(iter(self._signed_in))]

    def _require_commander(self, request: web.Request) -> None:
        """Raises CommandError when the request may not change anything."""
        if self._check_token is None:
            raise CommandError(
                "no_token", "Without a token the page only shows.", hint="Set [http] token and start warrend again."
            )
        word = self._word(request)
        by_bearer = request[READER] and "Authorization" in request.headers
        by_cookie = word is not None and secrets.compare_digest(request.headers.get(CSRF_HEADER, "").encode(), word.encode())
        if not by_bearer and not by_cookie:
            raise CommandError("token_needed", "You are not signed in.", hint="Load the page again and sign in.")

    # --- what it shows

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """A stream of `sessions` events: first all of them, then what has changed."""
        if not request[READER]:
            return web.Response(status=401)
        if len(self._watching) >= MAX_WATCHING:
            return web.Response(status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        watcher = _Watcher()
        self._watching.add(watcher)
        try:
            await response.prepare(request)
            await self._stream(response, watcher, request)
        finally:
            self._watching.discard(watcher)
        return response

    async def _stream(self, response: web.StreamResponse, watcher: _Watcher, request: web.Request) -> None:
        clock = asyncio.get_running_loop().time
        shown: dict[str, Row] = {}
        problems: list[Problem] | None = None
        look_through_at = clock()
        while not watcher.closed and self._still_reader(request):
            everything = clock() >= look_through_at
            dirty = watcher.take()
            if everything:
                look_through_at = clock() + TICK_S
                now = self._rows()
                gone = [s for s in shown if s not in now]
            else:
                now = {s: row for s in dirty if (row := self._row(s)) is not None}
                gone = [s for s in dirty if s not in now and s in shown]
            new = [row for s, row in now.items() if shown.get(s) != row]
            found = self._overview.problems()
            if new or gone or found != problems:
                await response.write(_event("sessions", {"sessions": new, "gone": gone, "problems": found}))
            elif everything:
                await response.write(b": still there\n\n")  # a proxy between us must not take silence for an end
            problems = found
            shown.update(now)
            for session in gone:
                del shown[session]
            if await watcher.wait(look_through_at - clock()):
                await asyncio.sleep(COLLECT_S)

    def _still_reader(self, request: web.Request) -> bool:
        return self._check_token is None or "Authorization" in request.headers or self.signed_in(request)

    def _rows(self) -> dict[str, Row]:
        return {status["session"]: _shown(status) for status in self._overview.sessions()}

    def _row(self, session: str) -> Row | None:
        status = self._overview.session(session)
        return None if status is None else _shown(status)

    # --- what it does

    async def _command(self, request: web.Request) -> web.Response:
        self._require_commander(request)
        body = await _body(request)
        command, session, args = body.get("command"), body.get("session"), body.get("args", {})
        if not isinstance(command, str) or not isinstance(session, str) or not isinstance(args, dict):
            raise CommandError("invalid_argument", "A command has a `command`, a `session` and perhaps `args`.")
        logger.bind(action="page_command", session=session, command=command, remote=request.remote).info(
            "Asked for on the page: {}.", command
        )
        outcome = await self._commanding.run(command, session, args, COMMAND_TIMEOUT_S)
        if outcome is None:
            return web.json_response({"pending": True}, status=202)
        return web.Response(body=orjson.dumps(outcome.body()), content_type="application/json")


class _Watcher:
    """One open page: which sessions have changed since it was told."""

    def __init__(self) -> None:
        self.closed = False
        self._dirty: set[str] = set()
        self._news = asyncio.Event()

    def changed(self, session: str) -> None:
        self._dirty.add(session)
        self._news.set()

    def close(self) -> None:
        self.closed = True
        self._news.set()

    def take(self) -> set[str]:
        """What has changed since it was last asked."""
        dirty, self._dirty = self._dirty, set()
        return dirty

    async def wait(self, timeout_s: float) -> bool:
        """Until something has changed; False when nothing has within the time."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True


def _file(name: str, content_type: str) -> Callable[[web.Request], Any]:
    body = resources.files("warren").joinpath("web", name).read_bytes()

    async def serve(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return serve


async def _body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request. Its content type is what other sites cannot send without being asked for permission."""
    if request.content_type != "application/json":
        raise CommandError("invalid_json", "The body must be application/json.")
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        body = None
    if not isinstance(body, dict):
        raise CommandError("invalid_json", "The body is no JSON object.")
    return body


def _event(name: str, data: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def _shown(status: dict[str, Any]) -> Row:
    row = {field: status.get(field) for field in FIELDS}
    qr = status.get("qr")
    row["qr"] = qr and {**_drawn(qr["code"]), "expires_at": qr["expires_at"]}
    row["pairing_code"] = status.get("pairing_code")
    return row


@lru_cache(maxsize=256)
def _drawn(code: str) -> dict[str, Any]:
    """A QR code as the path of an SVG, with the quiet zone that scanners need; `size` is its width and height."""
    matrix = tuple(segno.make(code, error="l", micro=False).matrix_iter(border=4))
    dark = (f"M{x} {y}h1v1h-1z" for y, line in enumerate(matrix) for x, module in enumerate(line) if module)
    return {"path": "".join(dark), "size": len(matrix)}
