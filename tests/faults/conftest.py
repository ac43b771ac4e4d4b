"""Fixtures of the fault tests, and their one table at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.conftest import Broker
from tests.faults.plan import plan

figures: dict[str, list[str]] = {}
"""By test, in the order in which they ran."""


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
def progress(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line at once."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return show


@pytest.fixture
def report() -> Callable[[str, list[str]], None]:
    """`report(what was done, lines)`: figures for the table, also of a test that fails afterwards."""
    return figures.__setitem__


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not figures:
        return
    terminalreporter.section(f"faults, SEED={plan().seed}")
    for title, lines in figures.items():
        terminalreporter.write_line(title)
        for line in lines:
            terminalreporter.write_line(f"  {line}")
