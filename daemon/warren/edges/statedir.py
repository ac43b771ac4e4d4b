"""The state directory: who may use it, and which epoch of a session is the current one.

    <state>/lock                            flock'ed by the daemon, holds its pid
    <state>/sessions/<id>/current           the current epoch as decimal text
    <state>/sessions/<id>/<epoch>/          the engine's files: state.db and its own lock
    <state>/sessions/<id>/restored.db       a state on its way back from a backup, until it has its epoch

Missing and unreadable are different answers everywhere: missing is None, False or nothing; whatever else goes wrong is a
StateError, so that a damaged disk is never taken for a session that was not paired yet.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import aiofiles

from warren.core.names import is_session_id
from warren.edges.database_check import database_problem
from warren.errors import OwnershipError, SealError, StateError

T = TypeVar("T")

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that say that nothing can be written now, not that what is there is damaged."""

_EPOCH = re.compile(r"0|[1-9][0-9]{0,17}")
_STAGED = "restored.db"
_COPY = "backup.db"
_KEEP = "unreadable"


class StateDirectory:
    """Implements `ports.StateDir`. What is begun is finished: cancelling a caller only stops it from waiting."""

    def __init__(self, path: Path) -> None:
        """`path` must be absolute: a daemon that changes its directory would lose its sessions."""
        if not path.is_absolute():
            raise StateError(f"The state directory {path} is not an absolute path.", hint="Check `state_dir`.")
        self.path = path
        self._lock_fd: int | None = None
        # Of each session with something under way: a later call must not overtake an earlier one that was cancelled.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[object]] = set()

    def lock(self) -> None:
        """Take the directory for this process, making it if need be. It is given up by `unlock` or the end of the process.

        Raises OwnershipError when another process has it. Idempotent.
        """
        if self._lock_fd is not None:
            return
        with _explained(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._flock(fd)
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd = fd

    def unlock(self) -> None:
        """Give the directory up. Idempotent. The file stays: removing it would let two processes lock two files."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    async def current_epoch(self, session: str) -> int | None:
        """The epoch the pointer names; None when there is no pointer. Raises StateError when it cannot be read."""
        pointer = self._folder(session) / "current"
        try:
            with _explained(pointer):
                # In one thread from open to close: whoever cancels the caller leaves no open file behind.
                text = (await asyncio.to_thread(_head_of, pointer)).decode("ascii", "replace")
        except FileNotFoundError:
            return None
        if not _EPOCH.fullmatch(text.removesuffix("\n")):
            raise StateError(
                f"{pointer} does not hold an epoch.",
                hint=f"Its directory has one folder per epoch; write the right number into it. It says {text!r}.",
            )
        return int(text)

    async def prepare(self, session: str, epoch: int) -> Path:
        """See `ports.StateDir.prepare`. After a crash at any moment the pointer is the old one or the new one, whole."""
        folder = self._folder(session)
        return await self._in_turn(session, lambda: self._prepare(session, folder, epoch))

    async def remove(self, session: str) -> None:
        """See `ports.StateDir.remove`. Links are removed, never followed. A crash half-way is finished by the next call."""
        folder = self._folder(session)
        await self._in_turn(session, lambda: self._remove(folder))

    async def epochs(self, session: str) -> list[int]:
        """The epochs that have a directory, ascending, current or not."""
        folder = self._folder(session)
        try:
            with _explained(folder):
                names = await asyncio.to_thread(_folders_in, folder)
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if _EPOCH.fullmatch(name))

    async def sessions(self) -> list[str]:
        """The sessions that have a directory, sorted."""
        folder = self.path / "sessions"
        try:
            with _explained(folder):
                names = await asyncio.to_thread(_folders_in, folder)
        except FileNotFoundError:
            return []
        return sorted(name for name in names if is_session_id(name))

    async def state_size(self, session: str, epoch: int) -> int:
        """Bytes of the epoch's `state.db`; 0 when there is none."""
        database = self._folder(session) / str(epoch) / "state.db"
        try:
            with _explained(database):
                return (await asyncio.to_thread(os.stat, database)).st_size
        except FileNotFoundError:
            return 0

    async def has_state(self, session: str, epoch: int) -> bool:
        """Whether the epoch has a `state.db`, good or bad."""
        database = self._folder(session) / str(epoch) / "state.db"
        try:
            with _explained(database):
                await asyncio.to_thread(os.stat, database)
        except FileNotFoundError:
            return False
        return True

    # --- backup and restore -------------------------------------------------------------------------------------------

    async def copied(self, session: str, copy: Callable[[Path, Path], Awaitable[T]]) -> tuple[T, bytes] | None:
        """See `ports.StateDir.copied`."""
        epoch = await self.current_epoch(session)
        if epoch is None or not await self.has_state(session, epoch):
            return None
        directory = self._folder(session) / str(epoch)
        target = directory / _COPY
        with _explained(target, missing=True):
            await asyncio.to_thread(_delete, target)  # from before a crash
            try:
                told = await copy(directory, target)
                data = await asyncio.to_thread(_bytes_of, target)
            finally:
                await asyncio.to_thread(_delete, target)
        return told, data

    async def stage(self, session: str, database: bytes) -> None:
        """See `ports.StateDir.stage`."""
        folder = self._folder(session)
        await self._in_turn(session, lambda: self._stage(folder, database))

    async def install(self, session: str, epoch: int) -> None:
        """See `ports.StateDir.install`."""
        folder = self._folder(session)
        await self._in_turn(session, lambda: self._install(session, folder, epoch))

    async def keep(self, session: str, epoch: int) -> None:
        """See `ports.StateDir.keep`."""
        with _explained(self._folder(session), missing=True):
            await _replace(self._folder(session) / str(epoch) / _KEEP, b"")

    async def tidy(self, session: str) -> None:
        """See `ports.StateDir.tidy`."""
        current, folder = await self.current_epoch(session), self._folder(session)
        for epoch in await self.epochs(session) if current is not None else ():
            old = folder / str(epoch)
            if epoch < (current or 0) and not (old / _KEEP).exists():
                with _explained(old, missing=True):
                    await self._in_turn(session, lambda old=old: asyncio.to_thread(_delete, old))  # type: ignore[misc]

    async def _stage(self, folder: Path, database: bytes) -> None:
        staged = folder / _STAGED
        with _explained(staged, missing=True):
            for needed in (folder.parent, folder):
                await asyncio.to_thread(_make_private, needed)
            await _replace(staged, database)
        if problem := await asyncio.to_thread(database_problem, database):
            raise SealError(f"The database in the backup is not whole: {problem}.", hint="An older backup may be whole.")

    async def _install(self, session: str, folder: Path, epoch: int) -> None:
        directory = folder / str(epoch)
        with _explained(directory, missing=True):
            if await self.has_state(session, epoch):
                raise StateError(f"{directory} has a state already; nothing was restored over it.")
            await asyncio.to_thread(_make_private, directory)
            await asyncio.to_thread(os.replace, folder / _STAGED, directory / "state.db")
            await asyncio.to_thread(_sync_folder, directory)
        await self._prepare(session, folder, epoch)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _folder(self, session: str) -> Path:
        if not is_session_id(session):  # it would be a path of somebody's choice
            raise StateError(f"{session!r} is no session id.")
        return self.path / "sessions" / session

    def _flock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            by = f"process {holder}" if holder.isdecimal() else "another process"
            raise OwnershipError(
                f"The state directory {self.path} is in use by {by}.",
                hint="Only one warrend may run per state directory: stop the other one, or set another `state_dir`.",
            ) from None
        except OSError as e:
            raise _unusable(self.path, e) from e
        # Only for whoever finds it locked; on a full disk there may be no room for it.
        with suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    async def _in_turn(self, session: str, do: Callable[[], Awaitable[T]]) -> T:
        turn = self._turns.setdefault(session, asyncio.Lock())

        async def run() -> T:
            async with turn:
                return await do()

        task = asyncio.create_task(run(), name=f"state of {session}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _prepare(self, session: str, folder: Path, epoch: int) -> Path:
        directory = folder / str(epoch)
        with _explained(directory, missing=True):
            for needed in (folder.parent, folder, directory):
                await asyncio.to_thread(_make_private, needed)
        if await self.current_epoch(session) != epoch:
            with _explained(folder, missing=True):
                await _replace(folder / "current", f"{epoch}\n".encode())
        return directory

    async def _remove(self, folder: Path) -> None:
        # Out of the way in one step first: half a session would look like a damaged one. No session id begins with a dot.
        doomed = folder.with_name(f".removed-{folder.name}")
        with _explained(folder):
            await asyncio.to_thread(_delete, doomed)
            await asyncio.to_thread(_move_away, folder, doomed)
            await asyncio.to_thread(_delete, doomed)


async def _replace(path: Path, data: bytes) -> None:
    """Write a file anew, durably: whoever reads it, also after a loss of power, sees the old bytes or the new ones."""
    new = path.with_name(f"{path.name}.new")
    async with aiofiles.open(new, "wb", opener=_open_private) as file:
        await file.write(data)
        await file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    await asyncio.to_thread(os.replace, new, path)
    await asyncio.to_thread(_sync_folder, path.parent)


def _head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
        folder.chmod(0o700)
    # Also when it was there: it may be new and not durable yet, from before a crash.
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _folders_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _move_away(folder: Path, doomed: Path) -> None:
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    _sync_folder(folder.parent)


def _delete(path: Path) -> None:
    """Remove a tree, or a link, without following links (rmtree walks by descriptors and refuses a link as its root)."""
    existed = False
    while os.path.lexists(path):
        existed = True
        # Something in it may vanish at the same moment (SQLite's own files): then once more.
        with suppress(FileNotFoundError):
            if path.is_symlink() or path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path)
    if existed:
        _sync_folder(path.parent)


@contextmanager
def _explained(path: Path, *, missing: bool = False) -> Iterator[None]:
    """Errors of the file system as StateError; that something is missing only with `missing`."""
    try:
        yield
    except OSError as e:
        if isinstance(e, FileNotFoundError) and not missing:
            raise
        raise _unusable(path, e) from e


def _unusable(path: Path, error: OSError) -> StateError:
    return StateError(
        f"{path} cannot be used: {error.strerror or error}.",
        hint="Check the owner, mode and free space of `state_dir`, and the system log for errors of the disk.",
        retryable=error.errno in PASSING,
    )
