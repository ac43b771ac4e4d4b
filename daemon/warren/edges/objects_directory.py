"""A directory as object store: durable, exclusive, and whole files only.

    <root>/<name>          an object; its folders 0700, itself 0600
    <root>/.new/           objects on their way, of any process that uses the directory
    <root>/.lock           flock'ed around `replace` and `delete`

An object is written aside, synced, and then linked to its name, which fails when the name is taken: so a crash at any moment
leaves an object whole or not at all, and of two that create one name exactly one does. The directory may be on NFS; it must be
able to make hard links.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from warren.errors import StorageError, StorageTrouble
from warren.ports import Found, Listed

T = TypeVar("T")

LEFTOVER_S = 3_600.0
"""How old a file in `.new` must be to count as left behind by a crash."""
THREADS = 8
"""A pool of its own: a network disk that hangs holds up nothing else."""
MAKE_FOLDER_TRIES = 5
"""`delete` removes folders that became empty, perhaps between our making one and using it."""


class DirectoryObjects:
    """Implements `ports.ObjectStore`. `root` must be there; `make` makes it (0700), for one that belongs to warren alone."""

    def __init__(self, root: Path, *, timeout_s: float = 30.0, make: bool = False) -> None:
        self._root, self._timeout_s = root, timeout_s
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="objects")
        if make:
            with _explained(root):
                root.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        return await self._run(path, lambda: self._create(path, data))

    async def replace(self, name: str, data: bytes, expected: str) -> bool:
        path = self._path(name)
        return await self._run(path, lambda: self._replace(path, data, expected))

    async def get(self, name: str) -> Found | None:
        path = self._path(name)
        data = await self._run(path, lambda: self._read(path))
        return None if data is None else Found(data, _version(data))

    async def list(self, prefix: str) -> list[Listed]:
        folder = self._path(prefix) if prefix else self._root
        return await self._run(folder, lambda: sorted(self._walk(folder), key=lambda listed: listed.name))

    async def delete(self, name: str) -> None:
        path = self._path(name)
        await self._run(path, lambda: self._delete(path))

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- in a thread --------------------------------------------------------------------------------------------------

    async def _run(self, path: Path, do: Callable[[], T]) -> T:
        def explained() -> T:
            with _explained(path):
                if not self._root.is_dir():  # an unmounted disk is no empty store
                    raise StorageError(
                        f"There is no directory {self._root}.",
                        kind="misconfigured",
                        hint="Mount or make it: warren does not, so that a disk that is not there is no empty store.",
                    )
                return do()

        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._pool, explained)
        except TimeoutError:
            raise StorageError(
                f"{path} did not answer within {self._timeout_s:g} s.",
                kind="unavailable",
                hint="Does the disk or its server hang?",
            ) from None

    def _path(self, name: str) -> Path:
        parts = name.split("/")
        if parts[0].startswith(".") or not all(part not in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r} is no name of an object")
        return self._root.joinpath(*parts)

    def _create(self, path: Path, data: bytes) -> bool:
        if path.exists():
            # It may be our own, of a moment ago, and not durable yet.
            _sync(path.parent)
            return False
        new = self._write_aside(data)
        try:
            for _ in range(MAKE_FOLDER_TRIES):
                self._make_folders(path.parent)
                try:
                    os.link(new, path)
                except FileNotFoundError:
                    continue
                except FileExistsError:
                    _sync(path.parent)
                    return False
                _sync(path.parent)
                return True
        finally:
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
        raise StorageError(f"The folder {path.parent} goes away whenever it is made.", kind="unavailable")

    def _replace(self, path: Path, data: bytes, expected: str) -> bool:
        with self._locked():
            old = self._read(path)
            if old is None or _version(old) != expected:
                return False
            new = self._write_aside(data)
            try:
                new.replace(path)
            except FileNotFoundError:  # its folder was deleted at this moment
                new.unlink()
                return False
            _sync(path.parent)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time of what replaces and deletes: a key that is deleted while it is wrapped anew must not come back."""
        lock = os.open(self._root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def _walk(self, folder: Path) -> Iterator[Listed]:
        """Files below `folder`. What vanishes meanwhile is left out, as if it had been deleted before."""
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            path = Path(entry.path)
            if folder == self._root and entry.name.startswith("."):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from self._walk(path)
            elif stat.S_ISREG(status.st_mode):
                yield Listed(path.relative_to(self._root).as_posix(), status.st_size, status.st_mtime)

    def _delete(self, path: Path) -> None:
        try:
            with self._locked():
                path.unlink()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        _sync(path.parent)
        # Folders that are empty now go, too; who is about to use one makes it again.
        for folder in path.parents:
            if folder == self._root:
                return
            try:
                folder.rmdir()
            except OSError as e:
                if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    return
                raise

    def _write_aside(self, data: bytes) -> Path:
        aside = self._root / ".new"
        with contextlib.suppress(FileExistsError):
            aside.mkdir(mode=0o700)
        self._sweep(aside)
        new = aside / uuid.uuid4().hex
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
        except BaseException:
            new.unlink()
            raise
        return new

    def _sweep(self, aside: Path) -> None:
        for entry in os.scandir(aside):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < time.time() - LEFTOVER_S:
                    Path(entry.path).unlink()

    def _make_folders(self, folder: Path) -> None:
        """Durable folders, from the root down."""
        for made in reversed((folder, *folder.parents)):
            if self._root not in made.parents:
                continue
            try:
                made.mkdir(mode=0o700)
            except FileExistsError:
                pass  # perhaps from a moment ago, and not durable yet
            except FileNotFoundError:  # the one above was removed at this moment; the link fails then, and it is tried again
                return
            _sync(made.parent)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:  # removed meanwhile, and what was in it before that
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        kind, hint = _TROUBLES.get(e.errno or 0, ("unavailable", "Look into the system log for errors of the disk."))
        raise StorageError(f"{path} cannot be used: {e.strerror or e}.", kind=kind, hint=hint) from e


_OWNER = "Check its owner and mode: warren needs to read, write and list there."
_LINKS = "The file system forbids it, or cannot make hard links; then use another one."
_TROUBLES: dict[int, tuple[StorageTrouble, str]] = {
    errno.EACCES: ("denied", _OWNER),
    errno.EROFS: ("denied", "The file system is mounted read-only."),
    errno.EPERM: ("misconfigured", _LINKS),
    errno.EOPNOTSUPP: ("misconfigured", _LINKS),
    errno.ENOTDIR: ("misconfigured", "Something that is no directory stands in the way."),
    errno.ENOSPC: ("unavailable", "The disk is full."),
    errno.EDQUOT: ("unavailable", "The quota of the disk is used up."),
}
