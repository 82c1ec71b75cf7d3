"""A clip on several cards: they are its own from its start to its end, however that comes, and each other's again."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from supervisor.bench import Bench, scripted
from supervisor.test_cards import Driver, no_selected_cards  # noqa: F401  its cards
from supervisor.test_several_cards import free, make, states, turn  # noqa: F401  its supervisor
from tests.plan.machines import disk
from turbodiff.gpu.probe import GpuProcess, Sample
from turbodiff.jobs.cards import fleet
from turbodiff.plan.planner import plan_request
from turbodiff.spec.request import Request
from turbodiff.studio.cards import Cards
from turbodiff.supervisor.context import machine_of, worker_pids

Make = Callable[..., Bench]
LONG = {"steps": 20_000, "dt_s": 0.05}  # until it is told to stop


def submit(bench: Bench, asked: Request) -> int:
    machine = bench.supervisor.context.memory.machine()
    assert machine is not None
    return bench.store.submit(asked, plan_request(asked, machine, disk()))


def shared(*attempts: dict[str, object], cards: object = 2) -> Request:
    return scripted(*attempts, model="Wan2.1-14B", num_frames=81, cards=cards)


def children(bench: Bench) -> list[int]:
    """Processes of workers, but not the workers."""
    pids = [slot.worker.pid for slot in bench.supervisor.slots if slot.worker]
    return [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]


def lives(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_it_takes_both_cards_and_the_next_job_starts_when_they_are_free(make: Make) -> None:  # noqa: F811
    bench = make()
    bench.turn_until(lambda: free(bench))
    pids = {slot.device: slot.worker.pid for slot in bench.supervisor.slots}
    both = submit(bench, shared(LONG))
    next_one = submit(bench, shared({"steps": 1}, cards=1))
    bench.turn_until(lambda: states(bench, both) == ["running"] and bool(children(bench)))
    (first,) = [slot for slot in bench.supervisor.slots if slot.job]
    (lent,) = [slot for slot in bench.supervisor.slots if slot is not first]
    assert lent.lent and lent.worker is None and not lent.free and not Path(f"/proc/{pids[lent.device]}").exists()
    (follower,) = children(bench)
    assert f"CUDA_VISIBLE_DEVICES={lent.device}\0".encode() in Path(f"/proc/{follower}/environ").read_bytes()
    turn(bench)
    assert states(bench, next_one) == ["queued"] and lent.lent and lent.worker is None
    told = fleet(bench.store)
    assert told is not None and told.starts()[next_one].start_s > 0
    bench.store.stop_and_decode(both)
    bench.turn_until(lambda: states(bench, both, next_one) == ["done", "done"] and free(bench))
    done, after = bench.store.job(both), bench.store.job(next_one)
    assert done.attempt == after.attempt == 1 and done.ended_s <= after.started_s
    assert not lent.lent and lent.worker.pid != pids[lent.device] and not lives(follower)
    assert done.plan.levers.cards == 2 and {share.uuid for share in done.plan.shares} == {"GPU-a", "GPU-b"}


def test_jobs_before_it_start_first_and_those_behind_it_do_not_pass_it(make: Make) -> None:  # noqa: F811
    bench = make()
    bench.turn_until(lambda: free(bench))
    before = bench.store.submit(scripted({"steps": 30, "dt_s": 0.05}))
    bench.turn_until(lambda: states(bench, before) == ["running"])
    both = submit(bench, shared({"steps": 2}))
    behind = [bench.store.submit(scripted({"steps": 1})) for _ in range(4)]
    bench.turn_until(lambda: states(bench, before, both, *behind) == ["done"] * 6)
    jobs = [bench.store.job(job) for job in (before, both, *behind)]
    assert jobs[0].ended_s <= jobs[1].started_s and jobs[1].overtaken == 0
    assert all(jobs[1].ended_s <= job.started_s for job in jobs[2:])


@pytest.mark.parametrize("how", ["cancelled", "failed", "killed", "restart", "crash"])
def test_however_it_ends_both_cards_take_jobs_again_and_no_process_is_left(make: Make, how: str) -> None:  # noqa: F811
    bench = make()
    bench.turn_until(lambda: free(bench))
    script = {"error": {"code": "bad", "exit_code": 1}} if how == "failed" else LONG
    both = submit(bench, shared(script, {"steps": 1}))
    left: list[int] = []
    if how != "failed":
        bench.turn_until(lambda: states(bench, both) == ["running"] and bool(children(bench)))
        left = children(bench)
        (first,) = [slot for slot in bench.supervisor.slots if slot.job]
        if how == "cancelled":
            bench.store.cancel(both)
        elif how == "restart":
            bench.supervisor.restart()
        else:
            os.kill(first.worker.pid, signal.SIGKILL if how == "killed" else signal.SIGSEGV)
    over = {"cancelled": "cancelled", "failed": "failed"}.get(how, "done")
    bench.turn_until(lambda: states(bench, both) == [over] and free(bench))
    assert not any(map(lives, left)) and not children(bench)
    job = bench.store.job(both)
    assert job.attempt == (1 if over != "done" else 2)
    if how in ("killed", "crash"):  # once more on one card alone
        assert not any(slot.lent for slot in bench.supervisor.slots)
    later = [bench.store.submit(scripted(LONG)) for _ in range(2)]
    bench.turn_until(lambda: states(bench, *later) == ["running"] * 2)


def test_a_first_rank_that_ends_of_a_lost_one_goes_on_with_the_cards_that_are_left(make: Make) -> None:  # noqa: F811
    """Which is no crash of the job's own. Of four, three are left; 1.3B's 12 heads divide by three, 14B's 40 by two."""
    for asked, cards in (("wan2.1-1.3b", 3), ("wan2.1-14b", 2)):
        bench = make("GPU-a", "GPU-b", "GPU-c", "GPU-d")
        bench.turn_until(lambda here=bench: free(here))
        job = submit(bench, scripted({"lost": 1}, {"steps": 1}, model=asked, num_frames=81, cards=4))
        bench.turn_until(lambda here=bench, one=job: states(here, one) == ["running"])
        first = bench.store.job(job).plan
        bench.turn_until(lambda here=bench, one=job: states(here, one) == ["done"] and free(here))
        done = bench.store.job(job)
        assert len(first.shares) == 4 and done.plan.levers.cards == len(done.plan.shares) == cards
        assert first.shares[1].uuid not in {share.uuid for share in done.plan.shares}
        assert (done.attempt, done.strikes) == (2, {"rank": 1})
        bench.supervisor.close()


def test_a_follower_that_is_killed_costs_time_and_neither_the_job_nor_a_card(make: Make) -> None:  # noqa: F811
    bench = make()
    bench.turn_until(lambda: free(bench))
    both = submit(bench, shared(LONG))
    bench.turn_until(lambda: bool(children(bench)))
    (follower,) = children(bench)
    os.kill(follower, signal.SIGKILL)
    bench.turn_until(lambda: not children(bench))
    bench.store.stop_and_decode(both)
    bench.turn_until(lambda: states(bench, both) == ["done"] and free(bench))
    assert bench.store.job(both).attempt == 1 and not children(bench)
    assert "ranks_lost" in [event.key for _, event in bench.store.events(both) if event.type == "notice"]


def test_a_clip_that_leaves_it_to_us_has_both_cards_only_while_nobody_else_waits(make: Make) -> None:  # noqa: F811
    bench = make()
    bench.turn_until(lambda: free(bench))
    first, second = (submit(bench, shared(LONG, cards="auto")) for _ in range(2))
    bench.turn_until(lambda: states(bench, first, second) == ["running"] * 2)
    assert not any(slot.lent for slot in bench.supervisor.slots)
    for job in (first, second):
        bench.store.stop_and_decode(job)
    bench.turn_until(lambda: states(bench, first, second) == ["done"] * 2 and free(bench))
    alone = submit(bench, shared(LONG, cards="auto"))
    bench.turn_until(lambda: states(bench, alone) == ["running"])
    assert sum(slot.lent for slot in bench.supervisor.slots) == 1
    one = submit(bench, shared({"steps": 1}, cards=1))
    bench.store.stop_and_decode(alone)
    bench.turn_until(lambda: states(bench, alone, one) == ["done"] * 2)
    assert bench.store.job(one).plan.levers.cards == 1


def test_the_promise_names_both_cards_and_the_seconds_on_them(make: Make) -> None:  # noqa: F811
    bench = make()
    bench.turn_until(lambda: free(bench))
    turn(bench)
    machine = bench.supervisor.context.memory.machine()
    assert machine is not None
    asked = shared({"steps": 1})
    plan = plan_request(asked, machine, disk())
    begin = Cards(lambda: bench.store).begin(plan, machine, disk())
    assert begin is not None and begin.card == "RTX 4090 #1 + RTX 4090 #2"
    assert (begin.start_s, begin.seconds) == (0, pytest.approx(plan.seconds))


def test_the_first_shared_clip_measures_what_cards_send_each_other_and_no_later_one(make: Make) -> None:  # noqa: F811
    bench = make()
    bench.turn_until(lambda: free(bench))

    def rates() -> tuple[tuple[int, float], ...] | None:
        machine = bench.supervisor.context.memory.machine()
        return machine.gpus[0].link_bytes_s if machine else None

    assert rates() is None
    for _ in range(2):
        both = submit(bench, shared({"steps": 1}))
        bench.turn_until(lambda job=both: states(bench, job) == ["done"] and free(bench) and rates() is not None)
    assert rates() == ((2, 1e9),), "of the first job"


class Held(Driver):
    """Two cards, 9 GiB of the second one held by a process."""

    pid = 0

    def __call__(self) -> Sample:
        sample = super().__call__()
        held = (GpuProcess(pid=self.pid, bytes=9 << 30),) if self.pid else ()
        cards = [card.model_copy(update={"processes": held}) if card.uuid == "GPU-b" else card for card in sample.cards]
        return sample.model_copy(update={"cards": tuple(cards)})


def test_the_memory_of_a_follower_is_ours(make_bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbodiff.gpu.probe._version", lambda name: "2.11.0+cu130" if name == "torch" else "")
    monkeypatch.setattr("turbodiff.supervisor.context.inventory", disk)
    driver = Held("GPU-a", "GPU-b")
    bench = make_bench(sample=driver)
    bench.turn_until(lambda: free(bench))
    both = submit(bench, shared(LONG))
    bench.turn_until(lambda: bool(children(bench)))
    (driver.pid,) = children(bench)
    bench.turn_until(lambda: driver.pid in worker_pids(bench.store))
    machine = bench.supervisor.context.memory.machine()
    assert machine is not None and machine.gpus[1].reclaimable_bytes >= 9 << 30
    bench.turn_until(lambda: (seen := machine_of(bench.store)) and seen.gpus[1].reclaimable_bytes >= 9 << 30)
    follower, driver.pid = driver.pid, 0
    bench.store.cancel(both)
    bench.turn_until(lambda: free(bench))
    bench.turn_until(lambda: follower not in worker_pids(bench.store))  # told once a second


def test_the_app_that_is_stopped_leaves_no_process_and_the_job_in_the_queue(make: Make) -> None:  # noqa: F811
    bench = make()
    bench.turn_until(lambda: free(bench))
    both = submit(bench, shared(LONG))
    bench.turn_until(lambda: bool(children(bench)))
    left = children(bench)
    bench.supervisor.close()
    end_s = time.monotonic() + 10
    while any(map(lives, left)) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not any(map(lives, left))
    again = make()
    assert states(again, both) == ["queued"]
