"""The command line without RabbitMQ: usage, settings, what it hands over to other programs."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import orjson
import pytest

import warren
from warren import cli, cli_base, client
from warren.cli import main
from warren.edges.store import SCHEMA_VERSION

NOWHERE = "amqp://guest:geheim@127.0.0.1:1/"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but the defaults, and no state of anybody."""
    for name in [name for name in os.environ if name.startswith("WARREN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "words", [[], ["session"], ["session", "list"], ["session", "send"], ["qr"], ["watch"], ["sim"], ["version"]]
)
def test_help_tells_the_exit_status(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*words, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    if words != ["session"]:
        assert "4    no answer in time" in text
    assert "--config" in text
    assert "--json" in text


WRONG = [
    [],
    ["dance"],
    ["session", "create"],
    ["session", "create", "a.b"],
    ["session", "send", "acme", "--text", "hi"],
    ["session", "status", "acme", "--timeout", "0"],
    ["session", "status", "acme", "--timeout", "soon"],
    ["session", "list", "--url", "http://127.0.0.1"],
    ["session", "list", "--config", "missing.toml"],
    ["qr", "../etc"],
    ["session", "delete", "acme"],
    ["session", "settings", "acme", "--set", "colour=red"],
    ["session", "settings", "acme", "--set", "proxy"],
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_usage_is_exit_2_with_one_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("error: ") == 1
    assert main([*words, "--json"]) == 2
    error = orjson.loads(capsys.readouterr().out)["error"]
    assert error["code"] in {"usage", "config"}
    assert error["message"]


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_common_options_stand_anywhere(where: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["session", "status", "acme"]
    words[where:where] = ["--url", NOWHERE, "--json"]
    assert main(words) == 3
    said = capsys.readouterr()
    assert orjson.loads(said.out)["error"]["code"] == "broker_unavailable"
    assert "127.0.0.1:1 cannot be reached" in said.err
    assert "geheim" not in said.out + said.err


def test_neither_place_erases_what_the_other_said() -> None:
    args = cli.build_parser().parse_args(["--url", "a", "--timeout", "7", "session", "--json", "status", "acme", "--config", "f"])
    assert (args.url, args.timeout, args.json, args.config) == ("a", 7.0, True, Path("f"))
    args = cli.build_parser().parse_args(["--timeout", "7", "session", "status", "acme", "--timeout", "8"])
    assert args.timeout == 8.0


def test_check_config_masks_and_names_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.toml").write_text(f'instance = "one"\n[amqp]\nurl = "{NOWHERE}"\n')
    assert main(["check-config", "--config", "my.toml"]) == 0
    text = capsys.readouterr().out
    assert "geheim" not in text
    assert "my.toml" in next(line for line in text.splitlines() if line.startswith("amqp.url "))
    assert main(["--json", "check-config", "--config", "my.toml"]) == 0
    settings = orjson.loads(capsys.readouterr().out)["settings"]
    assert settings["instance"] == {"value": "one", "source": "my.toml"}
    assert settings["amqp.prefix"] == {"value": "warren", "source": "default"}


def test_check_config_looks_at_the_key_of_the_backups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.toml").write_text('[storage]\nurl = "s3://bucket"\n')
    assert main(["check-config", "--config", "my.toml"]) == 2
    assert "warren keys generate" in capsys.readouterr().err
    (tmp_path / "my.toml").write_text(f'[storage]\nurl = "s3://bucket"\nkey = "{"00" * 32}"\n')
    assert main(["check-config", "--config", "my.toml"]) == 2
    assert "not random" in capsys.readouterr().err
    (tmp_path / "my.toml").write_text("")
    assert main(["check-config", "--config", "my.toml"]) == 0
    assert "they do not survive its loss" in capsys.readouterr().err
    assert not (tmp_path / "var").exists()


def test_check_config_names_file_setting_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.toml").write_text('[amqp]\nurll = "x"\n')
    assert main(["check-config", "--config", "my.toml"]) == 2
    said = capsys.readouterr().err
    assert "my.toml" in said
    assert "amqp.urll" in said
    assert "amqp.url?" in said


def test_an_unreadable_address_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "var" / "rabbitmq" / "url").mkdir(parents=True)
    assert main(["session", "list"]) == 3
    assert "as the user that the daemon runs as" in capsys.readouterr().err


def test_sim_becomes_warren_sim(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(cli, "find_engine_binary", lambda path, name: Path("/x") / name)
    monkeypatch.setattr(os, "execv", lambda *words: ran.append(words))
    with pytest.raises(TypeError):  # a real execv does not come back
        main(["sim", "--listen", "127.0.0.1:0", "--ca-file", "ca.pem"])
    assert ran == [("/x/warren-sim", ["/x/warren-sim", "--listen", "127.0.0.1:0", "--ca-file", "ca.pem"])]


def test_demo_is_handed_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = types.ModuleType("warren.demo")
    demo.run = lambda base: 0 if base == Path("there") else 9  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "warren.demo", demo)
    assert main(["demo", "--dir", "there"]) == 0


@pytest.mark.parametrize(
    ("script", "engine", "whatsmeow"),
    [
        ("""echo '{"engine": "9.8.7", "whatsmeow": "v1.2", "protocol": 1}'""", "9.8.7", "v1.2"),
        ("echo warren-engine 9.8.7", "unknown", "unknown"),
        ("echo []", "unknown", "unknown"),
        ("exit 2", "unknown", "unknown"),
        (None, None, None),
    ],
)
def test_version(
    script: str | None,
    engine: str | None,
    whatsmeow: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = tmp_path / "warren-engine"
    if script is not None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("WARREN_ENGINE__PATH", str(program))
    assert main(["version", "--json"]) == 0
    told = orjson.loads(capsys.readouterr().out)
    assert told == {"warren": warren.__version__, "engine": engine, "whatsmeow": whatsmeow, "schema": SCHEMA_VERSION}
    assert main(["version"]) == 0
    text = capsys.readouterr().out
    assert (f"{engine} (whatsmeow {whatsmeow})" if engine else "make engine") in text
    assert f"schema {SCHEMA_VERSION} " in text


def test_an_interrupted_command_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_base, "load_settings", interrupted)
    assert main(["check-config"]) == 130


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://u:p@host/", "host:5672"),
        ("amqps://u:p@host/vhost", "host:5671"),
        ("amqp://[::1]:77", "::1:77"),
        ("amqp://u:p@host:x/", "an address that is not a URL"),
    ],
)
def test_only_host_and_port_of_a_url_are_shown(url: str, shown: str) -> None:
    assert client.broker_address(url) == shown


def test_settings_are_read_as_what_they_are() -> None:
    words = ["--set", "messages_per_minute=7", "--set", "mark_online=true", "--set", "device_name=7", "--reset", "proxy"]
    args = cli.build_parser().parse_args(["session", "settings", "acme", *words])
    assert cli.settings_args(args) == {"messages_per_minute": 7, "mark_online": True, "device_name": "7", "reset": ["proxy"]}
    assert cli.settings_args(cli.build_parser().parse_args(["session", "settings", "acme"])) == {}


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f'source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_warren; printf "%s\\n" "${{COMPREPLY[@]}}"'
    bash = shutil.which("bash")
    assert bash is not None
    return set(subprocess.run([bash, "-c", ask], capture_output=True, text=True, check=True, timeout=30).stdout.split())


def test_bash_completes_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "warren.bash"
    script.write_text(capsys.readouterr().out)
    assert completed(script, "warren", "do") == {"doctor"}
    assert completed(script, "warren", "dead", "") >= {"list", "show", "replay", "drop"}
    assert completed(script, "warren", "session", "settings", "acme", "--re") == {"--reset"}


@pytest.mark.parametrize(("shell", "head"), [("zsh", "#compdef warren"), ("fish", "complete -c warren")])
def test_other_shells_have_a_script_with_every_command(shell: str, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert head in script
    assert {name for name in ("doctor", "replay", "settings", "check-config", "rotate") if name not in script} == set()


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> dict[str, argparse.ArgumentParser]:
    """Every command that does something, by its words."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        return {" ".join(words): parser}
    return {k: v for name, sub in nested[0].choices.items() for k, v in commands(sub, (*words, name)).items()}


def test_the_page_about_the_command_line_has_every_command_and_exit_status() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    known = commands(cli.build_parser())
    assert len(known) > 30
    assert [words for words in known if f"`warren {words}" not in page] == []
    told = dict(re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE))
    said = dict(re.findall(r"^  (\d+) +(.*)$", cli_base.EXIT_CODES, re.MULTILINE))
    assert set(told) == set(said)
