import gc
import json
import os
from pathlib import Path

import psutil
import pytest
from supervisor.bench import Bench, request
from supervisor.cards import Card

from turbodiff.archive import clips
from turbodiff.gpu.probe import machine_now
from turbodiff.jobs import store
from turbodiff.plan.hardware import pretend
from turbodiff.plan.planner import plan_request
from turbodiff.spec.request import make_request
from turbodiff.supervisor import slots as slots
from turbodiff.weights.locate import inventory

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
JOBS, JOBS_OF_A_WORKER = 500, 20
PROMPT = "A stylish woman walks down a street of neon signs, rain on the asphalt, the camera follows her. " * 3


def test_fault_82_five_hundred_jobs_leak_nothing_and_take_8_kb_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(slots, "RECYCLE_JOBS", JOBS_OF_A_WORKER)
    asked = make_request({"prompt": PROMPT, "model": "wan2.1-14b", "resolution": "720p"}).seeded()
    plan = plan_request(asked, pretend(machine_now(), 24.0), inventory())
    for module, name in ((clips, "_read_once"), (store, "asked_of")):  # kept for the page: 512 and 128 of them, no more
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    bench = Bench(tmp_path, sample=Card())
    bench.run(request())

    def held() -> tuple[int, int]:
        gc.collect()  # what earlier tests left open
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        return len(list(Path("/proc/self/fd").iterdir())), len(children)

    before, rss_bytes = held(), psutil.Process().memory_info().rss
    script = json.dumps({"steps": 1, "about": PROMPT})
    jobs = [bench.store.submit(request(script), plan) for _ in range(JOBS)]
    bench.turn_until(lambda: bench.store.job(jobs[-1]).over, 60 + JOBS)
    bench.turn_until(lambda: bench.slot.free)
    assert all(now <= then for now, then in zip(held(), before, strict=True))
    assert psutil.Process().memory_info().rss - rss_bytes < 10 << 20
    bench.store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    assert bench.store.path.stat().st_size < 8192 * JOBS
    bench.supervisor.close()
