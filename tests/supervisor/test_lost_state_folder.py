"""The state folder is removed while the app runs: the queue is in the new one, and the next start says why."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.bench import Bench, scripted
from turbodiff.spec.environment import START_AGAIN
from turbodiff.supervisor.ownership import StateLock
from turbodiff.supervisor.state_folder import IN_USE
from turbodiff.supervisor.web_process import WebProcess

LOSSES: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "moved away": lambda state: state.rename(state.with_name("elsewhere")),
    "replaced by an empty one": lambda state: (shutil.rmtree(state), state.mkdir()),
    "without its database": lambda state: (state / "turbodiff.db").unlink(),
    "without its lock": lambda state: (state / "supervisor.lock").unlink(),
}


def lose(bench: Bench, how: str) -> None:
    LOSSES[how](bench.state)
    bench.supervisor._slow_s = -1e9
    bench.turn_until(lambda: bench.supervisor.exit_code is not None)


@pytest.mark.parametrize("how", LOSSES)
def test_no_accepted_job_goes_with_the_state_folder(how: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    done = bench.run(scripted({}, seed=1))
    bench.store.put("paused", True)
    waits = [bench.store.submit(scripted({}, seed=seed)) for seed in (2, 3)]
    lose(bench, how)
    late = bench.store.submit(scripted({}, seed=4))  # a page that has not heard yet
    assert bench.supervisor.exit_code == START_AGAIN
    bench.supervisor.close()

    again = Bench(tmp_path)
    told = again.store.fact("recovered")
    assert told["folder_lost"] and again.store.paused
    assert {job.id: job.state for job in again.store.jobs()} == {
        done.id: "done",
        **dict.fromkeys((*waits, late), "queued"),
    }
    again.store.put("paused", False)
    again.turn_until(lambda: all(job.state == "done" for job in again.store.jobs()))
    assert len(list(again.outputs.glob("*/*.mp4"))) == 4
    again.supervisor.close()
    third = Bench(tmp_path)
    assert not (third.store.fact("recovered") or {}).get("folder_lost")
    third.supervisor.close()


@pytest.mark.parametrize("met_by", ["supervisor", "page"])
def test_a_store_that_is_damaged_while_the_app_runs_is_restored_by_a_new_start(met_by: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    done = bench.run(scripted({}, seed=1))
    bench.store.put("paused", True)
    waits = [bench.store.submit(scripted({}, seed=seed)) for seed in (2, 3)]
    bench.store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    bench.store.rows("PRAGMA shrink_memory")  # else our own pages hide it
    path = bench.state / "turbodiff.db"
    with path.open("r+b") as file:
        file.seek(4096)  # all but the first page
        file.write(bytes(path.stat().st_size - 4096))
    if met_by == "page":  # with exit code 2
        page = (sys.executable, "-c", "raise SystemExit(2)")
        bench.supervisor.web = WebProcess(page, bench.supervisor.context)
        bench.turn_until(lambda: bench.supervisor.web.failed_code is not None)
    bench.supervisor._slow_s = -1e9
    bench.turn_until(lambda: bench.supervisor.exit_code is not None)
    assert bench.supervisor.exit_code == START_AGAIN
    bench.supervisor.close()

    again = Bench(tmp_path)
    assert again.store.fact("recovered")["damaged"]
    again.store.put("paused", False)
    again.turn_until(lambda: all(job.state == "done" for job in again.store.jobs()))
    assert {job.id for job in again.store.jobs()} == {done.id, *waits}
    assert len(list(again.outputs.glob("*/*.mp4"))) == 3
    again.supervisor.close()


def test_a_job_that_runs_meanwhile_is_made_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    job = bench.store.submit(scripted({"steps": 50, "dt_s": 0.1}, {}, seed=1))
    bench.turn_until(lambda: bench.store.job(job).state == "running")
    lose(bench, "removed")
    bench.supervisor.close()
    again = Bench(tmp_path)
    again.turn_until(lambda: again.store.job(job).state == "done")
    assert len(list(again.outputs.glob("*/*.mp4"))) == 1
    again.supervisor.close()


def test_another_app_in_the_new_folder_gets_the_jobs_with_its_next_start(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.store.put("paused", True)
    job = bench.store.submit(scripted({}, seed=1))
    shutil.rmtree(bench.state)
    other = StateLock(bench.state)
    bench.supervisor._slow_s = -1e9
    bench.turn_until(lambda: bench.supervisor.exit_code is not None)
    assert bench.supervisor.exit_code == IN_USE
    bench.supervisor.close()
    other.close()
    again = Bench(tmp_path)
    assert [found.id for found in again.store.jobs()] == [job]
    again.supervisor.close()
