"""The fault table of tests/README.md says what is true."""

import re

import pytest

from tests.fault_table import HERE, ROWS, claims, names_in, numbers


def test_every_fault_has_its_row():
    assert sorted({claim.row for claim in claims()}) == list(ROWS)


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: f"{claim.row}-{claim.file}-{claim.piece}")
def test_every_test_that_the_table_names_exists(claim):
    assert claim.tests(), f"row {claim.row}: no test_*{claim.piece}* in tests/{claim.file}"


def test_every_test_with_a_number_is_in_its_row():
    held = numbers()
    for file in sorted(HERE.rglob("test_*.py")):
        name = str(file.relative_to(HERE))
        for test in names_in(file):
            for number in re.findall(r"fault_(\d+)", test):
                assert f"fault_{number}" in held.get((name, test), ()), f"{name}::{test} is missing in row {number}"


def test_a_number_selects_the_names_in_its_row(request):
    chosen = {item.originalname for item in request.session.items if "fault_46" in item.listextrakeywords()}
    listed = {item.originalname for item in request.session.items if item.path == HERE / "weights" / "test_damage.py"}
    assert not listed or "test_files_of_another_kind_are_called_by_their_name" in chosen
