"""The cards of two nodes, with real Ray on one machine: what ends is replaced, and a clip is published once."""

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from supervisor.bench import Bench, request, scripted, wait_until

from cluster.ray_nodes import PATIENCE_S, Make, Nodes, again, joined, stream
from turbodiff.archive.clips import read_sidecar
from turbodiff.cluster.host import SCRATCH
from turbodiff.jobs.nodes import cluster_facts
from turbodiff.spec.files import sha256_of
from turbodiff.supervisor.worker_process import WORKER

pytest.importorskip("ray", reason="needs the extra `cluster`")
pytestmark = pytest.mark.cluster
LONG = {"steps": 400, "dt_s": 0.05}
WITHOUT_TURBODIFF = """
import sys
class Absent:
    def find_spec(name, *more):
        if name.partition(".")[0] == "turbodiff":
            raise ImportError("not installed here")
sys.meta_path.insert(0, Absent)
"""


def running(bench: Bench, job: int) -> Any:
    """The slot on which a job has taken its first step."""
    bench.turn_until(lambda: (told := bench.store.job(job).progress) and told.step, PATIENCE_S)
    return next(slot for slot in bench.supervisor.slots if slot.job and slot.job.id == job)


def alive(pid: int) -> bool:
    """Whether a process runs; nobody may reap one whose parents are gone."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def clips(bench: Bench) -> list[Path]:
    return sorted(bench.outputs.glob("*/*.mp4"))


def test_the_demo_clip_of_a_node_is_that_of_this_machine_bit_for_bit(
    make_bench: Make, nodes: Nodes, tmp_path: Path
) -> None:
    asked = request("a red circle moves right", model="demo", seed=5, num_frames=5)
    there = joined(make_bench, nodes, most_cards=1, worker_argv=WORKER)
    here = Bench(tmp_path / "here", worker_argv=WORKER)
    number, same = there.store.submit(asked), here.store.submit(asked)

    def both_over() -> bool:
        here.supervisor.tick(0.02)
        return there.store.job(number).over and here.store.job(same).over

    there.turn_until(both_over, PATIENCE_S)
    far, near = there.store.job(number), here.store.job(same)
    here.supervisor.close()
    assert far.state == "done", there.log_text()
    assert far.result is not None and Path(far.result.path).is_relative_to(there.outputs)
    assert not list((there.outputs / ".partial").iterdir())
    assert near.result is not None, here.log_text()
    assert stream(far.result.path, tmp_path) == stream(near.result.path, tmp_path)


def test_a_worker_an_actor_and_a_node_that_die_cost_the_attempt_and_not_the_clip(
    make_bench: Make, nodes: Nodes, tmp_path: Path
) -> None:
    bench, picture = joined(make_bench, nodes), tmp_path / "start.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    job = bench.store.submit(scripted(LONG, LONG, LONG, {"steps": 2}, model="demo-i2v", image=str(picture)))
    slot = running(bench, job)
    assert list(Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/files/{sha256_of(picture)}.png"))  # it went there
    os.kill(slot.worker.pid, signal.SIGKILL)
    bench.turn_until(lambda: bench.store.job(job).attempt == 2, PATIENCE_S)
    slot = running(bench, job)
    os.kill(psutil.Process(slot.worker.pid).ppid(), signal.SIGKILL)
    bench.turn_until(lambda: bench.store.job(job).attempt == 3, PATIENCE_S)
    assert bench.store.job(job).strikes == {"killed": 2}
    slot = running(bench, job)
    raylet = nodes.raylet(slot.context.node)
    raylet.kill()
    raylet.wait()
    bench.turn_until(lambda: bench.store.job(job).over, PATIENCE_S)
    done = bench.store.job(job)
    assert (done.state, done.strikes) == ("done", {"killed": 2, "node": 1}), bench.log_text()
    assert [read_sidecar(clip).request.image for clip in clips(bench)] == [str(picture)]


def test_the_clip_of_a_node_that_nobody_could_reach_is_refused(make_bench: Make, nodes: Nodes) -> None:
    bench = joined(make_bench, nodes)
    job = bench.store.submit(scripted({"steps": 240, "dt_s": 0.05}, {"steps": 120, "dt_s": 0.05}))
    slot = running(bench, job)
    zombie, raylet = slot.worker.pid, nodes.raylet(slot.context.node)
    raylet.send_signal(signal.SIGSTOP)
    try:
        bench.turn_until(lambda: bench.store.job(job).attempt == 2, PATIENCE_S)
        assert alive(zombie)  # it goes on and makes its clip
        bench.turn_until(lambda: bench.store.job(job).over, PATIENCE_S)
    finally:
        raylet.send_signal(signal.SIGCONT)
        raylet.wait(60)
    done = bench.store.job(job)
    assert (done.state, done.attempt, done.strikes) == ("done", 2, {"node": 1}), bench.log_text()
    assert wait_until(lambda: not alive(zombie), 60)
    for _ in range(20):
        bench.supervisor.tick(0.05)
    assert len(clips(bench)) == 1 and not list((bench.outputs / ".partial").iterdir())


def test_a_node_that_comes_back_in_time_keeps_its_job_and_one_that_comes_back_later_gets_others(
    make_bench: Make, nodes: Nodes
) -> None:
    bench = joined(make_bench, nodes)
    job = bench.store.submit(scripted({"steps": 80, "dt_s": 0.1}))
    slot = running(bench, job)
    raylet = nodes.raylet(slot.context.node, keep=True)
    raylet.send_signal(signal.SIGSTOP)
    silent_s = time.monotonic()
    bench.turn_until(lambda: time.monotonic() > silent_s + 3.0)  # it is given up after eight
    raylet.send_signal(signal.SIGCONT)
    bench.turn_until(lambda: bench.store.job(job).over, PATIENCE_S)
    assert (bench.store.job(job).state, bench.store.job(job).attempt) == ("done", 1), bench.log_text()
    for one in list(nodes.nodes):  # both are lost while nothing runs there, and come back under other names
        raylet = nodes.raylet(one.node_id)
        raylet.kill()
        raylet.wait()
    bench.turn_until(lambda: not bench.supervisor.slots, PATIENCE_S)
    nodes.fill()
    again = [bench.store.submit(scripted({"steps": 1})) for _ in range(2)]
    bench.turn_until(lambda: all(bench.store.job(job).over for job in again), PATIENCE_S)
    assert [(bench.store.job(job).state, bench.store.job(job).strikes) for job in again] == [("done", {})] * 2
    assert len(clips(bench)) == 3 and not list((bench.outputs / ".partial").iterdir())


def test_without_its_head_a_cluster_costs_its_jobs_an_attempt_and_this_machine_goes_on(
    make_bench: Make, nodes: Nodes
) -> None:
    bench = joined(make_bench, nodes, devices=("",))
    endless = {"steps": 100_000, "dt_s": 0.05}  # this machine's own card is free no sooner than it is asked to end
    first = bench.store.submit(scripted(endless))
    assert not running(bench, first).context.node
    second = bench.store.submit(scripted(endless, {"steps": 1}))
    assert running(bench, second).context.node
    os.kill(nodes.gcs(), signal.SIGKILL)
    bench.turn_until(lambda: not bench.supervisor.cluster.is_up, PATIENCE_S)  # type: ignore[union-attr]
    bench.store.stop_and_decode(first)
    for job in (first, second):
        bench.turn_until(lambda job=job: bench.store.job(job).over, PATIENCE_S)
        assert (bench.store.job(job).state, bench.store.job(job).strikes) == ("done", {})
    assert "cluster" in bench.log_text() and len(clips(bench)) == 2


def test_a_node_on_which_turbodiff_does_not_run_is_named_once_and_costs_nobody_else(
    make_bench: Make, nodes: Nodes, tmp_path: Path
) -> None:
    """A process was started on it every second, and the log said each time that it was lost."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TURBODIFF)  # its path is the driver's: Ray passes that on
    bare = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "num_gpus": 1, "env_vars": {"PYTHONPATH": str(tmp_path)}}
    node = again(lambda: nodes.cluster.add_node(**bare))
    try:
        bench = joined(make_bench, nodes, most_cards=9)
        job = bench.store.submit(scripted({"steps": 1}))
        bench.turn_until(lambda: "not installed here" in bench.log_text(), PATIENCE_S)
        bench.turn_until(lambda: bench.store.job(job).over, PATIENCE_S)
        told = cluster_facts(bench.store)
        assert told is not None and "unfit" in [one.state for one in told.nodes], bench.log_text()
        assert node.node_id not in {slot.context.node for slot in bench.supervisor.slots}
    finally:
        nodes.cluster.remove_node(node, allow_graceful=False)
    bench.turn_until(lambda: node.node_id not in bench.supervisor.cluster.nodes, PATIENCE_S)  # type: ignore[union-attr]
    assert bench.log_text().count("does not run there") == 1
