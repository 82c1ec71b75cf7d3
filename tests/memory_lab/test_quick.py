"""The parts of `turbodiff calibrate --quick`, with a ledger in the place of a card."""

import json
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.machines import ask, card, machine
from turbodiff.memory_lab import quick
from turbodiff.memory_lab.quick import Measured, bisect_cap, fixed, measure_clip, page_lock, samples
from turbodiff.plan import phase_costs
from turbodiff.plan.calibration import History, Sample, provenance_of
from turbodiff.plan.candidates import as_wished
from turbodiff.plan.context import plan_context
from turbodiff.plan.offload_search import cost_inputs
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.device import Device
from turbodiff.spec.models import Inventory
from turbodiff.spec.numbers import GIB, MIB
from turbodiff.spec.request import make_request

LATER = math.inf
CPU = Device(torch.device("cpu"), "a ledger", torch.float32)


@given(st.integers(1, 3 * GIB), st.integers(0, GIB), st.integers(GIB, 2 * GIB))
def test_bisection_finds_the_smallest_cap_that_works(need, least, planned):
    found = bisect_cap(lambda cap: cap >= need, planned, min(least, need - 1), LATER)
    if need > round(1.5 * planned):
        assert found is None
    else:
        assert found is not None and need <= found
        assert found <= max(need + 0.011 * planned, 0)


def test_a_search_that_runs_out_of_time_tells_a_cap_that_was_seen_to_work():
    tried: list[int] = []

    def runs(cap: int) -> bool:
        tried.append(cap)
        return cap >= 700

    assert bisect_cap(runs, 1000, 0, time.monotonic()) == 1000 and tried == [1000]
    assert bisect_cap(runs, 600, 0, time.monotonic()) is None


@pytest.mark.parametrize("refused_at", [0, 3])
def test_page_locking_stops_where_it_is_refused(refused_at):
    made: list[int] = []

    def make(size: int) -> object:
        if len(made) == refused_at:
            raise RuntimeError("CUDA error: out of memory")
        made.append(size)
        return size

    found = page_lock(LATER, make)
    assert found == {"page_locked_bytes": refused_at * 256 * MIB, "page_lock_refused": True}


def test_page_locking_takes_at_most_a_part_of_what_is_free(monkeypatch):
    monkeypatch.setattr(quick, "host_memory", lambda: type("Memory", (), {"available_bytes": 3 * GIB}))
    found = page_lock(LATER, lambda size: size)
    assert found == {"page_locked_bytes": 3 * 256 * MIB, "page_lock_refused": False}


def test_a_block_and_a_decode_tell_their_rates_and_the_smallest_cap_beside_the_planned_one():
    """The ledger has no allocator's slack, so the smallest cap is at most the planned one."""
    request = make_request({"prompt": "-", "model": "demo"})
    findings = list(measure_clip(request, machine(), CPU, LATER))
    facts = {name: value for found in findings for name, value in found.get("facts", {}).items()}
    assert set(facts) == {"block_rate", "decode_rate", "planned_cap_bytes", "smallest_cap_bytes"}
    assert facts["block_rate"] > 0 < facts["decode_rate"]
    assert 0.6 * facts["planned_cap_bytes"] < facts["smallest_cap_bytes"] <= 1.01 * facts["planned_cap_bytes"]
    json.dumps(findings)


@pytest.mark.parametrize("model", ["wan2.1-1.3b", "wan2.1-14b"])
@pytest.mark.parametrize("over", [0.95, 1.0, 1.1])
def test_the_smallest_cap_of_one_block_teaches_the_plan_of_all(model, over):
    """What a block's work takes beyond the plan is what all of them take; the text of the others is known."""
    here, request = card(24), ask(model, quant_linear="on")
    plan = plan_request(request, here, Inventory(), policy="anyway")
    spec = plan.request.spec
    one = spec.model_copy(update={"dit": spec.dit.model_copy(update={"num_layers": 1})})
    choice = as_wished(plan.request, False)._replace(spec=one)
    inputs = cost_inputs(plan.request, choice, plan_context(here, Inventory()))
    work = phase_costs.step_work(inputs, plan.levers.ffn_chunks)
    cost = phase_costs.denoise(inputs, inputs.experts[-1], "resident", 0, work)
    held = cost.peak_bytes - cost.weights_bytes - fixed(inputs)
    excess = round((over - 1) * held)
    found = Measured(1.0, held - cost.slack_bytes + excess, held + excess)
    told = list(samples(plan, cost, found, fixed(inputs), here))
    assert [sample.phase for sample in told] == ["denoise"]
    read = [Sample.model_validate(sample.model_dump(mode="json")) for sample in told]
    (lesson,) = History(read * 50).calibration(provenance_of(told[0].kind)).lessons
    learned = plan_request(request, here, Inventory(), policy="anyway", history=History(read * 50))
    added = [phase.learned_bytes for phase in learned.phases if phase.name == "denoise"]
    assert lesson.samples == 50
    if over == 1.0:
        assert added == [0]
    else:
        assert added == [pytest.approx(excess, rel=0.1)]


def test_nothing_is_told_of_a_phase_whose_smallest_cap_is_not_known():
    plan = plan_request(ask("wan2.1-1.3b"), card(24), Inventory(), policy="anyway")
    inputs = cost_inputs(plan.request, as_wished(plan.request, False), plan_context(card(24), Inventory()))
    cost = phase_costs.vae(inputs, "vae_decode", None)
    assert list(samples(plan, cost, Measured(1.0, 1, None), fixed(inputs), card(24))) == []
