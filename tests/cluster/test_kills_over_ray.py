"""Workers, actors, raylets and the bridge are killed at random moments while clips are made over two nodes of real Ray:
no job is lost, none makes two clips, and a demo clip is the same whatever was killed while it was made.

Four kills in the suite, one of each kind, of the scripted worker; with TURBODIFF_SOAK=1 160 of it and 40 of real ones,
whose start takes most of the time. Without Ray: tests/chaos/test_node_kills.py.
"""

import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from supervisor.bench import SCRIPTED, Bench, request, scripted

from cluster.ray_nodes import Make, Nodes, joined, stream
from tests.soak import SOAK
from turbodiff.cluster import remote
from turbodiff.spec.request import Request
from turbodiff.supervisor.worker_process import WORKER

pytest.importorskip("ray", reason="needs the extra `cluster`")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(4 * 3600)]
ROLES = ("worker", "actor", "raylet", "bridge")
SEEDS = 3
MOST_STRIKES = 4  # of a job: one that was charged six times is parked, as it shall be
LONGEST_S = 3.0 if SOAK else 1.0  # after the last kill: in a soak longer than a clip takes
END_S = 1800.0  # of a busy machine, until all clips are made


def kill(bench: Bench, nodes: Nodes, role: str) -> bool:
    """SIGKILL to what makes a clip now; False where nothing does, or it has just ended."""
    cluster: Any = bench.supervisor.cluster
    busy = [
        slot for slot in bench.supervisor.slots
        if slot.job and slot.worker and slot.worker.pid and sum(slot.job.strikes.values()) < MOST_STRIKES
    ]  # fmt: skip
    if not busy or not cluster.is_up:
        return False
    slot: Any = random.choice(busy)
    try:
        if role == "raylet":
            raylet = nodes.raylet(slot.context.node)
            raylet.kill()
            raylet.wait()
            nodes.fill()
        else:
            pid = {"worker": lambda: slot.worker.pid, "bridge": lambda: cluster._child.pid,
                   "actor": lambda: psutil.Process(slot.worker.pid).ppid()}[role]()  # fmt: skip
            os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess, StopIteration):
        return False
    return True


def asked(demo: bool, seed: int) -> Request:
    if demo:
        return request("a red circle moves right", model="demo", seed=seed, num_frames=5)
    return scripted({"steps": random.randrange(2, 12), "dt_s": 0.2}, seed=seed)


def roles() -> Iterator[str]:
    """Each kind of kill once, in a random order, again and again."""
    return itertools.chain.from_iterable(random.sample(ROLES, len(ROLES)) for _ in itertools.count())


@pytest.mark.parametrize(("kills", "demo"), [(160, False), (40, True)] if SOAK else [(4, False)])
def test_kills_over_ray_lose_no_clip_double_none_and_change_no_pixel(
    kills: int,
    demo: bool,
    make_bench: Make,
    nodes: Nodes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", (0.5,) * 6)
    random.seed(20261130)
    bench = joined(make_bench, nodes, worker_argv=WORKER if demo else SCRIPTED)
    killed, jobs = Counter[str](), list[int]()
    for role in itertools.islice(roles(), kills):
        wanted_s = bench.supervisor.context.now() + random.uniform(0, LONGEST_S)
        while bench.supervisor.context.now() < wanted_s or not kill(bench, nodes, role):
            while bench.store.overview(0)[1] < 2:
                jobs.append(bench.store.submit(asked(demo, len(jobs) % SEEDS)))
            bench.supervisor.tick(0.02)
        killed[role] += 1
        print(killed.total(), role, len(jobs), flush=True)
    bench.turn_until(lambda: all(bench.store.job(job).over for job in jobs), END_S)
    found = [bench.store.job(job) for job in jobs]
    clips = [job.result.path for job in found if job.result]
    attempts = sum(job.attempt for job in found)
    print(f"{dict(killed)}; {len(jobs)} jobs, {attempts} attempts, {len(clips)} clips")
    assert [job.state for job in found] == ["done"] * len(jobs), bench.log_text()
    assert sorted(clips) == sorted(map(str, bench.outputs.glob("2*/*.mp4"))) and len(set(clips)) == len(jobs)
    if demo:
        pixels = {(job.request.seed, stream(job.result.path, tmp_path)) for job in found if job.result}
        assert len(pixels) == len({job.request.seed for job in found})
