"""Settings: command line over environment over secret files over the TOML file over defaults.

`config.example.toml` explains each of them; a test holds that its names and defaults are those of the models here.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import shutil
import socket
import tomllib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

import warren
from warren.core.names import SESSION_ID
from warren.errors import ConfigError

ENV_PREFIX = "WARREN_"
CONFIG_ENV = "WARREN_CONFIG"
CONFIG_PLACES = (Path("warren.toml"), Path("/etc/warren/warren.toml"))
HIDDEN = "***"
NAMED_FILES = ("amqp.url", "storage.key", "storage.old_keys", "http.token")
"""Settings that may be in a file of their own, which the setting `…_file` names."""
SCHEMES = ("s3", "gs", "az", "file")


# --- values -------------------------------------------------------------------------------------------------------------


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _split(url: str) -> SplitResult:
    parts = urlsplit(url)
    _ = parts.port  # raises ValueError when it is none
    if not parts.hostname:
        raise ValueError("it names no host")
    return parts


def _amqp_url(url: SecretStr) -> SecretStr:
    if _split(url.get_secret_value()).scheme not in ("amqp", "amqps"):
        raise ValueError("it must look like amqp://user:password@host:5672/vhost or amqps://...")
    return url


def _loopback(url: str) -> str:
    """Only a simulator may stand in for WhatsApp, and it is on this machine: a foreign server would be given the sessions."""
    parts = _split(url)
    if parts.scheme != "wss" or not _is_loopback(parts.hostname or ""):
        raise ValueError("it must be wss:// on a loopback address, like wss://127.0.0.1:8443 (a simulator)")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token(token: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]{16,1024}", token.get_secret_value()):
        raise ValueError("it must be 16 characters or more, without blanks, like `openssl rand -hex 32` makes")
    return token


def _address(address: str) -> str:
    if address != "localhost":
        ipaddress.ip_address(address)
    return address


def _hex_key(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", key.get_secret_value()):
        raise ValueError("it must be 64 hexadecimal digits")
    return key


def _object_store(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError("it must begin with s3://, gs://, az:// or file:///")
    if parts.username or parts.query or parts.fragment:
        raise ValueError("it may have no user, password, query or fragment; credentials have settings of their own")
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        raise ValueError("it must name an absolute directory, like file:///srv/warren-backups")
    if parts.scheme != "file" and not parts.netloc:
        raise ValueError(f"it names no bucket, like {parts.scheme}://my-bucket")
    return url


def _http_url(url: str) -> str:
    if _split(url).scheme not in ("http", "https"):
        raise ValueError("it must begin with https:// (or http://)")
    return url


def _joined(keys: Any) -> Any:
    """Several keys may be a list, or one text with spaces or lines between them."""
    if isinstance(keys, list) and all(isinstance(key, str) for key in keys):
        return " ".join(keys)
    return keys


def _hex_keys(keys: SecretStr) -> SecretStr:
    for key in keys.get_secret_value().split():
        _hex_key(SecretStr(key))
    return keys


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """From the environment: names with commas between them."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname()).lstrip("_.-")[:64] or "warren"


def _default_state_dir() -> Path:
    # systemd gives a list, separated by colons, when the unit names several.
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(given or "var").absolute()


SessionName = Annotated[str, Field(pattern=f"^{SESSION_ID.pattern}$")]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
ReadableFile = Annotated[Path, AfterValidator(_absolute), AfterValidator(_readable)]
NameInQueues = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Prefix = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$")]


# --- the settings -------------------------------------------------------------------------------------------------------


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class AmqpSettings(_Section):
    """`url` None: the daemon runs a private RabbitMQ of its own. `url_file` is where `url` was read from, when it was."""

    url: Annotated[SecretStr, AfterValidator(_amqp_url)] | None = None
    url_file: AbsolutePath | None = None
    ca_file: ReadableFile | None = None
    cert_file: ReadableFile | None = None
    key_file: ReadableFile | None = None
    prefix: Prefix = "warren"
    heartbeat_s: PositiveInt = 10
    connect_timeout_s: PositiveFloat = 5.0
    publish_timeout_s: PositiveFloat = 10.0
    work_prefetch: Annotated[int, Field(ge=1, le=65_535)] = 10

    @model_validator(mode="after")
    def _certificates_fit(self) -> AmqpSettings:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("`cert_file` and `key_file` belong together; set both, or remove both")
        if self._files() and (self.url is None or not self.url.get_secret_value().startswith("amqps:")):
            raise ValueError("`ca_file`, `cert_file` and `key_file` are for an amqps:// `url`; set one, or remove them")
        return self

    @property
    def address(self) -> str | None:
        """The URL to connect to, with its secrets; the certificates are named in its query, where aiormq looks for them."""
        if self.url is None:
            return None
        parts = urlsplit(self.url.get_secret_value())
        return parts._replace(query=urlencode([*parse_qsl(parts.query), *self._files()])).geturl()

    def _files(self) -> list[tuple[str, str]]:
        given = {"cafile": self.ca_file, "certfile": self.cert_file, "keyfile": self.key_file}
        return [(name, str(path)) for name, path in given.items() if path is not None]


class WhatsAppSettings(_Section):
    """`endpoint` None: WhatsApp. The trust for a simulator is refused without one."""

    endpoint: Annotated[str, AfterValidator(_loopback)] | None = None
    root_key: Annotated[SecretStr, AfterValidator(_hex_key)] | None = None
    ca_file: Annotated[Path, AfterValidator(_absolute), AfterValidator(_readable)] | None = None
    device_name: Annotated[str, Field(min_length=1, max_length=50)] = "warren"
    version: Annotated[str, Field(pattern=r"^2\.[0-9]+\.[0-9]+$")] | None = None

    @model_validator(mode="after")
    def _all_of_a_simulator_or_nothing(self) -> WhatsAppSettings:
        if self.endpoint is None and (self.root_key is not None or self.ca_file is not None):
            raise ValueError("`root_key` and `ca_file` are for a simulator; set `endpoint` too, or remove them")
        if self.endpoint is not None and (self.root_key is None or self.ca_file is None):
            raise ValueError("`endpoint` needs `root_key` and `ca_file`; `warren sim` prints all three")
        return self


class EngineSettings(_Section):
    """`path` None: see `find_engine_binary`."""

    path: AbsolutePath | None = None
    sessions_per_process: PositiveInt = 250
    ping_interval_s: PositiveFloat = 5.0
    ping_timeout_s: PositiveFloat = 15.0
    memory_limit_mb: PositiveInt | None = None
    memory_ceiling_mb: NonNegativeInt = 2_048


class FleetSettings(_Section):
    """How many sessions, and how they come up."""

    max_sessions: Annotated[int, Field(ge=1, le=1_000)] = 1_000
    connects_at_once: PositiveInt = 16
    idle_timeout_s: NonNegativeFloat = 0.0
    takeover: Annotated[Literal["off"], BeforeValidator(_lower)] = "off"


class ReconnectSettings(_Section):
    """Of a session that lost WhatsApp."""

    base_s: PositiveFloat = 5.0
    cap_s: PositiveFloat = 300.0
    alarm_after: PositiveInt = 10
    stable_s: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _ordered(self) -> ReconnectSettings:
        if self.cap_s < self.base_s:
            raise ValueError(f"`cap_s` ({self.cap_s:g}) must not be below `base_s` ({self.base_s:g})")
        return self


class DeliverySettings(_Section):
    """From the outbox to RabbitMQ."""

    outbox_max_mb: PositiveInt = 1_024
    min_free_disk_mb: NonNegativeInt = 256
    answer_after_ms: NonNegativeInt = 250
    publishes_at_once: PositiveInt = 100


class StorageSettings(_Section):
    """Where backups go. `url` None: a directory below the state directory, with a key made there. Credentials that are not given
    are looked for where each cloud's users expect them. `key_file` and `old_keys_file` are where `key` and `old_keys` were read
    from, when they were.
    """

    mode: Annotated[Literal["local", "hybrid", "cloud"], BeforeValidator(_lower)] = "hybrid"
    url: Annotated[str, AfterValidator(_object_store)] | None = None
    prefix: Prefix = "warren"
    region: Annotated[str, Field(min_length=1)] | None = None
    endpoint: Annotated[str, AfterValidator(_http_url)] | None = None
    allow_http: bool = False
    access_key_id: Annotated[str, Field(min_length=1)] | None = None
    secret_access_key: SecretStr | None = None
    account: Annotated[str, Field(min_length=1)] | None = None
    account_key: SecretStr | None = None
    credentials_file: Annotated[Path, AfterValidator(_absolute), AfterValidator(_readable)] | None = None
    key: Annotated[SecretStr, AfterValidator(_hex_key)] | None = None
    key_file: AbsolutePath | None = None
    old_keys: Annotated[SecretStr, BeforeValidator(_joined), AfterValidator(_hex_keys)] | None = None
    old_keys_file: AbsolutePath | None = None
    interval_s: NonNegativeInt = 300
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    timeout_s: PositiveFloat = 30.0
    start_wait_s: NonNegativeFloat = 15.0
    alarm_after: PositiveInt = 3
    keep_last: PositiveInt = 3
    keep_days: NonNegativeInt = 31
    forget_after_days: NonNegativeInt = 30

    @property
    def scheme(self) -> str:
        """`s3`, `gs`, `az` or `file`."""
        return urlsplit(self.url).scheme if self.url else "file"

    @model_validator(mode="after")
    def _fits_together(self) -> StorageSettings:
        if self.mode == "cloud" and self.url is None:
            raise ValueError('`mode` "cloud" keeps nothing on this machine, so it needs `url`')
        if self.endpoint and self.endpoint.lower().startswith("http:") and not self.allow_http:
            raise ValueError("`endpoint` is http://, without encryption on the way; set `allow_http = true` if that is meant")
        for scheme, names in {
            "s3": ("access_key_id", "secret_access_key", "region"),
            "az": ("account", "account_key"),
            "gs": ("credentials_file",),
        }.items():
            given = [name for name in names if getattr(self, name) is not None]
            if given and self.scheme != scheme:
                raise ValueError(f"`{given[0]}` is for {scheme}://, and `url` is {self.url or 'not set'}")
        if self.endpoint and self.scheme == "file":
            raise ValueError(f"`endpoint` is for a cloud's interface, and `url` is {self.url or 'not set'}")
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("`access_key_id` and `secret_access_key` go together; or remove both to use the environment's")
        if self.account_key is not None and self.account is None:
            raise ValueError("`account_key` needs `account`")
        return self


class PacingSettings(_Section):
    """How fast sessions send, where their `create` says nothing else."""

    messages_per_minute: Annotated[int, Field(ge=0, le=6_000)] = 30
    burst: PositiveInt | None = None
    on_limit: Annotated[Literal["wait", "refuse"], BeforeValidator(_lower)] = "wait"


class ShutdownSettings(_Section):
    """Budgets of the steps of a stop, in seconds."""

    commands_s: NonNegativeFloat = 10.0
    sessions_s: NonNegativeFloat = 15.0
    drain_s: NonNegativeFloat = 10.0
    backup_s: NonNegativeFloat = 20.0
    broker_s: NonNegativeFloat = 15.0


class LogSettings(_Section):
    """See `edges.logs`."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"
    format: Annotated[Literal["auto", "human", "json"], BeforeValidator(_lower)] = "auto"
    redact: bool = True
    trace: Annotated[tuple[SessionName, ...], NoDecode, BeforeValidator(_listed)] = ()


class HttpSettings(_Section):
    """`port` None: no HTTP server. `token_file` is where `token` was read from, when it was."""

    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    address: Annotated[str, AfterValidator(_address)] = "127.0.0.1"
    token: Annotated[SecretStr, AfterValidator(_token)] | None = None
    token_file: AbsolutePath | None = None

    @model_validator(mode="after")
    def _guarded(self) -> HttpSettings:
        if self.port is not None and self.token is None and not _is_loopback(self.address):
            raise ValueError(f"on {self.address} anybody could log sessions out; set `token` too, or keep to 127.0.0.1")
        return self


@dataclass(frozen=True, slots=True)
class Described:
    """One setting as it is in force, fit to be shown."""

    name: str
    """Dotted: `amqp.url`."""
    value: str | int | float | bool | None
    source: str


RELOADABLE = frozenset(
    {
        *("log", "reconnect", "pacing", "shutdown", "whatsapp.device_name"),
        *("storage.interval_s", "storage.alarm_after", "storage.keep_last", "storage.keep_days"),
    }
)
"""Sections, and settings of sections, that a SIGHUP changes. All others are built into what runs: connections, engines, queues.
A section with rules between its settings is in whole or not at all."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """`settings`: what is in force now. `taken`: sentences about what has changed. `waiting`: names that need a restart."""

    settings: Settings
    taken: list[str]
    waiting: list[str]


class Settings(BaseSettings):
    """Every setting of the daemon. Made by `load_settings`; made directly, it knows the environment but no files."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    instance: NameInQueues = Field(default_factory=_host_name)
    state_dir: AbsolutePath = Field(default_factory=_default_state_dir)
    amqp: AmqpSettings = AmqpSettings()
    whatsapp: WhatsAppSettings = WhatsAppSettings()
    engine: EngineSettings = EngineSettings()
    fleet: FleetSettings = FleetSettings()
    reconnect: ReconnectSettings = ReconnectSettings()
    delivery: DeliverySettings = DeliverySettings()
    storage: StorageSettings = StorageSettings()
    pacing: PacingSettings = PacingSettings()
    shutdown: ShutdownSettings = ShutdownSettings()
    log: LogSettings = LogSettings()
    http: HttpSettings = HttpSettings()

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def reloaded(self, new: Settings) -> Reloaded:
        """What becomes of a running daemon's settings when they are read again: RELOADABLE ones change, all others stay."""
        before, after = dict(_leaves(self)), dict(_leaves(new))
        changed = [name for name in after if after[name] != before[name]]
        taken = [name for name in changed if name in RELOADABLE or name.split(".")[0] in RELOADABLE]
        sections: dict[str, dict[str, Any]] = {}
        for section, _, last in (name.partition(".") for name in taken):
            sections.setdefault(section, {})[last] = after[f"{section}.{last}"]
        settings = self.model_copy(update={name: getattr(self, name).model_copy(update=to) for name, to in sections.items()})
        settings._sources = {**self._sources, **{name: new._sources.get(name, "default") for name in taken}}
        told = [f"{name} = {_shown(after[name])} (was {_shown(before[name])})" for name in taken]
        return Reloaded(settings, told, [name for name in changed if name not in taken])

    def describe(self) -> list[Described]:
        """The settings in force, secrets masked, with where each comes from, in the order of the example file."""
        return [Described(name, _shown(value), self._sources.get(name, "default")) for name, value in _leaves(self)]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The order of the sources, first wins."""
        return init_settings, env_settings, *(_Files(settings_cls, layer.data) for layer in _files.get())


@dataclass(frozen=True, slots=True)
class _Layer:
    """Settings from one place, nested as in the file; `place` says where by dotted name, "" for all others; `lines`
    in which line of it.
    """

    data: dict[str, Any]
    place: dict[str, str]
    lines: dict[str, int] = field(default_factory=dict)

    def source(self, name: str) -> str:
        return self.place.get(name) or self.place[""]

    def spot(self, name: str) -> str:
        """`source`, with the line where the file has the setting, or else its section."""
        known = name
        while known and known not in self.lines:
            known = known.rpartition(".")[0]
        return f"{self.source(name)}, line {self.lines[known]}" if known else self.source(name)


_files: ContextVar[tuple[_Layer, ...]] = ContextVar("_files", default=())


class _Files(PydanticBaseSettingsSource):
    """Hands what was read from files to pydantic-settings."""

    def __init__(self, settings_cls: type[BaseSettings], data: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._data = data

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of the interface; only the base class's own `__call__` would use it."""
        return self._data.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._data


# --- loading ------------------------------------------------------------------------------------------------------------


def load_settings(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read every source and check the result.

    `config` names the TOML file and must exist then; `overrides` (the command line) may be nested or have dotted names.
    Raises ConfigError, one for everything that is wrong: where, which setting, what to do.
    """
    given = _Layer(_nested(overrides or {}), {"": "command line"})
    environment = _environment()
    toml = _toml(config)
    layers = (given, environment, _secrets((given, environment, toml)), toml)
    token = _files.set(layers[2:])
    try:
        settings = Settings(**given.data)
    except ValidationError as e:
        raise _explain(e, layers) from None  # its text may hold secrets
    finally:
        _files.reset(token)
    for name, _ in _leaves(settings):
        if layer := _layer_of(name, layers):
            settings._sources[name] = layer.source(name)
    return settings


def _environment() -> _Layer:
    known = {ENV_PREFIX + name.replace(".", "__").upper(): name for name in _names()}
    sections = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    place = {"": "environment"}
    problems = []
    for variable in sorted(os.environ):
        upper = variable.upper()
        if upper in known:
            place[known[upper]] = f"environment ({variable})"
        elif upper.startswith(ENV_PREFIX) and upper not in {*sections, CONFIG_ENV}:
            problems += _unknown_variable(variable, list(known))
    if problems:
        raise _config_error(problems)
    try:
        return _Layer(EnvSettingsSource(Settings)(), place)
    except SettingsError as e:
        raise ConfigError(f"environment: {e}.", hint="Set one variable per setting, like WARREN_LOG__LEVEL.") from None


def _unknown_variable(variable: str, known: list[str]) -> list[str]:
    """The complaint, if any: others share the name space (Kubernetes sets WARREN_PORT for a service `warren`)."""
    close = difflib.get_close_matches(variable.upper(), known, n=1, cutoff=0.8)
    if not close and "__" not in variable:
        return []
    return [f"environment: {variable} is no setting.{_did_you_mean(close)}"]


def _toml(config: Path | None) -> _Layer:
    named = config or (Path(given) if (given := os.environ.get(CONFIG_ENV)) else None)
    path = named or next((place for place in CONFIG_PLACES if _is_there(place)), None)
    if path is None:
        return _Layer({}, {"": "default"})
    try:
        text = path.read_text(encoding="utf-8")
        return _Layer(tomllib.loads(text), {"": str(path)}, _lines(text))
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {path}.", hint=f"Check --config or ${CONFIG_ENV}.") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}.", hint="Check its owner and mode.") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not TOML: {e}.", hint="See config.example.toml for the form.") from e


def _is_there(path: Path) -> bool:
    """A folder that is closed to us (/etc/warren is the daemon's) is none of ours."""
    try:
        return path.exists()
    except PermissionError:
        return False


_HEADER = re.compile(r"\s*\[\s*([\w.-]+)\s*\]")
_ENTRY = re.compile(r"\s*([\w.-]+)\s*=")


def _lines(toml: str) -> dict[str, int]:
    """Dotted name -> line. For what is written plainly; whoever quotes names or nests tables is told the section."""
    section, found = "", dict[str, int]()
    for number, line in enumerate(toml.splitlines(), start=1):
        if header := _HEADER.match(line):
            section = f"{header[1]}."
            found.setdefault(header[1], number)
        elif entry := _ENTRY.match(line):
            found.setdefault(section + entry[1], number)
    return found


def _secrets(layers: tuple[_Layer, ...]) -> _Layer:
    """Credentials of systemd (files named like settings) over the files that settings name (`amqp.url_file`)."""
    place = {"": "credential"}
    data: dict[str, Any] = {}
    _read_named(layers, data, place)
    if folder := os.environ.get("CREDENTIALS_DIRECTORY"):
        for name in _names():
            path = Path(folder) / name
            if path.exists():
                _put(data, name, _secret(path, f"the credential {name}"))
                place[name] = str(path)
    return _Layer(data, place)


def _read_named(layers: tuple[_Layer, ...], data: dict[str, Any], place: dict[str, str]) -> None:
    for name in NAMED_FILES:
        _read_one(layers, name, data, place)


def _read_one(layers: tuple[_Layer, ...], name: str, data: dict[str, Any], place: dict[str, str]) -> None:
    naming = _layer_of(f"{name}_file", layers)
    value = _layer_of(name, layers)
    if naming is None or (value is not None and layers.index(value) < layers.index(naming)):
        return
    if value is naming:
        raise ConfigError(f"{naming.source(f'{name}_file')}: {name} and {name}_file are both set.", hint="Keep one of them.")
    section, _, last = name.partition(".")
    path = naming.data[section][f"{last}_file"]
    if isinstance(path, str | Path):  # else the models complain
        _put(data, name, _secret(_absolute(Path(path)), f"{name}_file"))
        place[name] = str(path)


def _secret(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not text"
        raise ConfigError(f"{what}: {path} cannot be read: {why}.", hint="Check the path, its owner and its mode.") from e


# --- what is wrong ------------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, layers: tuple[_Layer, ...]) -> ConfigError:
    return _config_error([_problem(details, layers) for details in error.errors(include_url=False)])


def _config_error(problems: list[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError(f"{len(problems)} settings are wrong:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _problem(details: ErrorDetails, layers: tuple[_Layer, ...]) -> str:
    name = ".".join(part for part in details["loc"] if isinstance(part, str))
    layer = _layer_of(name, layers)
    where = layer.spot(name) if layer else "settings"
    if details["type"] == "extra_forbidden":
        return f"{where}: {name} is no setting.{_did_you_mean(_close(name))}"
    what = details["msg"].removeprefix("Value error, ")
    if details["type"] == "string_pattern_mismatch":
        what = f"may have letters, digits, `_`, `.` and `-`, and begins with a letter or digit ({what})"
    if name == "fleet.takeover":
        what = 'only "off" is there in this version'
    return f"{where}: {name}: {what[:1].lower()}{what[1:]}.{_default_of(name)}"


def _default_of(name: str) -> str:
    """What would do, for a setting of a section with a default to show."""
    section, _, last = name.partition(".")
    known = Settings.model_fields.get(section)
    default = getattr(known.default, last, None) if known and last else None
    return f" Default: {orjson.dumps(default).decode()}." if isinstance(default, str | int | float) else ""


def _close(name: str) -> list[str]:
    """Settings that may have been meant: alike, or of the same name in another section."""
    last = name.rsplit(".", 1)[-1]
    same = [known for known in _names() if known.rsplit(".", 1)[-1] == last]
    return same or difflib.get_close_matches(name, [*_names(), *Settings.model_fields], n=1, cutoff=0.6)


def _did_you_mean(names: list[str]) -> str:
    return f" Did you mean {' or '.join(names)}?" if names else " See config.example.toml for all there are."


# --- names --------------------------------------------------------------------------------------------------------------


def _names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _names(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _layer_of(name: str, layers: tuple[_Layer, ...]) -> _Layer | None:
    """The first layer that has the setting."""
    return next((layer for layer in layers if _has(layer.data, name.split("."))), None)


def _has(data: Any, parts: list[str]) -> bool:
    for part in parts:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    return True


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in flat.items():
        if isinstance(value, Mapping):
            for inner, leaf in _nested(value).items():
                _put(data, f"{name}.{inner}", leaf)
        elif value is not None:  # else an option that was not given
            _put(data, name, value)
    return data


def _put(data: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        data = data.setdefault(section, {})
    data[last] = value


def _shown(value: Any) -> str | int | float | bool | None:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, SecretStr):
        return _masked(value.get_secret_value())
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _masked(secret: str) -> str:
    """A URL without its password, which tells where it leads; any other secret not at all."""
    if "://" not in secret:
        return HIDDEN
    parts = urlsplit(secret)
    user, at, host = parts.netloc.rpartition("@")
    user = f"{user.split(':')[0]}:{HIDDEN}" if ":" in user else user
    return parts._replace(netloc=f"{user}{at}{host}", query=HIDDEN if parts.query else "").geturl()


# --- programs -----------------------------------------------------------------------------------------------------------


def find_engine_binary(settings_path: Path | None, name: str = "warren-engine") -> Path:
    """The program `name`: where `[engine] path` says; else built in this checkout, in the package, or on PATH.

    Raises ConfigError when there is none that may be executed.
    """
    if settings_path is not None:
        if _is_program(settings_path):
            return settings_path
        raise ConfigError(f"engine.path: {settings_path} is no program.", hint="Run `make engine`, or remove the setting.")
    package = Path(warren.__file__).parent
    for place in (package.parent.parent / "engine" / "bin", package):
        if _is_program(place / name):
            return place / name
    if found := shutil.which(name):
        return Path(found).absolute()
    raise ConfigError(f"{name} is not installed.", hint="Run `make engine`, or set [engine] path.")


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
