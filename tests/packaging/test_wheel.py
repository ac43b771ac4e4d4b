"""The wheel, as its users get it. The whole way (clean environment, demo; package) is `make wheel-demo`, `make try-deb`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import orjson
import pytest

from warren import __version__

ROOT = Path(__file__).parents[2]
HATCHLING = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, without a network."""
    target = tmp_path_factory.mktemp("dist")
    ran = subprocess.run([*HATCHLING, str(target)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (made,) = target.iterdir()
    return made


def test_the_wheel_is_for_this_platform_and_says_what_it_holds(wheel: Path) -> None:
    assert re.fullmatch(
        rf"warren-{re.escape(__version__)}-py3-none-(manylinux_2_\d+|linux)_{os.uname().machine}\.whl", wheel.name
    )
    with zipfile.ZipFile(wheel) as archive:
        info = f"warren-{__version__}.dist-info"
        assert "Root-Is-Purelib: false" in archive.read(f"{info}/WHEEL").decode()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert {"MIT", "GPL-3.0-or-later", "MPL-2.0"} <= set(metadata["License-Expression"].split(" AND "))
        names = archive.namelist()
        assert {f"{info}/licenses/LICENSE", f"{info}/licenses/engine/LICENSE"} <= set(names)
        licences = archive.read("warren/LICENSES-engine.txt").decode()
        for module in ("go.mau.fi/whatsmeow", "go.mau.fi/libsignal", "github.com/mattn/go-sqlite3", "google.golang.org/protobuf"):
            assert re.search(rf"^{re.escape(module)} v\S+: LICENSE", licences, re.MULTILINE), module
        assert [name for name in names if "tests/" in name or name.endswith(".go")] == []


def test_installed_it_needs_neither_go_nor_the_sources(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    # Its own warren first, the libraries of this environment behind it; no Go, no checkout.
    ran = subprocess.run(
        [sys.executable, "-m", "warren.cli", "version", "--json"],
        env={"PYTHONPATH": str(site), "PATH": "/nonexistent", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    told = orjson.loads(ran.stdout)
    assert (told["warren"], told["engine"]) == (__version__, __version__)
    assert re.fullmatch(r"v0\.0\.0-\d{14}-[0-9a-f]{12}", told["whatsmeow"])
    commands = {path.name for path in (site / "bin").iterdir()}
    assert commands == {"warren", "warrend"}
    listed = subprocess.run([str(site / "warren" / "warren-sim"), "--help"], capture_output=True, text=True, check=False)
    assert "-listen" in listed.stderr


def test_without_go_the_build_says_what_to_install(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "bin", "build", "dist", "var", "tests"))
    hook = (copy / "tools" / "hatch_build.py").read_text()
    assert 'Path("/usr/local/go/bin/go")' in hook
    (copy / "tools" / "hatch_build.py").write_text(hook.replace("/usr/local/go/bin/go", "/nonexistent/go"))
    ran = subprocess.run(
        [*HATCHLING, str(tmp_path)],
        cwd=copy,
        env={"PATH": "/nonexistent", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode != 0
    assert "there is no Go here" in ran.stderr
    assert "GO=/path/to/go" in ran.stderr
