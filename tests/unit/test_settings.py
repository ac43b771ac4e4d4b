from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

import warren
from warren.edges import settings as module
from warren.edges.settings import Settings, find_engine_binary, load_settings
from warren.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"
KEY = "a1" * 32
NEEDS_MORE = {"amqp.ca_file", "amqp.cert_file", "amqp.key_file", "amqp.url_file", "http.token_file"} | {
    f"{section}.{name}"
    for section, names in {
        "whatsapp": "endpoint root_key ca_file",
        "storage": "region endpoint access_key_id secret_access_key account account_key credentials_file key_file old_keys_file",
    }.items()
    for name in names.split()
}
"""Settings of the example that are right only together with others, or with a file that is there."""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment and no files but the test's own."""
    for name in os.environ:
        if name.startswith("WARREN_") or name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(module, "CONFIG_PLACES", (Path("warren.toml"), tmp_path / "etc" / "warren.toml"))
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def error(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(config, overrides)
    return str(caught.value)


# --- the example ------------------------------------------------------------------------------------------------------


def example_blocks() -> dict[str, tuple[str, str]]:
    """Dotted name -> (the comment above it, the line), in order."""
    section, comment, found = "", "", {}
    for line in EXAMPLE.read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section, comment = f"{match[1]}.", ""
        elif match := re.match(r"#(\w+) = ", line):
            found[section + match[1]] = (comment, line[1:])
        elif line.startswith("# "):
            comment += line[1:]
        elif not line:
            comment = ""
    return found


def test_the_example_names_every_setting_in_the_order_of_the_models() -> None:
    assert list(example_blocks()) == list(module._names())


def test_the_example_shows_the_defaults_and_says_where_it_does_not() -> None:
    defaults = dict(module._leaves(Settings()))
    for name, (comment, line) in example_blocks().items():
        value = next(iter(tomllib.loads(line).values()))
        if defaults[name] is None or name in ("instance", "state_dir"):
            assert "Default: " in comment, name
        else:
            default = list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]
            assert (value, type(value)) == (default, type(default)), name


def test_the_example_explains_every_setting() -> None:
    for name, (comment, _) in example_blocks().items():
        assert len(comment) > 20, name
        unit = {"_s": "Seconds", "_ms": "Milliseconds", "_mb": "Megabytes"}.get(name[name.rfind("_") :])
        assert unit is None or unit in comment, name


def test_the_example_loads_as_it_is_and_its_values_are_valid() -> None:
    assert load_settings(EXAMPLE) == Settings()
    for name, (_, line) in example_blocks().items():
        if name not in NEEDS_MORE:
            load_settings(None, {name: next(iter(tomllib.loads(line).values()))})


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_without_anything_there_is_a_private_rabbitmq_and_state_in_var(tmp_path: Path) -> None:
    s = load_settings()
    assert s.amqp.url is None
    assert s.state_dir == tmp_path / "var"
    assert s.instance


def test_systemd_gives_the_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/warren:/var/lib/other")
    assert load_settings().state_dir == Path("/var/lib/warren")


def test_a_host_name_with_odd_characters_is_made_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, instance in {"-_höst name": "h-st-name", "": "warren", "a.b-1": "a.b-1"}.items():
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert load_settings().instance == instance


# --- sources ----------------------------------------------------------------------------------------------------------


def test_command_line_over_environment_over_credentials_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def url() -> str:
        found = load_settings(None, overrides).amqp.url
        return found.get_secret_value() if found else "none"

    overrides: dict[str, Any] = {"amqp.url": None}
    write(tmp_path / "warren.toml", '[amqp]\nurl = "amqp://file/"\nprefix = "p"')
    assert url() == "amqp://file/"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "c"))
    write(tmp_path / "c" / "amqp.url", "amqp://credential/\n")
    assert url() == "amqp://credential/"
    monkeypatch.setenv("WARREN_AMQP__URL", "amqp://environment/")
    assert url() == "amqp://environment/"
    overrides["amqp.url"] = "amqp://given/"
    assert url() == "amqp://given/"
    assert load_settings(None, {"amqp": {"url": "amqp://nested/"}}).amqp.url == SecretStr("amqp://nested/")
    # The rest of the section still comes from below.
    assert load_settings().amqp.prefix == "p"


def test_the_first_file_that_exists_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "etc" / "warren.toml", 'instance = "etc"')
    assert load_settings().instance == "etc"
    write(tmp_path / "warren.toml", 'instance = "here"')
    assert load_settings().instance == "here"
    monkeypatch.setenv("WARREN_CONFIG", str(write(tmp_path / "env.toml", 'instance = "env"')))
    assert load_settings().instance == "env"
    assert load_settings(write(tmp_path / "given.toml", 'instance = "given"')).instance == "given"


def test_a_folder_that_is_closed_to_us_holds_no_file_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /etc/warren is to people who are not in the group warren."""

    class Closed(type(Path())):  # type: ignore[misc]
        def exists(self) -> bool:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "CONFIG_PLACES", (Closed(tmp_path / "warren.toml"),))
    assert load_settings().amqp.prefix == "warren"


def test_a_named_file_must_exist_and_be_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "There is no configuration file nowhere.toml. Check --config" in error(Path("nowhere.toml"))
    assert "cannot be read: Is a directory" in error(tmp_path)
    assert "is not TOML: " in error(write(tmp_path / "bad.toml", "[amqp]\nurl = amqp"))
    assert "line 2" in error(tmp_path / "bad.toml")
    monkeypatch.setenv("WARREN_CONFIG", "elsewhere.toml")
    assert "elsewhere.toml" in error()


def test_url_file_is_read_where_no_url_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = write(tmp_path / "secret", " amqp://from-file/\n")
    config = write(tmp_path / "c.toml", f'[amqp]\nurl_file = "{secret}"')
    assert load_settings(config).amqp.url == SecretStr("amqp://from-file/")
    monkeypatch.setenv("WARREN_AMQP__URL_FILE", str(write(tmp_path / "other", "amqp://other/")))
    assert load_settings(config).amqp.url == SecretStr("amqp://other/")
    monkeypatch.delenv("WARREN_AMQP__URL_FILE")
    secret.unlink()
    assert "amqp.url_file: " in error(config)
    assert "No such file" in error(config)
    # With a URL from a better place the file is not even looked at.
    assert load_settings(config, {"amqp.url": "amqp://given/"}).amqp.url == SecretStr("amqp://given/")
    both = write(tmp_path / "both.toml", f'[amqp]\nurl = "amqp://a/"\nurl_file = "{secret}"')
    assert error(both) == f"{both}: amqp.url and amqp.url_file are both set. Keep one of them."


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARREN_AMQP__URL", "")
    assert load_settings().amqp.url is None


@given(st.integers(1, 1_000), st.booleans())
def test_the_environment_is_read_by_type(number: int, flag: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARREN_FLEET__MAX_SESSIONS", str(number))
        patch.setenv("WARREN_LOG__REDACT", str(flag).lower())
        patch.setenv("WARREN_LOG__LEVEL", "DEBUG")
        s = load_settings()
    assert (s.fleet.max_sessions, s.log.redact, s.log.level) == (number, flag, "debug")


def test_settings_do_not_change() -> None:
    s = load_settings()
    with pytest.raises(ValidationError):
        s.instance = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        s.log.level = "debug"  # type: ignore[misc]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once_each_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "c.toml", '[amqp]\nprefix = "no spaces"\nheartbeat_s = 0\n[fleet]\ntakeover = "on"')
    monkeypatch.setenv("WARREN_DELIVERY__ANSWER_AFTER_MS", "soon")
    text = error(config, {"log.level": "loud"})
    assert text.startswith("5 settings are wrong:\n")
    assert f"{config}, line 2: amqp.prefix: may have letters" in text
    assert f"{config}, line 3: amqp.heartbeat_s: input should be greater than 0. Default: 10." in text
    assert f'{config}, line 5: fleet.takeover: only "off" is there in this version. Default: "off".' in text
    assert "environment (WARREN_DELIVERY__ANSWER_AFTER_MS): delivery.answer_after_ms: input should be a valid int" in text
    assert "command line: log.level: input should be 'debug', 'info', 'warning' or 'error'." in text


@pytest.mark.parametrize(
    ("toml", "suggestion"),
    [
        ("[amqp]\nulr = 'x'", "Did you mean amqp.url?"),
        ("[ampq]\nurl = 'x'", "Did you mean amqp?"),
        ("max_sessions = 5", "Did you mean fleet.max_sessions?"),
        ("[log]\nxyzzy = 5", "See config.example.toml"),
    ],
)
def test_unknown_settings_are_errors_with_a_suggestion(tmp_path: Path, toml: str, suggestion: str) -> None:
    text = error(write(tmp_path / "c.toml", toml))
    assert "is no setting." in text
    assert suggestion in text


def test_unknown_variables_are_errors_when_they_are_meant_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARREN_PORT", "tcp://10.0.0.1:5672")  # Kubernetes
    monkeypatch.setenv("WARREN_SERVICE_HOST", "10.0.0.1")
    load_settings()
    monkeypatch.setenv("WARREN_AMQP_URL", "amqp://x/")
    assert "WARREN_AMQP_URL is no setting. Did you mean WARREN_AMQP__URL?" in error()
    monkeypatch.setenv("WARREN_LOG__COLOUR", "1")
    assert "2 settings are wrong" in error()
    assert "WARREN_LOG__COLOUR is no setting." in error()


def test_a_trusted_root_needs_an_endpoint_on_this_machine(tmp_path: Path) -> None:
    ca = str(write(tmp_path / "ca.pem", ""))
    for alone in ({"whatsapp.root_key": KEY}, {"whatsapp.ca_file": ca}):
        assert "are for a simulator; set `endpoint` too" in error(None, alone)
    for endpoint in ("ws://127.0.0.1:1", "wss://10.0.0.1:1", "wss://web.whatsapp.com/ws", "wss://", "wss://localhost:x"):
        assert "whatsapp.endpoint: " in error(None, {"whatsapp.endpoint": endpoint})
    for endpoint in ("wss://127.0.0.1:8443", "wss://[::1]:8443/ws", "wss://localhost:8443"):
        s = load_settings(None, {"whatsapp": {"endpoint": endpoint, "root_key": KEY, "ca_file": ca}})
        assert s.whatsapp.endpoint == endpoint
    assert "there is no file" in error(None, {"whatsapp.endpoint": "wss://[::1]:1", "whatsapp.ca_file": "/no/ca"})
    assert "64 hex" in error(None, {"whatsapp.endpoint": "wss://[::1]:1", "whatsapp.root_key": KEY + "z"})


def test_times_that_contradict_each_other_are_refused() -> None:
    assert "`cap_s` (1) must not be below `base_s` (5)" in error(None, {"reconnect.cap_s": 1})


@pytest.mark.parametrize("url", ["http://u:s3cret@host/", "amqp://u:s3cret@/", "amqp://u:s3cret@host:port/", "s3cret"])
def test_errors_do_not_show_secrets(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    assert "s3cret" not in error(None, {"amqp.url": url})
    monkeypatch.setenv("WARREN_AMQP__URL", url)
    assert "amqp.url" in error()
    assert "s3cret" not in error()


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/some/path", "gs://bucket", "az://container/path", "file:///srv/backups"]
)
def test_stores_by_their_urls(url: str) -> None:
    storage = load_settings(None, {"storage.url": url}).storage
    assert (storage.url, storage.scheme) == (url, url.split(":", maxsplit=1)[0])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"url": "https://bucket.s3.amazonaws.com"}, "must begin with s3://"),
        ({"url": "s3://"}, "names no bucket"),
        ({"url": "s3://user:s3cret@bucket"}, "no user, password"),
        ({"url": "file://srv/backups"}, "absolute directory"),
        ({"url": "file:///"}, "absolute directory"),
        ({"mode": "cloud"}, "needs `url`"),
        ({"mode": "remote"}, "'local', 'hybrid' or 'cloud'"),
        ({"url": "s3://b", "endpoint": "http://minio:9000"}, "set `allow_http = true` if that is meant"),
        ({"url": "s3://b", "endpoint": "minio:9000"}, "storage.endpoint: "),
        ({"url": "s3://b", "access_key_id": "a"}, "go together"),
        ({"url": "s3://b", "secret_access_key": "s3cret"}, "go together"),
        ({"url": "gs://b", "access_key_id": "a", "secret_access_key": "s3cret"}, "`access_key_id` is for s3://"),
        ({"access_key_id": "a", "secret_access_key": "s3cret"}, "`url` is not set"),
        ({"url": "az://c", "account_key": "s3cret"}, "`account_key` needs `account`"),
        ({"url": "file:///srv/b", "endpoint": "https://minio"}, "`endpoint` is for a cloud"),
        ({"url": "gs://b", "credentials_file": "/no/file"}, "there is no file"),
        ({"key": "s3cret"}, "64 hexadecimal digits"),
        ({"old_keys": [KEY, "s3cret"]}, "64 hexadecimal digits"),
        ({"keep_last": 0}, "greater than 0"),
        ({"concurrency": 65}, "less than or equal to 64"),
    ],
)
def test_a_store_that_cannot_be_is_refused(given: dict[str, Any], told: str) -> None:
    text = error(None, {"storage": given})
    assert told in text
    assert "s3cret" not in text


def test_keys_come_from_files_and_credentials_and_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write(tmp_path / "old", f"{KEY}\n{KEY[::-1]}\n")
    config = write(tmp_path / "c.toml", f'[storage]\nkey_file = "{write(tmp_path / "key", KEY)}"\nold_keys_file = "{old}"')
    settings = load_settings(config)
    assert settings.storage.key == SecretStr(KEY)
    assert settings.storage.old_keys is not None
    assert settings.storage.old_keys.get_secret_value().split() == [KEY, KEY[::-1]]
    shown = {d.name: (d.value, d.source) for d in settings.describe()}
    assert shown["storage.key"] == ("***", str(tmp_path / "key"))
    assert shown["storage.old_keys"] == ("***", str(old))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(write(tmp_path / "creds" / "storage.key", KEY.upper()).parent))
    assert load_settings(config).storage.key == SecretStr(KEY.upper())
    monkeypatch.setenv("WARREN_STORAGE__OLD_KEYS", f"{KEY} {KEY}")
    assert load_settings().storage.old_keys == SecretStr(f"{KEY} {KEY}")
    assert load_settings(None, {"storage.old_keys": [KEY]}).storage.old_keys == SecretStr(KEY)


# --- reading again ------------------------------------------------------------------------------------------------------


def test_what_is_read_again_changes_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    config = write(tmp_path / "c.toml", '[log]\nlevel = "info"\n[amqp]\nprefix = "a"')
    running = load_settings(config)
    write(config, '[log]\nlevel = "debug"\ntrace = ["acme"]\n[amqp]\nprefix = "b"\n[whatsapp]\ndevice_name = "Desk"')
    told = running.reloaded(load_settings(config))
    assert told.taken == ["whatsapp.device_name = Desk (was warren)", "log.level = debug (was info)", "log.trace = acme (was )"]
    assert told.waiting == ["amqp.prefix"]
    s = told.settings
    assert (s.log.level, s.log.trace, s.whatsapp.device_name, s.amqp.prefix) == ("debug", ("acme",), "Desk", "a")
    # Still waiting at the next time; and what was taken can be taken back.
    write(config, '[amqp]\nprefix = "b"')
    again = s.reloaded(load_settings(config))
    assert (again.settings.model_dump(), again.waiting, len(again.taken)) == (running.model_dump(), ["amqp.prefix"], 3)
    assert running.reloaded(running) == module.Reloaded(running, [], [])


def test_a_changed_secret_is_not_told(tmp_path: Path) -> None:
    running = load_settings(None, {"amqp.url": "amqp://u:old@h/"})
    assert running.reloaded(load_settings(None, {"amqp.url": "amqp://u:new@h/"})).waiting == ["amqp.url"]


def test_everything_that_can_be_reloaded_is_a_section_or_a_setting() -> None:
    assert {*Settings.model_fields, *module._names()} >= module.RELOADABLE


# --- RabbitMQ with certificates -----------------------------------------------------------------------------------------


def test_certificates_go_into_the_address_and_need_amqps(tmp_path: Path) -> None:
    ca, cert, key = (str(write(tmp_path / name, "")) for name in ("c a&.pem", "cert.pem", "key.pem"))
    tls = {"amqp.url": "amqps://u:p%2F@h/v?name=x", "amqp.ca_file": ca, "amqp.cert_file": cert, "amqp.key_file": key}
    address = load_settings(None, tls).amqp.address
    assert address is not None
    assert address.startswith("amqps://u:p%2F@h/v?name=x&cafile=")
    assert dict(parse_qsl(urlsplit(address).query)) == {"name": "x", "cafile": ca, "certfile": cert, "keyfile": key}
    assert load_settings(None, {"amqp.url": "amqp://h/"}).amqp.address == "amqp://h/"
    assert load_settings().amqp.address is None
    assert "belong together" in error(None, {"amqp.url": "amqps://h/", "amqp.key_file": key})
    assert "are for an amqps:// `url`" in error(None, {"amqp.url": "amqp://h/", "amqp.ca_file": ca})
    assert "there is no file" in error(None, {"amqp.url": "amqps://h/", "amqp.ca_file": "/no/ca"})


def test_the_sessions_to_trace_come_as_a_list_or_with_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(write(tmp_path / "c.toml", '[log]\ntrace = ["a", "b"]')).log.trace == ("a", "b")
    monkeypatch.setenv("WARREN_LOG__TRACE", "acme, other")
    assert load_settings().log.trace == ("acme", "other")
    monkeypatch.setenv("WARREN_LOG__TRACE", "no/session")
    assert "environment (WARREN_LOG__TRACE): log.trace: " in error()


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        ("\n[amqp]\n# url\nulr = 'x'", 4),
        ("[log]\n\n[ampq]\nurl = 'x'", 3),
        ("\nmax_sessions = 5", 2),
        ("amqp.heartbeat_s = 0", 1),
        ("instance = 'a'\namqp = { heartbeat_s = 0 }", 2),
    ],
)
def test_what_is_wrong_has_its_line(tmp_path: Path, toml: str, line: int) -> None:
    config = write(tmp_path / "c.toml", toml)
    assert error(config).startswith(f"{config}, line {line}: ")


# --- describe ---------------------------------------------------------------------------------------------------------


def test_describe_tells_every_setting_with_its_source_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca = write(tmp_path / "ca.pem", "")
    config = write(tmp_path / "c.toml", f'[whatsapp]\nendpoint = "wss://[::1]:1"\nroot_key = "{KEY}"\nca_file = "{ca}"')
    monkeypatch.setenv("WARREN_LOG__LEVEL", "error")
    secret = write(tmp_path / "secret", "amqp://user:s3cret@rabbit:5672/vhost?password=s3cret")
    described = load_settings(config, {"amqp.url_file": secret, "fleet.max_sessions": 7}).describe()
    found = {d.name: (d.value, d.source) for d in described}
    assert list(found) == list(module._names())
    assert found["amqp.url"] == ("amqp://user:***@rabbit:5672/vhost?***", str(secret))
    assert found["whatsapp.root_key"] == ("***", str(config))
    assert found["whatsapp.endpoint"] == ("wss://[::1]:1", str(config))
    assert found["log.level"] == ("error", "environment (WARREN_LOG__LEVEL)")
    assert found["fleet.max_sessions"] == (7, "command line")
    assert found["log.format"] == ("auto", "default")
    assert found["engine.path"] == (None, "default")
    assert "s3cret" not in repr(described)


# --- http -------------------------------------------------------------------------------------------------------------


def test_a_server_beyond_this_machine_needs_a_token() -> None:
    assert load_settings().http.port is None
    for address in ("127.0.0.1", "::1", "localhost"):
        load_settings(None, {"http.port": 9464, "http.address": address})
    for address in ("0.0.0.0", "::", "192.0.2.1"):
        assert "set `token` too" in error(None, {"http.port": 9464, "http.address": address})
        load_settings(None, {"http.port": 9464, "http.address": address, "http.token": KEY})
    assert "http.address" in error(None, {"http.address": "example.org"})


def test_a_weak_token_is_refused_and_not_shown() -> None:
    for weak in ("short", "with a blank in it, long enough"):
        said = error(None, {"http.token": weak})
        assert "16 characters" in said
        assert weak not in said


def test_the_token_comes_from_a_file_or_a_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "token", "from-a-file-of-its-own\n")
    assert load_settings(None, {"http.token_file": str(file)}).http.token == SecretStr("from-a-file-of-its-own")
    assert "both set" in error(None, {"http.token": KEY, "http.token_file": str(file)})
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "c"))
    write(tmp_path / "c" / "http.token", "from-a-credential-of-systemd")
    assert load_settings().http.token == SecretStr("from-a-credential-of-systemd")


# --- find_engine_binary -----------------------------------------------------------------------------------------------


def program(path: Path, mode: int = 0o755) -> Path:
    write(path, "#!/bin/sh\n").chmod(mode)
    return path


def test_the_engine_is_found_in_the_checkout_then_the_package_then_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "daemon" / "warren"
    monkeypatch.setattr(warren, "__file__", str(package / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match="make engine"):
        find_engine_binary(None)
    places = [tmp_path / "bin", package, tmp_path / "checkout" / "engine" / "bin"]
    for place in places:
        made = program(place / "warren-engine")
        assert find_engine_binary(None) == made
    assert find_engine_binary(None, "warren-engine") == places[-1] / "warren-engine"
    with pytest.raises(ConfigError, match="warren-sim is not installed"):
        find_engine_binary(None, "warren-sim")


def test_a_configured_engine_is_taken_or_refused(tmp_path: Path) -> None:
    assert find_engine_binary(program(tmp_path / "mine")) == tmp_path / "mine"
    with pytest.raises(ConfigError, match=r"engine\.path: .*make engine"):
        find_engine_binary(program(tmp_path / "text", 0o644))
