"""The cards of two nodes, with real Ray on one machine: what ends is replaced, and a clip is published once."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from supervisor.bench import Bench, request, scripted, wait_until

from turbodiff.archive.clips import read_sidecar
from turbodiff.cluster import remote
from turbodiff.cluster.host import SCRATCH
from turbodiff.media.ffmpeg import ffmpeg_path
from turbodiff.spec.files import sha256_of
from turbodiff.supervisor.worker_process import WORKER

pytest.importorskip("ray", reason="needs the extra `cluster`")
pytestmark = pytest.mark.cluster
Make = Callable[..., Bench]
PATIENCE_S = 300.0  # of a busy machine
# loopback alone; a node that is silent is given up after seconds, and the driver ends seconds after the head
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_niceness": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
LONG = {"steps": 400, "dt_s": 0.05}


class Nodes:
    """A head and two nodes of one card each; a node that a test took is replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"},
        )
        self.nodes: list[Any] = []
        self.fill()

    def fill(self) -> None:
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=1, num_gpus=1, node_ip_address="127.0.0.1"))

    def raylet(self, node: str, keep: bool = False) -> subprocess.Popen[bytes]:
        """The raylet of a node, which is no longer counted among ours unless we `keep` it. Whoever ends it reaps it: to
        Ray's workers a corpse counts as a raylet that lives."""
        found = next(one for one in self.nodes if one.node_id == node)
        if not keep:
            self.nodes.remove(found)
        return found.all_processes["raylet"][0].process

    def gcs(self) -> int:
        return int(self.cluster.head_node.all_processes["gcs_server"][0].process.pid)


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[Nodes]:
    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    made = Nodes()
    yield made
    made.cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def nodes(ray_nodes: Nodes) -> Nodes:
    ray_nodes.fill()
    return ray_nodes


def joined(make_bench: Make, nodes: Nodes, most_cards: int = 2, **options: Any) -> Bench:
    cluster = partial(remote.Cluster, address=nodes.cluster.address, most_cards=most_cards)
    return make_bench(**{"devices": (), "cluster": cluster, **options})


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


def stream(clip: str, folder: Path) -> bytes:
    """The video of a clip without its tags, which name the job and its time."""
    bare = ["-map_metadata", "-1", "-fflags", "+bitexact", "-c", "copy", "-f", "mp4"]
    subprocess.run([ffmpeg_path(), "-v", "error", "-y", "-i", clip, *bare, folder / "bare.mp4"], check=True)
    return (folder / "bare.mp4").read_bytes()


def test_the_demo_clip_of_a_node_is_that_of_this_machine_bit_for_bit(
    make_bench: Make, nodes: Nodes, tmp_path: Path
) -> None:
    asked = request("a red circle moves right", model="demo", seed=5, num_frames=5)
    there = joined(make_bench, nodes, most_cards=1, worker_argv=WORKER)
    far = there.run(asked, PATIENCE_S)
    assert far.state == "done", there.log_text()
    assert far.result is not None and Path(far.result.path).is_relative_to(there.outputs)
    assert not list((there.outputs / ".partial").iterdir())
    there.supervisor.close()
    here = Bench(tmp_path / "here", worker_argv=WORKER)
    near = here.run(asked, PATIENCE_S)
    here.supervisor.close()
    assert near.result is not None
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
    job = bench.store.submit(scripted({"steps": 300, "dt_s": 0.05}, {"steps": 200, "dt_s": 0.05}))
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
    first = bench.store.submit(scripted(LONG, {"steps": 1}))
    second = bench.store.submit(scripted(LONG, {"steps": 1}))
    slots = [running(bench, job) for job in (first, second)]
    assert any(slot.context.node for slot in slots), bench.log_text()
    os.kill(nodes.gcs(), signal.SIGKILL)
    bench.turn_until(lambda: not bench.supervisor.cluster.is_up, PATIENCE_S)  # type: ignore[union-attr]
    for job in (first, second):
        bench.turn_until(lambda job=job: bench.store.job(job).over, PATIENCE_S)
        assert (bench.store.job(job).state, bench.store.job(job).strikes) == ("done", {})
    assert "cluster" in bench.log_text() and len(clips(bench)) == 2
