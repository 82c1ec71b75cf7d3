"""tests/public_reports.md says what is true: every test that it names exists."""

import re

import pytest

from tests.fault_table import HERE, Claim

ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.M)
ROWS = ROW.findall((HERE / "public_reports.md").read_text("utf-8"))
CLAIMS = [
    Claim(int(number), file.strip(), piece.strip())
    for number, *_, held in ROWS
    for file, pieces in (part.split(":") for part in held.split(";"))
    for piece in pieces.split(",")
]


def test_the_rows_are_numbered_from_one() -> None:
    lines = (HERE / "public_reports.md").read_text("utf-8").count("\n| ") - 1
    assert [int(number) for number, *_ in ROWS] == list(range(1, lines + 1))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.row}-{claim.file}-{claim.piece}")
def test_every_test_that_a_report_names_exists(claim: Claim) -> None:
    assert claim.tests(), f"row {claim.row}: no test_*{claim.piece}* in tests/{claim.file}"
