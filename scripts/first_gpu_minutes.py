"""What a GPU does in its first minutes: parts with a time limit each, results dated in scripts/results/.

    scripts/first_gpu_minutes [--only kernels times] [--again] [--dry]

kernels: the verdict of each fused kernel and of Hopper's own attention loop. loops: how far the attention loops are
from the reference, with two clips and at odd lengths. model: the time of each launch of attention beside what the
static model says of it. quick: `turbodiff calibrate --quick`. small, large, streamed: the bytes of three plans beside
what was measured. reference: the first of them with reference kernels. times: a step and a decode. ranks: two processes
that share a small network on the one card, through gloo, since NCCL refuses one card to two of them: correctness alone,
the largest difference from one process.

A part that is done on this card with this driver and torch is not run again; one that failed or was stopped is. This
file needs nothing but Python: parts run in processes of their own, and what is missing ends only those that need it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
NAME = "first_gpu_minutes"
TOTAL_S = 470.0  # of all parts: under 8 minutes
GIB = 2**30
NO_CARD = "none"
DRY_TIMES_LONGER = 15  # a dry run is about the script: a busy machine may take long over it
LAST_LINES = 5  # of what a part that failed wrote
Report = dict[str, Any]


class Part(NamedTuple):
    """A command, the seconds that it may take, and variables that it needs. The last line that it prints is JSON."""

    command: tuple[str, ...]
    limit_s: float
    environment: Mapping[str, str] = {}


class Clip(NamedTuple):
    """A plan to measure: fields of a request, and the size of the card that it is planned for, None: as it is."""

    fields: Mapping[str, Any]
    card_gib: float | None = None


CLIPS = {
    "small": Clip({"model": "wan2.1-1.3b", "resolution": "480p"}),
    "large": Clip({"model": "wan2.1-14b", "resolution": "720p", "quant_linear": "on"}),
    "streamed": Clip({"model": "wan2.1-14b", "resolution": "480p", "quant_linear": "on"}, card_gib=12.0),
}


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet; 1 where a part did not come to its end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--again", action="store_true", help="parts that are done, too")
    parser.add_argument("--dry", action="store_true", help="the demo model on a CPU: tests the script")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the report is kept")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        print(json.dumps(run_part(options.part, options.dry)))
        return 0
    parts = all_parts(options.dry)
    if unknown := set(options.only or ()) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    where = here(options.dry)
    if where["card"] == NO_CARD and not options.dry:
        print("No CUDA device: nothing was measured.")
        return 0
    chosen = {name: part for name, part in parts.items() if not options.only or name in options.only}
    total_s = DRY_TIMES_LONGER * TOTAL_S if options.dry else TOTAL_S
    report = run_parts(chosen, options.results, where, again=options.again, total_s=total_s)
    return int(any(report["parts"].get(name, {}).get("state") != "done" for name in chosen))


def all_parts(dry: bool) -> dict[str, Part]:
    """Every part in order; the cheap ones that the others depend on first."""
    own = (sys.executable, str(Path(__file__)), *(("--dry",) if dry else ()), "--part")
    quick = (sys.executable, "-P", "-m", "turbodiff.cli", "calibrate", "--quick", "--json")
    parts = {
        "kernels": Part((*own, "kernels"), 75.0),
        "loops": Part((*own, "loops"), 20.0, {"TRITON_INTERPRET": str(int(dry))}),
        "model": Part((*own, "model"), 40.0, {"TRITON_INTERPRET": "0"}),
        "quick": Part(quick, 65.0),
        "small": Part((*own, "small"), 45.0),
        "large": Part((*own, "large"), 65.0),
        "streamed": Part((*own, "streamed"), 50.0),
        "reference": Part((*own, "small"), 30.0, {"TURBODIFF_KERNELS": "reference"}),
        "times": Part((*own, "times"), 50.0),
        "ranks": Part((sys.executable, "-P", "-m", "turbodiff.memory_lab.two_ranks"), 30.0),
    }
    longer = DRY_TIMES_LONGER if dry else 1
    return {name: part._replace(limit_s=part.limit_s * longer) for name, part in parts.items()}


def here(dry: bool) -> Report:
    """What results depend on: card and driver as nvidia-smi says, torch; "dry" where nothing is measured."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        card = NO_CARD
    code = "import importlib.metadata as m; print(m.version('torch'))"
    torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    return {"card": card, "torch": torch, "dry": dry}


def run_parts(
    parts: Mapping[str, Part], folder: Path, where: Report, *, again: bool = False, total_s: float = TOTAL_S
) -> Report:
    """Run the parts that are not done, the report kept after each; returns it.

    Args:
        where: a report of the same is gone on with.
    """
    until_s = time.monotonic() + total_s
    known = [(path, read(path)) for path in sorted(folder.glob(f"*_{NAME}.json"))]
    earlier = [(path, found) for path, found in known if found.get("where") == where]
    path = folder / f"{datetime.now(UTC):%Y-%m-%d_%H%M%S}_{NAME}.json"
    report: Report = {"utc": datetime.now(UTC).isoformat(timespec="seconds"), "where": where, "parts": {}}
    if earlier and not again:
        path, report = earlier[-1]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        if report["parts"].get(name, {}).get("state") == "done":
            print(f"{name}: done before", flush=True)
            continue
        report["parts"][name] = run_one(part, min(part.limit_s, until_s - time.monotonic()))
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        unfinished.replace(path)
        print(f"{name}: {told(report['parts'][name])}", flush=True)
    print(f"kept in {path}")
    return report


def read(path: Path) -> Report:
    """A report, {} where it cannot be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("parts"), dict) else {}


def run_one(part: Part, limit_s: float) -> Report:
    """A part's result: state done, failed or stopped, seconds, what it found or the last lines that it wrote."""
    if limit_s < 1:
        return {"state": "stopped", "seconds": 0.0, "said": ["no time was left"]}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **part.environment}
    start_s, state = time.monotonic(), "done"
    child = subprocess.Popen(
        part.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        state = "stopped"
        os.killpg(child.pid, 9)  # its own session: what it started goes with it
        output, _ = child.communicate()
    lines = output.strip().splitlines()
    seconds = round(time.monotonic() - start_s, 1)
    try:
        found = json.loads(lines[-1]) if lines and child.returncode == 0 else None
    except ValueError:
        found = None
    if state == "done" and found is not None:
        return {"state": "done", "seconds": seconds, "found": found}
    return {"state": "failed" if state == "done" else state, "seconds": seconds, "said": lines[-LAST_LINES:]}


def told(result: Report) -> str:
    """A result in a line or a few."""
    head = f"{result['state']} in {result['seconds']:.0f} s"
    if "found" not in result:
        return "\n  ".join([head, *result["said"]])
    found = result["found"]
    lines = []
    for row in found.get("phases", ()):
        planned, tensors, held = (row.get(f"{name}_bytes") for name in ("planned", "measured", "reserved"))
        line = f"{row['name']:13} planned {planned / GIB:6.2f} GiB, "
        took = f"tensors {(tensors or 0) / GIB:6.2f}, allocator {(held or 0) / GIB:6.2f}, {row.get('seconds', 0):.1f} s"
        lines.append(line + ("OUT OF MEMORY" if "oom" in row else took))
    others = {name: value for name, value in found.items() if name != "phases"}
    return "\n  ".join([head, *lines, json.dumps(others)])


def run_part(name: str, dry: bool) -> Report:
    """One part, in this process; what it found."""
    if name == "kernels":
        return kernels()
    if name in ("loops", "model"):
        return loops(name)
    if name == "times":
        return times("small" if dry else "large", dry)
    return measured(name, dry)


def kernels() -> Report:
    """What computes each operation here, and why: on a card the self-check runs now. "" of Hopper's loop is good."""
    import torch
    from turbodiff_kernels import backend, selfcheck

    from turbodiff.runtime.device import Device

    device = Device.pick()
    start_s = time.monotonic()
    choices: list[backend.Implementation] = []
    backend.check_all(device.torch_device, choices.append)
    verdicts = {choice.op: f"{choice.runs} ({choice.why})" for choice in choices}
    took_s = time.monotonic() - start_s
    verdicts |= {op: backend.hopper_verdict(kind, device.torch_device) for op, kind in selfcheck.HOPPER.items()}
    return {**device.facts(), "verdicts": verdicts, "seconds": took_s, "cuda": torch.version.cuda}


def loops(name: str) -> Report:
    """Numbers of the attention loops, or their times beside the model's."""
    from scripts import kernels_on_card
    from turbodiff.runtime.device import Device

    device = Device.pick().torch_device
    return kernels_on_card.numbers(device) if name == "loops" else kernels_on_card.beside_the_model(device)


def planned(name: str, dry: bool) -> tuple[Any, Any]:
    """The device of this process and a plan for one of `CLIPS` on this machine's card; dry: the demo's."""
    from turbodiff.gpu.probe import machine_now
    from turbodiff.plan.hardware import pretend
    from turbodiff.plan.planner import plan_request
    from turbodiff.runtime.device import Device
    from turbodiff.spec.models import Inventory
    from turbodiff.spec.request import make_request

    clip, machine = CLIPS[name], machine_now()
    fields = {"model": "demo"} if dry else clip.fields
    if clip.card_gib is not None and not dry:
        machine = pretend(machine, clip.card_gib)
    request = make_request({"prompt": "a cat chases a butterfly", "steps": 2, **fields})
    return Device.pick("cpu" if dry else "auto"), plan_request(request, machine, Inventory(), policy="anyway")


def measured(name: str, dry: bool) -> Report:
    """What each phase of a plan takes beside what was planned, under the cap that a job would have."""
    from turbodiff.memory_lab.measure import DummyModels, rows_of
    from turbodiff.plan.hardware import CONTEXT_BYTES
    from turbodiff.runtime import offload

    device, plan = planned(name, dry)
    offload.cap_allocator(device.torch_device, plan.budget_bytes - CONTEXT_BYTES)
    rows = list(rows_of(DummyModels(plan.request.spec, device), plan))
    predicted = {phase.name: phase.seconds for phase in plan.phases}
    return {"clip": clip_of(plan), "predicted_s": predicted, "phases": rows}


def times(name: str, dry: bool) -> Report:
    """Seconds of a step and of a decode once warm, beside the predicted ones."""
    import torch

    from turbodiff.memory_lab.measure import DummyModels, run_phase

    device, plan = planned(name, dry)
    models, found = DummyModels(plan.request.spec, device), {}
    with torch.inference_mode():
        found["step_s"] = run_phase(models, plan, "denoise")
        run_phase(models, plan, "vae_decode")
        found["decode_s"] = run_phase(models, plan, "vae_decode")
    predicted = {phase.name: phase.seconds for phase in plan.phases}
    return {"clip": clip_of(plan), **found, "predicted_s": predicted, "steps": plan.request.steps}


def clip_of(plan: Any) -> str:
    """What runs, in a line."""
    request, levers = plan.request, plan.levers
    size = f"{request.width}x{request.height}x{request.num_frames}"
    blocks = f"{levers.experts} {levers.blocks_resident}" if levers.experts == "streamed" else levers.experts
    return f"{request.model} {size} {request.attention} int8 {request.quant_linear} blocks {blocks} vae {levers.vae}"


if __name__ == "__main__":
    sys.exit(main())
