"""The state directory on a real file system."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warren.edges.statedir import StateDirectory
from warren.errors import OwnershipError, StateError


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDirectory]:
    state = StateDirectory(tmp_path / "var" / "warren")
    state.lock()
    yield state
    state.unlock()


def session_dir(state: StateDirectory, session: str = "acme") -> Path:
    return state.path / "sessions" / session


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def modes(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): oct(p.stat().st_mode & 0o777) for p in [root, *root.rglob("*")]}


def inode(path: Path) -> int:
    return path.stat().st_ino


def everything(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def symlink(link: Path, target: Path) -> None:
    link.symlink_to(target)


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from warren.edges.statedir import StateDirectory
StateDirectory(Path(sys.argv[1])).lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_the_directory_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "var")]
    state = StateDirectory(tmp_path / "var")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(OwnershipError, match=f"in use by process {holder.pid}") as caught:
            state.lock()
        assert "Only one warrend" in caught.value.hint
        holder.kill()
        holder.wait()
    state.lock()
    assert (tmp_path / "var" / "lock").read_text() == f"{os.getpid()}\n"
    state.unlock()


def test_the_lock_is_taken_once_and_given_up(state: StateDirectory) -> None:
    state.lock()
    other = StateDirectory(state.path)
    with pytest.raises(OwnershipError):
        other.lock()
    state.unlock()
    state.unlock()
    other.lock()
    other.unlock()


def test_a_child_does_not_inherit_the_lock(state: StateDirectory) -> None:
    """An engine may outlive its daemon, and must not keep the next one out."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
        state.unlock()
        other = StateDirectory(state.path)
        other.lock()
        other.unlock()
        child.kill()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"somebody"])
def test_a_holder_without_a_pid_is_another_process(tmp_path: Path, content: bytes) -> None:
    first = StateDirectory(tmp_path)
    first.lock()
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(OwnershipError, match="another process"):
        StateDirectory(tmp_path).lock()
    first.unlock()


def test_a_path_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="not an absolute path"):
        StateDirectory(Path("var"))
    for path in (tmp_path / "file", tmp_path / "file" / "var"):
        with pytest.raises(StateError, match="cannot be used"):
            StateDirectory(path).lock()


# --- epochs -----------------------------------------------------------------------------------------------------------


async def test_prepare_makes_a_private_directory_and_points_to_it(state: StateDirectory) -> None:
    assert await state.current_epoch("acme") is None
    old = os.umask(0)
    try:
        made = await state.prepare("acme", 3)
    finally:
        os.umask(old)
    assert made == session_dir(state) / "3"
    assert await state.current_epoch("acme") == 3
    assert modes(state.path) == {
        ".": "0o700",
        "lock": "0o600",
        "sessions": "0o700",
        "sessions/acme": "0o700",
        "sessions/acme/3": "0o700",
        "sessions/acme/current": "0o600",
    }


async def test_prepare_is_idempotent_and_keeps_what_is_there(state: StateDirectory) -> None:
    write(await state.prepare("acme", 1) / "state.db", "precious")
    before = inode(session_dir(state) / "current")
    assert (await state.prepare("acme", 1) / "state.db").read_text() == "precious"
    assert inode(session_dir(state) / "current") == before
    await state.prepare("acme", 2)
    assert await state.epochs("acme") == [1, 2]
    assert await state.current_epoch("acme") == 2
    assert await state.current_epoch("other") is None


async def test_has_state_tells_missing_from_unreadable(state: StateDirectory) -> None:
    assert not await state.has_state("acme", 1)
    directory = await state.prepare("acme", 1)
    assert not await state.has_state("acme", 1)
    write(directory / "state.db")
    assert await state.has_state("acme", 1)
    write(session_dir(state, "odd") / "1")
    with pytest.raises(StateError, match="Not a directory"):
        await state.has_state("odd", 1)


@pytest.mark.parametrize("content", [b"", b"\n", b"-1", b"1 2", b"01", b"1\n\n", b"x", b"\xff", b"\xd9\xa1", b"9" * 60, b"0x1"])
async def test_a_pointer_that_is_no_epoch_is_not_taken_for_a_missing_one(state: StateDirectory, content: bytes) -> None:
    await state.prepare("acme", 1)
    overwrite(session_dir(state) / "current", content)
    with pytest.raises(StateError, match="does not hold an epoch"):
        await state.current_epoch("acme")
    with pytest.raises(StateError, match="does not hold an epoch"):
        await state.prepare("acme", 2)


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


async def test_a_pointer_that_cannot_be_read_is_not_taken_for_a_missing_one(state: StateDirectory) -> None:
    make_dir(session_dir(state, "folder") / "current")
    write(session_dir(state, "file"))
    symlink(session_dir(state, "loop"), session_dir(state, "loop"))
    for session in ("folder", "file", "loop"):
        with pytest.raises(StateError, match="cannot be used"):
            await state.current_epoch(session)
        with pytest.raises(StateError, match="cannot be used"):
            await state.prepare(session, 1)
    for session in ("file", "loop"):
        with pytest.raises(StateError, match="cannot be used"):
            await state.epochs(session)


def make_dir(path: Path) -> None:
    path.mkdir(parents=True)


async def test_a_state_directory_that_went_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be used: No such file"):
        await StateDirectory(tmp_path / "gone").prepare("acme", 1)


async def test_epochs_are_directories_with_a_number(state: StateDirectory, tmp_path: Path) -> None:
    assert await state.epochs("acme") == []
    for epoch in (10, 9, 2):
        await state.prepare("acme", epoch)
    write(session_dir(state) / "7")
    make_dir(session_dir(state) / "03")
    symlink(session_dir(state) / "8", tmp_path)
    assert await state.epochs("acme") == [2, 9, 10]


@pytest.mark.parametrize("session", ["", ".", "..", "../acme", "a/b", "/etc", ".removed-acme", "_", "a\n"])
async def test_only_session_ids_become_paths(state: StateDirectory, session: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: state.current_epoch(session),
        lambda: state.prepare(session, 1),
        lambda: state.remove(session),
        lambda: state.epochs(session),
        lambda: state.has_state(session, 1),
    ]
    for call in calls:
        with pytest.raises(StateError, match="is no session id"):
            await call()
    assert everything(state.path) == ["lock"]


# --- remove -----------------------------------------------------------------------------------------------------------


async def test_remove_deletes_one_session_and_nothing_else(state: StateDirectory) -> None:
    for epoch in (1, 2):
        write(await state.prepare("acme", epoch) / "state.db")
    write(await state.prepare("acme2", 1) / "state.db")
    await state.remove("acme")
    await state.remove("acme")
    assert await state.current_epoch("acme") is None
    assert everything(state.path / "sessions") == ["acme2", "acme2/1", "acme2/1/state.db", "acme2/current"]


async def test_remove_does_not_follow_links(state: StateDirectory, tmp_path: Path) -> None:
    write(tmp_path / "theirs" / "precious")
    symlink(await state.prepare("acme", 1) / "link", tmp_path / "theirs")
    symlink(session_dir(state) / "2", tmp_path / "theirs")
    symlink(session_dir(state, "linked"), tmp_path / "theirs")
    await state.remove("acme")
    await state.remove("linked")
    assert everything(state.path / "sessions") == []
    assert everything(tmp_path / "theirs") == ["precious"]


async def test_a_removal_that_was_cut_short_is_finished_by_the_next(state: StateDirectory) -> None:
    await state.prepare("acme", 1)
    write(state.path / "sessions" / ".removed-acme" / "1" / "state.db")
    await state.remove("acme")
    assert everything(state.path / "sessions") == []


# --- crashes ----------------------------------------------------------------------------------------------------------


class Power(Exception):
    """It went out."""


def lose_power_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """From the given step on nothing reaches the disk any more. A step is one call into the operating system."""
    left = [steps]
    real = asyncio.BaseEventLoop.run_in_executor

    def run_in_executor(loop: Any, executor: Any, func: Any, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0 and getattr(getattr(func, "func", func), "__name__", "") not in ("close", "__exit__"):
            raise Power
        return real(loop, executor, func, *args)

    patch.setattr(asyncio.BaseEventLoop, "run_in_executor", run_in_executor)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_the_pointer_is_the_old_or_the_new_one_whenever_power_is_lost(epochs: list[int], steps: int) -> None:
    async def run(path: Path) -> None:
        done, asked = None, None
        with pytest.MonkeyPatch.context() as patch:
            state = StateDirectory(path)
            lose_power_after(steps, patch)
            try:
                for epoch in epochs:
                    asked = epoch
                    await state.prepare("acme", epoch)
                    done = epoch
            except Power:
                pass
        found = await StateDirectory(path).current_epoch("acme")
        assert found in (done, asked)
        assert found is None or found in await state.epochs("acme")  # its directory was there first
        # ... and the next start goes on.
        await StateDirectory(path).prepare("acme", 9)
        assert await state.current_epoch("acme") == 9

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


async def test_the_pointer_is_on_disk_before_it_is_in_place_and_the_place_is_on_disk_after(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loss of power would show and a test cannot: the order of write, fsync, rename, fsync."""
    calls: list[str] = []
    pointer = session_dir(state) / "current"
    fsync, replace = os.fsync, os.replace

    def name_of(fd: int) -> str:
        return Path(f"/proc/self/fd/{fd}").readlink().name

    def traced_fsync(fd: int) -> None:
        size = os.fstat(fd).st_size if name_of(fd) == "current.new" else ""
        calls.append(f"fsync {name_of(fd)} {size}".strip())
        fsync(fd)

    def traced_replace(old: Path, new: Path) -> None:
        calls.append(f"replace {old.name} {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    await state.prepare("acme", 12)
    assert calls[-3:] == ["fsync current.new 3", f"replace current.new {pointer.name}", "fsync acme"]
    assert calls[:3] == ["fsync warren", "fsync sessions", "fsync acme"]  # each new folder, in its parent


PREPARER = """
import asyncio, sys
from pathlib import Path
from warren.edges.statedir import StateDirectory

async def main():
    state = StateDirectory(Path(sys.argv[1]))
    epoch = await state.current_epoch("acme") or 0
    while True:
        epoch += 1
        print(epoch, flush=True)
        await state.prepare("acme", epoch)

asyncio.run(main())
"""


async def test_kill_9_leaves_the_old_or_the_new_pointer(state: StateDirectory) -> None:
    def run(lines: int) -> int:
        command = [sys.executable, "-c", PREPARER, str(state.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(lines)]
            process.kill()
            said += process.stdout.readlines()
        return int([line for line in said if line.endswith(b"\n")][-1])

    for lines in (1, 5, 20, 40, 41):
        last = await asyncio.to_thread(run, lines)
        assert (await state.current_epoch("acme") or 0) in (last - 1, last)


async def test_a_cancelled_prepare_does_not_overtake_a_later_one(state: StateDirectory) -> None:
    for epoch in range(1, 30):
        cancelled = asyncio.create_task(state.prepare("acme", epoch))
        for _ in range(epoch % 7):
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        await state.prepare("acme", 100 + epoch)
        assert await state.current_epoch("acme") == 100 + epoch


def test_a_full_disk_does_not_keep_the_directory_from_being_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    state = StateDirectory(tmp_path)
    state.lock()
    with pytest.raises(OwnershipError, match="another process"):
        StateDirectory(tmp_path).lock()
    state.unlock()


async def test_what_the_directories_tell_of_sessions(state: StateDirectory) -> None:
    assert await state.sessions() == []
    await state.prepare("b", 1)
    await state.prepare("a", 3)
    write(session_dir(state, "a") / "3" / "state.db", "x" * 10)
    write(session_dir(state, ".removed-c") / "current", "1")
    write(state.path / "sessions" / "file")
    assert await state.sessions() == ["a", "b"]
    assert (await state.state_size("a", 3), await state.state_size("a", 2), await state.state_size("b", 1)) == (10, 0, 0)
