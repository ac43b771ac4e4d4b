"""The page as a person has it: a real browser, a real daemon, a virtual phone."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import segno
from tests.acceptance.rig import Rig
from tests.conftest import Broker
from tests.page.browser import Tab
from tests.unit.test_http import World

from warren.edges.http import HttpOptions, HttpServer
from warren.ports import Problem

TOKEN = "open-sesame-of-the-test"
NUMBER = "15550100001"
SCREENSHOTS = Path(os.environ.get("WARREN_SCREENSHOTS", "build/page"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
async def rig(broker: Broker, tmp_path: Path) -> AsyncIterator[Rig]:
    settings = {"WARREN_HTTP__PORT": str(free_port()), "WARREN_HTTP__TOKEN": TOKEN}
    async with Rig(tmp_path, broker.url, f"page{os.getpid()}", **settings) as made:
        made.page = f"http://127.0.0.1:{settings['WARREN_HTTP__PORT']}/"  # type: ignore[attr-defined]
        yield made


@pytest.fixture
async def tab() -> AsyncIterator[Tab]:
    async with Tab() as made:
        await made.look(width=1100)
        yield made


def text_of(path: str, size: int) -> frozenset[tuple[int, int]]:
    """The dark modules of a code as the page draws it."""
    dark = frozenset((int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path))
    assert all(0 <= x < size and 0 <= y < size for x, y in dark)
    return dark


def drawn(code: str) -> frozenset[tuple[int, int]]:
    matrix = segno.make(code, error="l", micro=False).matrix_iter(border=4)
    return frozenset((x, y) for y, line in enumerate(matrix) for x, module in enumerate(line) if module)


async def views(tab: Tab, name: str) -> None:
    for device, width, height in (("desktop", 1100, 760), ("phone", 390, 800)):
        for dark in (False, True):
            await tab.look(width=width, height=height, dark=dark)
            overflow = await tab.js("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert overflow <= 0, f"{name} is wider than a {device}"
            await tab.screenshot(SCREENSHOTS / f"{name}-{device}-{'dark' if dark else 'light'}.png")
    await tab.look(width=1100)


async def test_a_session_from_its_qr_code_to_its_end_without_a_reload(rig: Any, tab: Tab) -> None:
    await rig.sim.add_phone(NUMBER, "Ana")
    await tab.open(rig.page)
    await views(tab, "sign-in")
    await tab.type("#token", "wrong")
    await tab.key("Enter")
    await tab.until("document.querySelector('#sign-in-error').textContent.includes('not the token')", "the refusal")
    tab.complaints.clear()  # the browser logs the 403
    await tab.type("#token", TOKEN)
    await tab.key("Enter")
    await tab.until("document.querySelector('#link').textContent === 'Live'", "the live list")

    # A QR code appears...
    await tab.click("#new")
    await tab.type("#create-name", "acme")
    await tab.key("Enter")
    shown = "document.querySelector('#code[open] svg.qr')"
    path = await tab.until(f"{shown}?.querySelector('path').getAttribute('d')", "a QR code")
    size = await tab.js(f"Number({shown}.getAttribute('viewBox').split(' ')[3])")
    await views(tab, "qr")
    code = (await rig.call("status", "acme")).result["qr"]["code"]
    if text_of(path, size) != drawn(code):  # the code was renewed in between: it must be on the page now
        path = await tab.until(
            f"{shown}.querySelector('path').getAttribute('d') !== {path!r} && {shown}.querySelector('path').getAttribute('d')",
            "the next QR code",
        )
    assert text_of(path, size) == drawn(code)

    # ...a phone scans it, and the page turns to connected.
    await rig.sim.scan(NUMBER, code)
    await tab.until("document.querySelector('#code-body').innerText.includes('Connected')", "`Connected` in the dialog")
    await views(tab, "connected")
    await tab.click("#code [data-close]")
    await tab.until("document.querySelector('[data-session=acme]')?.dataset.state === 'online'", "the session online")
    row = await tab.js("document.querySelector('[data-session=acme]').innerText")
    assert "Online" in row
    assert f"+{NUMBER}" in row

    # A message comes, and the page knows.
    await rig.sim.add_phone("15550100002", "Ben")
    assert "none yet" in row
    await rig.sim.send("15550100002", NUMBER, "hi")
    label = "[...document.querySelectorAll('[data-session=acme] dt')].find(dt => dt.textContent === 'Last message')"
    last = f"{label}.nextSibling.textContent"
    await tab.until(f"{last} === 'just now'", "the message's time")
    await tab.js("document.activeElement.blur()")
    await views(tab, "sessions")

    # Disconnected, connected again without a code, and logged out after a question.
    await tab.click("[data-session=acme] [data-act=disconnect]")
    await tab.until("document.querySelector('[data-session=acme]')?.dataset.state === 'stopped'", "the session stopped")
    await tab.click("[data-session=acme] [data-act=connect]")
    await tab.until("document.querySelector('#code-body').innerText.includes('Connected')", "`Connected` without a code")
    await tab.click("#code [data-close]")
    await tab.click("[data-session=acme] [data-act=logout]")
    await tab.until("document.querySelector('#confirm').open", "the question")
    await views(tab, "log-out")
    await tab.key("Enter")  # the focus is on Cancel
    await tab.until("!document.querySelector('#confirm').open", "the question's end")
    assert (await rig.call("status", "acme")).result["state"] == "online"
    await tab.click("[data-session=acme] [data-act=logout]")
    await tab.click("#confirm-yes")
    await tab.until("!document.querySelector('[data-session=acme]')", "the session gone")
    await rig.got.event("logout", "acme")
    outcomes = [e["data"] for e in rig.got.events if e["type"].startswith("warren.command_")]
    assert [(o["command"], o["ok"]) for o in outcomes if str(o["id"]).startswith("page-")] == [
        ("create", True), ("disconnect", True), ("create", True), ("logout", True),
    ]  # fmt: skip

    assert tab.loads == 1, "it was loaded again"
    assert tab.complaints == []
    assert all(url.startswith(rig.page) for url in tab.requests), "it loads something from elsewhere"


async def test_a_pairing_code_for_those_who_cannot_scan_and_refusals_in_words(rig: Any, tab: Tab) -> None:
    await rig.sim.add_phone(NUMBER, "Ana")
    await tab.open(rig.page)
    await tab.type("#token", TOKEN)
    await tab.key("Enter")
    await tab.click("#new")
    await tab.type("#create-name", "typed")
    await tab.type("#create-phone", f"+{NUMBER}")
    await tab.key("Enter")
    await tab.until("!!document.querySelector('#code[open] .letters')", "a pairing code")
    await views(tab, "pairing-code")
    code = await tab.js("document.querySelector('#code .letters').textContent")
    assert code == (await rig.call("status", "typed")).result["pairing_code"]["code"]
    await rig.sim.pair_code(NUMBER, code)
    await tab.until("document.querySelector('#code-body').innerText.includes('Connected')", "`Connected` in the dialog")
    await tab.click("#code [data-close]")
    await tab.click("[data-session=typed] [data-act=disconnect]")
    await tab.until("document.querySelector('[data-session=typed]')?.dataset.state === 'stopped'", "the session stopped")
    await tab.click("[data-session=typed] [data-act=logout]")
    await tab.click("#confirm-yes")
    await tab.until(
        "document.querySelector('#confirm .error').textContent.includes('cannot be told')", "why it cannot be logged out"
    )
    await views(tab, "refused")
    assert tab.loads == 1


async def test_the_page_outlives_a_restart_of_warrend(rig: Any, tab: Tab) -> None:
    await tab.open(rig.page)
    await tab.type("#token", TOKEN)
    await tab.key("Enter")
    await tab.until("document.querySelector('#link').textContent === 'Live'", "the live list")
    assert await rig.warrend.stop() == 0
    await tab.until("document.querySelector('#link').className.includes('lost')", "that it notices")
    await rig.restart()
    # Who had signed in is forgotten: the page asks again, by itself.
    await tab.until("document.querySelector('#sign-in').checkVisibility()", "the question for the token")
    await tab.type("#token", TOKEN)
    await tab.key("Enter")
    await tab.until("document.querySelector('#link').textContent === 'Live'", "the live list again")
    assert tab.loads == 1


async def test_without_a_token_one_may_look_and_is_offered_nothing(tab: Tab) -> None:
    world, port = World(), free_port()
    world.put("acme", "online")
    world.put("depot", "pairing", qr={"code": "2@" + "Q0RF" * 40, "expires_at": "2126-11-20T12:00:00.000Z", "remaining": 3})
    world.put("<b onclick=1>", "logged_out", message="<img src=x onerror=alert(1)>", hint="Publish `create`.")
    world.found = [Problem("rabbitmq_away", "RabbitMQ <cannot> be reached.", "Start it.")]
    server = HttpServer(world, world, HttpOptions("127.0.0.1", port))
    await server.start()
    try:
        await tab.open(f"http://127.0.0.1:{port}/")
        await tab.until("document.querySelectorAll('.row').length === 3", "the sessions")
        offered = await tab.js("[...document.querySelectorAll('button')].filter(b => b.checkVisibility()).map(b => b.innerText)")
        assert "Show QR code" in offered
        assert not {"Connect", "Disconnect", "Log out…", "New session", "Sign out"} & set(offered)
        text = await tab.js("document.body.innerText")
        assert "set [http] token" in text
        # What comes from elsewhere is text, never markup; hints speak of buttons.
        for said in ("RabbitMQ <cannot> be reached.", "<b onclick=1>", "<img src=x onerror=alert(1)> Press Connect."):
            assert said in text
        everything = "[...document.querySelectorAll('button, input')].filter(e => !e.closest('[aria-hidden]'))"
        nameless = f"{everything}.filter(e => !(e.innerText || e.ariaLabel || e.labels?.length || e.textContent)).map(e => e.id)"
        assert await tab.js(nameless) == []

        # Filters, and the way back.
        await tab.type("#search", "dep")
        shown = "[...document.querySelectorAll('.row')].filter(r => r.checkVisibility()).map(r => r.dataset.session).join()"
        await tab.until(f"{shown} === 'depot'", "only what is looked for")
        await tab.type("#search", "x")
        await tab.until("document.querySelector('#none').innerText.includes('No session is like that')", "a word for nothing")
        assert tab.complaints == []
    finally:
        await server.stop()
