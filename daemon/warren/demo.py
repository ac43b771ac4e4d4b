"""`warren demo`: one session's whole life, for real, on this machine alone: RabbitMQ, warrend, the engine, a simulated WhatsApp.

Everything is a separate process, started as a user would start it and killed as only an accident would.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from warren.client import Client, Subscription
from warren.edges.broker_node import BrokerNode
from warren.edges.settings import find_engine_binary
from warren.edges.terminal import qr_lines
from warren.errors import WarrenError
from warren.simulator import Simulator

SESSION = "demo"
ANA, BOB = "15550000001", "15550000002"
STEP_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0
MARKER = ".warren-demo"


class DemoFailed(WarrenError):
    code = "demo_failed"


class Warrend:
    """The daemon as a child process. `kill` is kill -9: it gets no chance to tidy up."""

    def __init__(self, state: Path, environment: dict[str, str]) -> None:
        self.state, self.log = state, state.parent / "warrend.log"
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "warren.app",
                f"--config={os.devnull}",
                # Neither settings nor configuration of whoever runs this: it must not reach a RabbitMQ that matters.
                env={k: v for k, v in os.environ.items() if not k.startswith("WARREN_")} | self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        if self._process is None:
            return 0
        if self._process.returncode is None:
            self._process.terminate()
        try:
            return await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            await self.kill()
            raise DemoFailed("warrend did not stop.", hint=f"See {self.log}.") from None

    def engine_pids(self) -> list[int]:
        """The daemon's engine processes, as the kernel knows them."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children if "warren-engine" in _command_line(pid)]


def _command_line(pid: str) -> str:
    """Empty when the process has gone meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


class Demo:
    """The story. Every step says what it does, waits for what must come of it, and fails with the reason when it does not."""

    def __init__(self, sim: Simulator, warrend: Warrend) -> None:
        self._sim, self._warrend = sim, warrend
        self._client: Client
        self._events: Subscription
        self._qrs = 0
        """QR codes seen since the phone was paired."""
        self._began = time.monotonic()

    async def __aenter__(self) -> Self:
        self._stack = contextlib.AsyncExitStack()
        await self._warrend.start()
        url = await self._broker_url()
        self._client = await self._stack.enter_async_context(Client(url, name="warren-demo"))
        # A durable queue of our own: exactly what a backend service has.
        self._events = await self._stack.enter_async_context(self._client.subscribe(f"{SESSION}.#", queue="warren-demo"))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def run(self) -> None:
        await self._pair()
        await self._talk()
        await self._kill_daemon()
        await self._kill_engine()
        await self._lose_state()
        await self._disconnect()
        await self._logout()

    # --- the chapters

    async def _pair(self) -> None:
        self._say(f"create: the command goes to RabbitMQ, for session `{SESSION}`")
        await self._sim.add_phone(ANA, "Ana")
        await self._sim.add_phone(BOB, "Bob")
        await self._command("create")
        qr = await self._event("qr")
        self._say("qr: this is what a person would scan")
        print("\n".join(qr_lines(qr["data"]["code"])), flush=True)
        await self._sim.scan(ANA, qr["data"]["code"])
        connected = await self._event("connected")
        self._qrs = 0
        self._say(f"connected: Ana's phone scanned it; the session is {connected['data']['jid']}")

    async def _talk(self) -> None:
        await self._sim.send(BOB, ANA, "Hello Ana, is my order on its way?")
        message = await self._message("Hello Ana, is my order on its way?")
        self._say(f"message in: Bob wrote {message['data']['text']!r}, encrypted for our device")
        sent = await self._command("send", {"to": f"+{BOB}", "text": "It is shipped."}, id="demo-order-1")
        await self._until("Bob's phone shows the answer", self._bob_shows("It is shipped."))
        self._say(f"send: WhatsApp has message {sent['message_id']}, and Bob's phone shows it")
        await self._receipt("delivered", sent["message_id"])
        await self._sim.read(BOB, ANA, [sent["message_id"]])
        await self._receipt("read", sent["message_id"])
        self._say("delivered, and read: both receipts came back as events")
        again = await self._command("send", {"to": f"+{BOB}", "text": "It is shipped."}, id="demo-order-1")
        if again["message_id"] != sent["message_id"]:
            raise DemoFailed("A repeated command was executed twice.")
        self._say("send again with the same id: answered from the journal, nothing is sent twice")

    async def _kill_daemon(self) -> None:
        self._say(f"kill -9 of the daemon (pid {self._warrend.pid})")
        await self._warrend.kill()
        await self._sim.send(BOB, ANA, "Are you still there?")
        self._say("Bob writes while nobody is there; starting the daemon again (RabbitMQ went on and is adopted)")
        await self._warrend.start()
        await self._comes_back("Are you still there?")

    async def _kill_engine(self) -> None:
        pids = self._warrend.engine_pids()
        if not pids:
            raise DemoFailed("The daemon has no engine process.")
        self._say(f"kill -9 of the engine (pid {pids[0]})")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        await self._sim.send(BOB, ANA, "And now?")
        await self._comes_back("And now?")

    async def _lose_state(self) -> None:
        backup = await self._command("backup")
        self._say(f"backup: the session's state is sealed and stored as {backup['position']} ({backup['size']:,} bytes)")
        await self._warrend.kill()
        shutil.rmtree(self._warrend.state / "sessions")
        self._say("kill -9 of the daemon, and the state of every session is deleted; starting it again")
        await self._sim.send(BOB, ANA, "Did you lose something?")
        await self._warrend.start()
        await self._comes_back("Did you lose something?")

    async def _disconnect(self) -> None:
        result = await self._command("disconnect")
        self._say(f"disconnect: the session is {result['state']}; RabbitMQ holds what is sent meanwhile")
        await self._command("create")
        await self._event("connected")
        self._no_qr()
        self._say("create: connected again, no QR")

    async def _logout(self) -> None:
        await self._command("logout")
        await self._event("logout")
        await self._until("WhatsApp has unlinked the device", self._no_devices)
        self._say("logout: the device is unlinked at WhatsApp and the session removed")

    # --- what a step waits for

    async def _comes_back(self, text: str) -> None:
        """A `connected` and a message, in whichever order they are published, and no QR."""
        missing = {"connected", "message"}
        async with self._deadline(f"connected, and the message {text!r}"):
            while missing:
                event = await self._next()
                kind = event["type"].removeprefix("warren.")
                if kind == "connected" or (kind == "message" and event["data"]["text"] == text):
                    missing.discard(kind)
        self._no_qr()
        self._say(f"connected again, no QR; the message {text!r} arrived")

    async def _event(self, name: str, wanted: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        async with self._deadline(f"event `{name}`"):
            while True:
                event = await self._next()
                if event["type"] == f"warren.{name}" and wanted(event["data"]):
                    return event

    async def _next(self) -> dict[str, Any]:
        event = await anext(self._events)
        self._qrs += event["type"] == "warren.qr"
        return event

    async def _message(self, text: str) -> dict[str, Any]:
        return await self._event("message", lambda data: data["text"] == text)

    async def _receipt(self, kind: str, message_id: str) -> None:
        await self._event("receipt", lambda data: data["type"] == kind and message_id in data["message_ids"])

    async def _command(self, command: str, args: dict[str, Any] | None = None, *, id: str | None = None) -> dict[str, Any]:
        outcome = await self._client.call(command, SESSION, args, id=id, timeout_s=STEP_TIMEOUT_S)
        if outcome.error is not None:
            raise DemoFailed(f"`{command}` failed: {outcome.error}")
        return outcome.result

    def _no_qr(self) -> None:
        if self._qrs:
            raise DemoFailed("A QR code was shown for a session that is paired.")

    def _bob_shows(self, text: str) -> Callable[[], Any]:
        async def shows() -> bool:
            return any(m["text"] == text for m in (await self._sim.received(BOB))["shown"])

        return shows

    async def _no_devices(self) -> bool:
        return not await self._sim.devices(ANA)

    async def _until(self, what: str, condition: Callable[[], Any]) -> None:
        async with self._deadline(what):
            while not await condition():
                await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def _deadline(self, what: str) -> Any:
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                yield
        except TimeoutError:
            raise DemoFailed(f"Waited {STEP_TIMEOUT_S:g} s in vain for: {what}.", hint=f"See {self._warrend.log}.") from None

    async def _broker_url(self) -> str:
        path = self._warrend.state / "rabbitmq" / "url"
        async with self._deadline("the private RabbitMQ"):
            while not path.exists() or not path.read_text().strip():
                if not self._warrend.running:
                    raise DemoFailed("warrend ended while it was starting.", hint=f"See {self._warrend.log}.")
                await asyncio.sleep(0.05)
        url = path.read_text().strip()
        async with self._deadline("an answer of warrend"):
            while not await _answers(url):
                await asyncio.sleep(0.1)
        return url

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.1f} s] {text}", flush=True)


async def _answers(url: str) -> bool:
    try:
        async with Client(url) as client:
            await client.list_sessions(timeout_s=1.0)
    except WarrenError:
        return False
    return True


async def _demo(base: Path) -> None:
    await _fresh(base)
    state = base / "state"
    async with Simulator(find_engine_binary(None, "warren-sim"), log=base / "warren-sim.log") as sim:
        settings = {**sim.endpoint.environment(), "WARREN_STATE_DIR": str(state), "WARREN_LOG__FORMAT": "human"}
        warrend = Warrend(state, settings)
        try:
            async with Demo(sim, warrend) as demo:
                await demo.run()
        except BaseException:
            with contextlib.suppress(DemoFailed):
                await warrend.stop()
            raise
        status = await warrend.stop()
    if status != 0:
        raise DemoFailed(f"warrend ended with status {status} after SIGTERM.", hint=f"See {warrend.log}.")
    print("SIGTERM: the daemon and its RabbitMQ stopped cleanly")


async def _fresh(base: Path) -> None:
    """An empty directory; a RabbitMQ that an earlier, killed demo left is stopped first. Nobody else's files are touched."""
    marker, node = base / MARKER, base / "state" / "rabbitmq"
    if base.exists() and any(base.iterdir()) and not marker.exists():
        raise DemoFailed(f"{base} is not empty and not from an earlier demo.", hint="Name another directory with --dir.")
    if (node / "node.json").exists():
        left = BrokerNode(node)
        await left.start()
        await left.stop()
    if base.exists():
        shutil.rmtree(base)
    (base / "state").mkdir(parents=True, mode=0o700)
    marker.touch()


def run(base: Path | None = None) -> int:
    """Tell the story; 0 when it went well. Files and logs are in `base` (default: ./var/demo)."""
    base = (base or Path("var/demo")).absolute()
    print("warren demo: RabbitMQ, warrend, the engine and a simulated WhatsApp, all on this machine", flush=True)
    try:
        asyncio.run(_demo(base))
    except WarrenError as e:
        print(f"demo: failed. {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("demo: ok")
    return 0
