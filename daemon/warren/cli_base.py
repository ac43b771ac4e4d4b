"""What every command of the command line shares: exit statuses, where RabbitMQ is, JSON and errors, arguments."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import orjson

from warren.client import Client, NoAnswer
from warren.core.envelope import Outcome
from warren.core.names import is_session_id
from warren.edges.settings import Settings, load_settings
from warren.edges.terminal import printable
from warren.errors import BrokerUnavailable, ConfigError, StorageError, WarrenError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_BROKER, EXIT_NO_ANSWER, EXIT_STORE, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
EXIT_CODES = """\
exit status:
  0    it went well
  1    the command failed; the error says why
  2    wrong usage or configuration
  3    RabbitMQ cannot be reached
  4    no answer in time
  5    the object store cannot be used
  130  interrupted
"""
CALL_TIMEOUT_S = 30.0
LIST_TIMEOUT_S = 2.0
PROGRESS_S = 5.0
"""Between two lines of progress where no terminal is; on one, a line is written over many times a second."""


class UsageError(ConfigError):
    """A command line that argparse does not understand."""

    code = "usage"


class Failed(Exception):
    """A command whose outcome is an error."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


def exit_status(error: WarrenError) -> int:
    match error:
        case ConfigError():
            return EXIT_USAGE
        case BrokerUnavailable():
            return EXIT_BROKER
        case NoAnswer():
            return EXIT_NO_ANSWER
        case StorageError():
            return EXIT_STORE
        case _:
            return EXIT_FAILED


def complain(error: dict[str, Any], document: dict[str, Any], status: int, *, as_json: bool) -> int:
    if as_json:
        print_json(document)
    hint = f" hint: {error['hint']}" if error.get("hint") else ""
    print(printable(f"error: {error.get('message', '')}{hint}"), file=sys.stderr)
    return status


def print_json(document: dict[str, Any]) -> None:
    print(orjson.dumps(document).decode(), flush=True)


def note(text: str) -> None:
    """For the person, not for what reads stdout."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Of long work, on stderr: one line that counts on a terminal, now and then a line elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._terminal = what, sys.stderr.isatty()
        self._told = time.monotonic()
        self._open = False

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self._told < (0.1 if self._terminal else PROGRESS_S) and done != of:
            return
        self._told = now
        if self._terminal:
            sys.stderr.write(f"\r{self._what}: {done} of {of}")
            sys.stderr.flush()
            self._open = True
        else:
            note(f"{self._what}: {done} of {of}")

    def end(self) -> None:
        if self._open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._open = False


# --- where RabbitMQ is ------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace) -> Settings:
    return load_settings(args.config, {} if args.url is None else {"amqp.url": args.url})


def client_of(args: argparse.Namespace) -> Client:
    settings = settings_of(args)
    return Client(broker_url(settings), settings.amqp.prefix, name="warren-cli")


def broker_url(settings: Settings) -> str:
    if (address := settings.amqp.address) is not None:
        return address
    path = settings.state_dir / "rabbitmq" / "url"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        raise BrokerUnavailable(
            f"No [amqp] url is set, and no daemon with a private RabbitMQ runs with the state directory {settings.state_dir}.",
            hint="Start it with `make run` or `warrend`, from this directory and with the same --config; or give --url.",
        ) from None
    except OSError as e:
        raise BrokerUnavailable(
            f"The address of the private RabbitMQ cannot be read: {e}.", hint="Run this as the user that the daemon runs as."
        ) from e


# --- arguments ----------------------------------------------------------------------------------------------------------


def timeout_of(args: argparse.Namespace, default: float) -> float:
    return float(args.timeout or default)


def session_id(text: str) -> str:
    """An argument that is a session id."""
    if not is_session_id(text):
        raise argparse.ArgumentTypeError(f"`{text}` is no session id: letters, digits and, not first, _ @ + = -; at most 64")
    return text
