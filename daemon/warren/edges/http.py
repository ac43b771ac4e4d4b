"""The HTTP server: health and metrics for machines, sessions for both, and the page for people (`edges.http_page`).

| path | who may | what |
|---|---|---|
| `/healthz` | everybody | 200 as long as the event loop runs |
| `/readyz` | everybody; the reasons only who may read | 200, or 503 while something keeps the daemon from its work |
| `/metrics`, `/sessions` | who may read | Prometheus' text form; every session's status as JSON |
| `/`, `/page/...` | everybody; what is in it only who may read | the page |

Who may read: with `[http] token`, whoever brings it (as bearer, or by signing in to the page); without one, whoever is on this
machine. Without a token nobody may give commands.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import orjson
from aiohttp import web
from loguru import logger

from warren.core.redact import redact
from warren.edges.http_metrics import Exposition
from warren.edges.http_page import READER, Page
from warren.errors import BrokerUnavailable, CommandError, ConfigError, WarrenError
from warren.ports import Commanding, Overview

MAX_BODY_BYTES = 16_384
STOP_S = 2.0
"""How long requests may take to end when the server stops."""
NOT_ALLOWED = ("no_token", "token_needed")
HEADERS = {
    "Server": "warren",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """`token` None: reading is free, on loopback only; commands are refused."""

    address: str
    port: int
    token: str | None = None


class HttpServer:
    """Serves from `start` to `stop`. `changed` tells the open pages that a session is not what it was."""

    def __init__(self, overview: Overview, commanding: Commanding, options: HttpOptions) -> None:
        self._overview, self._options = overview, options
        self._exposition = Exposition(overview.families)
        self._page = Page(overview, commanding, check_token=self._is_token if options.token else None)
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/sessions", self._sessions),
                *self._page.routes(),
            ]
        )
        app.on_response_prepare.append(_add_headers)
        app.on_shutdown.append(self._end_pages)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=STOP_S, keepalive_timeout=30.0)

    async def start(self) -> None:
        """Raises ConfigError when the address cannot be had."""
        address, port = self._options.address, self._options.port
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, address, port).start()
        except OSError as e:
            await self._runner.cleanup()
            raise ConfigError(
                f"[http] port {port} on {address} cannot be had: {e.strerror or e}.",
                hint="Another program, or another warrend, may listen there: choose another port.",
            ) from e
        logger.bind(action="http_ready", address=address, port=port).info("HTTP on {} port {}.", address, port)

    async def stop(self) -> None:
        await self._runner.cleanup()

    def changed(self, session: str) -> None:
        """For every change of a session that a status shows."""
        self._page.changed(session)

    # --- who may what

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[READER] = self._may_read(request)
        try:
            return await handler(request)
        except web.HTTPException:
            raise
        except CommandError as e:
            return _error(403 if e.reason in NOT_ALLOWED else 422, e.reason, e)
        except BrokerUnavailable as e:
            return _error(503, e.code, e)
        except ConnectionError:
            raise  # the client is gone, and aiohttp knows what to do about it
        except Exception:
            logger.bind(action="http_bug", path=redact(request.path)).exception("Answering an HTTP request met a bug.")
            return _error(500, "internal", WarrenError("Answering met a bug.", hint="See the log of the daemon."))

    def _may_read(self, request: web.Request) -> bool:
        if self._options.token is None:
            # A page from elsewhere whose name leads to 127.0.0.1 has its own name in here.
            return _is_loopback(request.host)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return (scheme.lower() == "bearer" and self._is_token(token.strip())) or self._page.signed_in(request)

    def _is_token(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), (self._options.token or "").encode())

    async def _end_pages(self, _app: web.Application) -> None:
        self._page.close()

    # --- for machines

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        problems = self._overview.problems()
        ready = not any(problem.blocking for problem in problems)
        told = {"ready": ready, "problems": problems} if request[READER] else {"ready": ready}
        return _json(told, 200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        if not request[READER]:
            return refused()
        body, content_type = self._exposition.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _sessions(self, request: web.Request) -> web.Response:
        return _json({"sessions": self._overview.sessions()}) if request[READER] else refused()


def refused() -> web.Response:
    """The answer to who may not."""
    error = WarrenError("This needs the token.", hint="Send `Authorization: Bearer TOKEN`, with [http] token.")
    response = _error(401, "token_needed", error)
    response.headers["WWW-Authenticate"] = 'Bearer realm="warren"'
    return response


def _is_loopback(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")


def _error(status: int, code: str, error: WarrenError) -> web.Response:
    return _json({"error": {"code": code, "message": error.message, "hint": error.hint}}, status)


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
