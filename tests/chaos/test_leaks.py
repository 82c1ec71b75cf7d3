import os
from pathlib import Path

import psutil
import pytest
from jobs.bench import Bench, request, scripted

from turbodiff.jobs import slot as slots

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
JOBS, JOBS_OF_A_WORKER = 500, 20


def test_fault_82_five_hundred_jobs_leak_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "RECYCLE_JOBS", JOBS_OF_A_WORKER)
    bench = Bench(tmp_path)
    bench.run(request())

    def held() -> tuple[int, int]:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        return len(list(Path("/proc/self/fd").iterdir())), len(children)

    before, rss_bytes = held(), psutil.Process().memory_info().rss
    jobs = [bench.store.submit(scripted({"steps": 1})) for _ in range(JOBS)]
    bench.turn_until(lambda: bench.store.job(jobs[-1]).over, 60 + JOBS)
    bench.turn_until(lambda: bench.slot.free)
    assert held() == before
    assert psutil.Process().memory_info().rss - rss_bytes < 10 << 20
    bench.supervisor.close()
