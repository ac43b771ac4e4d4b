"""`warren-sim` from Python: starts the simulated WhatsApp and works its phones, for tests, the demo and users' own CI.

The HTTP API behind it is in docs/simulator.md.

    async with Simulator(binary) as sim:
        await sim.add_phone("15550001", "Ana")
        await sim.scan("15550001", qr_text)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from warren.errors import WarrenError

START_TIMEOUT_S = 20.0
REQUEST_TIMEOUT_S = 60.0


class SimulatorError(WarrenError):
    """The simulator did not start, or refused a request (`code` of the API in `reason`)."""

    code = "simulator"

    def __init__(self, message: str, *, reason: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What `[whatsapp]` needs to use the simulator instead of WhatsApp, and the control API's address."""

    endpoint: str
    control: str
    root_key: str
    ca_file: str

    def environment(self) -> dict[str, str]:
        """The settings as environment variables for warrend."""
        return {
            "WARREN_WHATSAPP__ENDPOINT": self.endpoint,
            "WARREN_WHATSAPP__ROOT_KEY": self.root_key,
            "WARREN_WHATSAPP__CA_FILE": self.ca_file,
        }


class Simulator:
    """One `warren-sim` process; it ends with this context, and with this process however that ends.

    Numbers are digits only. Requests raise SimulatorError; cancelling one leaves open whether the phone did it.
    """

    def __init__(self, binary: Path, *, log: Path | None = None, seed: int | None = None) -> None:
        self._binary, self._log = binary, log
        self._arguments = [] if seed is None else ["--seed", str(seed)]
        self._process: asyncio.subprocess.Process | None = None
        self.endpoint: Endpoint

    async def __aenter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stderr: Any = asyncio.subprocess.DEVNULL if self._log is None else stack.enter_context(self._log.open("ab"))
            self._process = await asyncio.create_subprocess_exec(
                self._binary,
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,  # its end ends the simulator
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            self.endpoint = await self._ready(self._process)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 5.0)
        except TimeoutError:
            process.kill()
            await process.wait()

    @staticmethod
    async def _ready(process: asyncio.subprocess.Process) -> Endpoint:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await process.stdout.readline()
            ready = json.loads(line)
            return Endpoint(ready["endpoint"], ready["control"], ready["root_key"], ready["ca_file"])
        except (TimeoutError, ValueError, KeyError) as e:
            raise SimulatorError("warren-sim did not start.", hint="Run it by hand to see why: `warren sim`.") from e

    # --- phones

    async def add_phone(self, number: str, name: str) -> dict[str, Any]:
        return await self.request("POST", "/phones", {"number": number, "name": name})

    async def scan(self, number: str, qr: str) -> int:
        """The phone scans a QR text. Returns the number of the linked device."""
        return int((await self.request("POST", f"/phones/{number}/scan", {"qr": qr}))["device"])

    async def pair_code(self, number: str, code: str) -> int:
        """The phone enters the pairing code that a client shows. Returns the number of the linked device."""
        return int((await self.request("POST", f"/phones/{number}/pair-code", {"code": code}))["device"])

    async def set_addressing(self, number: str, addressing: Literal["lid", "pn"]) -> None:
        """Whether the phone sends to LIDs or to phone numbers."""
        await self.request("POST", f"/phones/{number}/settings", {"addressing": addressing})

    async def create_group(self, creator: str, participants: list[str], subject: str) -> str:
        """Returns the group's address (`...@g.us`), which `send` takes for `to`."""
        body = {"creator": creator, "participants": participants, "subject": subject}
        return str((await self.request("POST", "/groups", body))["id"])

    async def send(self, number: str, to: str, text: str, *, count: int = 1) -> list[str]:
        """The phone sends one message, or `count` of them as `text 1` ... to a number or a group. Returns their message ids."""
        answer = await self.request("POST", f"/phones/{number}/send", {"to": to, "text": text, "count": count})
        return list(answer["message_ids"])

    async def read(self, number: str, sender: str, message_ids: list[str]) -> None:
        """The person reads messages from `sender`."""
        await self.request("POST", f"/phones/{number}/read", {"from": sender, "message_ids": message_ids})

    async def received(self, number: str) -> dict[str, Any]:
        return await self.request("GET", f"/phones/{number}/received")

    async def sent(self, number: str) -> list[dict[str, Any]]:
        return list((await self.request("GET", f"/phones/{number}/sent"))["messages"])

    async def devices(self, number: str) -> list[dict[str, Any]]:
        phones = (await self.request("GET", "/phones"))["phones"]
        return next(list(p["devices"] or []) for p in phones if p["number"] == number)

    async def pending(self, number: str) -> int:
        """Stanzas that the phone's linked devices have not receipted."""
        return sum(d["pending"] for d in (await self.request("GET", f"/phones/{number}/pending"))["devices"] or [])

    async def drop(self, number: str, device: int) -> None:
        await self.request("POST", f"/phones/{number}/devices/{device}/drop")

    async def unlink(self, number: str, device: int) -> None:
        await self.request("POST", f"/phones/{number}/devices/{device}/unlink")

    # --- what goes wrong

    async def stream_error(self, number: str, device: int | None = None, *, code: int = 0, conflict: str = "") -> None:
        """End a device's connection (None: all of the phone's) with `<stream:error>`; `conflict` is `replaced`, for instance."""
        await self.request("POST", f"{_scope(number, device)}/stream-error", {"code": code, "conflict": conflict})

    async def failure(self, number: str, device: int | None = None, *, code: int, expire_s: int = 0) -> None:
        """End a device's connection (None: all of the phone's) with `<failure>`."""
        await self.request("POST", f"{_scope(number, device)}/failure", {"code": code, "expire_s": expire_s})

    async def malformed(self, number: str, device: int | None = None) -> None:
        """Send a frame on which whatsmeow panics."""
        await self.request("POST", f"{_scope(number, device)}/malformed")

    async def timelock(self, number: str, *, active: bool, seconds: float = 0, kind: str = "") -> None:
        """Tells the linked devices that the account is restricted for so long (0: no end is told), or no longer."""
        await self.request("POST", f"/phones/{number}/timelock", {"active": active, "seconds": seconds, "type": kind})

    async def add_fault(self, kind: str, number: str | None = None, **more: Any) -> int:
        """Put a fault in force for an account (None: for all); `more` as in docs/simulator.md. Returns its number."""
        body = {"kind": kind, **more} if number is None else {"kind": kind, "phone": number, **more}
        return int((await self.request("POST", "/faults", body))["fault"])

    async def faults(self) -> list[dict[str, Any]]:
        """The faults in force."""
        return list((await self.request("GET", "/faults"))["faults"])

    async def lift_fault(self, fault: int | None = None) -> None:
        """End a fault; None: all of them."""
        await self.request("DELETE", "/faults" if fault is None else f"/faults/{fault}")

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Any request of the control API."""
        return await asyncio.to_thread(self._request, method, path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 (loopback, from the simulator's own first line)
            self.endpoint.control + path,
            method=method,
            data=json.dumps(body or {}).encode() if method == "POST" else None,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:  # noqa: S310
                answer: dict[str, Any] = json.loads(response.read() or b"{}")
                return answer
        except urllib.error.HTTPError as e:
            with e:
                error = json.loads(e.read() or b"{}").get("error", {})
            raise SimulatorError(f"{method} {path}: {error.get('message', e)}", reason=error.get("code", "")) from None
        except OSError as e:
            raise SimulatorError(f"{method} {path}: the simulator does not answer ({e}).") from e


def _scope(number: str, device: int | None) -> str:
    return f"/phones/{number}" if device is None else f"/phones/{number}/devices/{device}"
