"""The command `warren`: everything over RabbitMQ, so it works from any machine that reaches the broker."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import orjson

from warren import __version__, cli_backup, cli_doctor, cli_import, cli_queues
from warren.cli_base import (
    CALL_TIMEOUT_S,
    EXIT_CODES,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    LIST_TIMEOUT_S,
    Failed,
    UsageError,
    broker_url,
    client_of,
    complain,
    exit_status,
    note,
    print_json,
    session_id,
    settings_of,
    timeout_of,
)
from warren.cli_text import account, because, columns, event_line, outcome_text, parse_time, sessions_table
from warren.client import Client, NoAnswer, broker_address
from warren.core.envelope import CreateArgs, KeptSettings, Outcome
from warren.core.names import is_session_id
from warren.edges.leaving import leave
from warren.edges.settings import find_engine_binary
from warren.edges.storage_keys import disk_warning, load_keyring
from warren.edges.terminal import QrScreen, printable
from warren.errors import CommandError, ConfigError, WarrenError

SHELLS = ("bash", "zsh", "fish")
SIM_OPTIONS = ("listen", "control", "ca-file", "seed", "log-level")


def main(argv: list[str] | None = None) -> int:
    """The command `warren`. Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    # What the libraries think of a lost connection is said by our own errors, in words.
    for library in ("aio_pika", "aiormq"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    args = argparse.Namespace(config=None, url=None, timeout=None, json="--json" in words)
    try:
        build_parser().parse_args(words, args)
        return int(args.run(args))
    except Failed as e:
        return complain(e.outcome.error or {}, e.outcome.body(), EXIT_FAILED, as_json=args.json)
    except WarrenError as e:
        error = {"code": getattr(e, "reason", e.code), "message": e.message, "hint": e.hint}
        return complain(error, {"error": error}, exit_status(e), as_json=args.json)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough (`warren watch | head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


# --- session ----------------------------------------------------------------------------------------------------------


def _command(
    name: str, arguments: Callable[[argparse.Namespace], dict[str, Any]] = lambda _: {}
) -> Callable[[argparse.Namespace], int]:
    """A sub-command that is one call."""

    def run(args: argparse.Namespace) -> int:
        return asyncio.run(_call(args, name, arguments(args)))

    return run


async def _call(args: argparse.Namespace, name: str, arguments: dict[str, Any]) -> int:
    async with client_of(args) as client:
        outcome = await client.call(
            name,
            args.session,
            arguments,
            id=getattr(args, "id", None),
            timeout_s=timeout_of(args, CALL_TIMEOUT_S),
            expires_in_s=getattr(args, "expires_in", None),
        )
        if not outcome.ok:
            raise Failed(outcome)
        if getattr(args, "wait", False):
            return await _pair(args, client)
        _print_outcome(args, outcome)
    return EXIT_OK


def _print_outcome(args: argparse.Namespace, outcome: Outcome) -> None:
    if args.json:
        print_json(outcome.body())
    else:
        print(outcome_text(args.session, outcome))


def _delete(args: argparse.Namespace) -> int:
    """Asks first: on a terminal for the id, elsewhere for `--yes`."""
    if not args.yes:
        if not sys.stdin.isatty():
            raise UsageError("Deleting needs a confirmation.", hint="Give --yes, if nothing of the session is needed any more.")
        question = f"Session {args.session}, its queues, all its backups and their key are deleted, for good. Type its id: "
        sys.stderr.write(question)
        sys.stderr.flush()
        if sys.stdin.readline().strip() != args.session:
            raise UsageError("That is not its id: nothing was deleted.")
    return asyncio.run(_call(args, "delete", {}))


def setting(text: str) -> tuple[str, Any]:
    """An argument `name=value`; the value as JSON if it is, else as text."""
    name, given, value = text.partition("=")
    if not given or name not in KeptSettings.model_fields:
        raise argparse.ArgumentTypeError(f"`{text}` is not NAME=VALUE with one of {', '.join(KeptSettings.model_fields)}")
    if name in {"mark_online", "messages_per_minute"}:
        with contextlib.suppress(orjson.JSONDecodeError):
            return name, orjson.loads(value)
    return name, value


def settings_args(args: argparse.Namespace) -> dict[str, Any]:
    return dict(args.set) | ({"reset": args.reset} if args.reset else {})


def _list(args: argparse.Namespace) -> int:
    sessions = asyncio.run(_listed(args))
    if args.json:
        print_json({"sessions": sessions})
    elif not sessions:
        print("No sessions. `warren session create ID` makes one.")
    else:
        print("\n".join(sessions_table(sessions)))
    return EXIT_OK


async def _listed(args: argparse.Namespace) -> list[dict[str, Any]]:
    async with client_of(args) as client:
        return await client.list_sessions(timeout_s=timeout_of(args, LIST_TIMEOUT_S))


# --- qr ---------------------------------------------------------------------------------------------------------------


class Pairing:
    """What `warren qr` shows: drawn for a person, as text for a pipe, as JSON lines for a program."""

    def __init__(self, session: str, *, as_json: bool) -> None:
        self._session, self._json = session, as_json
        self._screen = QrScreen(sys.stdout) if sys.stdout.isatty() and not as_json else None
        self._qr: dict[str, Any] | None = None

    def tell(self, what: str, data: dict[str, Any]) -> None:
        """What `Client.wait_connected` tells."""
        {"qr": self.qr, "pairing_code": self.pairing_code, "state": self.state}[what](data)

    def qr(self, data: dict[str, Any]) -> None:
        if self._qr is not None and self._qr.get("code") == data.get("code"):
            return
        self._qr = data
        if self._json:
            print_json({"event": "qr", "data": {k: v for k, v in data.items() if k != "image"}})
        elif self._screen is None:
            print(data.get("code"), flush=True)
        self.tick()

    def pairing_code(self, data: dict[str, Any]) -> None:
        """The other way to link: a code to type into the phone."""
        self.clear()
        if self._json:
            print_json({"event": "pairing_code", "data": data})
        elif self._screen is None:
            print(data.get("code"), flush=True)
        else:
            left = max(0, round((parse_time(data["expires_at"]) - datetime.now(UTC)).total_seconds()))
            where = f"on {data.get('phone_number')}: WhatsApp > Linked devices > Link with phone number"
            print(printable(f"{self._session}: type {data.get('code')} within {left} s {where}"), flush=True)

    def tick(self) -> None:
        """Count down."""
        if self._screen is not None and self._qr is not None:
            left = max(0, round((parse_time(self._qr["expires_at"]) - datetime.now(UTC)).total_seconds()))
            more = self._qr.get("remaining", 0)
            scan = f"{self._session}: scan with WhatsApp > Linked devices. Valid {left} s, {more} more."
            self._screen.update(
                self._qr["code"], scan if left else f"{self._session}: this code has expired, waiting for the next."
            )

    def state(self, data: dict[str, Any]) -> None:
        """The session is on its way: between two codes, or between the scan and `connected`."""
        self.clear()
        if not self._json:
            note(printable(f"{self._session}: {data.get('state')}{because(data)}"))

    def connected(self, data: dict[str, Any]) -> None:
        self.clear()
        if self._json:
            print_json({"event": "connected", "data": data})
        else:
            print(printable(f"{self._session}: connected as {account(data)}"), flush=True)

    def clear(self) -> None:
        self._qr = None
        if self._screen is not None:
            self._screen.clear()


def _qr(args: argparse.Namespace) -> int:
    async def run() -> int:
        async with client_of(args) as client:
            return await _pair(args, client)

    return asyncio.run(run())


async def _pair(args: argparse.Namespace, client: Client) -> int:
    """Show codes until the session is connected. `--timeout`, if given, bounds all of it."""
    view = Pairing(args.session, as_json=args.json)
    ticking = asyncio.create_task(_tick(view))
    try:
        async with asyncio.timeout(args.timeout):
            view.connected(await client.wait_connected(args.session, view.tell))
    except TimeoutError:
        raise NoAnswer(
            f"Session {args.session} was not connected within {args.timeout:g} s.", hint=f"`warren qr {args.session}` waits on."
        ) from None
    except CommandError as e:
        if e.reason == "session_not_found":
            e.hint = f"`warren session create {args.session}` makes it."
        raise
    finally:
        ticking.cancel()
        view.clear()
    return EXIT_OK


async def _tick(view: Pairing) -> None:
    while True:
        await asyncio.sleep(1.0)
        view.tick()


# --- watch ------------------------------------------------------------------------------------------------------------


def _watch(args: argparse.Namespace) -> int:
    asyncio.run(_watched(args))
    return EXIT_OK


async def _watched(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    url = broker_url(settings)
    binding = f"{args.what}.*" if is_session_id(args.what) else args.what
    async with Client(url, settings.amqp.prefix, name="warren-watch") as client, client.subscribe(binding, tap=True) as events:
        note(f"watching {binding} at {broker_address(url)}; Ctrl-C ends")
        async for event in events:
            if args.raw or args.json:
                print_json(event)
            else:
                print(printable(event_line(event)), flush=True)


# --- this machine -----------------------------------------------------------------------------------------------------


def _check_config(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    if settings.storage.url is not None or settings.storage.key is not None:
        load_keyring(settings.storage, settings.state_dir)
    described = settings.describe()
    if warning := disk_warning(settings):
        note(f"note: {warning}")
    if args.json:
        print_json({"settings": {d.name: {"value": d.value, "source": d.source} for d in described}})
        return EXIT_OK
    rows = [(d.name, orjson.dumps(d.value).decode(), d.source) for d in described]
    print("\n".join(columns([("SETTING", "VALUE", "FROM"), *rows])))
    return EXIT_OK


def _sim(args: argparse.Namespace) -> NoReturn:
    """Becomes warren-sim, so that signals and the end of stdin reach it directly."""
    program = str(find_engine_binary(None, name="warren-sim"))
    options = ((f"--{name}", getattr(args, name.replace("-", "_"))) for name in SIM_OPTIONS)
    os.execv(program, [program, *(word for name, value in options if value is not None for word in (name, value))])  # noqa: S606


def _demo(args: argparse.Namespace) -> int:
    from warren.demo import run  # noqa: PLC0415 (brings the simulator and processes along, which nothing else here needs)

    return run(args.dir)


def _completion(args: argparse.Namespace) -> int:
    import shtab  # noqa: PLC0415 (which nothing else here needs)

    script = shtab.complete(build_parser(), shell=args.shell)
    if args.json:
        print_json({"shell": args.shell, "script": script})
    else:
        print(script)
    return EXIT_OK


def _version(args: argparse.Namespace) -> int:
    """Without an engine here `engine` and `whatsmeow` are None: a machine that only runs the command line needs none."""
    from warren.edges.store import SCHEMA_VERSION  # noqa: PLC0415 (SQLite, which nothing else here needs)

    engine, whatsmeow = _engine_versions(args)
    if args.json:
        print_json({"warren": __version__, "engine": engine, "whatsmeow": whatsmeow, "schema": SCHEMA_VERSION})
        return EXIT_OK
    print(f"warren {__version__} (schema {SCHEMA_VERSION} of warren.db)")
    print(printable(f"warren-engine {engine} (whatsmeow {whatsmeow})") if engine else "warren-engine is not here (`make engine`)")
    return EXIT_OK


def _engine_versions(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Of the engine and its whatsmeow; "unknown" when there is a program that does not tell."""
    try:
        program = find_engine_binary(settings_of(args).engine.path)
        ran = subprocess.run([program, "--version"], capture_output=True, timeout=10, check=True)
        told = orjson.loads(ran.stdout)
        return str(told["engine"]), str(told["whatsmeow"])
    except ConfigError:
        return None, None
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, KeyError):
        return "unknown", "unknown"


# --- usage ------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Usage errors look like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}.", hint=f"See `{self.prog} --help`.")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


def _common() -> _Parser:
    """Options that may stand before or after the sub-command: without defaults, so that neither place erases the other."""
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("everywhere")
    group.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with the settings (default: as the daemon finds it)"
    )
    group.add_argument("--url", metavar="AMQP_URL", help="RabbitMQ (default: [amqp] url, else the daemon's private one)")
    group.add_argument("--json", action="store_true", help='print JSON; an error is {"error": {…}}')
    group.add_argument("--timeout", type=_seconds, metavar="S", help="how long to wait for an answer (30; list: 2)")
    return common


def build_parser() -> argparse.ArgumentParser:
    common = _common()
    parser = _Parser(
        prog="warren",
        description="Many WhatsApp sessions as one service on RabbitMQ.",
        epilog="examples:\n  warren session create acme --wait\n"
        '  warren session send acme --to +15551234567 --text "Shipped."\n  warren watch acme\n  warren --json session list\n\n'
        + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(
        where: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str = ""
    ) -> argparse.ArgumentParser:
        epilog = (f"example:\n  {example}\n\n" if example else "") + EXIT_CODES
        sub: argparse.ArgumentParser = where.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        sub.set_defaults(run=run)
        return sub

    session = commands.add_parser(
        "session",
        help="create, send, settings, disconnect, logout, delete, status, list",
        parents=[common],
        description="Commands for sessions.",
    )
    _add_session_commands(session.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser), add)
    backup = commands.add_parser(
        "backup",
        help="list, verify, now, restore, prune, stats",
        parents=[common],
        description="The sessions' backups in the object store.",
    )
    keys = commands.add_parser(
        "keys", help="generate, check, rotate", parents=[common], description="The key that the backups are encrypted with."
    )
    cli_backup.add_commands(
        backup.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser),
        keys.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser),
        add,
    )
    dead = commands.add_parser(
        "dead",
        help="list, show, replay, drop",
        parents=[common],
        description="Commands that could not be executed (`warren.dead`).",
    )
    kept = commands.add_parser(
        "events",
        help="list, replay",
        parents=[common],
        description="Events that had no subscriber (`warren.events.unrouted`). To see events as they happen: `warren watch`.",
    )
    cli_queues.add_commands(
        dead.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser),
        kept.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser),
        add,
    )
    cli_import.add_command(commands, add)
    cli_doctor.add_command(commands, add)
    qr = add(commands, "qr", _qr, "draw the QR code of a session, renewed until it is connected", "warren qr acme")
    qr.add_argument("session", metavar="SESSION", type=session_id)
    watch = add(
        commands, "watch", _watch, "show events as they happen (no promise: for people)", "warren watch '*.message' --raw"
    )
    watch.add_argument(
        "what", metavar="SESSION|BINDING", nargs="?", default="#", help="a session, or a binding like '*.message' (#)"
    )
    watch.add_argument("--raw", action="store_true", help="whole CloudEvents as JSON lines")
    add(commands, "check-config", _check_config, "check the settings and show where each comes from")
    sim = add(commands, "sim", _sim, "run the simulated WhatsApp (docs/simulator.md)", "warren sim --control 127.0.0.1:8089")
    for option in SIM_OPTIONS:
        sim.add_argument(f"--{option}", help="handed to warren-sim")
    demo = add(commands, "demo", _demo, "a session's whole life against the simulated WhatsApp")
    demo.add_argument("--dir", type=Path, help="for its files and logs (default: ./var/demo)")
    completion = add(
        commands,
        "completion",
        _completion,
        "print the completion of these commands for a shell",
        "warren completion bash > ~/.local/share/bash-completion/completions/warren",
    )
    completion.add_argument("shell", choices=SHELLS)
    add(commands, "version", _version, "versions of warren and of its engine")
    return parser


def _add_session_commands(where: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    def with_id(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("session", metavar="ID", type=session_id)
        sub.add_argument("--id", metavar="COMMAND_ID", help="idempotency key: repeat it to repeat safely (default: a new one)")
        return sub

    def create_args(args: argparse.Namespace) -> dict[str, Any]:
        given = {name: getattr(args, name) for name in CreateArgs.model_fields}
        return {name: value for name, value in given.items() if value is not None}

    create = with_id(
        add(where, "create", _command("create", create_args), "start a session", "warren session create acme --wait")
    )
    create.add_argument("--device-name", metavar="NAME", help="what the phone shows under Linked devices")
    create.add_argument("--phone-number", metavar="+NUMBER", help="pair by a code typed into this phone, instead of a QR code")
    create.add_argument("--mark-online", action=argparse.BooleanOptionalAction, help="whether contacts see the account as online")
    create.add_argument("--proxy", metavar="URL", help="connect through http://, https:// or socks5://[user:password@]host:port")
    create.add_argument("--messages-per-minute", type=int, metavar="N", help="how many it sends at most; 0: no limit")
    create.add_argument("--wait", action="store_true", help="show the QR or pairing code and wait until connected")

    send = with_id(
        add(
            where,
            "send",
            _command("send", lambda args: {"to": args.to, "text": args.text}),
            "send a text message",
            'warren session send acme --to +15551234567 --text "Shipped." --id order-4711',
        )
    )
    send.add_argument("--to", required=True, metavar="RECIPIENT", help="+15551234567, or a JID such as 123@lid or 123@g.us")
    send.add_argument("--text", required=True)
    send.add_argument("--expires-in", type=_seconds, metavar="S", help="do not send later than that")

    with_id(
        add(where, "disconnect", _command("disconnect"), "close the connection; stays linked", "warren session disconnect acme")
    )
    with_id(add(where, "logout", _command("logout"), "unlink the device and forget the session", "warren session logout acme"))
    delete = with_id(
        add(
            where,
            "delete",
            _delete,
            "remove a session, its queues and its backups without telling WhatsApp: nothing brings it back",
            "warren session delete acme --yes",
        )
    )
    delete.add_argument("--yes", action="store_true", help="do not ask")
    settings = with_id(
        add(
            where,
            "settings",
            _command("settings", settings_args),
            "show or change the settings of a session",
            "warren session settings acme --set messages_per_minute=10 --set mark_online=true --reset proxy",
        )
    )
    settings.add_argument(
        "--set",
        metavar="NAME=VALUE",
        type=setting,
        action="append",
        default=[],
        help=f"one of {', '.join(KeptSettings.model_fields)}",
    )
    settings.add_argument("--reset", metavar="NAME", action="append", default=[], help="back to the default")
    status = add(where, "status", _command("status"), "what one session does", "warren session status acme")
    status.add_argument("session", metavar="ID", type=session_id)
    add(where, "list", _list, "the sessions of all daemons", "warren session list --json")


def program() -> NoReturn:
    """What `warren` runs."""
    leave(main())


if __name__ == "__main__":
    program()
