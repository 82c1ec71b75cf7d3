"""The last look before a job and before each phase, on cards that only the driver would have: figures, no torch."""

from dataclasses import dataclass

import pytest
import torch

from tests.plan.machines import ask, card, disk, gpu, machine
from turbodiff.plan.hardware import CONTEXT_BYTES
from turbodiff.plan.planner import from_phase, plan_request
from turbodiff.plan.shared_clip import with_cards
from turbodiff.runtime import offload, replan
from turbodiff.runtime.device import Device
from turbodiff.runtime.latents_cache import LatentsCache
from turbodiff.runtime.replan import WaitForMemory, first_plan, machine_for
from turbodiff.spec.errors import DoesNotFitError, OutOfMemoryError
from turbodiff.spec.events import RunCommand
from turbodiff.spec.numbers import GIB, MIB


@dataclass(frozen=True)
class Told(Device):
    """A GPU that says what we tell it to."""

    free: int = 0
    held: int = 0

    @property
    def is_cuda(self) -> bool:
        return True

    def available_bytes(self):
        return self.free

    def held_bytes(self):
        return self.held


def told(free_gib=0.0, held=0, index=0):
    return Told(torch.device("cuda", index), "a card", torch.bfloat16, round(free_gib * GIB), held)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(replan, "inventory", disk)


@pytest.fixture
def caps(monkeypatch):
    """Where the allocator was told to stop."""
    seen = []
    monkeypatch.setattr(offload, "cap_allocator", lambda device, allocator_bytes: seen.append(allocator_bytes))
    return seen


def at_phase(plan, name, machine, device):
    return replan.replan(plan, machine, device, at=name)


@pytest.mark.parametrize("free_gib", [22.9, 16, 12, 10, 8, 6, 4, 2])
@pytest.mark.parametrize(("model", "total"), [("wan2.1-1.3b", 24), ("wan2.1-14b", 24), ("wan2.2-a14b", 80)])
def test_before_every_phase_what_is_left_fits_or_says_how_much_it_lacks(model, total, free_gib, caps):
    plan = plan_request(ask(model), card(total), disk())
    for phase in plan.phases:
        budget = round(free_gib * GIB) + CONTEXT_BYTES - 512 * MIB
        try:
            fresh = at_phase(plan, phase.name, card(total), told(free_gib))
        except WaitForMemory as waits:
            assert waits.shortage.free_bytes == budget + 512 * MIB < waits.shortage.need_bytes
            continue
        assert fresh.request == plan.request
        assert all(left.peak_bytes <= budget for left in from_phase(fresh, phase.name))
        if all(left.peak_bytes <= budget for left in from_phase(plan, phase.name)):
            assert fresh is plan  # nothing to do, nothing done
        assert caps[-1] == budget - CONTEXT_BYTES


def test_each_lossless_lever_is_pulled_when_its_turn_comes(caps):
    plan = plan_request(ask("wan2.1-1.3b", resolution="720p", quant_linear="off"), card(48), disk())
    assert (plan.levers.text, plan.levers.experts, plan.levers.vae) == ("resident", "resident", "whole")
    assert at_phase(plan, "text_encode", card(48), told(9)).levers.text != "resident"
    assert at_phase(plan, "vae_decode", card(48), told(4)).levers.vae == "tiled"
    tight = at_phase(plan, "denoise", card(48), told(4.5)).levers
    assert tight.experts == "streamed" or tight.ffn_chunks > 1


def test_a_phase_that_is_over_needs_no_room_any_more(caps):
    plan = plan_request(ask("wan2.1-14b"), card(48), disk())
    decode = from_phase(plan, "vae_decode")
    only_that = max(phase.peak_bytes for phase in decode) + 1 * GIB
    assert plan.peak_bytes > only_that
    assert at_phase(plan, "vae_decode", card(48), told(only_that / GIB)) is plan


def test_run_anyway_and_a_card_that_cannot_be_asked_stay_as_they_are(caps):
    plan = plan_request(ask("wan2.1-14b", pinned={"model"}), card(24), disk())
    anyway = plan_request(ask("wan2.1-14b", quant_linear="off"), card(3), disk(), policy="anyway")
    assert at_phase(anyway, "denoise", card(3), told(1)) is anyway
    assert at_phase(plan, "denoise", card(24), Device.pick("cpu")) is plan
    assert at_phase(plan, "denoise", machine(), told(1)) is plan


def four_small_cards():
    return machine(*[gpu(12, index=index, uuid=f"GPU-{index}") for index in range(4)])


def test_a_clip_that_lost_a_card_is_planned_anew_for_those_that_are_left(caps):
    """What four processes need of a card that each has blocks of is not what one needs alone."""
    plan = plan_request(ask("wan2.1-14b", resolution="720p", cards=4), four_small_cards(), disk())
    assert plan.levers.cards == 4 and plan.band == "fits"
    kept = replan.with_levers(plan, with_cards(plan.levers, 1), card(12))
    assert kept.band == "no", "the case itself"
    for cards in (2, 1):
        left = replan.for_cards(plan, cards, card(12))
        assert left.request == plan.request and left.changes == plan.changes
        assert left.band != "no" and left.peak_bytes <= left.budget_bytes
        assert left.levers.cards == cards and len(left.shares) == (cards if cards > 1 else 0)
        launched = first_plan(command(plan, cards=plan.followers[: cards - 1]), card(12), told())
        assert launched.levers == left.levers and launched.peak_bytes == left.peak_bytes
    assert replan.for_cards(plan, 3, card(12)).levers.cards == 2, "heads must divide"
    anyway = plan.model_copy(update={"band": "no"})
    assert replan.for_cards(anyway, 1, card(12)).levers == with_cards(plan.levers, 1)


def test_a_clip_that_what_is_left_cannot_hold_says_so_or_waits():
    plan = plan_request(ask("wan2.1-14b", resolution="720p", cards=4), four_small_cards(), disk())
    with pytest.raises(DoesNotFitError):
        replan.for_cards(plan, 1, card(4))
    decode = replan.for_cards(plan, 1, card(4), at="vae_decode")
    assert decode.band == "fits" and decode.levers.cards == 1, "what is over needs no room"
    with pytest.raises(WaitForMemory) as waits:
        replan.for_cards(plan, 1, machine(gpu(12, free_bytes=4 * GIB, used_bytes=8 * GIB)))
    assert waits.value.shortage.free_bytes == 4 * GIB < waits.value.shortage.need_bytes <= 12 * GIB


def command(plan, **more):
    """As a worker reads it, from JSON."""
    request = (plan.request if plan else ask()).model_dump(mode="json")
    paths = {"state": "/nowhere", "outputs": "/nowhere"}
    shown = plan.model_dump(mode="json") if plan else None
    return RunCommand.model_validate({"job": 7, "attempt": 1, "request": request, "plan": shown, **paths, **more})


def test_the_allocator_stops_at_the_budget_less_the_context(caps):
    plan = plan_request(ask(), card(24), disk())
    launched = first_plan(command(plan), card(24), told())
    assert (launched.request, launched.phases, launched.changes) == (plan.request, plan.phases, plan.changes)
    assert {reason.key for reason in plan.reasons} - {"binding_phase"} <= {reason.key for reason in launched.reasons}
    assert caps == [24 * GIB - 512 * MIB - CONTEXT_BYTES]
    anyway = plan_request(ask(quant_linear="off"), card(3), disk(), policy="anyway")
    assert first_plan(command(anyway), card(3), told()) == anyway
    assert caps[-1] == anyway.peak_bytes - CONTEXT_BYTES


def test_an_attempt_after_an_out_of_memory_plans_smaller_and_may_use_all_there_is(caps):
    plan = plan_request(ask(), card(24), disk())
    cap_bytes = plan.peak_bytes * 9 // 10
    again = first_plan(command(plan, cap_bytes=cap_bytes), card(24), told())
    assert again.peak_bytes <= cap_bytes < caps[-1]


def test_with_latents_at_hand_only_the_decode_has_to_fit_and_the_clip_stays_the_same(caps, tmp_path):
    request = ask("wan2.1-14b", resolution="720p", seed=3)
    plan = plan_request(request, card(24), disk())
    LatentsCache(tmp_path, 7).save(torch.zeros(1, 16, 2, 4, 4), plan)
    tiled = plan_request(plan.request, card(2), disk(), policy="anyway")
    cap_bytes = from_phase(tiled, "vae_decode")[0].peak_bytes + MIB
    assert tiled.levers.vae == "tiled" and tiled.peak_bytes > cap_bytes
    more = {"request": request.model_dump(mode="json"), "cap_bytes": cap_bytes, "state": str(tmp_path)}
    again = first_plan(command(None, **more), card(24), told())
    assert again.request == plan.request
    assert (again.levers.vae, [phase.name for phase in again.phases]) == ("tiled", ["vae_decode", "write"])
    assert again.peak_bytes <= cap_bytes and again.band != "no"
    fresh = first_plan(command(None, **{**more, "state": "/nowhere"}), card(24), told())
    assert fresh.request != plan.request  # without them the whole clip must fit, and it is made smaller
    other = request.model_copy(update={"prompt": "a dog"}).model_dump(mode="json")
    assert first_plan(command(None, **{**more, "request": other}), card(24), told()).request.prompt == "a dog"


def test_host_memory_that_is_short_is_no_reason_to_wait_for_the_card(caps):
    plan = plan_request(ask(), card(12), disk())
    with pytest.raises(DoesNotFitError):
        first_plan(command(plan), machine(gpu(12), ram_gib=2.5), told())
    with pytest.raises(WaitForMemory):
        first_plan(command(plan), machine(gpu(12, free_bytes=GIB, used_bytes=11 * GIB)), told())


def test_a_worker_plans_for_its_own_card_and_counts_its_own_memory_where_pids_are_foreign(monkeypatch):
    two = machine(gpu(24, index=0), gpu(80, index=1))
    monkeypatch.setattr(replan, "machine_now", lambda own_pids: two)
    asked = command(None)
    assert [known.total_bytes for known in machine_for(asked, told(index=0)).gpus] == [24 * GIB]
    assert [known.total_bytes for known in machine_for(asked, told(index=1)).gpus] == [80 * GIB]
    assert machine_for(asked, told(held=3 * GIB)).gpus[0].reclaimable_bytes == 3 * GIB + CONTEXT_BYTES


OUT_OF_MEMORY = (
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom", True),
    (RuntimeError("CUDA driver error: out of memory"), "oom", False),
    (MemoryError(), "oom", False),  # on a CPU the host's memory is the device's
)


@pytest.mark.parametrize(("error", "code", "goes_on"), OUT_OF_MEMORY, ids=["allocator", "driver", "host"])
def test_running_out_has_many_names(attempt_of, error, code, goes_on):
    with pytest.raises(OutOfMemoryError) as caught, attempt_of().phase("denoise"):
        raise error
    assert (caught.value.field, caught.value.code, caught.value.goes_on) == ("denoise", code, goes_on)


def test_host_memory_beside_a_card_is_told_apart(attempt_of):
    attempt = attempt_of()
    attempt.plan = attempt.plan.model_copy(update={"device": "cuda:0"})
    with pytest.raises(OutOfMemoryError) as caught, attempt.phase("denoise"):
        raise MemoryError
    assert caught.value.code == "host_ram"


def test_another_error_of_torch_is_no_out_of_memory(attempt_of):
    error = RuntimeError("out of resource: shared memory")
    with pytest.raises(RuntimeError) as caught, attempt_of().phase("denoise"):
        raise error
    assert caught.value is error
