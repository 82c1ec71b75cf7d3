"""How long people wait: a cold clip, a warm one, the help text, a plan, a submit. Run it on an idle machine.

    python scripts/bench_app.py [--runs 3]
    python scripts/bench_app.py --load          the page with 5,000 clips, 500 waiting jobs, 50 clients, ten tabs
    python scripts/bench_app.py --library 10000     the gallery with so many clips: opening, search, filter, sort

Prints a table; the last line is JSON, which is also kept, dated, under scripts/results/.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
TURBODIFF = [sys.executable, "-m", "turbodiff.cli"]
PROMPT = "a red circle moves right on a black background"


def seconds_of(command: list[str], folder: str) -> float:
    """Wall seconds of one command that must succeed."""
    start_s = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": sys.path[0]})
    return time.perf_counter() - start_s


def median_ms(call: Callable[[], object], runs: int) -> float:
    """Median milliseconds of a call in this process."""
    times = []
    for _ in range(runs):
        start_s = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start_s))
    return statistics.median(times)


def cold_clip(runs: int) -> dict[str, float]:
    """Fresh processes and a fresh state folder each time; the first run, which fills the page cache, is not counted."""
    seconds = []
    for run in range(runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TURBODIFF_STATE"] = str(Path(folder) / "state")
            took_s = seconds_of([*TURBODIFF, "generate", PROMPT, "--seed", str(run), "-o", "out.mp4"], folder)
            seconds += [took_s] if run else []
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"cold_clip_s": statistics.median(seconds), "cold_clip_peak_gib": peak_kib / 2**20}


def warm_clip(runs: int) -> dict[str, float]:
    """From the command to the result in a worker that made a clip before; each has another prompt and another seed."""
    from turbodiff.gpu.probe import machine_now
    from turbodiff.plan.planner import plan_request
    from turbodiff.spec.events import RunCommand
    from turbodiff.spec.request import make_request
    from turbodiff.supervisor.worker_process import Worker
    from turbodiff.weights.locate import inventory

    machine, found, worker, seconds = machine_now(), inventory(), Worker(), []
    with tempfile.TemporaryDirectory() as folder:
        for run, colour in zip(range(1, runs + 2), itertools.cycle(("red", "green", "blue", "yellow")), strict=False):
            request = make_request({"prompt": PROMPT.replace("red", colour), "seed": run})
            plan, root = plan_request(request, machine, found), Path(folder)
            start_s = time.perf_counter()
            worker.send(RunCommand(job=run, request=request, plan=plan, outputs=root / "out", state=root / "state"))
            last = "run"
            while last != "result":
                select.select(worker.filenos(), [], [])
                last = next((event.type for event in worker.events() if event.type in ("result", "error")), last)
                worker.output()
                assert last != "error" and worker.exit_status() is None, "the worker failed"
            seconds += [time.perf_counter() - start_s] if run > 1 else []
        worker.stop()
        worker.close()
    return {"warm_clip_s": statistics.median(seconds)}


def planning(runs: int) -> dict[str, float]:
    """A full plan, and a submit into a store of 10,000 jobs."""
    from turbodiff.jobs.store import Store
    from turbodiff.plan.hardware import GpuFacts, Machine
    from turbodiff.plan.planner import plan_request
    from turbodiff.spec.models import Inventory
    from turbodiff.spec.request import make_request

    card = GpuFacts(total_bytes=24 << 30, free_bytes=23 << 30, capability=(8, 9))
    # another one each time: a plan for the same machine is known already
    machines = (
        Machine(gpus=(card,), gpu_state="ok", ram_total_bytes=64 << 30, ram_available_bytes=free, pretended=True)
        for free in itertools.count(48 << 30)
    )
    request = make_request({"prompt": PROMPT, "model": "Wan2.1-14B"})
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for _ in range(10_000):
            store.submit(request)
        submit_ms = median_ms(lambda: store.submit(request), runs)
    return {
        "plan_ms": median_ms(lambda: plan_request(request, next(machines), Inventory()), runs),
        "submit_at_10000_ms": submit_ms,
    }


def main() -> None:
    """Measure everything once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--library", type=int, metavar="CLIPS")
    args = parser.parse_args()
    runs, what = args.runs, "load" if args.load else "library" if args.library else "app"
    if args.load:
        from bench_load import load

        figures = load()
    elif args.library:
        from bench_library import measure

        figures = measure(args.library)
    else:
        with tempfile.TemporaryDirectory() as folder:
            help_s = statistics.median(seconds_of([*TURBODIFF, "--help"], folder) for _ in range(runs + 2))
        figures = {"help_s": help_s, **cold_clip(runs), **warm_clip(5 * runs), **planning(50)}
    for name, value in figures.items():
        print(f"{name:24} {value:10.3f}")
    now = datetime.now(UTC)
    result = {
        "utc": now.isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: round(value, 4) for name, value in figures.items()},
    }
    line = json.dumps(result)
    results = ROOT / "scripts" / "results"
    results.mkdir(exist_ok=True)
    (results / f"{now:%Y-%m-%d}-{what}.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
