"""Every row of the table of errors in docs/message-api.md has a test."""

from __future__ import annotations

from tests.acceptance.test_bad_input import CASES
from tests.unit.test_backup import BACKUP_ERRORS
from tests.unit.test_message_api_doc import names, section
from tests.unit.test_sending import FAILURES


def test_every_row_has_a_test() -> None:
    assert names(section("Errors"), 4) == {case.code for case in CASES} | set(FAILURES) | BACKUP_ERRORS


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.what for case in CASES}) == len(CASES)
