"""A head and two nodes of one card each, of real Ray on this machine, for the tests of the mark `cluster`."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from supervisor.bench import Bench

from turbodiff.cluster import remote
from turbodiff.media.ffmpeg import ffmpeg_path

Make = Callable[..., Bench]
PATIENCE_S = 300.0  # of a busy machine
STARTS = 10
ALONE = {"node_ip_address": "127.0.0.1", "include_log_monitor": False}
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


def again(start: Callable[[], Any]) -> Any:
    """What starts in the end: Ray gives up after 30 s, in which a busy machine may not have started a process."""
    for _ in range(STARTS - 1):
        with suppress(Exception):
            return start()
    return start()


class Nodes:
    """A head and two nodes of one card each; a node that a test took is replaced, and all of them if it took the head.
    Neither an autoscaler nor what gathers logs runs beside them: each takes as long to start as a node."""

    def __init__(self) -> None:
        self.cluster: Any = None
        self.nodes: list[Any] = []
        self.fill()

    def fill(self) -> None:
        from ray.cluster_utils import Cluster

        if self.cluster is not None and self.cluster.head_node.dead_processes():
            self.end()
        if self.cluster is None:
            head = {**ALONE, "num_cpus": 0, "include_dashboard": False, "no_monitor": True}
            self.cluster = again(lambda: Cluster(initialize_head=True, head_node_args=head))
        one = {**ALONE, "num_cpus": 1, "num_gpus": 1}
        while len(self.nodes) < 2:  # not in threads: a raylet dies with the thread that started it
            self.nodes.append(again(lambda: self.cluster.add_node(**one)))

    def end(self) -> None:
        self.cluster.shutdown()
        self.cluster, self.nodes = None, []

    def raylet(self, node: str, keep: bool = False) -> subprocess.Popen[bytes]:
        """The raylet of a node, which is no longer counted among ours unless we `keep` it. Whoever ends it reaps it: to
        Ray's workers a corpse counts as a raylet that lives."""
        found = next(one for one in self.nodes if one.node_id == node)
        if not keep:
            self.nodes.remove(found)
        return found.all_processes["raylet"][0].process

    def gcs(self) -> int:
        return int(self.cluster.head_node.all_processes["gcs_server"][0].process.pid)


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[Nodes]:
    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    made = Nodes()
    yield made
    made.end()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(name="nodes")
def filled_nodes(ray_nodes: Nodes) -> Nodes:
    ray_nodes.fill()
    return ray_nodes


def joined(make_bench: Make, nodes: Nodes, most_cards: int = 2, **options: Any) -> Bench:
    cluster = partial(remote.Cluster, address=nodes.cluster.address, most_cards=most_cards)
    return make_bench(**{"devices": (), "cluster": cluster, **options})


def stream(clip: str, folder: Path) -> bytes:
    """The video of a clip without its tags, which name the job and its time."""
    bare = ["-map_metadata", "-1", "-fflags", "+bitexact", "-c", "copy", "-f", "mp4"]
    subprocess.run([ffmpeg_path(), "-v", "error", "-y", "-i", clip, *bare, folder / "bare.mp4"], check=True)
    return (folder / "bare.mp4").read_bytes()
