"""How the bench scripts measure: contenders interleaved in one process, CUDA events, median and spread, one JSON line.

Every round runs every contender once, in turn, so that clocks and temperature hit all alike. Between two runs a buffer
larger than any L2 cache is written, so that memory-bound passes read memory.
"""

import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
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
def measure(job: Job, clock: Clock, rounds: int, warmup: int = 5) -> list[Timing]:
    """All contenders of a job; one that cannot run here is listed with its error and no time."""
    expected = job.expected() if job.expected else None
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


def finish(report: dict[str, object], name: str, save: bool) -> None:
    """Dated file under scripts/results/ if `save`, and the report as the last line."""
    if save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d_%H%M%S}_{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        print(f"\nkept in {path}")
    print(json.dumps(report))
