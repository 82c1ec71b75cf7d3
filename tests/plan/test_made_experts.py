"""Weights of two experts that are made at load time, where host memory has room for one of them."""

import pytest

from tests.plan.machines import ask, disk, gpu, machine
from turbodiff.plan.planner import Refusal, plan_request
from turbodiff.plan.weight_sizes import weights_of
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GIB

MADE = weights_of(find_model("wan2.2-a14b"), True, 2).dit


def converted():
    """INT8 files in another dtype than they run in, for both experts."""
    found = disk("wan2.2-a14b", quant=(True,))
    files = [f.model_copy(update={"converted": f.component.startswith("dit")}) for f in found.files]
    return found.model_copy(update={"files": tuple(files)})


def plan_with(ram_gib, vram_gib=24):
    return plan_request(ask("wan2.2-a14b"), machine(gpu(vram_gib), ram_gib=ram_gib), converted())


@pytest.mark.parametrize("vram_gib", [7.6, 24])
def test_the_first_expert_leaves_host_memory_where_both_are_too_many(vram_gib):
    """29 GiB were needed: a computer with 24 GiB of RAM refused the model, one with 16 GiB still does."""
    roomy, short = plan_with(64, vram_gib), plan_with(24, vram_gib)
    assert (roomy.levers.made_experts, short.levers.made_experts) == ("kept", "dropped")
    assert short.request == roomy.request and short.request.num_frames == 81
    assert max(phase.host_ram_bytes for phase in short.phases) < 17 * GIB
    of = {phase.name: phase.host_ram_bytes for phase in roomy.phases}
    less = {phase.name: of[phase.name] - phase.host_ram_bytes for phase in short.phases}
    assert less["denoise_low"] == less["vae_decode"] == less["write"] == MADE and less["denoise_high"] == 0
    assert short.seconds == pytest.approx(roomy.seconds)
    (told,) = [reason for reason in short.reasons if reason.key == "made_experts_dropped"]
    assert told.numbers["saved_bytes"] == MADE
    with pytest.raises(Refusal):
        plan_with(16, vram_gib)


def test_nothing_is_dropped_where_one_expert_runs_or_files_are_mapped():
    here = machine(gpu(24), ram_gib=24)
    one = plan_request(ask("wan2.2-a14b", boundary=0.5), here, converted())
    mapped = plan_request(ask("wan2.2-a14b"), here, disk())
    assert one.levers.made_experts == mapped.levers.made_experts == "kept"


ROOM = 64 * GIB


def told_of(plan):
    return {reason.key: reason.numbers for reason in plan.reasons}


@pytest.mark.parametrize("vram_gib", [7.6, 24])
def test_what_does_not_fit_into_host_memory_goes_to_disk_where_there_is_room(vram_gib):
    """16 GiB of RAM: the first expert alone takes 15; as a copy on disk a block or two do."""
    found = converted().model_copy(update={"copies_room_bytes": ROOM})
    here = machine(gpu(vram_gib), ram_gib=16)
    plan = plan_request(ask("wan2.2-a14b"), here, found)
    assert (plan.levers.converted, plan.levers.made_experts) == ("on_disk", "kept")
    assert (plan.request.num_frames, plan.request.resolution) == (81, "720p")
    assert max(phase.host_ram_bytes for phase in plan.phases) <= here.host_budget_bytes
    assert told_of(plan)["converted_on_disk"] == {"disk_bytes": 2 * MADE}
    for room in (2 * MADE - 1, None):
        with pytest.raises(Refusal):
            plan_request(ask("wan2.2-a14b"), here, found.model_copy(update={"copies_room_bytes": room}))
    again = plan_request(plan.request, here, found)
    assert (again.levers, again.phases) == (plan.levers, plan.phases)
    roomy = plan_request(ask("wan2.2-a14b"), machine(gpu(vram_gib), ram_gib=64), found)
    assert roomy.levers.converted == "in_memory" and "converted_on_disk" not in told_of(roomy)


def test_a_converted_text_encoder_goes_to_disk_before_it_gets_fewer_bits():
    found = disk("wan2.1-1.3b")
    files = [f.model_copy(update={"converted": f.component == "text_encoder"}) for f in found.files]
    found = found.model_copy(update={"files": tuple(files)})
    here = machine(gpu(23.5), ram_gib=8, bitsandbytes=True)
    copied = plan_request(ask("wan2.1-1.3b"), here, found.model_copy(update={"copies_room_bytes": ROOM}))
    assert (copied.levers.converted, copied.levers.text_dtype) == ("on_disk", "bf16")
    assert told_of(copied)["converted_on_disk"]["disk_bytes"] == 2 * 5_680_910_336
    with pytest.raises(Refusal):
        plan_request(ask("wan2.1-1.3b"), here, found)


def test_a_cpu_keeps_its_networks_in_memory():
    found = converted().model_copy(update={"copies_room_bytes": ROOM})
    with pytest.raises(Refusal):
        plan_request(ask("wan2.2-a14b"), machine(ram_gib=16), found)
