"""What can go wrong with a store, and what is said of it; the directory under crashes; where credentials come from."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from warren.edges import objects_directory
from warren.edges.objects import CloudObjects, _aws_files, open_store
from warren.edges.objects_directory import DirectoryObjects
from warren.edges.settings import StorageSettings
from warren.errors import ConfigError, StorageError

DATA = b"sealed" * 1_000


class Answers(BaseHTTPRequestHandler):
    """Answers everything with `status`, `body` and `headers`, and may claim another length."""

    status, body, claimed = 200, b"", -1
    headers_sent: ClassVar[dict[str, str]] = {}
    seen: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: object) -> None: ...

    def _any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.seen.append(f"{self.command} {self.headers.get('Authorization', '')}")
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body) if self.claimed < 0 else self.claimed))
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about."""


class Server:
    def __init__(self, certificate: Path | None = None) -> None:
        """`certificate`: a file with key and certificate; TLS then."""
        self.answers = type("Answers", (Answers,), {"seen": []})
        self._http = QuietServer(("127.0.0.1", 0), self.answers)
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def answer(self, status: int, code: str = "", body: bytes = b"", claimed: int = -1, **headers: str) -> None:
        xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode() if code else body
        self.answers.status, self.answers.body, self.answers.claimed = status, xml, claimed
        self.answers.headers_sent = {name.replace("_", "-"): value for name, value in headers.items()}

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _no_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def s3_at(url: str, *, timeout_s: float = 5.0, allow_http: bool = True) -> CloudObjects:
    settings = StorageSettings(
        url="s3://bucket", region="us-east-1", access_key_id="a", secret_access_key="s3cret", timeout_s=timeout_s
    )
    # The settings refuse http:// without allow_http; here it is about what the store does then.
    settings = settings.model_copy(update={"endpoint": url, "allow_http": allow_http})
    store = open_store(settings, Path("/"))
    assert isinstance(store, CloudObjects)
    return store


@pytest.mark.parametrize(
    ("status", "code", "kind", "hint"),
    [
        (403, "AccessDenied", "denied", "credentials"),
        (403, "SignatureDoesNotMatch", "denied", "credentials"),
        (403, "InvalidAccessKeyId", "denied", "credentials"),
        (401, "", "denied", "credentials"),
        (403, "RequestTimeTooSkewed", "denied", "clock"),
        (404, "NoSuchBucket", "misconfigured", "bucket"),
        (400, "AuthorizationHeaderMalformed", "misconfigured", "region"),
        (404, "", "misconfigured", "endpoint"),
        (405, "MethodNotAllowed", "misconfigured", "endpoint"),
        (500, "InternalError", "unavailable", "tried again"),
        (503, "SlowDown", "unavailable", "tried again"),
        (429, "", "unavailable", "tried again"),
    ],
)
async def test_what_the_server_says(server: Server, status: int, code: str, kind: str, hint: str) -> None:
    server.answer(status, code)
    store = s3_at(server.url)
    for call in (store.get, store.list, lambda name: store.create(name, DATA), lambda name: store.replace(name, DATA, "e v")):
        server.answers.seen.clear()
        with pytest.raises(StorageError, match=r"^s3://bucket: could not \w+ warren/acme/key: HTTP ") as told:
            await call("warren/acme/key")
        assert told.value.kind == kind, told.value
        assert told.value.retryable == (kind == "unavailable")
        assert hint in told.value.hint
        assert str(status) in told.value.message
        assert code in told.value.message
        assert "s3cret" not in str(told.value)
        assert len(server.answers.seen) == 1, "repeating is not the edge's business"


async def test_another_region_is_told(server: Server) -> None:
    server.answer(301, "PermanentRedirect")
    with pytest.raises(StorageError, match="elsewhere") as told:
        await s3_at(server.url).get("warren/acme/key")
    assert (told.value.kind, "region" in told.value.hint) == ("misconfigured", True)


async def test_a_page_of_somebody_else_is_no_missing_object(server: Server) -> None:
    """That it is no empty list either is seen by `services.backup_keys` at the start: obstore takes any page for one."""
    server.answer(404, body=b"<html><body>Not Found</body></html>")
    with pytest.raises(StorageError, match="HTTP 404") as told:
        await s3_at(server.url).get("warren/acme/key")
    assert told.value.kind == "misconfigured"


async def test_a_read_that_is_cut_off_is_told(server: Server) -> None:
    server.answer(200, body=DATA, claimed=len(DATA) + 1, ETag='"e"', Last_Modified="Fri, 20 Nov 2026 12:00:00 GMT")
    with pytest.raises(StorageError) as told:
        await s3_at(server.url).get("warren/acme/key")
    assert told.value.kind == "unavailable"


async def test_an_enormous_object_is_not_read(server: Server) -> None:
    server.answer(200, body=b"", claimed=10**12, ETag='"e"', Last_Modified="Fri, 20 Nov 2026 12:00:00 GMT")
    with pytest.raises(StorageError, match="no object of warren is that large") as told:
        await s3_at(server.url).get("warren/acme/key")
    assert told.value.kind == "corrupt"


async def test_nobody_there() -> None:
    with socket.socket() as taken:  # bound but not listening: refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(StorageError) as told:
            await s3_at(f"http://127.0.0.1:{taken.getsockname()[1]}").create("warren/acme/key", DATA)
    assert told.value.kind == "unavailable"
    assert "network" in told.value.hint


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


async def test_a_server_that_says_nothing_is_given_up(silent: str) -> None:
    for call in ("get", "list", "delete"):
        started = time.monotonic()
        with pytest.raises(StorageError) as told:
            await getattr(s3_at(silent, timeout_s=0.3), call)("warren/acme/key")
        assert told.value.kind == "unavailable"
        assert time.monotonic() - started < 20


async def test_http_is_only_spoken_when_allowed(server: Server) -> None:
    with pytest.raises(StorageError) as told:
        await s3_at(server.url, allow_http=False).get("warren/acme/key")
    assert told.value.kind == "misconfigured"
    assert "allow_http" in told.value.hint
    assert not server.answers.seen


def certificate(folder: Path) -> tuple[Path, Path]:
    """A CA and, in one file, a certificate for 127.0.0.1 by it with its key."""
    now = datetime.now(UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def signed(subject: str, key: ec.EllipticCurvePrivateKey, *extensions: tuple[x509.ExtensionType, bool]) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("a CA of a test"))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(ca_key, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = signed("a CA of a test", ca_key, (x509.BasicConstraints(ca=True, path_length=None), True))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = signed("127.0.0.1", key, (x509.BasicConstraints(ca=False, path_length=None), True), (here, False))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(private + leaf.public_bytes(Encoding.PEM))
    return folder / "ca.pem", folder / "server.pem"


async def test_certificates_are_checked_and_a_ca_of_ones_own_can_be_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, own = certificate(tmp_path)
    server = Server(own)
    server.answer(404, "NoSuchKey")
    try:
        with pytest.raises(StorageError, match="certificate is not trusted") as told:
            await s3_at(server.url, allow_http=False).get("warren/acme/key")
        assert told.value.kind == "misconfigured"
        assert not server.answers.seen
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
        assert await s3_at(server.url, allow_http=False).get("warren/acme/key") is None
    finally:
        server.stop()


# --- credentials --------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))


def test_the_aws_command_lines_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _aws_files(credentials=True) == {}
    write(tmp_path / ".aws/credentials", """
        [default]
        aws_access_key_id = AKIADEFAULT
        aws_secret_access_key = one%two
        [work]
        aws_access_key_id = AKIAWORK
        aws_secret_access_key = work
        aws_session_token = token
        """)  # fmt: skip
    write(tmp_path / ".aws/config", """
        [default]
        region = eu-central-1
        [profile work]
        region = us-west-2
        [profile sso]
        sso_session = x
        """)  # fmt: skip
    default = {"region": "eu-central-1", "access_key_id": "AKIADEFAULT", "secret_access_key": "one%two"}
    assert _aws_files(credentials=True) == default
    assert _aws_files(credentials=False) == {"region": "eu-central-1"}
    monkeypatch.setenv("AWS_PROFILE", "work")
    work = {"region": "us-west-2", "access_key_id": "AKIAWORK", "secret_access_key": "work", "session_token": "token"}
    assert _aws_files(credentials=True) == work
    monkeypatch.setenv("AWS_PROFILE", "sso")
    with pytest.raises(ConfigError, match="AWS_PROFILE is sso"):
        _aws_files(credentials=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAENV")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert _aws_files(credentials=True) == {}
    write(tmp_path / ".aws/config", "no ini file")
    with pytest.raises(ConfigError, match="cannot be read"):
        _aws_files(credentials=True)


async def test_credentials_of_the_environment_are_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAENV")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    server.answer(404, "NoSuchKey")
    store = open_store(StorageSettings(url="s3://bucket", endpoint=server.url, allow_http=True), Path("/"))
    assert await store.get("warren/acme/key") is None
    assert "Credential=AKIAENV/" in server.answers.seen[0]
    assert "/eu-north-1/s3/" in server.answers.seen[0]


# --- the directory --------------------------------------------------------------------------------------------------------


async def test_files_and_folders_are_private(tmp_path: Path) -> None:
    store = open_store(StorageSettings(), tmp_path)
    old = os.umask(0)
    try:
        assert await store.create("warren/acme/0000000001/0000000001", DATA)
    finally:
        os.umask(old)
    for path in (tmp_path / "backups").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "backups").stat().st_mode) == 0o700
    await store.close()


async def test_a_directory_that_is_not_there_is_no_empty_store(tmp_path: Path) -> None:
    """An unmounted disk."""
    store = open_store(StorageSettings(url=f"file://{tmp_path}/mnt"), tmp_path)
    for call in (store.get, store.list, store.delete, lambda name: store.create(name, DATA)):
        with pytest.raises(StorageError, match="There is no directory") as told:
            await call("warren/acme/key")
        assert told.value.kind == "misconfigured"
    assert not (tmp_path / "mnt").exists()
    await store.close()


@pytest.mark.parametrize("name", ["", "/etc/passwd", "a//b", "../a", "a/../b", ".new/a", ".lock", "a/./b"])
async def test_only_names_of_objects_are_paths(tmp_path: Path, name: str) -> None:
    store = DirectoryObjects(tmp_path)
    with pytest.raises(ValueError, match="no name of an object"):
        await store.create(name, DATA)
    await store.close()


async def test_what_the_disk_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryObjects(tmp_path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects_directory.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left") as told:
        await store.create("warren/acme/1", DATA)
    assert told.value.kind == "unavailable"
    monkeypatch.undo()
    assert list((tmp_path / ".new").iterdir()) == []
    assert await store.get("warren/acme/1") is None

    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(objects_directory.os, "link", no_links)
    with pytest.raises(StorageError, match="not permitted") as told:
        await store.create("warren/acme/1", DATA)
    assert told.value.kind == "misconfigured"
    assert "hard links" in told.value.hint
    await store.close()


async def test_a_disk_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryObjects(tmp_path, timeout_s=0.1)
    goes_on = threading.Event()
    monkeypatch.setattr(DirectoryObjects, "_read", lambda *_: goes_on.wait(30) and None)
    try:
        with pytest.raises(StorageError, match=r"did not answer within 0\.1 s") as told:
            await store.get("warren/acme/1")
    finally:
        goes_on.set()
    assert told.value.kind == "unavailable"
    await store.close()


async def test_everything_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it is linked, then its folder, and every folder above it."""
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def noted_fsync(fd: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{fd}').readlink().relative_to(tmp_path).as_posix()}")
        fsync(fd)

    def noted_link(source: Path, target: Path) -> None:
        steps.append("link")
        link(source, target)

    monkeypatch.setattr(objects_directory.os, "fsync", noted_fsync)
    monkeypatch.setattr(objects_directory.os, "link", noted_link)
    store = DirectoryObjects(tmp_path)
    assert await store.create("warren/acme/1", DATA)
    assert steps[0].startswith("sync .new/")
    assert steps[1:] == ["sync .", "sync warren", "link", "sync warren/acme"]
    steps.clear()
    assert not await store.create("warren/acme/1", DATA)
    assert steps == ["sync warren/acme"]  # it may be our own of a moment ago
    await store.close()


async def test_what_is_deleted_while_it_is_replaced_stays_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is logged out while its key is wrapped anew: the key must not come back."""
    objects = DirectoryObjects(tmp_path)
    assert await objects.create("warren/acme/key", b"old")
    found = await objects.get("warren/acme/key")
    assert found is not None
    deleting = threading.Thread(target=lambda: objects._delete(tmp_path / "warren/acme/key"))
    write_aside = objects._write_aside

    def meanwhile(data: bytes) -> Path:
        deleting.start()
        deleting.join(0.2)  # it waits for us; without that it would be done by now
        return write_aside(data)

    monkeypatch.setattr(objects, "_write_aside", meanwhile)
    await objects.replace("warren/acme/key", b"new", found.version)
    await asyncio.to_thread(deleting.join)
    assert await objects.get("warren/acme/key") is None


async def test_creating_and_deleting_in_one_folder_do_not_hinder_each_other(tmp_path: Path) -> None:
    """Deleting the last object removes the folder that another one is about to go into."""
    store = DirectoryObjects(tmp_path)

    async def back_and_forth(name: str) -> None:
        for _ in range(100):
            assert await store.create(name, DATA)
            found = await store.get(name)
            assert found is not None
            assert found.data == DATA
            await store.delete(name)

    await asyncio.gather(*(back_and_forth(f"warren/acme/{n}") for n in range(3)))
    assert await store.list("") == []
    assert not (tmp_path / "warren").exists()
    await store.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from warren.edges.objects_directory import DirectoryObjects

async def main():
    store = DirectoryObjects(Path(sys.argv[1]))
    await store.create("warren/acme/key", bytes(200_000))
    print("ready", flush=True)
    for n in range(1, 1_000_000):
        assert await store.create(f"warren/acme/{sys.argv[2]}/{n}", bytes([n % 256]) * 200_000)
        print(n, flush=True)
        found = await store.get("warren/acme/key")
        assert await store.replace("warren/acme/key", bytes([n % 256]) * 200_000, found.version)

asyncio.run(main())
"""


def killed_after(lines: int, command: list[str]) -> list[int]:
    """The numbers that a writer has reported when it is killed in the middle of the next."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        said = [writer.stdout.readline() for _ in range(lines)]
        os.kill(writer.pid, signal.SIGKILL)
        said += writer.stdout.readlines()
    return [int(line) for line in said if line.endswith("\n")]


@pytest.mark.parametrize("round", range(5))
async def test_a_kill_at_any_moment_leaves_whole_objects(tmp_path: Path, round: int) -> None:
    """What was reported is there; nothing is half there; what was left aside is removed in the end."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(round)]
    done = killed_after(3 + round, command)
    store = DirectoryObjects(tmp_path)
    numbers = [int(o.name.rsplit("/", maxsplit=1)[1]) for o in await store.list(f"warren/acme/{round}")]
    assert sorted(numbers)[: len(done)] == done
    assert len(numbers) - len(done) in (0, 1)
    for listed in await store.list("warren"):
        found = await store.get(listed.name)
        assert found is not None
        assert len(found.data) == 200_000
        assert len(set(found.data)) == 1
    for left in (tmp_path / ".new").iterdir():
        os.utime(left, (0, 0))
    assert await store.create("warren/other", DATA)
    assert list((tmp_path / ".new").iterdir()) == []
    with contextlib.suppress(FileNotFoundError):
        assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o600
    await store.close()
