"""An engine process and its pipe: lines of bytes, nothing of what they mean (`core.frames` knows that)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from warren.core.frames import MAX_FRAME_BYTES
from warren.edges.logs import log_engine_line
from warren.errors import EngineError, FrameError

LOG_LINE_BYTES = 64 * 1024
"""Longer lines on the engine's stderr are cut off."""
LAST_WORDS_S = 1.0
"""How long after an engine's exit its last log lines are waited for."""

# The engine wants its socket as descriptor 3, but `pass_fds` keeps the number it has in the daemon, where 3 is taken. So the
# socket goes in as standard input, and the shell moves it and becomes the engine: same pid, no Python between fork and exec
# (`preexec_fn` is not safe with threads), no race for number 3 in the daemon. POSIX shells take no number over 9, but 0 and 3.
_MOVE_TO_FD_3 = 'exec "$0" "$@" 3<&0 0</dev/null'


class PipedEngine:
    """Implements `ports.EngineProcess`. Made by `start_engine`."""

    pid: int

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: Callable[[bytes], None],
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._reader = reader
        self._writer = writer
        assert process.stderr is not None
        self._stderr = asyncio.create_task(_relay(process.stderr, log), name=f"engine {process.pid} stderr")

    async def send(self, frame: bytes) -> None:
        """See `ports.EngineProcess.send`; any number of tasks may call it.

        Waits while the engine does not read. A frame is never torn: when cancelled, it has been queued whole.
        """
        if self._writer.is_closing():
            raise self._gone()
        try:
            self._writer.write(frame)
            await self._writer.drain()
        except (OSError, RuntimeError) as e:  # RuntimeError: written after `terminate` has closed our half
            raise self._gone() from e

    async def frames(self) -> bytes | None:
        """See `ports.EngineProcess.frames`; for one task. Cancelling it loses nothing."""
        try:
            line = await self._reader.readuntil()
        except asyncio.LimitOverrunError as e:
            raise FrameError(
                f"engine {self.pid} sent a frame over the limit of {MAX_FRAME_BYTES} bytes",
                hint="Daemon and engine must come from the same release; run `make engine`.",
            ) from e
        except (asyncio.IncompleteReadError, OSError):  # what follows the last newline was torn by its end
            self._writer.close()
            return None
        return line[:-1]

    async def terminate(self, timeout_s: float) -> int:
        """See `ports.EngineProcess.terminate`. The engine is told by the end of its input; what it still says can be read.

        Negative: the number of the signal that ended it. May be called again, also after it was cancelled.
        """
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()
        try:
            status = await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            self.kill()
            status = await self._process.wait()
        await self._last_words()
        return status

    def kill(self) -> None:
        """SIGKILL; nothing when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _last_words(self) -> None:
        """Let the log end before the descriptors are closed. Frames that have arrived can still be read afterwards."""
        try:
            await asyncio.wait([self._stderr], timeout=LAST_WORDS_S)
        finally:
            self._stderr.cancel()
            self._writer.close()
        await asyncio.wait([self._stderr])
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _gone(self) -> EngineError:
        return EngineError(f"engine {self.pid} is gone", engine_code="gone")


async def start_engine(binary: Path, args: Sequence[str], *, log: Callable[[bytes], None] = log_engine_line) -> PipedEngine:
    """Start the program with a socket as descriptor 3; its standard error goes to `log` line by line.

    It is in a session of its own, so that a terminal's Ctrl-C reaches only the daemon. Raises EngineError ("not_started")
    when there is nothing to start or the system has no room for it.
    """
    program = _program(binary)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                _MOVE_TO_FD_3,
                program,
                *args,
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=LOG_LINE_BYTES,
                start_new_session=True,
            )
        ours.setblocking(False)
        # asyncio's limit does not count the newline.
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_FRAME_BYTES - 1)
    except BaseException as e:
        # A child that was started all the same sees the end of its descriptor 3 and exits.
        ours.close()
        if isinstance(e, OSError):
            raise _not_started(binary, str(e)) from e
        raise
    return PipedEngine(process, reader, writer, log)


def _program(binary: Path) -> str:
    if not binary.is_file() or not os.access(binary, os.X_OK):
        raise _not_started(binary, "there is no such program, or it may not be executed")
    return str(binary.absolute())


def _not_started(binary: Path, why: str) -> EngineError:
    return EngineError(f"{binary} cannot be started: {why}.", engine_code="not_started", hint="Run `make engine`.")


async def _relay(stderr: asyncio.StreamReader, log: Callable[[bytes], None]) -> None:
    """Hand over each line until the end. A line over the limit is cut: its beginning is logged, its rest is dropped."""
    skipping = False
    while True:
        try:
            line = await stderr.readuntil()
        except asyncio.IncompleteReadError as e:
            if e.partial and not skipping:
                log(e.partial)
            return
        except asyncio.LimitOverrunError as e:
            part = await stderr.readexactly(e.consumed)
            if not skipping:
                log(part)
            skipping = True
            continue
        if not skipping:
            log(line)
        skipping = False
