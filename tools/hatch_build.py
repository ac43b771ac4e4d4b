"""Hatch's build hook: a wheel holds the engine's two programs, built here with Go, and the licences of what is linked into them.

An editable installation is left alone: it runs the programs of `make engine`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROGRAMS = ("warren-engine", "warren-sim")
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
USUAL_GO = Path("/usr/local/go/bin/go")


class EngineBuildHook(BuildHookInterface[Any]):
    """See the module's text."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files of a wheel; `version` is "editable" or "standard"."""
        if version == "editable":
            return
        if platform.system() != "Linux":
            raise SystemExit("warren runs on Linux only: it needs its /proc, process descriptors and file locks.")
        self._made = Path(tempfile.mkdtemp(prefix="warren-wheel-"))
        go, engine = _go(), Path(self.root) / "engine"
        release = self.metadata.version
        _build(engine, self._made, go, release)
        (self._made / "LICENSES-engine.txt").write_text(_licences(engine, go), encoding="utf-8")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag([self._made / name for name in PROGRAMS])}"
        for name in (*PROGRAMS, "LICENSES-engine.txt"):
            build_data["force_include"][str(self._made / name)] = f"warren/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is written."""
        if version != "editable":
            shutil.rmtree(self._made)


def _go() -> str:
    found = os.environ.get("GO") or shutil.which("go") or (str(USUAL_GO) if USUAL_GO.exists() else "")
    if not shutil.which(found):
        raise SystemExit(
            "warren's wheel contains its engine, which is built with Go, and there is no Go here.\n"
            "Install Go (engine/go.mod says which) and a C compiler, then try again; GO=/path/to/go names one that is not on the "
            "PATH.\nOr install a wheel that somebody has built: it needs neither."
        )
    return found


def _build(engine: Path, target: Path, go: str, release: str) -> None:
    script = engine.parent / "tools" / "setup-engine"
    environment = {**os.environ, "GO": go, "OUT": f"{target}/", "LDFLAGS": f"-s -w -X main.version={release}"}
    if subprocess.run([str(script)], env=environment, check=False).returncode:
        raise SystemExit("warren's engine could not be built; see above.")


def _platform_tag(programs: list[Path]) -> str:
    """The oldest glibc that has every symbol they ask for, as a manylinux tag; without glibc, this very platform."""
    versions = [
        int(minor) for program in programs for minor in re.findall(rb"\0GLIBC_2\.(\d{1,3})(?=[.\0])", program.read_bytes())
    ]
    if not versions:
        return sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"manylinux_2_{max(*versions, 17)}_{platform.machine()}"


def _licences(engine: Path, go: str) -> str:
    """The licences of the Go modules that are linked in, and of Go itself: those who pass on the programs pass them on, too."""
    listed = subprocess.run(
        [
            go,
            "list",
            "-deps",
            "-f",
            "{{with .Module}}{{if not .Main}}{{.Path}}\t{{.Version}}\t{{.Dir}}{{end}}{{end}}",
            "./cmd/...",
        ],
        cwd=engine,
        check=True,
        capture_output=True,
        text=True,
    )
    modules = sorted({tuple(line.split("\t")) for line in listed.stdout.splitlines() if line})
    root = json.loads(
        subprocess.run([go, "env", "-json", "GOROOT", "GOVERSION"], check=True, capture_output=True, text=True).stdout
    )
    modules.append(("Go", root["GOVERSION"], root["GOROOT"]))
    texts = [
        "warren-engine and warren-sim are GPL-3.0 as a whole (licenses/engine/LICENSE of this package's metadata).\n"
        "What is linked into them, and under which licence it comes:\n"
    ]
    for path, version, folder in modules:
        # Debian's Go has its licence elsewhere; it is the BSD licence of golang.org/x.
        files = sorted(file for pattern in LICENCE_FILES for file in Path(folder).glob(pattern) if file.is_file())
        if not files and path != "Go":
            raise SystemExit(f"{path} {version} has no licence file; look at it before it goes into a wheel.")
        texts += [f"\n{'=' * 100}\n{path} {version}: {file.name}\n\n{file.read_text(errors='replace')}" for file in files]
    return "".join(texts)
