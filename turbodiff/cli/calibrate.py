"""`turbodiff calibrate`: what short runs on this card teach the plan."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turbodiff.cli import flags
from turbodiff.cli.places import StateDir
from turbodiff.spec.errors import RequestError

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store
    from turbodiff.plan.calibration import Sample
    from turbodiff.plan.hardware import Machine
    from turbodiff.spec.plan import Plan

MEASURE = (sys.executable, "-m", "turbodiff.memory_lab.measure")
FRAMES = (17, 49)  # two lengths: what grows with a clip, and what does not


def calibrate(
    model: Annotated[
        list[str] | None, typer.Option("--model", help="what to measure; left out: the models on disk")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="show what was learned, measure nothing")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="forget what was learned")] = False,
    state_dir: StateDir = None,
    as_json: flags.Json = False,
) -> None:
    """Measure short runs with made-up weights on this GPU, so that later plans fit it more closely."""
    from turbodiff import studio
    from turbodiff.jobs import measurements
    from turbodiff.jobs.store import Store

    state = state_dir or studio.state_folder()
    state.mkdir(parents=True, exist_ok=True)
    store = Store(state)
    if clear:
        sys.stdout.write(f"forgot {measurements.clear_samples(store)} samples\n")
    elif show:
        _show(measurements.samples(store), as_json)
    else:
        _show(list(_measured(store, _models(model))), as_json)


def _models(asked: list[str] | None) -> list[str]:
    """The models to measure: those asked for, else those whose files are here, bundled ones aside."""
    from turbodiff.spec.models import find_model
    from turbodiff.studio import Studio

    if asked:
        return [find_model(name).name for name in asked]
    here = [spec.name for spec, missing in Studio().models() if not missing and not spec.bundled]
    return here or ["wan2.1-1.3b"]


def _measured(store: "Store", models: list[str]) -> "Iterator[Sample]":
    """A sample per phase of two short clips per model, kept as they come."""
    from turbodiff.gpu.probe import machine_now
    from turbodiff.jobs import measurements
    from turbodiff.plan.planner import plan_request
    from turbodiff.spec.inventory import Inventory
    from turbodiff.spec.request import make_request

    machine = machine_now()
    if not machine.gpus:
        raise RequestError(
            "there is no GPU to measure",
            code="no_gpu",
            got=machine.gpu_state,
            expected=f"a GPU, to run clips of {FRAMES[0]} and {FRAMES[1]} frames of {', '.join(models)} on",
            try_instead="turbodiff doctor",
        )
    for name in models:
        picture = {"image": "picture.jpg"} if "i2v" in name or "2.2" in name else {}
        for frames in FRAMES:
            asked = {"prompt": "a cat runs", "model": name, "num_frames": frames, "steps": 1, **picture}
            plan = plan_request(make_request(asked), machine, Inventory())
            before = _others_bytes(machine_now(), plan)
            rows = list(_rows(plan))
            moved = abs(_others_bytes(machine_now(), plan) - before)
            for sample in samples_of(plan, rows, machine, moved):
                measurements.keep_sample(store, sample)
                yield sample


def samples_of(plan: "Plan", rows: list[dict[str, Any]], machine: "Machine", moved_bytes: int) -> "list[Sample]":
    """Rows of turbodiff/memory_lab/measure.py as samples of a plan; one that ran out is left to real jobs."""
    from turbodiff.plan.calibration import Sample, kind_of

    gpu = machine.gpus[int(plan.device.partition(":")[2] or 0)]
    kind = kind_of(gpu, machine, plan.request, plan.levers)
    return [
        Sample(
            kind=kind,
            phase=row["name"],
            predicted_bytes=row["planned_work_bytes"],
            measured_bytes=max(0, row["measured_bytes"] - row["weights_bytes"]),
            neighbours_moved_bytes=moved_bytes,
            reserved_bytes=row["reserved_bytes"],
        )
        for row in rows
        if "oom" not in row
    ]


def _rows(plan: "Plan") -> Iterator[dict[str, Any]]:
    """What a process of its own measures of a plan, on the card that the plan is for."""
    from turbodiff.supervisor.worker_process import new_run_id, worker_environment

    index = plan.device.partition(":")[2] or "0"
    environment = worker_environment(new_run_id(), index)
    done = subprocess.run(
        MEASURE, input=plan.model_dump_json() + "\n", env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    for line in done.stdout.splitlines():
        yield json.loads(line)


def _others_bytes(machine: "Machine", plan: "Plan") -> int:
    cards = [gpu.used_bytes or 0 for gpu in machine.gpus if f"cuda:{gpu.index}" == plan.device]
    return sum(cards)


def _show(samples: "list[Sample]", as_json: bool) -> None:
    """What was measured, and the factor that plans of each kind use now."""
    from rich.console import Console
    from rich.table import Table

    from turbodiff.plan.calibration import History
    from turbodiff.spec.numbers import gib

    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        for sample in samples:
            console.print(sample.model_dump_json(), markup=False)
        return
    table = Table("model", "size", "frames", "phase", "predicted", "measured", "factor", box=None, pad_edge=False)
    for sample in samples:
        kind = sample.kind
        ratio = "OOM" if sample.out_of_memory else f"{sample.measured_bytes / max(1, sample.predicted_bytes):.2f}"
        sizes = (gib(sample.predicted_bytes), gib(sample.measured_bytes), ratio)
        table.add_row(kind.model, f"{kind.width}x{kind.height}", str(kind.num_frames), sample.phase, *sizes)
    console.print(table)
    history = History(samples)
    for kind in dict.fromkeys(sample.kind for sample in samples):
        learned = history.calibration(kind)
        console.print(
            f"{kind.model} {kind.width}x{kind.height} {kind.num_frames} frames on {kind.gpu}: work memory x "
            f"{learned.factor:.2f} from {learned.samples} samples"
        )
