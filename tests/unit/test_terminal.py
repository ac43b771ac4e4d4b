from __future__ import annotations

import io
import os
import unicodedata

import pytest
import segno
from hypothesis import given
from hypothesis import strategies as st

from warren.edges import terminal
from warren.edges.terminal import QUIET_ZONE, QrScreen, printable, qr_lines

CODE = "https://wa.me/settings/linked_devices#2@" + "A" * 200
UPPER, LOWER = set("▀█"), set("▄█")


@given(st.text(max_size=30))
def test_what_is_printable_moves_no_cursor(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs"}
    assert printable(shown) == shown


def test_ordinary_text_stays() -> None:
    assert printable("Grüße, 你好, 👋 +1 (Ana)") == "Grüße, 你好, 👋 +1 (Ana)"
    assert printable("a\x1b[2Jb\r\n\u202ec\x9b") == "a\ufffd[2Jb\ufffd\ufffd\ufffdc\ufffd"


@given(st.text("ABC0123@,/+=", min_size=1, max_size=300))
def test_the_blocks_are_the_modules_of_the_code(text: str) -> None:
    drawn = [[c in half for c in line] for line in qr_lines(text) for half in (UPPER, LOWER)]
    modules = [[bool(m) for m in row] for row in segno.make_qr(text, error="l", boost_error=False).matrix_iter(border=QUIET_ZONE)]
    assert drawn[: len(modules)] == modules
    assert not any(map(any, drawn[len(modules) :]))


def window(monkeypatch: pytest.MonkeyPatch, columns: int, lines: int) -> None:
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: os.terminal_size((columns, lines)))


def test_a_code_is_drawn_once_and_its_caption_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    window(monkeypatch, 100, 60)
    out = io.StringIO()
    screen = QrScreen(out)
    for left in (3, 2, 1):
        screen.update(CODE, f"{left} s")
    text = out.getvalue()
    assert text.count(qr_lines(CODE)[4]) == 1
    assert text.count("\r\x1b[2K") == 3
    screen.clear()
    screen.clear()
    assert out.getvalue().count("\x1b[J") == 1


def test_a_small_window_is_told_so_until_it_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    screen = QrScreen(out)
    window(monkeypatch, 80, 24)
    screen.update(CODE, "20 s")
    width, height = len(qr_lines(CODE)[0]), len(qr_lines(CODE)) + 1
    assert f"needs {width} x {height}, not 80 x 24" in out.getvalue()
    assert "█" not in out.getvalue()
    window(monkeypatch, width, height)
    screen.update(CODE, "19 s")
    assert qr_lines(CODE)[4] in out.getvalue()


def test_no_line_is_wider_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    window(monkeypatch, 20, 24)
    out = io.StringIO()
    QrScreen(out).update(CODE, "a caption that is longer than the window is wide")
    assert max(len(line.replace("\r\x1b[2K", "")) for line in out.getvalue().split("\n")) < 20
