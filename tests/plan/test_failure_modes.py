"""Thirteen ways in which memory guards of other programs failed; one test each (research on web UIs, section 3.5)."""

import math
from itertools import pairwise

import pytest

from tests.plan.machines import ask, card, disk, gpu, machine
from turbodiff.jobs.retry_policy import next_cap
from turbodiff.plan.calibration import HIGHEST, History, Kind, Sample, provenance_of
from turbodiff.plan.hardware import CONTEXT_BYTES, RESERVE_BYTES, WORKSPACE_BYTES
from turbodiff.plan.planner import Refusal, plan_request, replan
from turbodiff.plan.tiers import tier_of
from turbodiff.plan.vae_costs import decode_bytes
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.numbers import GIB, MIB
from turbodiff.spec.plan import Plan
from turbodiff.spec.shapes import VideoShape

DISK = disk()
KIND = Kind(gpu="RTX 4090", total_bytes=24 * GIB, torch="2.11.0", attention="sagesla", model="wan2.1-14b", int8=True)


def test_01_phases_are_never_summed():
    plan = plan_request(ask("wan2.1-1.3b"), card(16), DISK)
    assert plan.peak_bytes == max(phase.peak_bytes for phase in plan.phases)
    assert plan.peak_bytes <= plan.budget_bytes < sum(phase.peak_bytes for phase in plan.phases)
    assert not any(change.lossy for change in plan.changes)


def test_02_memory_that_our_own_cache_holds_counts_as_free():
    idle = plan_request(ask(), card(24), DISK)
    held = plan_request(ask(), card(24, free_bytes=6 * GIB, used_bytes=18 * GIB, reclaimable_bytes=18 * GIB), DISK)
    assert held.budget_bytes == idle.budget_bytes
    assert (held.request, held.levers) == (idle.request, idle.levers)


def test_03_our_own_context_is_counted_once():
    """The same job again, while its worker still holds context and weights, is planned as it was the first time."""
    first = plan_request(ask(), card(24), DISK)
    left = first.peak_bytes
    again = plan_request(ask(), card(24, free_bytes=24 * GIB - left, used_bytes=left, reclaimable_bytes=left), DISK)
    assert again.phases == first.phases
    context = [phase.workspace_bytes for phase in first.phases if phase.name == "write"]
    assert context == [CONTEXT_BYTES + WORKSPACE_BYTES]


def test_04_host_memory_that_the_first_run_keeps_is_credited_to_the_second():
    first = plan_request(ask(), card(12), DISK)
    assert first.levers.experts == "streamed"
    kept = 20 * GIB
    again = plan_request(ask(), machine(gpu(12), ram_gib=44, ram_reclaimable_bytes=kept), DISK)
    assert (again.request, again.levers) == (first.request, first.levers)


def test_05_out_of_memory_never_makes_later_plans_refuse():
    failed = Sample(kind=KIND, phase="denoise", predicted_bytes=GIB, measured_bytes=9 * GIB, out_of_memory=True)
    good = Sample(kind=KIND, phase="denoise", predicted_bytes=GIB, measured_bytes=GIB)
    inflated = History([failed] * 60).calibration(provenance_of(KIND))
    assert [lesson.factor for lesson in inflated.lessons] == [HIGHEST]
    plan_request(ask("wan2.1-1.3b"), card(8), DISK, calibration=inflated)
    (overruled,) = History([failed, *[good] * 3]).calibration(provenance_of(KIND)).lessons
    assert overruled.factor == pytest.approx(1.0)


def test_06_the_slider_the_queue_and_the_worker_ask_one_function():
    shown = plan_request(ask(), card(12), DISK)
    launched = replan(shown, card(12), lambda: DISK)
    assert isinstance(launched, Plan)
    assert (launched.request, launched.levers, launched.peak_bytes) == (shown.request, shown.levers, shown.peak_bytes)


def test_07_zero_bytes_free_on_an_idle_card_is_a_bogus_reading():
    idle = plan_request(ask(), card(24), DISK)
    bogus = plan_request(ask(), card(24, free_bytes=0, used_bytes=0), DISK)
    unknown = plan_request(ask(), card(24, free_bytes=None, used_bytes=None), DISK)
    assert bogus.request == unknown.request == idle.request
    assert "free_memory_bogus" in [reason.key for reason in bogus.reasons]
    assert "free_memory_unknown" in [reason.key for reason in unknown.reasons]


def test_07b_zero_bytes_free_on_a_full_card_is_believed():
    with pytest.raises(DoesNotFitError):
        plan_request(ask(), card(24, free_bytes=0, used_bytes=24 * GIB), DISK)


def test_07c_a_full_card_has_nothing_rather_than_less_than_nothing():
    full = machine(gpu(24, free_bytes=0, used_bytes=24 * GIB))
    with pytest.raises(Refusal) as refused:
        plan_request(ask("wan2.1-14b"), full, DISK)
    assert refused.value.expected == "at most 0 MiB" and refused.value.plan.budget_bytes == 0
    assert [reason.numbers["budget_bytes"] for reason in refused.value.plan.reasons if "budget_bytes" in reason.numbers]
    assert all(reason.numbers.get("budget_bytes", 0) == 0 for reason in refused.value.plan.reasons)


@pytest.mark.parametrize(("shown_gib", "tier"), [(7.6, "8 GB"), (11.6, "12 GB"), (15.6, "16 GB"), (23.5, "24 GB")])
def test_08_a_card_reaches_the_tier_of_its_nameplate(shown_gib, tier):
    assert tier_of(round(shown_gib * GIB)).name == tier


def test_09_memory_that_spills_into_the_host_is_no_evidence_of_room():
    """WSL reports more free than the card has; the budget stays on the card, with the larger reserve."""
    plan = plan_request(ask(), machine(gpu(16, free_bytes=40 * GIB), wsl=True), DISK)
    assert plan.budget_bytes == 16 * GIB - RESERVE_BYTES["wsl"]
    moved = Sample(
        kind=KIND, phase="denoise", predicted_bytes=GIB, measured_bytes=GIB // 2, neighbours_moved_bytes=300 * MIB
    )
    assert History([moved] * 9).calibration(provenance_of(KIND)).lessons == ()


def test_10_the_vae_peak_is_where_the_modules_have_it():
    """The widest moment is a frame that is made twice as large beside all remembered frames, not the output."""
    latent = VideoShape(81, 720, 1280).latent
    one_frame = 96 * 720 * 1280 * 2
    assert 40 < decode_bytes(latent, 96, 2, None) / one_frame < 42


def test_11_every_lever_that_is_named_saves_what_it_says():
    for total in (6, 7, 8, 9, 10, 12, 16):
        plan = plan_request(ask(), card(total), DISK)
        saved = [reason.numbers["saved_bytes"] for reason in plan.reasons if "saved_bytes" in reason.numbers]
        assert saved
        assert min(saved) > 0


def test_11b_a_wish_that_cannot_help_is_said_to_be_useless():
    plan = plan_request(ask("wan2.1-1.3b", resolution="720p", quant_linear="on"), card(12), DISK)
    assert plan.binding_phase.name == "vae_decode"
    assert "fewer_frames_will_not_help" in [reason.key for reason in plan.reasons]


def test_12_the_next_attempt_needs_less_than_the_one_that_failed():
    plan = plan_request(ask(), card(12), DISK)
    peaks = [plan.peak_bytes]
    while len(peaks) < 4:
        cap_bytes = next_cap(plan, None)
        plan = plan_request(plan.request, card(12), DISK, limit_bytes=cap_bytes)
        peaks.append(plan.peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert all(math.isclose(lower / higher, 0.9, abs_tol=0.15) for higher, lower in pairwise(peaks))


def test_13_a_refusal_can_always_be_overridden():
    request = ask(pinned={"model", "resolution", "num_frames", "quant_linear"}, quant_linear="off")
    with pytest.raises(Refusal) as refusal:
        plan_request(request, card(3), DISK)
    assert refusal.value.need_bytes > refusal.value.have_bytes
    plan = plan_request(request, card(3), DISK, policy="anyway")
    assert plan == refusal.value.plan
    assert plan.band == "no"
    assert plan.peak_bytes > plan.budget_bytes
    assert not any(change.lossy for change in plan.changes)
