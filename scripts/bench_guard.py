"""Does the plan keep its word? The whole pipeline with dummy weights on a card cut down to 8, 12, 16, 24 and 32 GiB.

    scripts/bench_guard.py                                  every model and budget, within nine minutes
    scripts/bench_guard.py --model wan2.1-14b --gib 12 16
    scripts/bench_guard.py --dry                            the same without a device: counted on meta tensors
    scripts/bench_guard.py --replay --resume replay.jsonl   planned peaks against torch's allocator, without a device;
                                                            what is in the file is not counted again

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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from turbodiff.gpu.probe import machine_now  # noqa: E402
from turbodiff.memory_lab.dry_run import Ledger, unmasked  # noqa: E402
from turbodiff.memory_lab.measure import DummyModels, rows_of, run_phase  # noqa: E402
from turbodiff.memory_lab.replay import Cell, network_cells, vae_cells, words_cells  # noqa: E402
from turbodiff.plan.allocator_slack import SLACK  # noqa: E402
from turbodiff.plan.candidates import candidates  # noqa: E402
from turbodiff.plan.hardware import ALL_REFERENCE, CONTEXT_BYTES, Allocator, Kernels, Machine, pretend  # noqa: E402
from turbodiff.plan.offload_search import cost_inputs, plan_context  # noqa: E402
from turbodiff.plan.phase_costs import CostInputs  # noqa: E402
from turbodiff.plan.planner import plan_request  # noqa: E402
from turbodiff.runtime import offload  # noqa: E402
from turbodiff.runtime.device import Device  # noqa: E402
from turbodiff.spec.attention import SPARSE_ATTENTION  # noqa: E402
from turbodiff.spec.errors import DoesNotFitError  # noqa: E402
from turbodiff.spec.models import Inventory, find_model  # noqa: E402
from turbodiff.spec.numbers import GIB  # noqa: E402
from turbodiff.spec.plan import Plan  # noqa: E402
from turbodiff.spec.request import Request, make_request  # noqa: E402

MODELS = ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b")
REPLAYED = (*MODELS, "wan2.2-t2v-a14b", "wan2.1-i2v-14b")
ALL_FUSED, REFERENCE_KERNELS = Kernels(), ALL_REFERENCE.model_copy(update={"wish": "reference"})
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
        return replay(flags.model if flags.model != MODELS else REPLAYED, flags.resume)
    ledger = Ledger("meta") if flags.dry else None
    device = Dry(torch.device("meta"), "meta tensors", torch.bfloat16, ledger) if ledger else Device.pick()
    if not device.is_cuda and not flags.dry:
        print("no CUDA device: nothing to measure (see --dry)")
        return 0
    machine, path, rows = machine_now(), result_path(), []
    end_s = time.monotonic() + 60 * flags.minutes
    with ledger or nullcontext(), unmasked() if flags.dry else nullcontext():
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
    parser.add_argument("--resume", type=Path, help="margins of an earlier replay of this very code; more are added")
    return parser.parse_args()


def replay(models: tuple[str, ...], kept: Path | None) -> int:
    """Every lever's planned peak less the smallest cap under which torch's allocator still holds the phase: by lever
    the least over models, sizes, frames, attention kinds, INT8 and the VAE's convolutions. 1 if any is below 0."""
    margins: dict[str, dict[str, int]] = {}
    if kept is not None and kept.exists():
        for line in kept.read_text("utf-8").splitlines():
            margins |= json.loads(line)
    for key, mode, found in replayed(models):
        name = f"{mode} {key}"
        if name in margins:
            continue
        margins[name] = {f"{cell.cost.name.partition('_')[0]} {cell.levers}": cell.margin_bytes for cell in found}
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: margins[name]}) + "\n")
    least: dict[tuple[str, str, str], tuple[int, str]] = {}
    for name, cells in margins.items():
        mode, _, key = name.partition(" ")
        for cell, margin in cells.items():
            phase, _, levers = cell.partition(" ")
            lever = (mode, phase, re.sub(r"streamed [1-9]\d*", "streamed half", levers.split(",")[0]))
            least[lever] = min(least.get(lever, (1 << 60, "")), (margin, f"{key}: {levers}"))
    for (mode, phase, lever), (margin, where) in sorted(least.items()):
        print(f"{mode:10} {phase:8} {lever:14} {margin / 2**20:+7.0f} MiB   {where}")
    below = [cell for cells in margins.values() for cell, margin in cells.items() if margin < 0]
    print(json.dumps({"cells": sum(map(len, margins.values())), "below": len(below)}))
    return int(bool(below))


def replayed(models: tuple[str, ...]) -> Iterator[tuple[str, Allocator, Iterator[Cell]]]:
    """(what runs, kind of allocator, its cells) of the matrix. All models of Wan have one text encoder and one VAE."""
    card = pretend(Machine(torch="2.11.0"), 80.0)
    context = plan_context(card, Inventory())

    def inputs_of(mode: Allocator, kernels: Kernels = ALL_FUSED, **fields: Any) -> CostInputs:
        request = make_request({"prompt": "a cat", **fields})
        choice = next(candidates(request, card, Inventory(), context.total_bytes, frozenset()))
        here = card.model_copy(update={"allocator": mode, "kernels": kernels})
        return cost_inputs(request, choice, plan_context(here, Inventory()))

    for model, size, frames, int8 in product(models, ("480p", "720p"), (17, 81), ("off", "on")):
        spec = find_model(model)
        picture = {"image": "cat.jpg"} if spec.kind == "i2v" else {}
        clip = {"model": model, "resolution": size, "num_frames": frames, "quant_linear": int8, **picture}
        for attention in ("dense", "sage", "sla", "sagesla") if spec.turbo else ("dense", "sage"):
            for mode in SLACK:
                inputs = inputs_of(mode, attention=attention, **clip)
                yield f"{model} {size} {frames} {int8} {attention}", mode, network_cells(inputs)
            if model not in MODELS:
                continue
            for mode in SLACK:
                name = f"{model} {size} {frames} {int8} {attention}"
                if frames == 17 or attention not in SPARSE_ATTENTION:  # whose references take a step per 128 queries
                    plain = inputs_of(mode, REFERENCE_KERNELS, attention=attention, **clip)
                    yield f"{name} references", mode, network_cells(plain, 2)
                if int8 == "on":
                    lora = {"loras": [{"path": "any.safetensors"}]}
                    yield f"{name} LoRA", mode, network_cells(inputs_of(mode, attention=attention, **lora, **clip), 4)
    for size, frames, mode in product(("480p", "720p"), (17, 81, 161), SLACK):
        clip = {"resolution": size, "num_frames": frames, "image": "cat.jpg"}
        for conv2d in (False, True):
            inputs = replace(inputs_of(mode, model="wan2.2-a14b", **clip), conv2d=conv2d)
            yield f"vae {size} {frames} {'conv2d' if conv2d else 'conv3d'}", mode, vae_cells(inputs)
        yield f"words {size} {frames}", mode, words_cells(inputs_of(mode, model="wan2.1-i2v-14b", **clip))


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
