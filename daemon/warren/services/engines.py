"""Supervision of engine processes: started when needed, pinged, killed when hung, restarted with backoff.

Sessions are spread over processes, because one malformed frame can take a whole whatsmeow process down. A process that ends takes
only its own sessions with it, and each of them is told (`engine_lost`) and connects again by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from warren.core import frames
from warren.core.backoff import delay
from warren.core.frames import EngineEvent, Response
from warren.core.metrics import Metrics
from warren.errors import EngineError, FrameError, WarrenError
from warren.ports import EngineProcess, StartEngine

OnEvent = Callable[[EngineEvent], None]
"""Takes an event of one generation, in the reader: it only hands over."""


OPEN_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 15.0
"""For a process that is replaced to close its sessions."""
OVER_CEILING = 2
"""Pings in a row that find a process above its ceiling until it is replaced: a peak is no leak."""
STRAYS = 10_000
"""Events between two pings that are for nobody. A generation that was given up says a few more; thousands are a bug."""
FRAMES_AT_ONCE = 100
"""Frames that are handed over without a break, so that an engine that floods does not take the event loop for itself."""


class Flood(WarrenError):
    """An engine says more than the protocol allows: what it means can no longer be trusted, and its process is ended."""

    code = "flood"


SNAPSHOT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineOptions:
    sessions_per_process: int = 250
    ping_interval_s: float = 5.0
    ping_timeout_s: float = 15.0
    hello_timeout_s: float = 15.0
    restart_base_s: float = 0.2
    restart_cap_s: float = 30.0
    memory_ceiling: int = 0
    """Bytes of resident memory above which a process is replaced; 0: none."""
    stable_s: float = 60.0
    """A process that lived this long is restarted without backoff."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """One engine as of its last answered ping; None: not told yet, or not known to the engine."""

    number: int
    up: bool
    sessions: int
    rss_bytes: int | None
    wa_version: str | None
    wa_version_age_s: float | None
    """For how long WhatsApp has not been heard to serve that version."""


def _gone() -> EngineError:
    return EngineError("The engine process ended.", engine_code="gone")


@dataclass(slots=True)
class _Open:
    """An open generation of a session and who listens to it."""

    generation: int
    on_event: OnEvent


class _Host:
    """One engine process after the other, in one place: the sessions it serves, its requests in flight."""

    def __init__(
        self, number: int, start: StartEngine, options: EngineOptions, random01: Callable[[], float], metrics: Metrics
    ) -> None:
        self.number = number
        self._metrics = metrics
        self._pong: dict[str, Any] = {}
        self._strays = 0
        self._end = "engine_lost"
        self.sessions: dict[str, _Open] = {}
        self.coming = 0
        """Sessions that wait for the process to be up; they have their places already."""
        self._start, self._options, self._random01 = start, options, random01
        self._pending: dict[int, asyncio.Future[Response]] = {}
        self._next_id = 0
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._ready = asyncio.Event()
        self._stopping = False
        self._task = asyncio.create_task(self._supervise(), name=f"engine.{number}")

    # --- used by Engines

    async def request(self, op: str, session: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        if not self._ready.is_set():
            raise _gone()
        return await self._ask(op, session, timeout_s, **arguments)

    async def _ask(self, op: str, session: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        self._next_id += 1
        request_id = self._next_id
        line = frames.encode_request(op, request_id, session, arguments)
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = future
        try:
            self._out.put_nowait(line)
            async with asyncio.timeout(timeout_s):
                response = await future
        except TimeoutError:
            raise EngineError(f"The engine did not answer `{op}` within {timeout_s:g} s.", engine_code="no_answer") from None
        finally:
            self._pending.pop(request_id, None)
        return _result(response)

    def answer(self, event: EngineEvent, *, ok: bool) -> None:
        current = self.sessions.get(event.session)
        if current is not None and current.generation == event.generation:
            self._out.put_nowait(frames.encode_answer(event, ok=ok))

    def vitals(self) -> Vitals:
        pong = self._pong
        return Vitals(
            self.number,
            self._ready.is_set(),
            len(self.sessions),
            pong.get("rss_bytes"),
            pong.get("wa_version"),
            pong.get("wa_version_age_s"),
        )

    @property
    def up(self) -> bool:
        return self._ready.is_set()

    async def ready(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise EngineError("No engine process is running.", engine_code="gone", hint="See the log for why.") from None

    async def stop(self, timeout_s: float) -> bool:
        """Ask it to close everything and exit, then end it. False when it had to be killed; one that is down is stopped."""
        self._stopping = True
        clean = True
        try:
            await self.request("stop", "", timeout_s)
        except EngineError as e:
            clean = e.engine_code == "gone"
            self._task.cancel()
            logger.bind(action="engine_stop", engine=self.number).warning("The engine did not stop by itself: {}", e)
        await asyncio.gather(self._task, return_exceptions=True)
        return clean

    # --- supervision

    async def _supervise(self) -> None:
        attempt = 0
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                await self._live()
            except Exception as e:  # whatever it is: an engine that nobody supervises takes its sessions with it
                bug = not isinstance(e, WarrenError | OSError)
                logger.bind(action="engine_failed", engine=self.number).opt(exception=bug).error("The engine failed: {}", e)
            if self._stopping:
                return
            attempt = 0 if loop.time() - started > self._options.stable_s else attempt + 1
            pause = delay(
                attempt, base_s=self._options.restart_base_s, cap_s=self._options.restart_cap_s, random01=self._random01()
            )
            self._metrics.engine_restarts += 1
            logger.bind(action="engine_restart", engine=self.number).warning("Engine restarts in {:.1f} s.", pause)
            await asyncio.sleep(pause)

    async def _live(self) -> None:
        """One process, from its start to its end. However it ends, its sessions hear of it."""
        process = await self._start()
        writer = asyncio.create_task(self._write(process))
        pinger = asyncio.create_task(self._ping(process))
        log = logger.bind(action="engine_started", engine=self.number, pid=process.pid)
        log.info("Engine started.")
        try:
            await self._read(process)
        finally:
            self._ready.clear()
            self._pong = {}
            if not self._stopping:
                process.kill()
            for task in (writer, pinger):
                task.cancel()
            await asyncio.gather(writer, pinger, return_exceptions=True)
            self._lost()
            self._end, self._strays = "engine_lost", 0
            status = await process.terminate(5.0)
            log.bind(action="engine_ended", status=status).info("Engine ended with status {}.", status)

    async def _read(self, process: EngineProcess) -> None:
        """Never waits for a consumer: answers resolve here, events are handed over."""
        count = 0
        while (line := await process.frames()) is not None:
            count += 1
            if count % FRAMES_AT_ONCE == 0:
                await asyncio.sleep(0)
            frame = frames.decode(line)
            if isinstance(frame, Response):
                if (future := self._pending.get(frame.re)) is not None and not future.done():
                    future.set_result(frame)
            elif frame.event == "hello":
                self._greet(frame)
            else:
                self._hand_over(frame)

    def _greet(self, hello: EngineEvent) -> None:
        if (protocol := hello.data.get("protocol")) != frames.PROTOCOL:
            raise FrameError(f"the engine speaks protocol {protocol}, this daemon {frames.PROTOCOL}", hint="Run `make engine`.")
        self._ready.set()

    def _hand_over(self, event: EngineEvent) -> None:
        current = self.sessions.get(event.session)
        if current is None or current.generation != event.generation:
            # From a generation that was given up: the engine keeps what it gets no answer for.
            self._strays += 1
            if self._strays > STRAYS:
                raise Flood(f"Engine {self.number} floods with events of sessions that it does not have.")
            return
        try:
            current.on_event(event)
        except Flood:
            raise
        except Exception:
            # One session's bug must not stop the reader that serves 250 others.
            logger.bind(action="session_bug", session=event.session).exception("Handling {} failed.", event.event)

    async def _write(self, process: EngineProcess) -> None:
        while True:
            line = await self._out.get()
            try:
                await process.send(line)
            except EngineError:
                return  # the reader sees the end too

    async def _ping(self, process: EngineProcess) -> None:
        """A hung engine counts as dead: killing it ends the reader, which does the rest."""
        try:
            await self.ready(self._options.hello_timeout_s)
            over = 0
            while over < OVER_CEILING:
                self._pong = await self.request("ping", "", self._options.ping_timeout_s)
                self._strays = 0
                ceiling = self._options.memory_ceiling
                over = over + 1 if ceiling and int(self._pong.get("rss_bytes") or 0) > ceiling else 0
                await asyncio.sleep(self._options.ping_interval_s)
            await self._drain(process)
        except EngineError as e:
            logger.bind(action="engine_hung", engine=self.number, pid=process.pid).error("{} It is killed.", e)
            process.kill()

    async def _drain(self, process: EngineProcess) -> None:
        """Replace a process: it closes its sessions in good order and ends, and the reader with it; they connect again elsewhere.

        Raises EngineError when it does not.
        """
        logger.bind(action="engine_replaced", engine=self.number, pid=process.pid).error(
            "The engine uses {} MB, above its ceiling of {} MB; it is replaced with its {} sessions.",
            int(self._pong.get("rss_bytes") or 0) // 1_000_000,
            self._options.memory_ceiling // 1_000_000,
            len(self.sessions),
        )
        self._end = "engine_replaced"
        self._ready.clear()
        await self._ask("stop", "", DRAIN_TIMEOUT_S)

    def _lost(self) -> None:
        while not self._out.empty():
            self._out.get_nowait()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(_gone())
        for session, current in list(self.sessions.items()):
            self._hand_over(EngineEvent("disconnected", session, current.generation, {"reason": self._end}))


def _result(response: Response) -> dict[str, Any]:
    if response.error is None:
        return response.result
    code, server = str(response.error["code"]), response.error.get("server_code")
    raise EngineError(
        str(response.error.get("message", code)), engine_code=code, server_code=server if isinstance(server, int) else None
    )


class Engines:
    """Every engine process of this daemon, and which session is where."""

    def __init__(
        self,
        start: StartEngine,
        options: EngineOptions,
        *,
        random01: Callable[[], float],
        metrics: Metrics | None = None,
    ) -> None:
        self._start, self._options, self._random01 = start, options, random01
        self._metrics = metrics or Metrics()
        self._hosts: list[_Host] = []
        self._where: dict[str, _Host] = {}

    async def start(self) -> None:
        """Start the first engine, so that a wrong binary is noticed now. Raises EngineError when it does not come up."""
        await self._host_with_room().ready(self._options.hello_timeout_s)

    async def stop(self, timeout_s: float) -> bool:
        """Close every session and end every engine, side by side. False when one had to be killed."""
        results = await asyncio.gather(*(host.stop(timeout_s) for host in self._hosts))
        return all(results)

    async def open(self, session: str, generation: int, on_event: OnEvent, **arguments: Any) -> dict[str, Any]:
        """Open a generation, with the arguments of the protocol's `open`; None means: not given.

        Its events come to `on_event` until it is forgotten. Raises EngineError. After an error or a cancellation nobody
        knows whether it is open: `close` it.
        """
        host = self._where.get(session) or self._host_with_room()
        host.coming += 1
        try:
            await host.ready(self._options.hello_timeout_s)
        finally:
            host.coming -= 1
        self._where[session] = host
        host.sessions[session] = _Open(generation, on_event)
        given = {name: value for name, value in arguments.items() if value is not None}
        asked = asyncio.ensure_future(host.request("open", session, OPEN_TIMEOUT_S, generation=generation, **given))
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            # A `close` that overtakes it would find nothing to close, and the session would stay open behind our back.
            await asyncio.gather(asked, return_exceptions=True)
            raise

    async def request(self, op: str, session: str, generation: int, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """`send`, `close`, `logout`. Raises EngineError (`not_open`, `gone`, `no_answer` or the engine's own code)."""
        host = self._where.get(session)
        if host is None:
            raise EngineError("The session is not open in an engine.", engine_code="not_open")
        if not host.up:
            # Not "gone": of this request, nothing can have had an effect.
            raise EngineError("The session's engine process is being replaced.", engine_code="not_open")
        return await host.request(op, session, timeout_s, generation=generation, **arguments)

    async def snapshot(self, session: str, directory: Path, to: Path) -> dict[str, Any]:
        """Have the state in `directory` copied into the new file `to`, whether or not the session is open. Raises EngineError."""
        host = self._where.get(session)
        current = host.sessions.get(session) if host is not None else None
        if host is None:
            host = self._host_with_room()
            await host.ready(self._options.hello_timeout_s)
        generation = current.generation if current is not None else 0
        return await host.request("snapshot", session, SNAPSHOT_TIMEOUT_S, generation=generation, dir=str(directory), to=str(to))

    def answer(self, event: EngineEvent, *, ok: bool) -> None:
        """Answer a waiting event; ignored when its generation is over."""
        if (host := self._where.get(event.session)) is not None:
            host.answer(event, ok=ok)

    def forget(self, session: str, generation: int) -> None:
        """The generation is over: no more of its events are wanted."""
        host = self._where.get(session)
        if host is not None and (current := host.sessions.get(session)) and current.generation == generation:
            host.sessions.pop(session, None)
            self._where.pop(session, None)

    def vitals(self) -> list[Vitals]:
        """Every engine there is, also one that is being restarted."""
        return [host.vitals() for host in self._hosts]

    def _host_with_room(self) -> _Host:
        for host in self._hosts:
            if len(host.sessions) + host.coming < self._options.sessions_per_process:
                return host
        host = _Host(len(self._hosts), self._start, self._options, self._random01, self._metrics)
        self._hosts.append(host)
        return host
