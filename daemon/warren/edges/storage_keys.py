"""The operator's keys for backups: from the settings, or made once where there is no store but our own directory."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from warren.core.sealing import KEY_BYTES, Keyring, MasterKey
from warren.edges.settings import Settings, StorageSettings
from warren.errors import ConfigError

KEY_FILE = "storage.key"


def load_keyring(storage: StorageSettings, state_dir: Path, *, make: bool = False) -> Keyring:
    """The keys in force. `make`: where neither a store nor a key is set, `<state_dir>/storage.key` is made if need be.

    Raises ConfigError, which names the setting and never the key.
    """
    old = (storage.old_keys.get_secret_value() if storage.old_keys else "").split()
    read = tuple(_key("storage.old_keys", text) for text in old)
    if storage.key is not None:
        return Keyring(_key("storage.key", storage.key.get_secret_value()), read)
    if storage.url is not None:
        raise ConfigError(
            "[storage] url is set, and there is no key to encrypt the backups with.",
            hint="`warren keys generate` makes one: put it into `[storage] key_file` (or `key`), and keep a copy elsewhere.",
        )
    return Keyring(_own_key(state_dir / KEY_FILE, make=make), read)


def disk_warning(settings: Settings) -> str:
    """What to tell at the start about backups that share the fate of what they are a copy of; "" when they do not."""
    if settings.storage.url is not None or settings.storage.mode == "local":
        return ""
    return (
        f"Backups and their key are on the disk of the state directory ({settings.state_dir}): they do not survive its loss. "
        "Set [storage] url to a bucket, or to a directory on another disk."
    )


def _key(name: str, text: str) -> MasterKey:
    try:
        return MasterKey.from_hex(text)
    except ValueError as e:
        raise ConfigError(f"{name}: {e}.", hint="`warren keys generate` makes one.") from None


def _own_key(path: Path, *, make: bool) -> MasterKey:
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        if not make:
            raise ConfigError(
                f"There is no key: [storage] key is not set, and the daemon has not made {path} yet.",
                hint="Start the daemon once, or check --config.",
            ) from None
        if any(found.is_file() for found in path.with_name("backups").rglob("*")):
            # A new one would stand where the right one belongs, and be taken for it.
            raise ConfigError(
                f"{path} is gone, and {path.with_name('backups')} holds backups that only it opens. Nothing was written.",
                hint="Bring the file back. If it is lost, move that directory away: sessions that have their state here go on.",
            ) from None
        text = secrets.token_hex(KEY_BYTES)
        _write_new(path, f"{text}\n".encode())
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"The key {path} cannot be read: {e}.", hint="Check its owner and mode.") from e
    try:
        return MasterKey.from_hex(text)
    except ValueError as e:
        raise ConfigError(
            f"{path} holds no key: {e}.", hint="Bring the right file back: the backups cannot be read without."
        ) from None


def _write_new(path: Path, data: bytes) -> None:
    """Durable, private, whole, and never over another one."""
    aside = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        aside.rename(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise ConfigError(f"The key {path} cannot be made: {e.strerror}.", hint="Check the state directory.") from e
