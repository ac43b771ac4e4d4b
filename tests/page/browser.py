"""Headless Chromium, driven over its own debugging protocol: no library between the test and the browser."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
START_S = 30.0
ANSWER_S = 30.0
DEADLINE_S = 30.0


def find_chromium() -> str:
    """$CHROMIUM, or the first of the usual names on PATH."""
    for name in (os.environ.get("CHROMIUM", ""), *NAMES):
        if name and (found := shutil.which(name)):
            return found
    raise AssertionError("There is no Chromium. `make page` installs it; or set CHROMIUM to the path of one.")


class Tab:
    """One browser with one tab. What goes wrong in the page (errors, refused resources) is in `complaints`."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.loads = 0
        """How many documents the tab has loaded."""
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0

    async def __aenter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(prefix="warren-chromium-", ignore_cleanup_errors=True)
        self._process = await asyncio.create_subprocess_exec(
            find_chromium(),
            "--headless",
            "--no-sandbox",  # the page is our own, and root has no sandbox
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._profile.name}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._http = aiohttp.ClientSession()
        try:
            port = await self._port()
            async with self._http.get(f"http://127.0.0.1:{port}/json/list") as response:
                (page,) = [target for target in await response.json() if target["type"] == "page"]
            self._socket = await self._http.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
            self._reader = asyncio.create_task(self._read())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await self.ask(f"{domain}.enable")
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._socket.close()
        await self._end()

    async def _end(self) -> None:
        await self._http.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.wait()
        self._profile.cleanup()

    async def _port(self) -> int:
        """Where the browser listens; it says so in its profile."""
        file = Path(self._profile.name) / "DevToolsActivePort"
        async with asyncio.timeout(START_S):
            while not (file.exists() and file.read_text()):
                assert self._process.returncode is None, "Chromium ended at its start."
                await asyncio.sleep(0.05)
        return int(file.read_text().split()[0])

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if (answer := self._answers.pop(said.get("id", -1), None)) is not None:
                answer.set_result(said)
            elif said.get("method"):
                self._happened(said["method"], said["params"])

    def _happened(self, method: str, about: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                self.complaints.append(str(about["exceptionDetails"].get("exception", {}).get("description", about)))
            case "Log.entryAdded" if about["entry"]["level"] == "error":
                self.complaints.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Page.domContentEventFired":
                self.loads += 1

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._next += 1
        answer = self._answers[self._next] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._next, "method": method, "params": params})
        async with asyncio.timeout(ANSWER_S):
            said = await answer
        assert "error" not in said, f"{method}: {said['error']}"
        return dict(said["result"])

    # --- what a person does and sees

    async def open(self, url: str) -> None:
        await self.ask("Page.navigate", url=url)

    async def js(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        said = await self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def until(self, condition: str, what: str) -> Any:
        """Wait until a JavaScript expression is true; its value."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not (value := await self.js(condition)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.js("document.body.innerText")
            raise AssertionError(f"waited in vain for {what}; complaints: {self.complaints}; the page says:\n{text}") from None
        return value

    async def click(self, selector: str) -> None:
        """With the mouse, in the middle of it, as a person would: nothing may lie over it."""
        await self.until(f"!!document.querySelector({selector!r})?.checkVisibility()", f"{selector} to be there")
        x, y = await self.js(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'nearest'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, selector: str, text: str) -> None:
        """In place of what is there."""
        await self.click(selector)
        await self.js(f"document.querySelector({selector!r}).select()")
        await self.ask("Input.insertText", text=text)

    async def key(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        for kind in ("keyDown", "keyUp"):
            await self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    async def look(self, *, width: int, height: int = 800, dark: bool = False) -> None:
        """Another window, another time of day."""
        await self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        await self.ask("Emulation.setEmulatedMedia", features=[scheme, still])

    async def screenshot(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode((await self.ask("Page.captureScreenshot", format="png"))["data"]))
