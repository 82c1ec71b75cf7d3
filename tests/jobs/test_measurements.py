from supervisor.bench import request

from turbodiff.jobs.attempts import claim
from turbodiff.jobs.measurements import record, usual_seconds
from turbodiff.jobs.store import Store
from turbodiff.spec.events import PhaseEvent


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
