"""The whole pipeline on a card of a few megabytes: what the plan says fits, fits; what does not, ends in order."""

import json
import os
import sys
from pathlib import Path

import pytest
from supervisor.bench import Bench

from tests.runtime.small_card import CardShelf, card, write_toy
from tests.test_tiny import Ears, Nobody
from turbodiff.plan.planner import Shortage, plan_request
from turbodiff.runtime import replan, worker
from turbodiff.runtime.attempt import Job
from turbodiff.runtime.device import Device
from turbodiff.runtime.pipeline import generate
from turbodiff.runtime.replan import Waits, plan_for
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.events import read_event
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import inventory

MB = 10**6
CARD_WORKER = Path(__file__).with_name("card_worker.py")
PINS = "quant_linear,num_frames,size"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A request for the toy, whose decode binds the more the wider its VAE is."""

    def make(base_dim, **fields):
        write_toy(tmp_path / "toy", base_dim)
        monkeypatch.setenv("TURBODIFF_CONFIGS", str(tmp_path / "toy" / "configs"))
        monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "toy" / "models"))
        fixed = {"model": "toy", "steps": 1, "num_frames": 5, "seed": 7, "quant_linear": "off", "pinned": PINS}
        return make_request({"prompt": "a red circle moves right", **fixed, **fields})

    return make


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """One order to a worker on a card of that many bytes; returns (exit status of the worker, its events)."""
    shelf = CardShelf()
    monkeypatch.setattr("turbodiff.runtime.model_cache.ModelCache", lambda device: shelf)
    monkeypatch.setattr(worker, "_beat", lambda pipe: None)

    def run(request, plan, card_bytes, number, planned_card, cap_bytes=None):
        monkeypatch.setattr(replan, "machine_of", lambda order, device: planned_card)
        shelf.warm(request)
        order = {
            "job": 1, "attempt": number, "request": request.model_dump(mode="json"), "cap_bytes": cap_bytes,
            "plan": plan and plan.model_dump(mode="json"), "outputs": tmp_path / "outputs", "state": tmp_path / "state",
        }  # fmt: skip
        events = os.memfd_create("events")
        with shelf.insert(card_bytes):
            status = worker.serve(worker.Pipe(events), OneOrder(order), "cpu")
        os.lseek(events, 0, os.SEEK_SET)
        with os.fdopen(events, "rb") as lines:
            return status, [read_event(line) for line in lines]

    return run


class OneOrder(Nobody):
    """The commands of a parent that wants one job done."""

    def __init__(self, order):
        self._order = order

    def runs(self):
        yield self._order


def words(events, kind):
    return [event for event in events if event.type == kind]


@pytest.mark.slow
def test_no_budget_runs_out_where_the_plan_said_it_fits(toy, tmp_path):
    request, shelf, levers, refused = toy(4), CardShelf(), set(), 0
    roomy = plan_request(request, card(100 * MB), inventory())
    for number, share in enumerate([0.1, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0]):
        try:
            plan = plan_request(request, card(int(share * roomy.peak_bytes)), inventory())
        except DoesNotFitError:
            refused += 1
            continue
        if plan.levers in levers:
            continue
        levers.add(plan.levers)
        shelf.warm(request)
        job = Job(number, 1, plan, tmp_path / "outputs", tmp_path / f"state{number}")
        with shelf.insert(plan.budget_bytes) as ledger:
            assert generate(job, shelf, Ears(), Nobody()).frames == 5
        assert ledger.peak_bytes <= plan.budget_bytes
    assert 1 <= refused <= 3 and {lever.experts for lever in levers} == {"streamed", "resident"}


def test_a_card_smaller_than_its_plan_ends_the_worker_and_one_rung_lower_finishes(toy, attempt):
    request, wide = toy(4), card(40 * MB)
    plan = plan_request(request, wide, inventory(), text_cached=True)
    small = plan.peak_bytes * 9 // 10  # what it needs is 92 % of the plan, slack of the allocator included
    status, events = attempt(request, plan, small, 1, wide)
    (error,) = words(events, "error")
    assert status == 1 and (error.code, error.field) == ("oom", "denoise")
    status, events = attempt(request, None, small, 2, wide, cap_bytes=small)
    assert status == 0 and words(events, "result")
    (again,) = words(events, "plan")
    assert again.plan.peak_bytes <= small and again.plan.levers.experts == "streamed"


def test_a_decode_that_ran_out_is_done_in_tiles_from_the_saved_latents(toy, attempt):
    request, wide = toy(8, size="256x384"), card(200 * MB)
    plan = plan_request(request, wide, inventory(), text_cached=True)
    small = plan.peak_bytes * 9 // 10
    status, events = attempt(request, plan, small, 1, wide)
    (error,) = words(events, "error")
    assert status == 1 and (error.code, error.field) == ("oom", "vae_decode")
    status, events = attempt(request, None, small, 2, wide, cap_bytes=small)
    assert status == 0 and words(events, "result") and not words(events, "step")
    assert words(events, "plan")[0].plan.levers.vae == "tiled"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base_dim", "size", "frames", "phase", "levers"),
    [(4, "128x128", 17, "denoise", {"experts": "streamed"}), (8, "256x384", 5, "vae_decode", {"vae": "tiled"})],
    ids=["denoise", "decode"],
)
def test_through_the_supervisor_a_job_that_ran_out_runs_again_one_rung_lower(
    toy, tmp_path, monkeypatch, base_dim, size, frames, phase, levers
):
    request, shown = toy(base_dim, size=size, num_frames=frames), 200 * MB
    plan = plan_request(request, card(shown), inventory(), text_cached=True)
    monkeypatch.setenv("TOY_SHOWN_BYTES", str(shown))
    monkeypatch.setenv("TOY_CARD_BYTES", str(plan.peak_bytes * 9 // 10))
    bench = Bench(tmp_path / "bench", worker_argv=(sys.executable, str(CARD_WORKER)))
    try:
        job = bench.store.submit(request, plan)
        first = bench.slot.worker
        bench.turn_until(lambda: bench.store.job(job).over or bench.store.job(job).state == "parked", 280)
        row, told = bench.store.job(job), [event for _, event in bench.store.events(job)]
        assert (row.state, row.attempt, row.strikes) == ("done", 2, {"oom": 1}), bench.log_text()
        (error,) = [event for event in told if event.type == "error"]
        assert (error.code, error.field) == ("oom", phase)
        assert bench.slot.worker is not first  # the worker that ran out is gone
        assert row.plan.peak_bytes <= row.cap_bytes < plan.peak_bytes
        assert levers.items() <= row.plan.levers.model_dump().items()
        assert row.plan.request.num_frames == plan.request.num_frames
        again = [event.name for event in told if event.attempt == 2 and event.type == "phase"]
        assert ("denoise" in again) == (phase == "denoise")  # else the saved latents are decoded
        log = bench.run_log_text()
        assert "one rung lower" in log and "an earlier attempt needed more than there was: this one stays below" in log
        assert ("the latents of an earlier attempt are decoded" in log) == (phase == "vae_decode")
    finally:
        bench.supervisor.close()


def test_levers_are_pulled_between_two_phases_where_a_neighbour_grew(toy, tmp_path):
    request, shelf, ears = toy(4), CardShelf(), Ears()
    plan = plan_request(request, card(40 * MB), inventory())
    less = plan.peak_bytes * 85 // 100
    shelf.warm(request)
    job = Job(1, 1, plan, tmp_path / "outputs", tmp_path / "state", machine=card(40 * MB))

    def shown():
        return 40 * MB if not ears.of("phase") else less  # it grew while the prompt was read

    with shelf.insert(less, shown) as ledger:
        assert generate(job, shelf, ears, Nobody()).frames == 5
    before, after = ears.of("plan")
    assert before.plan.levers.experts == "resident" and after.plan.levers.experts == "streamed"
    assert [notice.key for notice in ears.of("notice")] == ["levers_pulled"]
    assert ledger.peak_bytes <= less


def test_where_no_lever_is_enough_the_job_waits_and_its_latents_stay(toy, tmp_path):
    request, shelf, ears = toy(4), CardShelf(), Ears()
    plan = plan_request(request, card(40 * MB), inventory())
    job = Job(1, 1, plan, tmp_path / "outputs", tmp_path / "state", machine=card(40 * MB))
    shelf.warm(request)

    def shown():
        return 2 * MB if "denoise" in [phase.name for phase in ears.of("phase")] else 40 * MB

    with shelf.insert(plan.peak_bytes, shown), pytest.raises(Waits) as waits:
        generate(job, shelf, ears, Nobody())
    assert waits.value.shortage.free_bytes == 2 * MB < waits.value.shortage.need_bytes < plan.peak_bytes
    assert [phase.name for phase in ears.of("phase")][-1] == "denoise"
    assert not list((tmp_path / "outputs").rglob("*.mp4"))
    ears.clear()
    with shelf.insert(plan.peak_bytes):
        assert generate(job, shelf, ears, Nobody()).frames == 5
    assert not ears.of("step") and ears.of("notice")[0].key == "latents_resumed"


def test_a_cap_below_everything_does_not_fit_and_says_so(toy, attempt):
    status, events = attempt(toy(4), None, None, 2, card(40 * MB), cap_bytes=2 * MB)
    (error,) = words(events, "error")
    assert status == 0 and (error.code, error.exit_code) == ("does_not_fit", 5)


def test_a_neighbour_that_grew_moves_levers_and_then_makes_the_job_wait(toy):
    plan = plan_request(toy(4), card(40 * MB), inventory())
    tighter = replan.replan(plan, card(plan.peak_bytes * 3 // 4), inventory)
    assert tighter.request == plan.request and tighter.peak_bytes <= plan.peak_bytes * 3 // 4
    assert tighter.levers.experts == "streamed" and plan.levers.experts == "resident"
    shortage = replan.replan(plan, card(5 * MB), inventory)
    assert isinstance(shortage, Shortage) and shortage.free_bytes == 5 * MB < shortage.need_bytes < plan.peak_bytes
    assert replan.replan(plan, card(5 * MB).model_copy(update={"gpus": ()}), inventory) is plan


def test_on_a_cpu_a_plan_runs_as_it_came(toy):
    plan = plan_request(toy(4), card(40 * MB), inventory())
    order = {"plan": json.loads(plan.model_dump_json()), "request": {}, "cap_bytes": None}
    assert replan.machine_of(order, Device.pick("cpu")) is None
    assert plan_for(order, None, Device.pick("cpu")) == plan
