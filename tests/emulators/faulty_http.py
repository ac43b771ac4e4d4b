"""An HTTP proxy in front of an object store's emulator that fails like a network and like a cloud. One request per connection."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter

ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultyHttp:
    """`async with FaultyHttp(port) as proxy: proxy.url`. Its moods, to be changed at any time:

    - `down`: connections are refused at once; `slow_s`: every answer takes that long;
    - `errors`: how many further requests are answered 500; `losing`: how many further PUTs take effect and are not answered;
    - `cutting`: of how many further GETs of objects only half of the body comes, and a whole Content-Length;
    - `held`: methods whose requests wait (`release`); `holding` is set while one does.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.down = False
        self.slow_s = 0.0
        self.errors = self.losing = self.cutting = 0
        self.held: set[str] = set()
        self.holding = asyncio.Event()
        self._released = asyncio.Event()
        self.requests: Counter[tuple[str, str]] = Counter()
        """(method, path without query), each that came in."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FaultyHttp:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def release(self) -> None:
        """What is held goes on, and nothing more is held. What is held for a client that is gone gets no further."""
        self.held.clear()
        self.holding.clear()
        self._released.set()
        self._released = asyncio.Event()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not self.down:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if self.down else writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, target = head.split(b" ", 2)[:2]
        path = target.partition(b"?")[0].decode()
        verb = method.decode()
        self.requests[verb, path] += 1
        body = await reader.readexactly(_length(head))
        if verb in self.held:
            self.holding.set()
            await self._released.wait()
            return  # whoever asked was killed meanwhile, or asks again
        await asyncio.sleep(self.slow_s)
        if self.errors:
            self.errors -= 1
            writer.write(ERROR)
            await writer.drain()
            return
        answer = await self._forward(head, body)
        if verb == "PUT" and self.losing:
            self.losing -= 1
            return
        if verb == "GET" and self.cutting and re.search(r"/\d{10}/\d{10}$", path):
            self.cutting -= 1
            answer = answer[: len(answer) - _length(answer.partition(b"\r\n\r\n")[0]) // 2]
        writer.write(answer)
        await writer.drain()

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        """One request to the emulator, its whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            plain = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head[:-4])
            writer.write(plain + b"\r\nConnection: close\r\n\r\n" + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else 0
