"""The demo clip that the queue makes on two processes is that of one, bit for bit, also where one of them is killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from supervisor.bench import Bench
from supervisor.test_cards import Driver
from tests.runtime.test_ranks import bare
from tests.test_tiny import PROMPT
from turbodiff.jobs.cards import fleet
from turbodiff.studio import Studio
from turbodiff.supervisor.worker_process import WORKER

Make = Callable[..., Bench]
FIELDS = {"prompt": PROMPT, "seed": 7, "steps": 2, "num_frames": 17}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("alone")
    studio = Studio(folder / "state", folder / "outputs")
    made = studio.generate(FIELDS, output=None, device="cpu", on_event=lambda event: None)
    return bare(made.path, folder)


def followers(bench: Bench) -> list[psutil.Process]:
    workers = [slot.worker.pid for slot in bench.supervisor.slots if slot.worker]
    found = [child for pid in workers for child in psutil.Process(pid).children(recursive=True)]
    return [child for child in found if "turbodiff.runtime.follower" in child.cmdline()]


def done(bench: Bench, job: int, timeout_s: float = 300.0) -> None:
    bench.turn_until(lambda: bench.store.job(job).over, timeout_s)
    assert bench.store.job(job).state == "done", bench.log_text()


def test_on_a_cpu(make_bench: Make, alone: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bench = make_bench(worker_argv=WORKER)
    studio = Studio(bench.state, bench.outputs)
    job = studio.submit({**FIELDS, "cards": "2"})
    seen: list[int] = []
    bench.turn_until(lambda: bool(seen.extend(child.pid for child in followers(bench)) or seen), 300.0)
    done(bench, job)
    made = bench.store.job(job)
    assert made.plan.levers.cards == 2 and made.attempt == 1
    assert not [event for _, event in bench.store.events(job) if event.type == "notice" and event.key == "ranks_lost"]
    assert bare(made.result.path, tmp_path) == alone
    assert not followers(bench) and not any(map(psutil.pid_exists, seen))
    studio.close()


@pytest.mark.chaos
def test_on_two_cards_one_of_which_is_lost_on_the_way(
    make_bench: Make, alone: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("turbodiff.gpu.probe._version", lambda name: "2.11.0+cu130" if name == "torch" else "")
    bench = make_bench(worker_argv=WORKER, sample=Driver("GPU-a", "GPU-b"))  # cards that no torch here sees: CPUs
    bench.turn_until(lambda: all(slot.free for slot in bench.supervisor.slots) and bool(fleet(bench.store)), 300.0)
    studio = Studio(bench.state, bench.outputs)
    job = studio.submit({**FIELDS, "cards": "2"})
    assert {share.uuid for share in studio.job(job).plan.shares} == {"GPU-a", "GPU-b"}
    bench.turn_until(lambda: any(event.type == "step" for _, event in bench.store.events(job)), 300.0)
    (follower,) = followers(bench)
    assert sum(slot.lent for slot in bench.supervisor.slots) == 1
    assert follower.environ()["CUDA_VISIBLE_DEVICES"] in ("GPU-a", "GPU-b")
    os.kill(follower.pid, signal.SIGKILL)
    done(bench, job)
    made = bench.store.job(job)
    (lost,) = [event for _, event in bench.store.events(job) if event.type == "notice" and event.key == "ranks_lost"]
    assert lost.numbers["left"] == 1 and made.attempt == 1 and made.plan.levers.cards == 1
    memory = bench.supervisor.context.memory
    bench.turn_until(lambda: bool((machine := memory.machine()) and machine.gpus[0].link_bytes_s), 60.0)
    machine = memory.machine()
    assert machine is not None and machine.gpus[0].link_bytes_s is not None
    ((cards, bytes_s),) = machine.gpus[0].link_bytes_s
    assert cards == 2 and bytes_s > 1e6
    again = studio.plan({**FIELDS, "cards": "2"}, machine)
    assert [reason.key for reason in again.reasons if reason.key.startswith("link_")] == ["link_measured"]
    assert bare(made.result.path, tmp_path) == alone
    bench.turn_until(lambda: all(slot.free for slot in bench.supervisor.slots), 300.0)
    assert not followers(bench)
    studio.close()
