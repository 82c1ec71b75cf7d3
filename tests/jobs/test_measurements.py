import pytest
from supervisor.bench import request

from tests.plan.machines import ask, card, disk, gpu, machine
from turbodiff.jobs import measurements
from turbodiff.jobs.attempts import claim, finish_job
from turbodiff.jobs.measurements import record, samples, usual_seconds
from turbodiff.jobs.store import Store
from turbodiff.plan.calibration import History, provenance, work_bytes
from turbodiff.plan.planner import plan_request
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.events import PhaseEvent
from turbodiff.spec.models import FoundNetwork
from turbodiff.spec.numbers import GIB, MIB


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


def test_the_usual_seconds_of_a_phase_behind_the_decode_are_those_of_its_network(store: Store) -> None:
    here = card(24)
    found = [FoundNetwork(kind="upscaler", name=name, path=name, bytes=64 * MIB) for name in ("x4.pth", "other.pth")]
    weights = disk().model_copy(update={"networks": tuple(found)})
    for name, seconds in (("", 3.0), ("x4.pth", 300.0), ("", 5.0)):
        plan = plan_request(ask("wan2.1-1.3b", num_frames=17, upscale=2, upscaler=name), here, weights)
        store.submit(plan.request, plan)
        job = claim(store)
        assert job is not None
        record(store, job, PhaseEvent(name="upscale", state="done", seconds=seconds), here)
        finish_job(store, job.id, job.attempt, ClipResult(path="one.mp4"))
    for name, usual in (("", {"upscale": 4.0}), ("x4.pth", {"upscale": 300.0}), ("other.pth", {})):
        plan = plan_request(ask("wan2.1-1.3b", num_frames=17, upscale=2, upscaler=name), here, weights)
        assert usual_seconds(store, store.job(store.submit(plan.request, plan)), here) == usual


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


def test_what_one_card_takes_says_nothing_of_another(store: Store) -> None:
    fast, slow = gpu(24, capability=(8, 9)), gpu(12, name="NVIDIA GeForce RTX 3060", capability=(8, 6))
    here = machine(fast, slow)
    plan = plan_request(ask("wan2.1-1.3b", num_frames=17), machine(fast), disk())
    store.submit(plan.request, plan)
    job = claim(store)
    assert job is not None
    for slot, seconds in ((0, 20.0), (1, 90.0), (0, 22.0), (0, 24.0)):
        record(store, job, PhaseEvent(name="vae_decode", state="done", seconds=seconds, peak_bytes=6 * GIB), here, slot)
    assert usual_seconds(store, job, here, 0) == {"vae_decode": 22.0}
    assert usual_seconds(store, job, here, 1) == {"vae_decode": 90.0}
    assert usual_seconds(store, job, machine(gpu(16)), 0) == {}
    history = History(samples(store))
    runs = [[one.timed for one in history.calibration(provenance(card, here)).lessons] for card in here.gpus]
    assert runs == [[3], [1]]


def test_a_busy_card_does_not_push_out_what_a_quiet_one_taught(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "HISTORY", 2)
    here = machine(gpu(24, capability=(8, 9)), gpu(12, name="NVIDIA GeForce RTX 3060", capability=(8, 6)))
    plan = plan_request(ask("wan2.1-1.3b", num_frames=17), here, disk())
    store.submit(plan.request, plan)
    job = claim(store)
    assert job is not None
    for slot in (1, 0, 0, 0):
        record(store, job, PhaseEvent(name="vae_decode", state="done", seconds=9.0, peak_bytes=6 * GIB), here, slot)
    assert [sample.kind.total_bytes for sample in samples(store)] == [12 * GIB, 24 * GIB, 24 * GIB]


def test_rows_of_version_1_know_their_card_by_their_sample(store: Store) -> None:
    here = card(24, capability=(8, 9))
    plan = plan_request(ask("wan2.1-1.3b", num_frames=17), here, disk())
    store.submit(plan.request, plan)
    job = claim(store)
    assert job is not None
    record(store, job, PhaseEvent(name="vae_decode", state="done", seconds=9.0, peak_bytes=6 * GIB), here)
    (sample,) = samples(store)
    with store.write() as db:  # as version 1 left it: a row with its sample, plain, and one of which it was forgotten
        db.execute("UPDATE peak SET sample = ?", (sample.model_dump_json(),))
        for sql in ("ALTER TABLE peak DROP COLUMN gpu", "ALTER TABLE peak DROP COLUMN gpu_bytes"):
            db.execute(sql)
        for sql in ("DROP INDEX job_of_user", "DROP INDEX job_expiry", "DROP TABLE api_user"):
            db.execute(sql)
        for column in ("overtaken", "user", "expires_s"):
            db.execute(f"ALTER TABLE job DROP COLUMN {column}")
        rest = "at_s, job, attempt, model, width, height, num_frames, phase, measured_bytes, measured_s"
        db.execute(f"INSERT INTO peak ({rest}) SELECT {rest} FROM peak")
        db.execute("UPDATE peak SET measured_s = 50 WHERE sample IS NULL")
        db.execute("PRAGMA user_version = 1")
    state = store.path.parent
    store.close()
    store = Store(state)
    assert store.damage() == "" and store.job(job.id).overtaken == 0
    assert usual_seconds(store, job, here) == {"vae_decode": 9.0}
    assert usual_seconds(store, job, None) == {"vae_decode": 50.0}  # measured nobody knows where
    assert len(samples(store)) == 1
    store.close()
