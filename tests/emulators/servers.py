"""Emulators that run as processes of the tests: moto's server for S3, Azurite for Azure Blob."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

START_TIMEOUT_S = 60.0
INSTALL_S = 600
BUILD = Path(__file__).parents[2] / "build"
AZURITE = Path(__file__).parent / "azurite"
AZURE_ACCOUNT, AZURE_KEY = "warrentest", base64.b64encode(b"a key of the tests, known to all").decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(*buckets: str, log: Path) -> Iterator[str]:
    """Its URL. moto does not check signatures."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, url, log):
        for bucket in buckets:
            _request(urllib.request.Request(f"{url}/{bucket}", method="PUT"))
        yield url


@contextmanager
def azure_server(*containers: str, log: Path) -> Iterator[str]:
    """Its URL, with the account. Azurite checks signatures."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(_azurite()), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence", "--silent",
               "--skipApiVersionCheck", "--disableTelemetry"]  # fmt: skip
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{AZURE_KEY}"}
    with _running(command, url, log, environment):
        for container in containers:
            _request(_new_container(url, container))
        yield f"{url}/{AZURE_ACCOUNT}"


def _azurite() -> Path:
    """The program, installed from the lock file into build/ once per lock file; it appears in one piece."""
    parts = [AZURITE / name for name in ("package.json", "package-lock.json", ".npmrc")]
    ready = BUILD / f"azurite-{hashlib.sha256(b''.join(part.read_bytes() for part in parts)).hexdigest()[:16]}"
    if not ready.exists():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD, prefix="azurite-new-") as place:
            fresh = Path(place) / "fresh"
            fresh.mkdir()
            for part in parts:
                shutil.copy(part, fresh)
            npm = subprocess.run(["npm", "ci"], cwd=fresh, check=False, capture_output=True, text=True, timeout=INSTALL_S)
            assert npm.returncode == 0, f"npm ci failed:\n{npm.stdout}{npm.stderr}"
            fresh.rename(ready)
    return ready / "node_modules" / ".bin" / "azurite-blob"


@contextmanager
def _running(command: list[str], url: str, log: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as e:
        e.close()
    except OSError:
        return False
    return True


def _request(request: urllib.request.Request) -> None:
    urllib.request.urlopen(request, timeout=30).close()


def _new_container(url: str, container: str) -> urllib.request.Request:
    """Signed with the account's key, as Azure's REST interface wants it."""
    headers = {"x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), "x-ms-version": "2021-12-02"}
    resource = f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{container}\nrestype:container"
    text = "\n".join(["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in sorted(headers.items())), resource])
    signature = base64.b64encode(hmac.digest(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256)).decode()
    headers |= {"Authorization": f"SharedKey {AZURE_ACCOUNT}:{signature}", "Content-Length": "0"}
    return urllib.request.Request(f"{url}/{AZURE_ACCOUNT}/{container}?restype=container", method="PUT", headers=headers)
