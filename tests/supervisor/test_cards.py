"""Cards that appear and go while the supervisor runs, and which job runs on which."""

from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.bench import Bench, scripted
from tests.gpu.conftest import fake_nvml, fake_nvml_folder  # noqa: F401  the fixtures of that room
from tests.plan.machines import disk
from turbodiff.gpu import probe
from turbodiff.gpu.probe import CardSample, Sample
from turbodiff.jobs.dispatch import MOST_OVERTAKEN
from turbodiff.plan.hardware import only
from turbodiff.plan.planner import plan_request, seconds_on
from turbodiff.supervisor import context
from turbodiff.supervisor.cards import follow_cards

Make = Callable[..., Bench]
GIB = 1 << 30
SLOW = {"steps": 2000, "dt_s": 0.3}


class Driver:
    """What the probe says: the cards of `ids`, or that the driver does not answer."""

    def __init__(self, *ids: str, state: str = "ok") -> None:
        self.ids, self.state = ids, state

    def __call__(self) -> Sample:
        cards = [
            CardSample(
                name=f"NVIDIA GeForce RTX {'4060 Ti' if uuid == 'GPU-16' else '4090'}", uuid=uuid, nvml_index=index,
                capability=(8, 9), total_bytes=size * GIB, free_bytes=(size - 1) * GIB, used_bytes=GIB,
            )
            for index, uuid in enumerate(self.ids)
            for size in (16 if uuid == 'GPU-16' else 24,)
        ]  # fmt: skip
        return Sample(state=self.state, error="", driver="580.1", cards=tuple(cards), taken_s=id(cards) / 1e6)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_selected_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("turbodiff.supervisor.supervisor.SLOW_TICK_S", 0.05)


def devices(bench: Bench) -> list[str]:
    return [slot.device for slot in bench.supervisor.slots]


def test_a_driver_that_answers_late_gets_a_worker_for_each_card_all_the_same(make_bench: Make) -> None:
    driver = Driver(state="hang")
    bench = make_bench(sample=driver)
    assert devices(bench) == [""]
    job = bench.store.submit(scripted({"steps": 60, "dt_s": 0.05}))
    bench.turn_until(lambda: bench.slot.job)
    first = bench.slot.worker.pid
    driver.ids, driver.state = ("GPU-a", "GPU-b"), "ok"
    bench.turn_until(lambda: len(bench.supervisor.slots) == 2 and bench.supervisor.slots[1].free)
    assert devices(bench) == ["GPU-a", "GPU-b"] and bench.slot.worker.pid == first  # what ran goes on
    environment = Path(f"/proc/{bench.supervisor.slots[1].worker.pid}/environ").read_bytes()
    assert b"CUDA_VISIBLE_DEVICES=GPU-b\0" in environment
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).attempt == 1


def test_two_cards_whose_driver_needs_three_seconds_for_its_first_answer_get_a_worker_each(
    make_bench: Make,
    fake_nvml: Callable[[str], None],  # noqa: F811
) -> None:
    fake_nvml("slow_two")
    bench = make_bench(sample=None)  # a probe of its own, and the driver's library behind it
    assert devices(bench) == [""]
    bench.turn_until(lambda: len(bench.supervisor.slots) == 2 and all(slot.free for slot in bench.supervisor.slots))
    assert devices(bench) == ["GPU-aaaa", "GPU-bbbb"]
    jobs = [bench.store.submit(scripted({"steps": 3, "dt_s": 0.5})) for _ in range(2)]
    bench.turn_until(lambda: all(bench.store.job(job).state == "running" for job in jobs))
    assert {bench.store.job(job).slot for job in jobs} == {0, 1}


def test_the_job_of_a_card_that_is_gone_moves_to_another(make_bench: Make) -> None:
    driver = Driver("GPU-a", "GPU-b")
    bench = make_bench(sample=driver)
    jobs = [bench.store.submit(scripted(SLOW, {"steps": 1})) for _ in range(2)]
    bench.turn_until(lambda: all(bench.store.job(job).state == "running" for job in jobs))
    lost = bench.supervisor.slots[0]
    moved, pid = lost.job.id, lost.worker.pid
    driver.ids = ("GPU-b",)
    bench.turn_until(lambda: devices(bench) == ["GPU-b"])
    assert bench.store.job(moved).state == "queued" and bench.store.job(moved).strikes == {}
    assert not Path(f"/proc/{pid}").exists()
    assert bench.supervisor.slots[0].card == 0  # where the probe has it now, for its memory
    stays = next(job for job in jobs if job != moved)
    assert bench.store.job(stays).state == "running" and bench.store.job(stays).attempt == 1
    bench.store.cancel(stays)
    bench.turn_until(lambda: bench.store.job(moved).state == "done")
    driver.ids = ("GPU-b", "GPU-a")
    bench.turn_until(lambda: devices(bench) == ["GPU-b", "GPU-a"])
    assert len({slot.index for slot in bench.supervisor.slots}) == 2


def test_a_card_that_is_missing_for_a_moment_and_a_driver_that_falls_silent_end_nothing(make_bench: Make) -> None:
    driver = Driver("GPU-a", "GPU-b")
    bench = make_bench(sample=driver)
    jobs = [bench.store.submit(scripted(SLOW)) for _ in range(2)]
    bench.turn_until(lambda: all(bench.store.job(job).state == "running" for job in jobs))
    supervisor = bench.supervisor
    for seen in (Driver("GPU-b"), Driver("GPU-b"), driver, Driver("GPU-a"), Driver("GPU-a"), driver):
        assert follow_cards(supervisor.context, supervisor.slots, seen()) == supervisor.slots
    for _ in range(5):
        for silent in (Driver(), Driver(state="hang"), Driver("GPU-b", state="lost")):
            assert follow_cards(supervisor.context, supervisor.slots, silent()) == supervisor.slots
    assert all(bench.store.job(job).state == "running" for job in jobs)


def test_a_job_that_the_fast_card_ends_sooner_waits_for_it_and_the_next_one_takes_the_idle_card(
    make_bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_version", lambda name: "2.11.0+cu130" if name == "torch" else "")
    monkeypatch.setattr(context, "inventory", disk)
    driver = Driver("GPU-16", "GPU-24")
    bench = make_bench(sample=driver)
    machine = bench.supervisor.context.memory.machine()
    assert machine is not None
    asked = scripted(SLOW, model="Wan2.1-14B", num_frames=81)
    plan = plan_request(asked, only(machine, "cuda:1"), disk())
    first, second = (bench.store.job(bench.store.submit(asked, plan)) for _ in range(2))
    slow, fast = (seconds_on(plan, gpu, machine, disk()) for gpu in machine.gpus)
    assert slow and fast and slow[0] > 2 * fast[0]  # the button says the seconds of the fast one
    bench.turn_until(lambda: bench.store.job(first.id).state == "running")
    assert bench.store.job(first.id).slot == 1
    for _ in range(60):
        bench.supervisor.tick(0.02)
    assert bench.store.job(second.id).state == "queued"  # sooner done behind the first than on the slow card
    small = bench.store.submit(scripted({"steps": 1}))
    bench.turn_until(lambda: bench.store.job(small).state == "done")
    assert bench.store.job(small).slot == 0


def test_how_often_a_job_was_overtaken_outlives_a_restart(
    make_bench: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three jobs pass one that waits for the fast card; after a restart none passes it any more."""
    monkeypatch.setattr(probe, "_version", lambda name: "2.11.0+cu130" if name == "torch" else "")
    monkeypatch.setattr(context, "inventory", disk)
    bench = make_bench(sample=Driver("GPU-16", "GPU-24"))
    machine = bench.supervisor.context.memory.machine()
    assert machine is not None
    asked = scripted(SLOW, model="Wan2.1-14B", num_frames=81)
    plan = plan_request(asked, only(machine, "cuda:1"), disk())
    first, waits = (bench.store.submit(asked, plan) for _ in range(2))
    bench.turn_until(lambda: bench.store.job(first).state == "running")
    small = [bench.store.submit(scripted({"steps": 1})) for _ in range(5)]
    bench.turn_until(lambda: all(bench.store.job(job).state == "done" for job in small[:3]))
    assert bench.store.job(waits).overtaken == MOST_OVERTAKEN
    bench.supervisor.close()
    again = make_bench(sample=Driver("GPU-16", "GPU-24"))
    again.turn_until(lambda: again.store.job(first).state == "running" and again.supervisor.slots[0].free)
    for _ in range(60):
        again.supervisor.tick(0.02)
    assert [again.store.job(job).state for job in (waits, *small[3:])] == ["queued"] * 3
