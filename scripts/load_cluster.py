"""32 cards, 1,000 users, 10,000 jobs: the real supervisor, placement and store under load, and what they cost.

    python scripts/load_cluster.py [--jobs 10000] [--cards 32] [--users 1000] [--clip-s 2] [--keep]

It takes 11 minutes. Prints what it came to; the last line is JSON, which `--keep` also writes, dated, to
scripts/results/.

Simulated are the cards (what the probe says) and the workers: real processes with the real protocol that sleep instead
of computing, and write clips of a few bytes. Jobs come from another process, as they do from the page, through
`Store.submit_all`, with plans made beforehand; one user asks for a tenth of all jobs at once, the others as they come.
2 s for a clip is as fast as a published one gets (TurboDiffusion: 1.9 s for 1.3B at 480p on an RTX 5090).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store

ROOT = Path(__file__).resolve().parent.parent
STEPS, CLIP = 4, b"\0\0\0\x18ftypmp42" + b"frames " * 64
RAM_GIB, VRAM_GIB = 1024, 24
SUBMITTERS = 8
PREVIEW = "A" * 4096  # base64 of a small JPEG


def work(events_fd: int, commands_fd: int) -> None:
    """A worker that sleeps: the standard library alone, so that 32 of them fit two cores."""
    import hashlib

    told, clip_s = {"job": 0, "attempt": 0}, float(os.environ["LOAD_CLIP_S"])
    lock = threading.Lock()

    def say(kind: str, **fields: object) -> None:
        line = json.dumps({"v": 1, **told, "type": kind, "t_s": time.monotonic(), "fields": fields}) + "\n"
        with lock:
            os.write(events_fd, line.encode())

    def beat() -> None:
        while True:
            time.sleep(1.0)
            say("beat", rss_bytes=1 << 30, held_bytes=8 << 30)

    def clip(order: dict[str, object], request: dict[str, object]) -> None:
        data, now, folder = CLIP + str(request["nonce"]).encode(), datetime.now(UTC), Path(str(order["outputs"]))
        final = folder / f"{now:%Y-%m-%d}" / f"t2v_{order['job']}_{str(request['nonce'])[:8]}_{now:%Y%m%d_%H%M%S}.mp4"
        final.parent.mkdir(parents=True, exist_ok=True)
        facts = {"sha256": hashlib.sha256(data).hexdigest(), "frames": request["num_frames"],
                 "width": request["width"], "height": request["height"], "fps": request["fps"]}  # fmt: skip
        record = {"v": 1, "created": now.isoformat(), **told, "request": request, "plan": order["plan"], **facts}
        Path(f"{final}.json").write_text(json.dumps(record))
        final.write_bytes(data)
        say("result", path=str(final), sidecar=f"{final}.json", seconds=clip_s, ran={"attention": "dense"}, **facts)

    say("hello", pid=os.getpid(), torch="0", device="cuda:0", device_name="simulated", cudnn="")
    threading.Thread(target=beat, daemon=True).start()
    for line in os.fdopen(commands_fd, "rb"):
        order = json.loads(line)
        if order["cmd"] == "exit":
            os._exit(0)
        if order["cmd"] != "run":
            continue
        told.update(job=order["job"], attempt=order["attempt"])
        say("plan", plan=order["plan"])
        for phase, share in (("text_encode", 0.1), ("denoise", 0.7), ("vae_decode", 0.2)):
            say("phase", name=phase, state="start")
            for step in range(1, STEPS + 1) if phase == "denoise" else ():
                time.sleep(share * clip_s / STEPS)
                say("step", i=step, n=STEPS, t=0.5, expert="single", dt_s=share * clip_s / STEPS,
                    eta_s=clip_s * (0.9 - share * step / STEPS))  # fmt: skip
                say("preview", jpeg=PREVIEW, i=step)
            time.sleep(0 if phase == "denoise" else share * clip_s)
            say("phase", name=phase, state="done", seconds=share * clip_s, peak_bytes=8 << 30)
        clip(order, order["request"])
        told.update(job=0, attempt=0)


def submit(state: Path, plan_file: Path, jobs: int, users: int, seconds: float) -> None:
    """The process that asks for the jobs, as the page's does; writes how long each call took."""
    from turbodiff.jobs.store import Store
    from turbodiff.spec.plan import Plan

    store, plan = Store(state), Plan.model_validate_json(plan_file.read_text())
    heavy, took_s, start_s = jobs // 10, list[float](), time.monotonic()
    numbers = iter(range(jobs - heavy))
    lock = threading.Lock()

    def ask(number: int, user: str) -> None:
        request = plan.request.model_copy(update={"prompt": f"job {number} of {user}"})
        began_s = time.perf_counter()
        store.submit_all([(request, plan)], user=user)
        took_s.append(time.perf_counter() - began_s)

    def some() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            time.sleep(max(0.0, start_s + seconds * number / (jobs - heavy) - time.monotonic()))
            ask(number, f"user{1 + number % (users - 1)}")

    threads = [threading.Thread(target=some) for _ in range(SUBMITTERS)]
    for thread in threads:
        thread.start()
    for number in range(heavy):
        ask(number, "user0")
    for thread in threads:
        thread.join()
    print(json.dumps(sorted(took_s)), flush=True)
    store.close()


def simulate() -> object:
    """What the probe says of the cards, with a new sample each second; the machine has RAM for all."""
    from turbodiff.gpu import probe
    from turbodiff.gpu.host_memory import HostMemory
    from turbodiff.gpu.probe import CardSample, Sample

    probe.host_memory = lambda pids=(): HostMemory(RAM_GIB << 30, (RAM_GIB - 8) << 30, 0)
    kept: list[Sample] = []

    def sample() -> Sample:
        if not kept or time.monotonic() - kept[0].taken_s > 1.0:
            cards = [
                CardSample(
                    name="NVIDIA GeForce RTX 4090", uuid=f"GPU-{index:08x}", nvml_index=index, capability=(8, 9),
                    total_bytes=VRAM_GIB << 30, free_bytes=(VRAM_GIB - 1) << 30, used_bytes=1 << 30,
                )
                for index in range(ARGS.cards)
            ]  # fmt: skip
            kept[:] = [Sample(state="ok", error="", driver="580.1", cards=tuple(cards), taken_s=time.monotonic())]
        return kept[0]

    return sample


class Look(NamedTuple):
    """The run at one moment: seconds since its start, jobs that have ended, CPU seconds and MiB of the supervisor, and
    the share of the cards that work."""

    at_s: float
    ended: int
    cpu_s: float
    mib: float
    busy: float


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else 0.0


def violations(rows: list[dict[str, object]]) -> int:
    """Jobs that started after a later one of the same user."""
    latest, count = dict[object, float](), 0
    for row in sorted(rows, key=lambda row: row["place"], reverse=True):
        started_s = float(str(row["started_s"]))
        count += started_s > latest.get(row["user"], float("inf"))
        latest[row["user"]] = min(started_s, latest.get(row["user"], float("inf")))
    return count


def report(store: "Store", times: list[float], looks: list[Look], wall_s: float) -> dict[str, object]:
    """Print what it came to, and return it. Tenths are of the jobs that have ended."""
    rows = [dict(row) for row in store.rows("SELECT user, place, state, attempt, created_s, started_s FROM job")]
    waits = {heavy: [row["started_s"] - row["created_s"] for row in rows if (row["user"] == "user0") == heavy]
             for heavy in (False, True)}  # fmt: skip
    least_s, spent_s = ARGS.jobs * ARGS.clip_s / ARGS.cards, looks[-1].cpu_s
    tenths = [next(look for look in looks if look.ended >= share * ARGS.jobs / 10) for share in range(1, 11)]
    spent = [round(100 * (now.cpu_s - then.cpu_s) / max(0.1, now.at_s - then.at_s), 1)
             for then, now in pairwise([looks[0], *tenths])]  # fmt: skip
    busy = [look.busy for look in looks[1:-1]]
    print(f"{len(rows)} jobs, {ARGS.cards} cards, {ARGS.users} users: {wall_s:.0f} s, least possible {least_s:.0f} s")
    states = {state: sum(row["state"] == state for row in rows) for state in {row["state"] for row in rows}}
    print(f"states {states}, attempts {max(row['attempt'] for row in rows)}")
    print(f"supervisor: {100 * spent_s / wall_s:.1f} % of a core, {1000 * spent_s / len(rows):.1f} ms a job")
    print(f"submit: p50 {1000 * percentile(times, 0.5):.1f} ms, p99 {1000 * percentile(times, 0.99):.1f} ms, "
          f"largest {1000 * times[-1]:.0f} ms")  # fmt: skip
    print(f"jobs that waited behind a later one of the same user: {violations(rows)}")
    print(f"memory of the supervisor after each tenth, MiB: {' '.join(f'{look.mib:.0f}' for look in tenths)}")
    print(f"% of a core in each tenth: {' '.join(map(str, spent))}")
    print(f"cards busy: {100 * sum(busy) / max(1, len(busy)):.0f} %")
    for name, each in (("the user with a tenth of all jobs", waits[True]), ("the others", waits[False])):
        print(f"wait of {name}: median {percentile(each, 0.5):.0f} s, p95 {percentile(each, 0.95):.0f} s")
    print(f"load after: {os.getloadavg()}")
    return {
        "jobs": len(rows), "cards": ARGS.cards, "users": ARGS.users, "clip_s": ARGS.clip_s, "states": states,
        "wall_s": round(wall_s), "least_s": round(least_s), "supervisor_percent": round(100 * spent_s / wall_s, 1),
        "ms_a_job": round(1000 * spent_s / len(rows), 1), "submit_p50_ms": round(1000 * percentile(times, 0.5), 1),
        "submit_p99_ms": round(1000 * percentile(times, 0.99), 1), "submit_largest_ms": round(1000 * times[-1], 1),
        "behind_a_later_one": violations(rows), "mib_by_tenth": [round(look.mib, 1) for look in tenths],
        "percent_by_tenth": spent, "load_after": os.getloadavg(), "cores": os.cpu_count(),
    }  # fmt: skip


def main() -> None:
    import psutil

    from turbodiff.jobs.store import Store
    from turbodiff.jobs.users import User, add_user
    from turbodiff.plan.planner import plan_request
    from turbodiff.spec.request import make_request
    from turbodiff.supervisor.supervisor import Supervisor
    from turbodiff.weights.locate import inventory

    print(f"load before: {os.getloadavg()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        state, outputs = Path(folder) / "state", Path(folder) / "outputs"
        store = Store(state)
        for number in range(ARGS.users):
            add_user(store, User(name=f"user{number}", most_waiting=ARGS.jobs))
        os.environ |= {"LOAD_CLIP_S": str(ARGS.clip_s)}
        sample = simulate()
        worker = [sys.executable, "-S", "-E", str(Path(__file__).resolve())]
        supervisor = Supervisor(state, outputs, working=Path(folder), sample=sample, worker_argv=worker)  # type: ignore[arg-type]
        while not all(slot.free for slot in supervisor.slots):
            supervisor.tick()
        machine = supervisor.context.memory.machine()
        assert machine is not None and len(supervisor.slots) == ARGS.cards
        request = make_request({"prompt": "a red circle moves right", "model": "demo"})
        plan = plan_request(request, machine, inventory())
        (Path(folder) / "plan.json").write_text(plan.model_dump_json())
        least_s = ARGS.jobs * ARGS.clip_s / ARGS.cards
        argv = [sys.executable, __file__, "--submit", str(state), "--jobs", str(ARGS.jobs), "--users", str(ARGS.users)]
        asking = subprocess.Popen([*argv, "--seconds", str(0.6 * least_s)], stdout=subprocess.PIPE, text=True)
        told: list[str] = []
        listening = threading.Thread(target=lambda: told.extend(asking.stdout or ()))
        listening.start()
        ours, start_s, cpu_s, ended = psutil.Process(), time.monotonic(), time.process_time(), 0
        looks, looked_s, over = (
            list[Look](),
            0.0,
            "SELECT count(*) FROM job WHERE state IN ('done', 'failed', 'parked')",
        )
        while ended < ARGS.jobs:
            supervisor.tick()
            if time.monotonic() - looked_s > 5.0:
                looked_s, ended = time.monotonic(), store.rows(over)[0][0]
                busy = sum(slot.job is not None for slot in supervisor.slots) / ARGS.cards
                spent_s, mib = time.process_time() - cpu_s, ours.memory_info().rss / 2**20
                looks.append(Look(looked_s - start_s, ended, spent_s, mib, busy))
        wall_s = time.monotonic() - start_s
        listening.join()
        line = json.dumps(report(store, json.loads(told[0]), looks, wall_s))
        print(line)
        if ARGS.keep:
            results = ROOT / "scripts" / "results"
            results.mkdir(exist_ok=True)
            (results / f"{datetime.now(UTC):%Y-%m-%d}-cluster.json").write_text(f"{line}\n")
        supervisor._signals = 2  # their workers need no patience
        supervisor.close()
        store.close()


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (
        ("jobs", int, 10_000),
        ("cards", int, 32),
        ("users", int, 1000),
        ("clip-s", float, 2.0),
    ):
        flags.add_argument(f"--{name}", type=kind, default=default)
    flags.add_argument("--keep", action="store_true", help="also write the result to scripts/results/")
    for name in ("events-fd", "commands-fd"):
        flags.add_argument(f"--{name}", type=int, default=-1, help=argparse.SUPPRESS)
    flags.add_argument("--submit", type=Path, help=argparse.SUPPRESS)
    flags.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    ARGS = flags.parse_args()
    if ARGS.events_fd >= 0:
        work(ARGS.events_fd, ARGS.commands_fd)
    elif ARGS.submit:
        sys.path.insert(0, str(ROOT))
        submit(ARGS.submit, ARGS.submit.parent / "plan.json", ARGS.jobs, ARGS.users, ARGS.seconds)
    else:
        sys.path.insert(0, str(ROOT))
        main()
