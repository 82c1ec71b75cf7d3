"""Six machines and what a person gets there; each was wrong once."""

from tests.plan.machines import ask, card, disk, gpu, machine
from turbodiff.plan.hardware import pretend
from turbodiff.plan.planner import plan_request


def a6000(free_gib):
    used = 47.5 - free_gib
    sizes = {"free_bytes": round(free_gib * 2**30), "used_bytes": round(used * 2**30)}
    return machine(gpu(47.5, name="NVIDIA RTX A6000", capability=(8, 6), **sizes), ram_gib=58)


def test_an_a6000_runs_int8_because_it_is_faster():
    plan = plan_request(ask(), a6000(47.5), disk())
    plain = plan_request(ask(quant_linear="off", pinned={"quant_linear"}), a6000(47.5), disk())
    assert plan.request.quant_linear == "on"
    assert plan.seconds < 0.9 * plain.seconds


def test_less_free_memory_does_not_change_what_is_faster():
    plan = plan_request(ask(resolution="480p"), a6000(41.75), disk())
    assert (plan.request.quant_linear, plan.band) == ("on", "fits")


def test_four_gib_give_a_short_small_clip_rather_than_one_second_of_a_large_one():
    plan = plan_request(ask("wan2.2-a14b"), pretend(machine(ram_gib=64), 4), disk())
    assert plan.request.num_frames >= 33
    assert plan.request.resolution == "480p"


def test_eight_gib_with_16_gib_of_ram_keep_720p():
    """Page-locked copies are a wish: they cost the resolution once."""
    plan = plan_request(ask(), machine(gpu(7.64, name="NVIDIA GeForce RTX 4060"), ram_gib=14.4), disk())
    assert plan.request.resolution == "720p"
    assert plan.request.num_frames >= 65


def test_a_v100_is_not_planned_as_if_it_had_bf16():
    plan = plan_request(ask(), card(31.7, name="Tesla V100-SXM2-32GB", capability=(7, 0)), disk())
    assert plan.device == "cpu"
    assert "card_too_old" in [reason.key for reason in plan.reasons]


def test_an_h20_is_not_an_h200():
    plan = plan_request(ask(), card(95.6, name="NVIDIA H20", capability=(9, 0)), disk())
    assert plan.request.quant_linear == "off"
    assert plan.seconds > 100
