"""A disk that is full, read-only or slow on demand: see disk.c."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("disk.c")


class Disk:
    """What happens to files below `directory`, in the processes that get `environment`. It is healthy at first."""

    def __init__(self, base: Path, directory: Path) -> None:
        self._control = base / "disk"
        self._library = base / "disk.so"
        compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
        # No fortifying: its checked variants of open would go past ours.
        options = ["-shared", "-fPIC", "-O2", "-U_FORTIFY_SOURCE"]
        subprocess.run([compiler, *options, "-o", str(self._library), str(SOURCE)], check=True)
        self.heal()
        self.environment = {
            "LD_PRELOAD": str(self._library),
            "FAULTY_DISK": str(directory),
            "FAULTY_DISK_CONTROL": str(self._control),
        }

    def heal(self) -> None:
        self._says("ok")

    def fill(self) -> None:
        """Nothing can be written; reading and deleting work."""
        self._says("full")

    def make_readonly(self) -> None:
        self._says("readonly")

    def slow_down(self, fsync_ms: float) -> None:
        """Each fsync takes that much longer."""
        self._says(f"slow {int(fsync_ms * 1000)}")

    def _says(self, text: str) -> None:
        fresh = self._control.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self._control)


def damaged(state: Path) -> list[str]:
    """The databases of a state directory that SQLite finds fault with. Nobody may have them open."""
    faults = []
    for path in sorted([*state.glob("*.db"), *state.glob("sessions/*/*/*.db")]):
        with sqlite3.connect(path) as connection:
            verdict = [row[0] for row in connection.execute("PRAGMA integrity_check")]
        connection.close()
        if verdict != ["ok"]:
            faults.append(f"{path}: {verdict[:3]}")
    return faults
