"""The whole pipeline on a card of a few megabytes: what the plan says fits, fits; what does not, ends in order."""

import json
import os
import sys
from pathlib import Path

import pytest
from supervisor.bench import Bench

from tests.runtime.small_card import CardCache, card, write_toy
from tests.test_tiny import EventList, NoCommands
from turbodiff.plan import planner
from turbodiff.plan.planner import Shortage, plan_request
from turbodiff.runtime import replan, worker
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.runtime.pipeline import generate
from turbodiff.runtime.replan import WaitForMemory, first_plan
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.events import RunCommand, read_event
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
    """One run command to a worker on a card of that many bytes; returns (exit status of the worker, its events)."""
    models = CardCache()
    monkeypatch.setattr("turbodiff.runtime.model_cache.ModelCache", lambda device: models)
    monkeypatch.setattr(worker, "beat", lambda events, device: None)

    def run(request, plan, card_bytes, number, planned_card, cap_bytes=None, sound=True):
        monkeypatch.setattr(replan, "machine_for", lambda command, device: planned_card)
        models.warm(request)
        command = {
            "job": 1, "attempt": number, "request": request.model_dump(mode="json"), "cap_bytes": cap_bytes,
            "plan": plan and plan.model_dump(mode="json"), "outputs": tmp_path / "outputs", "state": tmp_path / "state",
        }  # fmt: skip
        events = os.memfd_create("events")
        with models.insert(card_bytes, sound=sound):
            status = worker.serve(worker.EventWriter(events), OneCommand(command), "cpu")
        os.lseek(events, 0, os.SEEK_SET)
        with os.fdopen(events, "rb") as lines:
            return status, [read_event(line) for line in lines]

    return run


class OneCommand(NoCommands):
    """The commands of a parent that wants one job done."""

    def __init__(self, command):
        self._command = command

    def runs(self):
        yield self._command


def words(events, kind):
    return [event for event in events if event.type == kind]


@pytest.mark.slow
def test_no_budget_runs_out_where_the_plan_said_it_fits(toy, tmp_path):
    """The text is read in host memory: accelerate, which streams an encoder, cannot tell this card from it."""
    request, models, levers, refused = toy(4), CardCache(), set(), 0
    roomy = plan_request(request, card(100 * MB), inventory(), text_cached=True)
    for number, share in enumerate([0.1, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0]):
        try:
            plan = plan_request(request, card(int(share * roomy.peak_bytes)), inventory(), text_cached=True)
        except DoesNotFitError:
            refused += 1
            continue
        if plan.levers in levers:
            continue
        levers.add(plan.levers)
        models.warm(request)
        places = (tmp_path / "outputs", tmp_path / f"state{number}")
        with models.insert(plan.budget_bytes) as ledger:
            assert generate(Attempt(number, 1, plan, *places, models, EventList(), NoCommands)).frames == 5
        assert ledger.peak_bytes <= plan.budget_bytes
    assert 1 <= refused <= 3 and {lever.experts for lever in levers} == {"streamed", "resident"}


def test_a_card_smaller_than_its_plan_ends_the_worker_and_one_rung_lower_finishes(toy, attempt):
    request, wide = toy(4), card(40 * MB)
    plan = plan_request(request, wide, inventory(), text_cached=True)
    small = plan.peak_bytes * 8 // 10  # what it needs is 92 % of the plan, slack of the allocator included
    status, events = attempt(request, plan, small, 1, wide, sound=False)
    (error,) = words(events, "error")
    assert status == 1 and (error.code, error.field) == ("oom", "denoise")
    status, events = attempt(request, None, small, 2, wide, cap_bytes=small)
    assert status == 0 and words(events, "result")
    (again,) = words(events, "plan")
    assert again.plan.peak_bytes <= small and again.plan.levers.experts == "streamed"


def test_a_decode_that_ran_out_is_done_in_tiles_in_the_same_process(toy, attempt):
    request, wide = toy(8, size="256x384"), card(200 * MB)
    plan = plan_request(request, wide, inventory(), text_cached=True)
    status, events = attempt(request, plan, plan.peak_bytes * 8 // 10, 1, wide)  # a fifth of it is slack and scratch
    assert status == 0 and words(events, "result") and not words(events, "error")
    before, after = words(events, "plan")
    assert (before.plan.levers.vae, after.plan.levers.vae) == ("whole", "tiled")
    assert after.plan.levers == before.plan.levers.model_copy(update={"vae": "tiled"})
    assert after.plan.peak_bytes < before.plan.peak_bytes and after.plan.request == before.plan.request
    assert [notice.key for notice in words(events, "notice")] == ["phase_repeated"]
    assert [event.name for event in words(events, "phase") if event.state == "start"].count("denoise") == 1


def test_a_decode_that_broke_its_process_is_done_in_tiles_by_the_next_from_the_saved_latents(toy, attempt):
    request, wide = toy(8, size="256x384"), card(200 * MB)
    plan = plan_request(request, wide, inventory(), text_cached=True)
    small = plan.peak_bytes * 8 // 10
    status, events = attempt(request, plan, small, 1, wide, sound=False)
    (error,) = words(events, "error")
    assert status == 1 and (error.code, error.field) == ("oom", "vae_decode")
    status, events = attempt(request, None, small, 2, wide, cap_bytes=small)
    assert status == 0 and words(events, "result") and not words(events, "step")
    assert words(events, "plan")[0].plan.levers.vae == "tiled"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base_dim", "size", "frames", "phase", "levers"),
    [(4, "128x128", 17, "denoise", {"text_keys": "recomputed"}), (8, "256x384", 5, "vae_decode", {"vae": "tiled"})],
    ids=["denoise", "decode"],
)
def test_through_the_supervisor_a_job_that_ran_out_runs_again_one_rung_lower(
    toy, tmp_path, monkeypatch, base_dim, size, frames, phase, levers
):
    request, shown = toy(base_dim, size=size, num_frames=frames), 200 * MB
    plan = plan_request(request, card(shown), inventory(), text_cached=True)
    monkeypatch.setenv("TOY_SHOWN_BYTES", str(shown))
    monkeypatch.setenv("TOY_CARD_BYTES", str(plan.peak_bytes * (9 if phase == "denoise" else 8) // 10))
    bench = Bench(tmp_path / "bench", worker_argv=(sys.executable, str(CARD_WORKER)))
    try:
        job = bench.store.submit(request, plan)
        first = bench.slot.worker
        bench.turn_until(lambda: bench.store.job(job).over or bench.store.job(job).state == "parked", 280)
        row, told = bench.store.job(job), [event for _, event in bench.store.events(job)]
        assert (row.state, row.attempt, row.strikes) == ("done", 2, {"oom": 1}), bench.log_text()
        (error,) = words(told, "error")
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


def attempt_on_card(plan, tmp_path, models, events):
    """Its plan was made for a card of 40 MB."""
    places = (tmp_path / "outputs", tmp_path / "state")
    return Attempt(1, 1, plan, *places, models, events, NoCommands, machine=card(40 * MB))


def test_levers_are_pulled_between_two_phases_where_a_neighbour_grew(toy, tmp_path):
    request, models, events = toy(4), CardCache(), EventList()
    plan = plan_request(request, card(40 * MB), inventory())
    less = plan.peak_bytes * 75 // 100
    models.warm(request)
    attempt = attempt_on_card(plan, tmp_path, models, events)

    def shown():
        return 40 * MB if not events.of("phase") else less  # it grew while the prompt was read

    with models.insert(less, shown) as ledger:
        assert generate(attempt).frames == 5
    before, after = events.of("plan")
    assert before.plan.levers.experts == "resident" and after.plan.levers.experts == "streamed"
    assert [notice.key for notice in events.of("notice")] == ["levers_pulled", "weights_left"]
    assert ledger.peak_bytes <= less


def test_where_no_lever_is_enough_the_job_waits_and_its_latents_stay(toy, tmp_path):
    request, models, events = toy(4), CardCache(), EventList()
    plan = plan_request(request, card(40 * MB), inventory())
    attempt = attempt_on_card(plan, tmp_path, models, events)
    models.warm(request)

    def shown():
        return 2 * MB if "denoise" in [phase.name for phase in events.of("phase")] else 40 * MB

    with models.insert(plan.peak_bytes, shown), pytest.raises(WaitForMemory) as waits:
        generate(attempt)
    assert waits.value.shortage.free_bytes == 2 * MB < waits.value.shortage.need_bytes < plan.peak_bytes
    assert [phase.name for phase in events.of("phase")][-1] == "denoise"
    assert not list((tmp_path / "outputs").rglob("*.mp4"))
    events.clear()
    with models.insert(plan.peak_bytes):
        assert generate(attempt).frames == 5
    assert not events.of("step") and events.of("notice")[0].key == "latents_resumed"


def test_a_cap_below_everything_does_not_fit_and_says_so(toy, attempt):
    status, events = attempt(toy(4), None, None, 2, card(40 * MB), cap_bytes=2 * MB)
    (error,) = words(events, "error")
    assert status == 0 and (error.code, error.exit_code) == ("does_not_fit", 5)


def test_a_neighbour_that_grew_moves_levers_and_then_makes_the_job_wait(toy):
    plan = plan_request(toy(4), card(40 * MB), inventory())
    tighter = planner.replan(plan, card(plan.peak_bytes * 3 // 4), inventory)
    assert tighter.request == plan.request and tighter.peak_bytes <= plan.peak_bytes * 3 // 4
    assert tighter.levers.experts == "streamed" and plan.levers.experts == "resident"
    shortage = planner.replan(plan, card(5 * MB), inventory)
    assert isinstance(shortage, Shortage) and shortage.free_bytes == 5 * MB < shortage.need_bytes < plan.peak_bytes
    assert planner.replan(plan, card(5 * MB).model_copy(update={"gpus": ()}), inventory) is plan


def test_on_a_cpu_a_plan_runs_as_it_came(toy):
    plan = plan_request(toy(4), card(40 * MB), inventory())
    shown = json.loads(plan.model_dump_json())
    fields = {"job": 1, "attempt": 1, "plan": shown, "request": shown["request"], "outputs": "/", "state": "/"}
    command = RunCommand.model_validate(fields)
    assert replan.machine_for(command, Device.pick("cpu")) is None
    assert first_plan(command, None, Device.pick("cpu")) == plan
