from supervisor.bench import request

from tests.plan.machines import ask, card, disk
from turbodiff.jobs.attempts import claim
from turbodiff.jobs.measurements import record, samples, usual_seconds
from turbodiff.jobs.store import Store
from turbodiff.plan.calibration import History, provenance, work_bytes
from turbodiff.plan.planner import plan_request
from turbodiff.spec.events import PhaseEvent
from turbodiff.spec.numbers import GIB


def test_the_usual_seconds_of_a_phase_are_the_median_of_earlier_runs_of_that_size(store: Store) -> None:
    store.submit(request())
    job = claim(store)
    assert job is not None
    for seconds in (30.0, 20.0, 40.0):
        record(store, job, PhaseEvent(name="vae_decode", state="done", seconds=seconds), None)
    record(store, job, PhaseEvent(name="write", state="start"), None)
    assert usual_seconds(store, job) == {"vae_decode": 30.0}
    other = store.job(store.submit(request(num_frames=5)))
    assert usual_seconds(store, other) == {}


def test_a_finished_phase_keeps_what_tensors_the_allocator_and_the_driver_took(store: Store) -> None:
    here = card(24, capability=(8, 9)).model_copy(update={"driver": "580", "allocator": "limited"})
    plan = plan_request(ask("wan2.1-1.3b", num_frames=17), here, disk())
    store.submit(plan.request, plan)
    job = claim(store)
    assert job is not None
    phase = next(phase for phase in plan.phases if phase.name == "vae_decode")
    bytes_taken = {"peak_bytes": 3 * GIB, "reserved_bytes": 4 * GIB, "nvml_bytes": 5 * GIB, "weights_bytes": GIB}
    record(store, job, PhaseEvent(name="vae_decode", state="done", seconds=7.0, **bytes_taken), here)
    (sample,) = samples(store)
    assert (sample.measured_bytes, sample.held_bytes) == (2 * GIB, 3 * GIB)
    assert (sample.reserved_bytes, sample.nvml_bytes) == (4 * GIB, 5 * GIB)
    assert (sample.predicted_s, sample.measured_s) == (phase.seconds, 7.0)
    assert (sample.predicted_bytes, sample.slack_bytes) == (work_bytes(plan, phase), phase.slack_bytes)
    assert (sample.kind.driver, sample.kind.allocator, sample.kind.gpu) == ("580", "limited", here.gpus[0].name)


def test_a_clip_on_a_cpu_teaches_seconds_and_no_bytes(store: Store) -> None:
    here = card(24).model_copy(update={"gpus": ()})
    plan = plan_request(request(), here, disk())
    store.submit(plan.request, plan)
    job = claim(store)
    assert job is not None
    for phase in plan.phases:
        done = PhaseEvent(name=phase.name, state="done", seconds=10 * phase.seconds + 1, peak_bytes=GIB)
        record(store, job, done, here)
    history = History(samples(store))
    lessons = history.calibration(provenance(None, here)).lessons
    assert lessons and all(lesson.samples == 0 and lesson.timed == 1 for lesson in lessons)
    again = plan_request(request(), here, disk(), history=history)
    assert again.seconds > 5 * plan.seconds and again.peak_bytes == plan.peak_bytes
