"""What the bench scripts share: their flags, how they measure, what they print and keep.

Contenders are interleaved in one process; CUDA events, median and spread, one JSON line at the end.

Every round runs every contender once, in turn, so that clocks and temperature hit all alike. Between two runs a buffer
larger than any L2 cache is written, so that memory-bound passes read memory.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
OPS = ("norm", "quant", "gemm", "sage", "sla", "sagesla")
FLUSH_BYTES = 256 * 2**20
Contenders = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender, its peak of temporary memory, and its error where a reference was given."""

    name: str
    median_ms: float
    low_ms: float  # quartiles
    high_ms: float
    best_ms: float
    rounds: int
    peak_bytes: int
    relative_l2: float | None
    error: str = ""


@dataclass(frozen=True)
class Job:
    """One operation at one shape: its contenders, the first being the yardstick, and the work one run does.

    `expected` computes the float32 answer; `answer` reduces a contender's result to what is compared with it.
    """

    name: str
    contenders: Contenders
    flop: float = 0.0
    traffic_bytes: float = 0.0
    expected: Callable[[], Tensor] | None = None
    answer: Callable[[Tensor], Tensor] = lambda result: result


class Clock:
    """Milliseconds of one call: CUDA events on a GPU; wall time on a CPU, which only proves that the script works."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = FLUSH_BYTES if device.type == "cuda" else 1
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, run: Callable[[], object]) -> float:
        """One run, after the caches were flushed."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that one run allocates above what was there before, its result included."""
        if self.device.type != "cuda":
            run()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def measure(job: Job, clock: Clock, rounds: int, warmup: int = 5, no_error: bool = False) -> list[Timing]:
    """All contenders of a job; one that cannot run here is listed with its error and no time."""
    expected = None if no_error else _expected(job)
    errors, peaks, distances = {}, {}, {}
    for name, run in job.contenders.items():
        try:
            result = run()
            distances[name] = relative_l2(job.answer(result), expected) if expected is not None else None
            del result
            peaks[name] = clock.peak(run)
        except Exception as error:  # noqa: BLE001 - a contender may be missing or unsupported on this card
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    able = {name: run for name, run in job.contenders.items() if name not in errors}
    samples: dict[str, list[float]] = {name: [] for name in able}
    for turn in range(warmup + rounds):
        for name, run in able.items():
            spent = clock.time(run)
            if turn >= warmup:
                samples[name].append(spent)
    gc.collect()
    return [_timing(name, samples.get(name, []), peaks, distances, errors) for name in job.contenders]


def _expected(job: Job) -> Tensor | None:
    """The float32 answer; where it does not fit into the card's memory, no error is told."""
    try:
        return job.expected() if job.expected else None
    except torch.OutOfMemoryError as error:
        print(f"{job.name}: no float32 answer: {str(error).splitlines()[0]}")
        return None


def _timing(name: str, samples: list[float], peaks: dict, distances: dict, errors: dict) -> Timing:
    if not samples:
        return Timing(name, 0, 0, 0, 0, 0, 0, None, errors[name])
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return Timing(name, median, low, high, min(samples), len(samples), peaks[name], distances[name])


def relative_l2(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in float32."""
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def table(job: Job, timings: list[Timing], flop_ceiling: float, byte_ceiling: float) -> str:
    """One line per contender: time, spread, speed relative to the yardstick, rate, share of the measured ceiling."""
    lines = [f"\n{job.name}"]
    yardstick = timings[0].median_ms
    for t in timings:
        if t.error:
            lines.append(f"  {t.name:<26} not run: {t.error}")
            continue
        ratio = f"{yardstick / t.median_ms:6.2f}x" if yardstick else "      -"
        if job.flop:
            rate, share = job.flop / t.median_ms / 1e9, job.flop / t.median_ms * 1e3 / flop_ceiling
            speed = f"{rate:7.0f} TFLOP/s {share:5.0%}"
        else:
            rate, share = job.traffic_bytes / t.median_ms / 1e9, job.traffic_bytes / t.median_ms * 1e3 / byte_ceiling
            speed = f"{rate:7.2f} TB/s    {share:5.0%}"
        error = "" if t.relative_l2 is None else f"  rel-L2 {t.relative_l2:.1e}"
        spread = f"{t.low_ms:.3f}..{t.high_ms:.3f}"
        cost = f"{t.median_ms:9.3f} ms  {spread:>17}  {ratio}  {speed}  {t.peak_bytes / 2**20:7.0f} MiB"
        lines.append(f"  {t.name:<26} {cost}{error}")
    return "\n".join(lines)


def as_json(job: Job, timings: list[Timing]) -> dict[str, object]:
    """A job and its timings for the last line and the dated file."""
    return {
        "job": job.name, "flop": job.flop, "traffic_bytes": job.traffic_bytes, "timings": [asdict(t) for t in timings]
    }  # fmt: skip


def machine() -> dict[str, object]:
    """The card, its clocks right now, and the versions that a figure depends on."""
    facts: dict[str, object] = {"torch": torch.__version__, "utc": datetime.now(UTC).isoformat(timespec="seconds")}
    if not torch.cuda.is_available():
        return facts | {"device": "cpu"}
    import triton

    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,driver_version", "--format=csv,noheader"]
    try:
        state = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        state = "unknown"
    versions = {"triton": triton.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts | versions | {"device": torch.cuda.get_device_name(), "clocks_temperature_driver": state}


def ceilings(clock: Clock, dtype: torch.dtype, dry: bool) -> tuple[float, float]:
    """What this card reaches at its best in this run: FLOP/s of a large 16-bit product, bytes/s of a copy."""
    side, size = (64, 2**16) if dry else (8192, 2**30)
    a = torch.randn(side, side, device=clock.device, dtype=dtype)
    source = torch.empty(size, dtype=torch.int8, device=clock.device)
    into = torch.empty_like(source)
    best = {}
    for name, run in {"product": lambda: a @ a, "copy": lambda: into.copy_(source)}.items():
        best[name] = min(clock.time(run) for _ in range(15))
    flops, rate = 2.0 * side**3 / best["product"] * 1e3, 2.0 * size / best["copy"] * 1e3
    print(f"ceilings of this run: {flops / 1e12:.0f} TFLOP/s 16-bit product, {rate / 1e12:.2f} TB/s copy")
    return flops, rate


def flags(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that every bench has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed runs of every contender, {rounds}")
    parser.add_argument("--warmup", type=int, default=3, help="runs of every contender that do not count, 3")
    parser.add_argument("--turbodiffusion", metavar="PATH", help="the folder turbodiffusion/ of its checkout")
    parser.add_argument("--no-error", action="store_true", help="skip the float32 answers, which take minutes at 14B")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the report is kept")
    parser.add_argument("--dry", action="store_true", help="toy sizes, once, any device: tests the script")
    return parser


def run(name: str, options: argparse.Namespace, jobs: Callable[[torch.device], Iterable[Job]]) -> int:
    """The jobs one after the other: tables as they come, the report kept after each, and its JSON as the last line.

    Without a GPU, unless dry, nothing is measured, and the report says so.
    """
    if not _has_card() and not options.dry:
        print("No CUDA device: nothing was measured.")
        print(json.dumps({"bench": name, "measured": False, "reason": "no CUDA device"}))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, kept = Clock(device), options.results / f"{datetime.now(UTC):%Y-%m-%d_%H%M%S}_{name}.json"
    tops = ceilings(clock, torch.bfloat16 if device.type == "cuda" else torch.float32, options.dry)
    report: dict[str, object] = {
        "bench": name, "measured": not options.dry, "command": sys.argv[1:], "before": machine(),
        "kernels": kernels(device), "flop_per_s": tops[0], "bytes_per_s": tops[1], "jobs": (done := []),
    }  # fmt: skip
    for job in jobs(device):
        timings = measure(job, clock, *((1, 0) if options.dry else (options.rounds, options.warmup)), options.no_error)
        print(table(job, timings, *tops), flush=True)
        done.append(as_json(job, timings))
        report["after"] = machine()
        if not options.dry:
            options.results.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print("\nToy sizes: nothing was measured." if options.dry else f"\nkept in {kept}")
    print(json.dumps(report))
    return 0


def _has_card() -> bool:
    return torch.cuda.is_available()


def kernels(device: torch.device) -> dict[str, str]:
    """What computes each operation behind the doors here; on a GPU the self-check runs now, outside the timings."""
    from turbodiff_kernels import backend

    choices = [backend.chosen(op, device) for op in OPS]
    return {choice.op: f"{choice.runs} ({choice.why})" for choice in choices}
