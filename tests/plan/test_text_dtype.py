"""A text encoder of fewer bits: taken after every lever that changes no pixel, before frames and size, and by wish."""

import pytest

from tests.plan.machines import ask, disk, gpu, machine
from turbodiff.plan.planner import Refusal, outlook, plan_request, replan
from turbodiff.plan.weight_sizes import encoder_bytes, text_parameters
from turbodiff.spec.models import all_models, find_model
from turbodiff.spec.numbers import GIB
from turbodiff.spec.plan import Levers
from turbodiff.spec.wording import Words
from webui.wording import Words as PageWords

DISK = disk("wan2.1-1.3b")
UMT5 = find_model("wan2.1-1.3b").text_encoder


def short_of_ram(total_gib=11.5, ram_gib=4.2, **facts):
    """Too little RAM for a token table there while layers pass through, too small a card for all of bf16."""
    return machine(gpu(total_gib), ram_gib=ram_gib, **{"bitsandbytes": True} | facts)


def small(**fields):
    return ask("wan2.1-1.3b", resolution="480p", num_frames=81, **fields)


def keys(plan):
    return [reason.key for reason in plan.reasons]


def test_umt5_xxl_has_the_parameters_of_its_published_file():
    """5.68e9 (Wan-AI/Wan2.1-T2V-1.3B, models_t5_umt5-xxl-enc-bf16.pth: 11,361,920,418 bytes, 2 a parameter)."""
    layer, rest = text_parameters(UMT5)
    count = UMT5.num_layers * layer + rest
    assert count == 5_680_910_336
    for spec in all_models():
        for file in spec.files:
            if file.component == "text_encoder" and file.bytes:
                assert 0 <= file.bytes - 2 * count < 2**17  # names and offsets


def test_the_bytes_of_fewer_bits_by_hand():
    """Of 24 layers with 7 linears each all but `wo` are small: int8 one byte and a float32 a row (arXiv 2208.07339),
    NF4 half a byte and 8.127 bits a block of 64 with double quantisation (arXiv 2305.14314, 3)."""
    linears = 24 * (4 * 4096 * 4096 + 2 * 4096 * 10240)
    rows = 24 * (4 * 4096 + 2 * 10240)
    full = encoder_bytes(UMT5, "bf16", 2)
    assert encoder_bytes(UMT5, "int8", 2) == full - 2 * linears + linears + 4 * rows
    nf4 = full - 2 * linears + linears * (0.5 + (8 + 32 / 256) / 8 / 64)
    assert abs(encoder_bytes(UMT5, "nf4", 2) - nf4) < 24


def test_lossless_levers_come_first():
    for where in (machine(gpu(23.5), bitsandbytes=True), machine(gpu(7.6), bitsandbytes=True)):
        plan = plan_request(small(), where, DISK)
        assert (plan.levers.text_dtype, plan.request.text_dtype) == ("bf16", "auto")
        assert not [change for change in plan.changes if change.field == "text_dtype"]


@pytest.mark.parametrize(("total_gib", "dtype"), [(11.5, "int8"), (7.6, "nf4")])
def test_where_ram_and_card_are_short_the_encoder_gets_fewer_bits_before_frames_and_size_give_way(total_gib, dtype):
    plan = plan_request(small(), short_of_ram(total_gib), DISK)
    assert (plan.levers.text, plan.levers.text_dtype, plan.request.text_dtype) == ("resident", dtype, dtype)
    assert (plan.request.num_frames, plan.request.resolution, plan.request.model) == (81, "480p", "wan2.1-1.3b")
    lossy = [(change.field, change.from_value, change.to_value) for change in plan.changes if change.lossy]
    assert lossy == [("text_dtype", "auto", dtype)]
    told = next(reason for reason in plan.reasons if reason.key == "text_of_fewer_bits")
    saved = encoder_bytes(UMT5, "bf16", 2) - encoder_bytes(UMT5, dtype, 2)
    assert told.numbers == {"text_dtype": dtype, "saved_bytes": saved}
    assert "lossless_is_slow" not in keys(plan)
    for words in (Words("en"), Words("zh"), PageWords("en"), PageWords("zh")):
        said = words.reason(told.key, told.numbers)
        assert words(f"value.text_dtype_{dtype}") in said and words.gib(saved) in said


@pytest.mark.parametrize("facts", [{"bitsandbytes": False}, {"bitsandbytes": None}, {"torch": "2.13.0+cpu"}], ids=str)
def test_without_bitsandbytes_or_cuda_no_plan_promises_it(facts):
    where = short_of_ram(**facts)
    try:
        plan = plan_request(small(), where, DISK)
    except Refusal as error:
        plan = error.plan
        assert error.code.startswith("does_not_fit") and "text_dtype" not in error.field
    assert plan.levers.text_dtype == "bf16"
    wished = plan_request(small(text_dtype="nf4"), where, DISK, policy="anyway")
    assert (wished.levers.text_dtype, wished.request.text_dtype) == ("bf16", "bf16")
    assert "text_dtype_unavailable" in keys(wished)
    assert not [change for change in wished.changes if change.field == "text_dtype" and change.lossy]


@pytest.mark.parametrize("policy", ["never", "anyway"])
def test_a_policy_that_lowers_nothing_does_not_take_it(policy):
    try:
        plan = plan_request(small(), short_of_ram(), DISK, policy=policy)
    except Refusal as error:
        plan = error.plan
        assert "text_dtype" in error.field and "lower text_dtype" in error.try_instead
    assert plan.levers.text_dtype == "bf16"


def test_a_pin_is_kept_and_its_release_is_told():
    with pytest.raises(Refusal) as refused:
        plan_request(small(text_dtype="bf16", pinned=["text_dtype"]), short_of_ram(), DISK)
    assert refused.value.field == "text_dtype"
    for wished in ("int8", "nf4"):
        plan = plan_request(small(text_dtype=wished, pinned=["text_dtype"]), short_of_ram(), DISK)
        assert plan.levers.text_dtype == wished
        assert "text_dtype" not in [change.field for change in plan.changes]
    with pytest.raises(Refusal) as refused:  # int8 has no room on it, nf4 would
        plan_request(small(text_dtype="int8", pinned=["text_dtype"]), short_of_ram(7.6), DISK)
    assert refused.value.field == "text_dtype"


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_it_is_taken_by_wish_where_nothing_asks_for_it(dtype):
    where = machine(gpu(23.5), bitsandbytes=True)
    plan = plan_request(small(text_dtype=dtype), where, DISK)
    assert (plan.levers.text_dtype, plan.request.text_dtype) == (dtype, dtype)
    assert "text_of_fewer_bits" in keys(plan) and "text_dtype" not in [change.field for change in plan.changes]
    full = plan_request(small(), where, DISK)
    assert plan.phases[0].weights_bytes == encoder_bytes(UMT5, dtype, 2) < full.phases[0].weights_bytes


def test_a_wish_that_has_no_room_makes_room_for_full_precision_that_passes_through():
    plan = plan_request(small(text_dtype="int8"), machine(gpu(5.6), bitsandbytes=True), DISK)
    assert (plan.levers.text, plan.levers.text_dtype, plan.request.text_dtype) == ("streamed", "bf16", "bf16")
    assert [(change.to_value, change.lossy) for change in plan.changes if change.field == "text_dtype"] == [
        ("bf16", False)
    ]


def test_what_was_chosen_stays_at_launch():
    where = short_of_ram()
    plan = plan_request(small(), where, DISK)
    assert plan.levers.text_dtype == "int8"
    fresh = replan(plan, where, lambda: DISK)
    assert (fresh.levers.text_dtype, fresh.changes, fresh.request) == ("int8", plan.changes, plan.request)
    roomy = replan(plan, machine(gpu(79), bitsandbytes=True), lambda: DISK)
    assert roomy.levers.text_dtype == "int8"  # the picture is the one that was shown


def test_a_cached_prompt_needs_no_encoder_of_any_precision():
    plan = plan_request(small(), short_of_ram(), DISK, text_cached=True)
    assert plan.levers == Levers(text="cached", experts=plan.levers.experts, vae=plan.levers.vae)


def test_the_marks_of_a_form_say_what_its_plan_says():
    where, asked = short_of_ram(), small()
    plan = plan_request(asked, where, DISK)
    assert (outlook(asked, where, DISK).band, outlook(asked, where, DISK).seconds) == (plan.band, plan.seconds)
    locked = asked.model_copy(update={"pinned": frozenset({"text_dtype"})})
    assert outlook(locked, where, DISK).band != plan.band or plan.band == "no"
    assert plan.phases[0].host_ram_bytes < 3.2 * GIB
