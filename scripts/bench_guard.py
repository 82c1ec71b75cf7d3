"""Does the plan keep its word? The whole pipeline with dummy weights on a card cut down to 8, 12, 16, 24 and 32 GiB.

    scripts/bench_guard.py                                  every model and budget, within nine minutes
    scripts/bench_guard.py --model wan2.1-14b --gib 12 16
    scripts/bench_guard.py --dry                            the same without a device: counted on meta tensors
    scripts/bench_guard.py --replay                         planned peaks against torch's allocator, without a device;
                                                            caps of scripts/results/*replay.jsonl are not sought again

For each model and budget: plan, cap torch's allocator at the budget, run every phase with the plan's levers, and
compare the measured peak of each phase with the planned one; and once per model a step streamed beside a step resident.
An out-of-memory where the plan said "fits" is a failure. Run it alone on the card. Results are kept, dated, under
scripts/results/ after every budget; the last line is a summary as JSON.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from turbodiff.gpu.probe import machine_now  # noqa: E402
from turbodiff.memory_lab.dry_run import Ledger  # noqa: E402
from turbodiff.memory_lab.measure import DummyModels, rows_of, run_phase  # noqa: E402
from turbodiff.memory_lab.replay import (  # noqa: E402
    REPLAYED,
    Margin,
    caps_line,
    caps_path,
    find_caps,
    margins,
    matrix,
    read_caps,
)
from turbodiff.plan.hardware import CONTEXT_BYTES, Machine, pretend  # noqa: E402
from turbodiff.plan.planner import plan_request  # noqa: E402
from turbodiff.runtime import offload  # noqa: E402
from turbodiff.runtime.device import Device  # noqa: E402
from turbodiff.spec.errors import DoesNotFitError  # noqa: E402
from turbodiff.spec.models import Inventory, find_model  # noqa: E402
from turbodiff.spec.numbers import GIB, MIB  # noqa: E402
from turbodiff.spec.plan import Plan  # noqa: E402
from turbodiff.spec.request import Request, make_request  # noqa: E402

MODELS = ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b")
BUDGETS_GIB = (8.0, 12.0, 16.0, 24.0, 32.0)
CLOSE = 0.10
MINUTES = 9.0


@dataclass(frozen=True)
class Dry(Device):
    """Meta tensors in place of a card: to see that every line runs, not to measure; all weights are there at once."""

    ledger: Ledger

    def reset_peak(self) -> None:
        self.ledger.reset_peak()

    def peak_bytes(self) -> int:
        return self.ledger.peak_bytes


def main() -> int:
    """Run what the flags ask for; 1 if any plan broke its word."""
    flags = arguments()
    if flags.replay:
        part, parts = map(int, flags.part.split("/"))
        models = flags.model if flags.model != MODELS else REPLAYED
        return replay(models, flags.resume or caps_path(), part, parts, flags.rows)
    ledger = Ledger("meta") if flags.dry else None
    device = Dry(torch.device("meta"), "meta tensors", torch.bfloat16, ledger) if ledger else Device.pick()
    if not device.is_cuda and not flags.dry:
        print("no CUDA device: nothing to measure (see --dry)")
        return 0
    machine, path, rows = machine_now(), result_path(), []
    end_s = time.monotonic() + 60 * flags.minutes
    with ledger or nullcontext():
        for row in all_rows(flags.model, flags.gib, machine, device, end_s):
            rows.append(row)
            show(row)
            if not flags.dry:
                keep(path, rows, device)
    budgets = [row for row in rows if "phases" in row]
    errors = [abs(phase["error"]) for row in budgets for phase in row["phases"] if "error" in phase]
    broken = [f"{row['model']} {row['gib']:g}" for row in budgets if not row["kept"]]
    worst = None if flags.dry else round(max(errors, default=0.0), 4)
    summary = {"budgets": len(budgets), "broken": broken, "worst_error": worst}
    print(json.dumps({**summary, "device": device.name, "kept_in": "" if flags.dry else path.name}))
    return int(bool(broken))


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--gib", nargs="+", type=float, default=BUDGETS_GIB)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin nothing after that")
    parser.add_argument("--dry", action="store_true", help="count on meta tensors, without a device")
    parser.add_argument("--replay", action="store_true", help="margin of every lever under each kind of allocator")
    parser.add_argument("--resume", type=Path, help="where caps are kept, if not in scripts/results/")
    parser.add_argument("--rows", default="", help="seek caps only of rows whose names begin so: vae")
    parser.add_argument("--part", default="1/1", help="which rows to seek caps for: 1/2 and 2/2 in two processes")
    return parser.parse_args()


def replay(models: tuple[str, ...], path: Path, part: int, parts: int, begin: str = "") -> int:
    """Find the caps that are not known yet and keep them; then every lever's planned peak less the smallest cap under
    which torch's allocator still holds the phase, by lever the least of all rows. 1 if any is below 0."""
    kept = read_caps(path)
    asked = [row for row in matrix(models) if row.name.startswith(begin)]
    for row in sorted(asked, key=lambda row: "references" in row.name)[part - 1 :: parts]:
        before, start_s = kept.get(row.name, {}), time.process_time()
        kept[row.name] = find_caps(row, before)
        if kept[row.name] != before:
            with path.open("a", encoding="utf-8") as file:
                file.write(caps_line(row.name, kept[row.name]))
            print(f"{row.name}: {time.process_time() - start_s:.0f} s", flush=True)
    kept = read_caps(path)
    order = [row.name for row in matrix() if row.name in kept]
    if parts == 1:
        path.write_text("".join(caps_line(name, kept[name]) for name in order), "utf-8")
    found = list(margins(matrix(models), kept))
    least = dict[tuple[str, str], Margin]()
    for margin in found:
        lever = re.sub(r"streamed [1-9]\d*", "streamed half", margin.cell.split(",")[0])
        key = margin.mode, lever
        least[key] = min(least.get(key, margin), margin, key=lambda each: each.n_bytes)
    for (mode, lever), margin in sorted(least.items()):
        print(f"{mode:10} {lever:24} {margin.n_bytes / MIB:+7.0f} MiB   {margin.row}: {margin.cell}")
    below = [margin for margin in found if margin.n_bytes < 0]
    for margin in sorted(below):
        print(f"below: {margin.mode} {margin.row}: {margin.cell} {margin.n_bytes / MIB:+.0f} MiB")
    rows = len({margin.row for margin in found})
    counts = {"rows": rows, "of": len(list(matrix(models))), "cells": len(found), "below": len(below)}
    print(json.dumps({**counts, "stale": sum(margin.stale for margin in found)}))
    return int(bool(below))


def all_rows(
    models: tuple[str, ...], budgets: tuple[float, ...], machine: Machine, device: Device, end_s: float
) -> Iterator[dict[str, Any]]:
    """One row per model and budget, and one per model for what streaming costs."""
    for model in models:
        dummy = DummyModels(find_model(model), device)
        for gib in budgets:
            if time.monotonic() > end_s:
                return
            yield one_budget(dummy, gib, machine)
        if device.is_cuda and time.monotonic() < end_s:
            yield streaming(dummy, machine)


def dearest(model: str) -> Request:
    """The dearest request of a model that people make, at two steps."""
    picture = {"image": "cat.jpg"} if "2.2" in model else {}
    return make_request({"prompt": "a cat chases a butterfly", "model": model, "steps": 2, **picture})


def one_budget(models: DummyModels, gib: float, machine: Machine) -> dict[str, Any]:
    """Plan and run one model on a card of `gib` GiB; one row."""
    row: dict[str, Any] = {"model": models.spec.name, "gib": gib, "kept": True, "phases": []}
    small = pretend(machine, gib).model_copy(update={"torch": torch.__version__.split("+")[0]})
    try:
        plan = plan_request(dearest(models.spec.name), small, Inventory())
    except DoesNotFitError as error:
        return row | {"plan": str(error)}
    offload.cap_allocator(models.device.torch_device, plan.budget_bytes - CONTEXT_BYTES)
    phases = list(rows_of(models, plan))
    kept = not any("oom" in phase for phase in phases)
    close = all(abs(phase.get("error", 1)) <= CLOSE for phase in phases)
    return row | {"plan": describe(plan), "band": plan.band, "phases": phases, "kept": kept, "close": close}


def streaming(models: DummyModels, machine: Machine) -> dict[str, Any]:
    """Seconds of a step with all blocks passing through, over those of a step with all of them there."""
    offload.cap_allocator(models.device.torch_device, 1 << 60)
    plan = plan_request(dearest(models.spec.name), machine, Inventory(), policy="anyway")
    seconds = {}
    for lever in ("resident", "streamed"):
        levers = plan.levers.model_copy(update={"experts": lever, "blocks_resident": 0})
        with torch.inference_mode():
            seconds[lever] = run_phase(models, plan.model_copy(update={"levers": levers}), "denoise")
    return {"model": models.spec.name, **seconds, "streamed_over_resident": seconds["streamed"] / seconds["resident"]}


def describe(plan: Plan) -> str:
    """One line of what runs."""
    request, levers = plan.request, plan.levers
    size = f"{request.width}x{request.height}x{request.num_frames}"
    blocks = f"{levers.experts}{f' {levers.blocks_resident}' if levers.experts == 'streamed' else ''}"
    text = f"text {levers.text} blocks {blocks} vae {levers.vae} chunks {levers.ffn_chunks}"
    return f"{request.model} {size} {request.attention} int8 {request.quant_linear} {text}"


def show(row: dict[str, Any]) -> None:
    """One row as lines."""
    if "phases" not in row:
        print(f"{row['model']} a step: resident {row['resident']:.2f} s, streamed {row['streamed']:.2f} s", flush=True)
        return
    print(f"{row['model']} on {row['gib']:g} GiB: {row['plan']}{'' if row['kept'] else '   OUT OF MEMORY'}", flush=True)
    for phase in row["phases"]:
        line = f"  {phase['name']:13} planned {phase['planned_bytes'] / GIB:6.2f} GiB  "
        if "oom" in phase:
            print(f"{line} OOM: {phase['oom']}")
            continue
        reserved = (phase["reserved_bytes"] or 0) / GIB
        print(
            f"{line}measured {phase['measured_bytes'] / GIB:6.2f}  reserved {reserved:6.2f}  "
            f"{phase['error']:+.1%}  {phase['seconds']:.1f} s, a step {phase['step_s']:.2f} s"
        )


def result_path() -> Path:
    """Where this run's results go."""
    return ROOT / "scripts" / "results" / f"guard_{datetime.now(UTC):%Y%m%d_%H%M%S}.json"


def keep(path: Path, rows: list[dict[str, Any]], device: Device) -> None:
    """Write what there is so far."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"at": datetime.now(UTC).isoformat(), **device.facts(), "rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
