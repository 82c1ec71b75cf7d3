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
