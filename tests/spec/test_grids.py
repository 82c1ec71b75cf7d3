"""Grids over two fields: which clips they are, and which are refused."""

import pytest

from turbodiff.spec.clips import Sidecar, read_record
from turbodiff.spec.errors import RequestError
from turbodiff.spec.grids import axis_of, grid_requests, values_of
from turbodiff.spec.request import make_request

FIELDS = {"prompt": "a red circle moves right", "steps": 4}


def test_each_pair_of_values_is_a_legal_request_in_its_place():
    made = [make_request(one) for one in grid_requests(FIELDS, ("seed", "1, 2, 3"), ("steps", [2, 4]))]
    assert [(one.seed, one.steps) for one in made] == [(1, 2), (1, 4), (2, 2), (2, 4), (3, 2), (3, 4)]
    assert [(one.grid.row, one.grid.column) for one in made] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert made[3].grid.row_label == "seed 2" and made[3].grid.column_label == "steps 4"
    assert len({one.grid.id for one in made}) == 1 and len({one.nonce for one in made}) == 6


def test_all_have_one_seed_where_no_axis_is_the_seed():
    made = grid_requests(FIELDS, ("steps", "2,4"), ("sampler", "sde,ode"))
    assert len({one["seed"] for one in made}) == 1


def test_values_may_hold_commas_between_semicolons_and_come_in_chinese_marks():
    assert values_of("a cat, red; a dog") == ["a cat, red", "a dog"]
    assert values_of("1，2，2") == ["1", "2"]
    assert axis_of("sla-topk=0.1,0.2") == ("sla_topk", "0.1,0.2")


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (("image", "a"), ("seed", "1")), (("seed", "1"), ("seed", "2")), (("seed", ""), ("steps", "1")),
        (("seed", list(range(7))), ("steps", list(range(1, 7)))), (axis_of(None), axis_of(7)),
    ],
)  # fmt: skip
def test_what_is_no_grid_is_refused(rows, columns):
    with pytest.raises(RequestError):
        grid_requests(FIELDS, rows, columns)


def test_a_value_that_the_sheet_has_no_letters_for_is_told_by_its_number():
    made = grid_requests({"prompt": "x"}, ("prompt", ["a cat", "一只猫", "a\ndog"]), ("seed", "1"))
    assert [one["grid"]["row_label"] for one in made] == ["prompt a cat", "prompt #2", "prompt #3"]


def test_a_cell_lies_inside_its_grid_and_a_record_of_another_is_read_without_it():
    asked = make_request(grid_requests(FIELDS, ("seed", "1,2"), ("steps", "1,2"))[3]).model_dump(mode="json")
    outside = {**asked, "grid": {**asked["grid"], "rows": 1}}
    with pytest.raises(RequestError) as caught:
        make_request({**FIELDS, "grid": outside["grid"]})
    assert caught.value.code == "bad_grid"
    read = read_record(Sidecar, {"request": outside})
    assert read.request.grid is None and read.request.seed == 2
