"""Object stores: S3 and what is compatible to it, Google Cloud Storage and Azure Blob through obstore; `open_store` takes any.

obstore makes one attempt per call here (repeating is the services' business), never follows plain HTTP unless told to, and finds
credentials in the environment or from the machine by itself. What it does not know is added: the AWS command line's files. Its
errors are Rust's, with the server's answer inside; `_explain` turns them into ours.

Missing means that the store said so in its own words (`NoSuchKey`, `BlobNotFound`). A bare 404 (a proxy, a wrong address, a
bucket that is not there) is an error: taken for "no backup", it would cost a session.
"""

from __future__ import annotations

import asyncio
import configparser
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

from warren.core.sealing import MAX_CONTENT_BYTES
from warren.edges.objects_directory import DirectoryObjects
from warren.edges.settings import StorageSettings
from warren.errors import ConfigError, StorageError, StorageTrouble
from warren.ports import Found, Listed, ObjectStore

T = TypeVar("T")

MAX_OBJECT_BYTES = MAX_CONTENT_BYTES + 1024 * 1024
"""What is larger is none of ours and is not read into memory."""
LIST_CHUNK = 1_000
CONNECT_TIMEOUT_S = 10.0
METADATA = "169.254.169.254"
"""Where machines in a cloud ask for credentials; also under Google's name `metadata.google.internal`."""


def open_store(settings: StorageSettings, state_dir: Path) -> ObjectStore:
    """The store that the settings name; nothing is connected yet. Raises ConfigError; StorageError for a directory of our own."""
    if settings.url is None:
        return DirectoryObjects(state_dir / "backups", timeout_s=settings.timeout_s, make=True)
    parts = urlsplit(settings.url)
    if parts.scheme == "file":
        return DirectoryObjects(Path(parts.path), timeout_s=settings.timeout_s)
    try:
        return CloudObjects(_cloud(settings, parts.netloc, parts.path.strip("/")), settings.url, settings.timeout_s)
    except (BaseError, ValueError, TypeError) as e:
        raise ConfigError(
            f"[storage] does not fit together: {_first_line(e)}.", hint="Check `url` and the settings by it."
        ) from e


def _cloud(settings: StorageSettings, bucket: str, path: str) -> S3Store | GCSStore | AzureStore:
    common: dict[str, Any] = {
        "prefix": path or None,
        "client_options": {
            "allow_http": settings.allow_http,
            "timeout": timedelta(seconds=settings.timeout_s),
            "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT_S, settings.timeout_s)),
        },
        "retry_config": {"max_retries": 0, "retry_timeout": timedelta(seconds=settings.timeout_s)},
    }
    match settings.scheme:
        case "s3":
            return S3Store(bucket, **common, **_s3_options(settings))
        case "gs":
            given = {"service_account": _text(settings.credentials_file), "base_url": settings.endpoint}
            return GCSStore(bucket, **common, **_without_none(given))
        case _:
            key = settings.account_key.get_secret_value() if settings.account_key else None
            given = {"account_name": settings.account, "account_key": key, "endpoint": settings.endpoint}
            return AzureStore(bucket, **common, **_without_none(given))


def _s3_options(settings: StorageSettings) -> dict[str, Any]:
    secret = settings.secret_access_key.get_secret_value() if settings.secret_access_key else None
    given = {
        "access_key_id": settings.access_key_id,
        "secret_access_key": secret,
        "region": settings.region,
        "endpoint": settings.endpoint,
    }
    # Bulk deletion is what compatible stores lack most often.
    return {**_aws_files(credentials=secret is None), **_without_none(given), "disable_bulk_delete": True}


_AWS_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                    "AWS_CONTAINER_CREDENTIALS_FULL_URI")  # fmt: skip


def _aws_files(*, credentials: bool) -> dict[str, str]:
    """What ~/.aws has for the profile, unless the environment says it. Only keys that are written there: no SSO, no roles."""
    profile = os.environ.get("AWS_PROFILE", "default")
    home = Path("~/.aws").expanduser()
    shared = _ini(Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials")), profile)
    config = _ini(Path(os.environ.get("AWS_CONFIG_FILE", home / "config")), profile, f"profile {profile}")
    found: dict[str, str] = {}
    if "region" in config and not os.environ.get("AWS_REGION") and not os.environ.get("AWS_DEFAULT_REGION"):
        found["region"] = config["region"]
    if not credentials or any(os.environ.get(name) for name in _AWS_CREDENTIALS):
        return found
    for source in (shared, config):
        if "aws_access_key_id" in source and "aws_secret_access_key" in source:
            found |= {"access_key_id": source["aws_access_key_id"], "secret_access_key": source["aws_secret_access_key"]}
            if "aws_session_token" in source:
                found["session_token"] = source["aws_session_token"]
            return found
    if "AWS_PROFILE" in os.environ:
        raise ConfigError(
            f"AWS_PROFILE is {profile}, and ~/.aws has no access key for it.",
            hint="Profiles with SSO or roles are not read: set access keys, or unset AWS_PROFILE to use the machine's role.",
        )
    return found


def _ini(path: Path, *sections: str) -> dict[str, str]:
    """The first of the sections that the file has; {} when there is none, or no file."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read(path, encoding="utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {_first_line(e)}.", hint="It is one of the AWS command line's files.") from e
    return next((dict(parser[name]) for name in sections if parser.has_section(name)), {})


def _without_none(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


class CloudObjects:
    """Implements `ports.ObjectStore` over one of obstore's stores. `where` is the URL for errors, `timeout_s` bounds each call
    (each page, for `list`).
    """

    def __init__(self, store: S3Store | GCSStore | AzureStore, where: str, timeout_s: float) -> None:
        self._store, self._where, self._timeout_s = store, where, timeout_s

    async def create(self, name: str, data: bytes) -> bool:
        async with self._explained("put", name):
            try:
                await self._store.put_async(name, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as e:
                # Two puts at the same time: S3 refuses one without saying which of them counts.
                if _code(e) in ("ConditionalRequestConflict", "OperationAborted"):
                    raise self._error("put", name, "another put of it is under way", "unavailable") from e
                return False
        return True

    async def replace(self, name: str, data: bytes, expected: str) -> bool:
        e_tag, _, version = expected.partition(" ")
        mode: Any = _without_none({"e_tag": e_tag or None, "version": version or None})
        async with self._explained("put", name):
            try:
                await self._store.put_async(name, data, mode=mode, use_multipart=False)
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as e:
                return self._missing(e, "put", name, found=False) if _status(str(e)) == 404 else False
        return True

    async def get(self, name: str) -> Found | None:
        async with self._explained("get", name):
            try:
                result = await self._store.get_async(name)
            except FileNotFoundError as e:
                return self._missing(e, "get", name, found=None)
            size = result.meta["size"]
            if size > MAX_OBJECT_BYTES:
                raise self._error("get", name, f"it has {size} bytes; no object of warren is that large", "corrupt")
            data = bytes(await result.bytes_async())
            if len(data) != size:
                raise self._error("get", name, f"{len(data)} of its {size} bytes came", "unavailable")
            return Found(data, f"{result.meta['e_tag'] or ''} {result.meta['version'] or ''}")

    async def list(self, prefix: str) -> list[Listed]:
        found: list[Listed] = []
        async with self._explained("list", prefix, bounded=False):
            pages = aiter(self._store.list(prefix or None, chunk_size=LIST_CHUNK))
            while (page := await self._next(pages)) is not None:
                found += [Listed(o["path"], o["size"], o["last_modified"].timestamp()) for o in page]
        return sorted(found, key=lambda listed: listed.name)

    async def delete(self, name: str) -> None:
        async with self._explained("delete", name):
            try:
                await self._store.delete_async(name)
            except FileNotFoundError as e:
                if "DeleteFailed" not in str(e):  # the answer of Azure's batches, for this very blob
                    self._missing(e, "delete", name, found=None)

    async def close(self) -> None: ...

    # --- inside

    async def _next(self, pages: Any) -> Any:
        async with asyncio.timeout(self._timeout_s):
            return await anext(pages, None)

    @asynccontextmanager
    async def _explained(self, verb: str, name: str, *, bounded: bool = True) -> AsyncIterator[None]:
        """Our deadline, as asking for credentials is not in the client's; and our errors."""
        try:
            async with asyncio.timeout(self._timeout_s if bounded else None):
                yield
        except TimeoutError:
            raise self._error(verb, name, f"no answer within {self._timeout_s:g} s", "unavailable", _NETWORK) from None
        except (BaseError, OSError, NotImplementedError) as e:
            raise self._error(verb, name, *_explain(e)) from e

    def _missing(self, error: Exception, verb: str, name: str, *, found: T) -> T:
        if _code(error) in _NOT_THERE:
            return found
        raise self._error(verb, name, *_explain(error)) from error

    def _error(self, verb: str, name: str, why: str, kind: StorageTrouble, hint: str = "") -> StorageError:
        return StorageError(f"{self._where}: could not {verb} {name or 'everything'}: {why}.", kind=kind, hint=hint)


# --- errors -------------------------------------------------------------------------------------------------------------

_NOT_THERE = ("NoSuchKey", "BlobNotFound")
_NETWORK = "Check the network, and `[storage] endpoint` if it is set. It is tried again."
_CREDENTIALS = (
    "Check the credentials (`[storage]`, the environment, or the machine's role) and what they may do: get, put, list, delete."
)
_NO_BUCKET = "Check `[storage] url`; the bucket (or container) must be there already."
_REGION = "Check `[storage] region`."
_ENDPOINT = "Check `[storage] url` and `endpoint`: something answers there, but not like such a store."

_CODES: dict[str, tuple[StorageTrouble, str]] = {
    "NoSuchBucket": ("misconfigured", _NO_BUCKET),
    "ContainerNotFound": ("misconfigured", _NO_BUCKET),
    "InvalidBucketName": ("misconfigured", _NO_BUCKET),
    "PermanentRedirect": ("misconfigured", _REGION),
    "AuthorizationHeaderMalformed": ("misconfigured", _REGION),
    "IllegalLocationConstraintException": ("misconfigured", _REGION),
    "RequestTimeTooSkewed": ("denied", "The clock of this machine is wrong."),
    "ContainerBeingDeleted": ("unavailable", "The container is being deleted."),
}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,80})</Code>")


def _explain(error: Exception) -> tuple[str, StorageTrouble, str]:
    """(why, kind, hint) of what obstore raised."""
    text = str(error)
    code, status = _code(error), _status(text)
    if code in _CODES:
        return _why(text), *_CODES[code]
    if status in (401, 403):
        return _why(text), "denied", _CREDENTIALS
    if status is not None:
        if status >= 500 or status in (408, 409, 412, 429):
            return _why(text), "unavailable", "It is tried again."
        return _why(text), "misconfigured", _REGION if 300 <= status < 400 else _ENDPOINT
    if METADATA in text or "metadata.google.internal" in text:
        return "there are no credentials, and the machine gives none", "unavailable", _CREDENTIALS
    if "BadScheme" in text:
        return (
            "its address is http://, which is not allowed",
            "misconfigured",
            "Use https://, or set `[storage] allow_http = true`.",
        )
    if "certificate" in text.lower():
        return "its TLS certificate is not trusted", "misconfigured", "Its CA must be among this machine's."
    if "redirect" in text:
        return "it sends us elsewhere", "misconfigured", _REGION
    if isinstance(error, NotImplementedError):
        return "the store cannot do it", "misconfigured", _ENDPOINT
    if "error sending request" in text or "HttpError" in text:
        return _why(text), "unavailable", _NETWORK
    return _why(text), "corrupt" if "parse" in text.lower() or "xml" in text.lower() else "unavailable", _ENDPOINT


def _why(text: str) -> str:
    """The part of an error that a person needs: status and code, or the first line without the request's path."""
    status, code = _status(text), _CODE.search(text)
    if status is not None:
        return f"HTTP {status}" + (f" {code[1]}" if code else "")
    line = text.split("\n", maxsplit=1)[0].rstrip(". ")
    return line.rsplit(" - ", maxsplit=1)[-1][:200]


def _status(text: str) -> int | None:
    found = _STATUS.search(text)
    return int(found[1]) if found else None


def _code(error: Exception) -> str | None:
    found = _CODE.search(str(error))
    return found[1] if found else None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", maxsplit=1)[0].rstrip(". ")
