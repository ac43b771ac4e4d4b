"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.conftest import Broker


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """RabbitMQ for the tests of one file alone: it may be killed at any moment."""
    running = Broker(tmp_path_factory.mktemp("rabbitmq"))
    try:
        running.begin()
        yield running
    finally:
        running.stop()


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints figures, also of a test that passes."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return show
