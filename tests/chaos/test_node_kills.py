"""Workers, nodes and the bridge to them are lost at random moments while jobs run there; nothing is lost or doubled.

A lost node's worker lives on and finishes its clip, as one that nobody can reach: 20 kills in the suite, 200 in
`scripts/test soak`. Behind a bridge without Ray; with Ray: tests/cluster/test_remote_workers.py.
"""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster.conftest import FarBench, far  # noqa: F401
from supervisor.bench import scripted
from supervisor.fixtures import no_rest  # noqa: F401

from tests.soak import SOAK
from turbodiff.cluster import remote
from turbodiff.spec.files import sha256_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
KILLS = 200 if SOAK else 20
NODES = [{"node": f"n{n}", "host": f"far{n}", "cards": 2} for n in range(2)]


def take(bench: FarBench, role: str) -> bool:
    """SIGKILL to a worker or the bridge, or the loss of a node, where a job runs; False where none does."""
    if not bench.supervisor.cluster.is_up:  # type: ignore[union-attr]
        return False
    busy = [slot for slot in bench.supervisor.slots if slot.job and slot.worker and slot.worker.pid]
    if not busy:
        return False
    slot = random.choice(busy)
    if role == "node":
        job, attempt = slot.job.id, slot.job.attempt
        bench.list_nodes(*[node for node in NODES if node["node"] != slot.context.node])
        bench.turn_until(lambda: (found := bench.store.job(job)).over or found.attempt > attempt or found.strikes)
        bench.list_nodes(*NODES)  # it comes back, and its words of before are nobody's
    else:
        cluster: Any = bench.supervisor.cluster
        try:
            os.kill(slot.worker.pid if role == "worker" else cluster._child.pid, signal.SIGKILL)
        except ProcessLookupError:  # it was just ending by itself
            return False
    return True


def test_kills_of_workers_nodes_and_the_bridge_lose_no_job_and_double_none(
    far: Callable[..., FarBench],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", (0.05,) * 6)
    random.seed(20261129)
    bench, killed, jobs = far(), Counter[str](), list[int]()
    bench.list_nodes(*NODES)
    while killed.total() < KILLS:
        while bench.store.overview(0)[1] < 3:
            jobs.append(bench.store.submit(scripted({"steps": random.randrange(2, 12), "dt_s": 0.1})))
        wanted = bench.supervisor.context.now() + random.uniform(0, 0.6)
        bench.turn_until(lambda wanted=wanted: bench.supervisor.context.now() > wanted)
        role = random.choice(("worker", "worker", "node", "bridge"))
        killed[role] += take(bench, role)
    bench.turn_until(lambda: all(bench.store.job(job).over for job in jobs), 600.0)
    found = [bench.store.job(job) for job in jobs]
    doubled = len(list(bench.outputs.glob("2*/*.mp4"))) - len(jobs)
    attempts = sum(job.attempt for job in found)
    print(f"{dict(killed)}; {len(jobs)} jobs, {attempts} attempts, doubled {doubled}")
    assert [job.state for job in found] == ["done"] * len(jobs), bench.log_text()
    paths = [job.result.path for job in found if job.result]
    assert sorted(paths) == sorted(map(str, bench.outputs.glob("2*/*.mp4"))) and len(set(paths)) == len(jobs)
    for path in paths:
        assert json.loads(Path(f"{path}.json").read_text())["sha256"] == sha256_of(Path(path))
