"""Host memory in the plan: page-locked copies are a wish, converted weights are counted, one pool is counted once."""

import pytest

from tests.plan.machines import ask, card, disk, gpu, machine
from turbodiff.plan.phase_costs import PROCESS_BYTES
from turbodiff.plan.planner import Refusal, plan_request
from turbodiff.plan.roofline import speed_of
from turbodiff.plan.weight_sizes import weights_of
from turbodiff.spec.models import Inventory, find_model
from turbodiff.spec.numbers import GIB

SMALL_PCS = [(vram, ram) for vram in (8, 12, 16) for ram in (16, 20, 24)]


def host_bytes(plan):
    return max(phase.host_ram_bytes for phase in plan.phases)


def converted(inventory: Inventory, *components: str) -> Inventory:
    """The same files in another dtype than the networks have."""
    files = [file.model_copy(update={"converted": file.component in components}) for file in inventory.files]
    return Inventory(files=tuple(files))


def test_an_8_gib_card_with_16_gib_of_ram_keeps_720p():
    """memory_accounting: pinning is a wish; it was 480p because every streamed block had to be page-locked."""
    plan = plan_request(ask(), machine(gpu(8), ram_gib=14.5), disk())
    assert plan.request.resolution == "720p"
    assert not any(change.lossy for change in plan.changes if change.field == "resolution")


@pytest.mark.parametrize("ram_gib", [6, 8, 10, 12, 14, 16, 20, 24])
def test_page_locked_copies_never_take_more_than_host_memory_has(ram_gib):
    here = machine(gpu(8), ram_gib=ram_gib)
    plan = plan_request(ask(), here, disk())
    assert not isinstance(plan, Refusal)
    assert plan.levers.experts == "streamed"
    assert 0 <= plan.levers.blocks_page_locked <= 40 - plan.levers.blocks_resident
    assert host_bytes(plan) <= here.host_budget_bytes


def test_less_host_memory_means_fewer_page_locked_blocks_and_more_seconds():
    plans = [plan_request(ask(num_frames=49), machine(gpu(8), ram_gib=ram), disk()) for ram in (32, 12, 6)]
    assert len({(plan.request.num_frames, plan.request.resolution) for plan in plans}) == 1
    locked = [plan.levers.blocks_page_locked for plan in plans]
    assert locked == sorted(locked, reverse=True)
    assert len(set(locked)) == 3
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 3


def test_the_limit_of_wsl_is_in_the_seconds():
    free, limited = (
        plan_request(ask(num_frames=49), machine(gpu(8), ram_gib=32, pinned_limit_bytes=limit), disk())
        for limit in (None, GIB // 2)
    )
    block = weights_of(find_model("wan2.1-14b"), True, 2).block
    assert limited.levers.blocks_page_locked == (GIB // 2) // block
    pageable = (40 - limited.levers.blocks_resident - limited.levers.blocks_page_locked) * 4 * block
    rate = speed_of(machine(gpu(8)).gpus[0], 16).pageable_bytes_s
    assert limited.seconds - free.seconds == pytest.approx(pageable / rate, rel=0.05)
    assert "blocks_pageable" in [reason.key for reason in limited.reasons]
    assert "blocks_pageable" not in [reason.key for reason in free.reasons]


def test_weights_that_do_not_fit_the_page_cache_are_read_from_disk_in_every_pass():
    """39 blocks of 14B in INT8 take 12.7 GiB: with 10 GiB left for the page cache each is read again, with 20 none."""
    few, many = (
        plan_request(ask(num_frames=49), machine(gpu(8), ram_gib=ram, pinned_limit_bytes=GIB // 2), disk())
        for ram in (12, 32)
    )
    assert few.levers == many.levers
    streamed = (40 - few.levers.blocks_resident - few.levers.blocks_page_locked) * 4
    block = weights_of(find_model("wan2.1-14b"), True, 2).block
    assert few.seconds - many.seconds == pytest.approx(streamed * block / 2e9, rel=0.02)


@pytest.mark.parametrize(("vram_gib", "ram_gib"), SMALL_PCS)
def test_a_second_identical_job_gets_the_first_ones_plan(vram_gib, ram_gib):
    """What our own warm worker holds, page-locked copies included, is free again for its next job."""
    first_machine = machine(gpu(vram_gib), ram_gib=ram_gib - 1.5)
    first = plan_request(ask(), first_machine, disk())
    held, context = host_bytes(first), first_machine.gpus[0].cuda_context_bytes
    warm = gpu(vram_gib, free_bytes=round(vram_gib * GIB) - context, used_bytes=context, reclaimable_bytes=context)
    ram = first_machine.ram_available_bytes - held
    second = plan_request(
        ask(), machine(warm, ram_available_bytes=ram, ram_reclaimable_bytes=held), disk(), loaded=frozenset({"dit"})
    )
    assert second.request == first.request
    assert second.levers == first.levers


def test_one_pool_holds_both_needs_of_a_job():
    """Orin 16 GB: 21.5 of 14.4 GiB were planned, device and host each against all of it."""
    orin = machine(
        gpu(16, name="Orin", total_bytes=None, free_bytes=None, used_bytes=None, capability=(8, 7)),
        ram_gib=15.4, unified_memory=True, tegra=True,
    )  # fmt: skip
    plan = plan_request(ask(), orin, disk())
    assert plan.device == "cuda:0"
    assert all(phase.peak_bytes + phase.host_ram_bytes <= orin.host_budget_bytes for phase in plan.phases)
    assert not plan.levers.blocks_page_locked  # a copy of what the device can read anyway


def test_converted_weights_are_in_host_memory():
    """fp32, fp16, fp8-scaled, GGUF: made at load time, so no file backs them."""
    spec = find_model("wan2.1-14b")
    plain = plan_request(ask(quant_linear="off"), card(80), disk())
    made = plan_request(ask(quant_linear="off"), card(80), converted(disk(), "dit"))
    of = {phase.name: phase.host_ram_bytes for phase in made.phases}
    without = {phase.name: phase.host_ram_bytes for phase in plain.phases}
    assert of["denoise"] - without["denoise"] == weights_of(spec, False, 2).dit
    assert of["text_encode"] == without["text_encode"]


def test_a_converted_text_encoder_is_in_host_memory_while_it_encodes():
    text = weights_of(find_model("wan2.1-14b"), True, 2).text
    plan = plan_request(ask(), card(24), converted(disk(), "text_encoder"))
    of = {phase.name: phase.host_ram_bytes for phase in plan.phases}
    assert of["text_encode"] == PROCESS_BYTES + text
    assert of["denoise"] < text


def test_both_experts_that_are_converted_are_counted():
    spec = find_model("wan2.2-a14b")
    both = plan_request(ask("wan2.2-a14b", quant_linear="off"), card(80), converted(disk(), "dit_high", "dit_low"))
    of = {phase.name: phase.host_ram_bytes for phase in both.phases}
    assert of["denoise_low"] - of["denoise_high"] == weights_of(spec, False, 2).dit


def test_a_refusal_in_one_pool_names_what_both_needs_take_together():
    orin = machine(
        gpu(8, name="Orin", total_bytes=None, free_bytes=None, used_bytes=None, capability=(8, 7)),
        ram_gib=6, unified_memory=True, tegra=True,
    )  # fmt: skip
    with pytest.raises(Refusal) as refused:
        plan_request(ask(pinned={"model", "num_frames", "resolution", "quant_linear"}), orin, disk())
    assert refused.value.code == "does_not_fit_host"
    assert refused.value.need_bytes > refused.value.have_bytes == orin.host_budget_bytes


@pytest.mark.parametrize("vram_gib", [2, 3, 4, 6])
def test_no_way_out_that_is_offered_needs_more_than_there_is(vram_gib):
    """Of a run that does not fit, fewer steps were offered, which change no byte."""
    plan = plan_request(ask(), machine(gpu(vram_gib)), disk(), policy="anyway")
    assert plan.band == "no"
    assert all(other.fits and other.peak_bytes <= plan.budget_bytes for other in plan.alternatives)
