"""Google Cloud Storage as far as warren uses it: its XML interface, in memory, in a thread. No emulator to be had speaks it.

Objects with generations and preconditions, ListObjectsV2 in pages, errors in Google's form. Nothing is checked that warren does
not send: no signatures, no multipart.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 3
"""Objects in one answer of a listing: few, so that tests meet several pages."""


@dataclass
class Stored:
    data: bytes
    generation: int
    modified: datetime


@dataclass
class Bucket:
    objects: dict[str, Stored] = field(default_factory=dict)
    generations: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class FakeGcs:
    """`with FakeGcs("bucket") as gcs: gcs.url`."""

    def __init__(self, *buckets: str) -> None:
        self.buckets = {name: Bucket() for name in buckets}
        fake = self

        class Handler(_Handler):
            buckets = fake.buckets

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="gcs")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeGcs:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    buckets: dict[str, Bucket]

    def log_message(self, format: str, *args: object) -> None: ...

    def setup(self) -> None:
        super().setup()
        # Two small writes for one answer must not wait for each other.
        self.connection.setsockopt(6, 1, 1)

    def _where(self) -> tuple[Bucket | None, str, dict[str, str]]:
        parts = urlsplit(self.path)
        bucket, _, name = parts.path.lstrip("/").partition("/")
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return self.buckets.get(bucket), unquote(name), query

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        bucket, name, _ = self._where()
        if bucket is None:
            return self._error(404, "NoSuchBucket")
        with bucket.lock:
            wanted = self.headers.get("x-goog-if-generation-match")
            old = bucket.objects.get(name)
            if wanted is not None and int(wanted) != (old.generation if old else 0):
                return self._error(412, "PreconditionFailed")
            bucket.generations += 1
            bucket.objects[name] = new = Stored(body, bucket.generations, datetime.now(UTC))
        return self._answer(200, b"", new)

    def do_GET(self) -> None:
        bucket, name, query = self._where()
        if bucket is None:
            return self._error(404, "NoSuchBucket")
        if not name:
            return self._listing(bucket, query)
        stored = bucket.objects.get(name)
        if stored is None:
            return self._error(404, "NoSuchKey")
        return self._answer(200, stored.data, stored)

    def do_DELETE(self) -> None:
        bucket, name, _ = self._where()
        if bucket is None:
            return self._error(404, "NoSuchBucket")
        with bucket.lock:
            if bucket.objects.pop(name, None) is None:
                return self._error(404, "NoSuchKey")
        return self._answer(204, b"")

    def _listing(self, bucket: Bucket, query: dict[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        names = [name for name in sorted(bucket.objects) if name.startswith(prefix) and name > after]
        page, rest = names[:PAGE], names[PAGE:]
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{o.modified.isoformat().replace('+00:00', 'Z')}</LastModified>"
            f'<ETag>"{o.generation}"</ETag><Size>{len(o.data)}</Size></Contents>'
            for name in page
            for o in (bucket.objects[name],)
        )
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if rest else ""
        self._answer(200, f"<ListBucketResult>{contents}{more}</ListBucketResult>".encode())

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode())

    def _answer(self, status: int, body: bytes, stored: Stored | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if stored is not None:
            self.send_header("ETag", f'"{stored.generation}"')
            self.send_header("x-goog-generation", str(stored.generation))
            self.send_header("Last-Modified", format_datetime(stored.modified, usegmt=True))
        self.end_headers()
        self.wfile.write(body)
