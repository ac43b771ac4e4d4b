"""The terminal of a person: QR codes, lines that renew themselves, and text that strangers wrote."""

from __future__ import annotations

import os
import shutil
import unicodedata
from typing import TextIO

import segno

QUIET_ZONE = 2
"""Light modules around a code. The standard says 4; phones need less, and a terminal has 24 to 50 rows."""
_BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
# Black on white whatever the colours of the terminal are: many scanners do not read inverted codes.
_INK, _PLAIN = "\x1b[38;5;16m\x1b[48;5;231m", "\x1b[0m"
_UP, _ERASE_BELOW, _ERASE_LINE = "\x1b[{}A", "\x1b[J", "\r\x1b[2K"


def printable(text: str) -> str:
    """`text` without what could move the cursor, recolour the terminal or reverse the reading direction."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"} else c for c in text
    )


def qr_lines(code: str) -> list[str]:
    """The QR code of a text in half blocks, two rows of modules in each line. Without colours."""
    matrix = segno.make_qr(code, error="l", boost_error=False).matrix_iter(border=QUIET_ZONE)
    rows = [[bool(module) for module in row] for row in matrix]
    if len(rows) % 2:
        rows.append([False] * len(rows[0]))
    return [
        "".join(_BLOCKS[pair] for pair in zip(upper, lower, strict=True))
        for upper, lower in zip(rows[::2], rows[1::2], strict=True)
    ]


class QrScreen:
    """Draws codes one over the other, with a line below that changes in place. For terminals only."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: tuple[str, os.terminal_size] | None = None
        self._height = 0
        """Lines above the cursor that are ours."""

    def update(self, code: str, caption: str) -> None:
        """Show this code and caption. The code is drawn only when it or the window's size has changed."""
        size = shutil.get_terminal_size()
        if (code, size) != self._shown:
            self.clear()
            lines = _fitted(qr_lines(code), size)
            self._out.write("\n".join(lines) + "\n")
            self._shown, self._height = (code, size), len(lines)
        # A line that wraps could not be erased again.
        self._out.write(_ERASE_LINE + caption[: max(size.columns - 1, 1)])
        self._out.flush()

    def clear(self) -> None:
        """Erase everything drawn: a code that was used or has expired should not be scanned."""
        if self._shown is not None:
            self._out.write(_ERASE_LINE + (_UP.format(self._height) if self._height else "") + _ERASE_BELOW)
            self._out.flush()
            self._shown, self._height = None, 0


def _fitted(lines: list[str], size: os.terminal_size) -> list[str]:
    """The lines in ink; or, in a window that they would scroll out of, one that says how large it must be."""
    columns, rows = len(lines[0]), len(lines) + 1
    if size.columns >= columns and size.lines >= rows:
        return [f"{_INK}{line}{_PLAIN}" for line in lines]
    words = f"Make this window larger: the QR code needs {columns} x {rows}, not {size.columns} x {size.lines}."
    return [words[: size.columns - 1]]
