"""The plan counts the kernels that run: fused, or their references."""

import pytest
from turbodiff_kernels.gemm.reference import ROW_TILES
from turbodiff_kernels.quant import reference as quant
from turbodiff_kernels.sage.reference import HEADS

from tests.plan.machines import ask, card, disk, machine
from turbodiff.plan import kernel_costs
from turbodiff.plan.hardware import ALL_REFERENCE, Kernels
from turbodiff.plan.planner import plan_request
from turbodiff.plan.roofline import kernels_here

WISHED = ALL_REFERENCE.model_copy(update={"wish": "reference"})


def plan(kernels, **fields):
    return plan_request(ask(**fields), card(80, kernels=kernels), disk(), policy="anyway")


def test_the_plan_knows_the_parts_that_references_work_in():
    assert kernel_costs.PART_ELEMENTS == quant.PART_ELEMENTS
    assert kernel_costs.GEMM_ROWS == ROW_TILES * quant.TILE
    assert kernel_costs.HEADS_AT_A_TIME == HEADS
    assert [kernel_costs._part_rows(width) for width in (256, 5120, 13824)] == [
        quant.part_rows(width) for width in (256, 5120, 13824)
    ]


@pytest.mark.parametrize("attention", ["dense", "sage", "sla", "sagesla"])
@pytest.mark.parametrize("switch", ["on", "off"])
def test_references_take_more_seconds_and_at_most_two_copies_of_the_stream(switch, attention):
    fields = {"quant_linear": switch, "attention": attention}
    fused, reference = plan(Kernels(), **fields), plan(WISHED, **fields)
    stream = 2 * 75_600 * 5120
    assert reference.peak_bytes - fused.peak_bytes <= 2 * stream
    assert reference.seconds > fused.seconds


def test_unknown_verdicts_count_as_fused_from_sm_80_on():
    assert plan(Kernels()).phases == plan(None).phases


def test_a_kind_that_did_not_prove_itself_makes_room_for_the_plainer_one():
    for kernels, asked, runs in (
        (Kernels(sagesla=False), "sagesla", "sla"),
        (Kernels(sage=False), "sage", "dense"),
        (ALL_REFERENCE, "sagesla", "sla"),
        (WISHED, "sagesla", "sagesla"),
    ):
        where = card(24, kernels=kernels)
        assert kernels_here(asked, where, where.gpus[0])[0] == runs


def test_where_the_int8_product_is_a_reference_plain_weights_are_faster_and_run():
    assert plan(Kernels()).request.quant_linear == "on"
    assert plan(Kernels(gemm=False)).request.quant_linear == "off"


def test_the_machine_says_it_for_all_its_cards_and_a_card_for_itself():
    where = card(24).model_copy(update={"kernels": ALL_REFERENCE})
    assert not where.runs_fused(where.gpus[0], "norm")
    assert where.runs_fused(card(24, kernels=Kernels()).gpus[0], "norm")
    assert not machine().runs_fused(None, "norm")
