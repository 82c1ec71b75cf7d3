from supervisor.bench import Bench, request, scripted


def test_a_job_becomes_a_clip(bench: Bench) -> None:
    job = bench.run(scripted({"steps": 3}, seed=42))
    assert job.state == "done"
    assert job.result is not None and job.result.frames == 17
    assert (job.attempt, job.progress, job.strikes) == (1, None, {})
    types = [event.type for _, event in bench.store.events(job.id)]
    assert types.count("step") == 1 and "preview" not in types


def test_the_same_worker_runs_the_next_job(bench: Bench) -> None:
    bench.run(request())
    pid = bench.slot.worker.pid
    bench.run(request())
    assert bench.slot.worker.pid == pid
