"""The object stores: what `ports.ObjectStore` promises, held on each of them and on the fake of the unit tests."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.emulators.gcs import FakeGcs
from tests.emulators.servers import AZURE_ACCOUNT, AZURE_KEY, azure_server, s3_server
from tests.fakes import MemoryObjects

from warren.edges.objects import open_store
from warren.edges.settings import StorageSettings
from warren.errors import StorageError
from warren.ports import ObjectStore

KINDS = ["memory", "directory", "s3", "gcs", *(["azure"] if os.environ.get("WARREN_FAULTS") else [])]
"""Azurite is a Node program of 190 MB, so Azure is for `make faults`, which sets the variable."""


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server("bucket", log=tmp_path_factory.mktemp("s3") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def gcs() -> Iterator[str]:
    with FakeGcs("bucket") as fake:
        yield fake.url


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with azure_server("bucket", log=tmp_path_factory.mktemp("azure") / "log") as url:
        yield url


def gcs_credentials(folder: Path, url: str) -> Path:
    """A service account that needs no token: understood by obstore, and of use with an emulator only."""
    path = folder / "gcs.json"
    key = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    path.write_text(json.dumps(key))
    return path


def settings_for(kind: str, request: pytest.FixtureRequest, tmp_path: Path, bucket: str = "bucket") -> StorageSettings:
    """Each test in a folder of its own, as the emulators are shared."""
    path = f"{bucket}/{tmp_path.name}"
    match kind:
        case "directory":
            (tmp_path / "store").mkdir()
            return StorageSettings(url=f"file://{tmp_path}/store")
        case "s3":
            return StorageSettings(
                url=f"s3://{path}",
                endpoint=request.getfixturevalue("s3"),
                allow_http=True,
                region="us-east-1",
                access_key_id="a",
                secret_access_key="b",
            )
        case "gcs":
            key = gcs_credentials(tmp_path, request.getfixturevalue("gcs"))
            return StorageSettings(url=f"gs://{path}", allow_http=True, credentials_file=key)
        case _:
            return StorageSettings(
                url=f"az://{path}",
                endpoint=request.getfixturevalue("azure"),
                allow_http=True,
                account=AZURE_ACCOUNT,
                account_key=AZURE_KEY,
            )


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    kind = str(request.param)
    opened: ObjectStore = MemoryObjects() if kind == "memory" else open_store(settings_for(kind, request, tmp_path), tmp_path)
    yield opened
    await opened.close()


@pytest.fixture(params=KINDS[2:])
async def no_bucket(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ObjectStore]:
    opened = open_store(settings_for(str(request.param), request, tmp_path, "missing"), tmp_path)
    yield opened
    await opened.close()


NAMES = ["warren/acme/key", "warren/acme/0000000001/0000000001", "warren/a@b+c=d-e_F/0000000001/0000000001", "warren/.key-check"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1, 100_000])
async def test_what_is_put_is_found(store: ObjectStore, name: str, size: int) -> None:
    data = os.urandom(size)
    assert await store.create(name, data)
    found = await store.get(name)
    assert found is not None
    assert found.data == data
    assert [(o.name, o.size) for o in await store.list("warren")] == [(name, size)]


async def test_a_name_is_given_once(store: ObjectStore) -> None:
    assert await store.create("warren/acme/1", b"first")
    assert not await store.create("warren/acme/1", b"second")
    assert not await store.create("warren/acme/1", b"first")
    found = await store.get("warren/acme/1")
    assert found is not None
    assert found.data == b"first"


async def test_of_many_at_once_one_wins(store: ObjectStore) -> None:
    async def put(number: int) -> bool | None:
        try:
            return await store.create("warren/acme/1", b"%d" % number)
        except StorageError as e:
            if e.kind != "unavailable":  # S3 may say that another put is under way
                raise
            return None

    results = await asyncio.gather(*(put(number) for number in range(20)))
    assert results.count(True) == 1
    found = await store.get("warren/acme/1")
    assert found is not None
    assert found.data == b"%d" % results.index(True)


async def test_missing_is_none(store: ObjectStore) -> None:
    assert await store.get("warren/acme/1") is None
    assert await store.create("warren/acme/1", b"x")
    assert await store.get("warren/acme") is None
    assert await store.get("warren/acme/1/2") is None
    assert await store.list("warren/other") == []


async def test_replacing_compares(store: ObjectStore) -> None:
    assert await store.create("warren/acme/key", b"old")
    old = await store.get("warren/acme/key")
    assert old is not None
    assert await store.replace("warren/acme/key", b"new", old.version)
    assert not await store.replace("warren/acme/key", b"stale", old.version)
    new = await store.get("warren/acme/key")
    assert new is not None
    assert new.data == b"new"
    assert new.version != old.version
    assert await store.replace("warren/acme/key", b"newer", new.version)
    await store.delete("warren/acme/key")
    assert not await store.replace("warren/acme/key", b"gone", new.version)
    assert await store.get("warren/acme/key") is None


async def test_of_many_replacements_one_wins(store: ObjectStore) -> None:
    assert await store.create("warren/acme/key", b"old")
    old = await store.get("warren/acme/key")
    assert old is not None
    results = await asyncio.gather(*(store.replace("warren/acme/key", b"%d" % i, old.version) for i in range(10)))
    new = await store.get("warren/acme/key")
    assert new is not None
    if "S3" not in repr(getattr(store, "_store", "")):  # moto compares and writes in two steps; AWS in one
        assert results.count(True) == 1
    assert new.data in [b"%d" % i for i, won in enumerate(results) if won]


async def test_listing_is_by_folder_complete_and_sorted(store: ObjectStore) -> None:
    names = sorted(f"warren/{session}/0000000001/{n:010d}" for session in ("acme", "acme2", "b") for n in range(1, 5))
    for name in reversed(names):
        assert await store.create(name, name.encode())
    assert await store.create("other/acme/1", b"")
    listed = await store.list("warren")
    assert [o.name for o in listed] == names
    assert [o.size for o in listed] == [len(name) for name in names]
    assert [o.name for o in await store.list("warren/acme")] == [n for n in names if n.startswith("warren/acme/")]
    assert len(await store.list("")) == 13
    assert max(o.modified for o in listed) - min(o.modified for o in listed) < 600
    assert abs(listed[0].modified - time.time()) < 600


async def test_deleting_is_for_good_and_may_be_repeated(store: ObjectStore) -> None:
    assert await store.create("warren/acme/1", b"x")
    for _ in range(2):
        await store.delete("warren/acme/1")
        assert await store.get("warren/acme/1") is None
        assert await store.list("warren") == []
    assert await store.create("warren/acme/1", b"again")


@pytest.mark.parametrize("verb", ["create", "get", "list", "replace"])
async def test_a_missing_bucket_is_no_empty_one(no_bucket: ObjectStore, verb: str) -> None:
    """That a delete there changes nothing is no harm."""
    calls = {
        "create": lambda: no_bucket.create("warren/acme/1", b"x"),
        "get": lambda: no_bucket.get("warren/acme/1"),
        "list": lambda: no_bucket.list("warren"),
        "replace": lambda: no_bucket.replace("warren/acme/1", b"x", '"etag" 1'),
    }
    with pytest.raises(StorageError, match="missing") as told:
        await calls[verb]()
    assert told.value.kind == "misconfigured"
    assert "bucket" in told.value.hint
