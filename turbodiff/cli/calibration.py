"""`turbodiff calibrate`: what this card really takes, from short runs (minutes) or `--quick` (under one)."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turbodiff.cli.flags import Json, StateDir, model_names, open_studio
from turbodiff.spec.errors import RequestError, not_started

if TYPE_CHECKING:
    from turbodiff.gpu.card_measurements import CardMeasurement
    from turbodiff.jobs.store import Store
    from turbodiff.plan.calibration import Sample
    from turbodiff.plan.hardware import GpuFacts, Machine
    from turbodiff.spec.plan import Plan
    from turbodiff.spec.wording import Words

MEASURE = (sys.executable, "-P", "-m", "turbodiff.memory_lab.measure")
QUICK = (sys.executable, "-P", "-m", "turbodiff.memory_lab.quick")
QUICK_S = 58.0  # for all of a card, the starts of Python and torch included
PARTS_S = {"vmm": 14.0, "card": QUICK_S}  # at most, of it
END_S = 6.0  # before its end a part begins nothing new
FRAMES = (17, 49)  # two lengths: what grows with a clip, and what does not


def calibrate(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help=f"what to measure: {model_names(bundled=False)}; left out: the models on disk"),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="show what was learned, measure nothing")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="forget what was learned")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="what this card does, in under a minute")] = False,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Measure short runs with made-up weights on this GPU, so that later plans fit it more closely."""
    from turbodiff import studio
    from turbodiff.cli.show import print_lines, print_table, words_here
    from turbodiff.jobs import measurements
    from turbodiff.jobs.store import Store
    from turbodiff.plan.calibration import History, provenance_of
    from turbodiff.spec.models import find_model
    from turbodiff.spec.numbers import gib, seconds

    state = state_dir or studio.state_folder()
    store = Store(state)
    if clear:
        print_lines([words_here()("shell.forgot", n=measurements.clear_samples(store))])
        return
    if quick:
        for line in measure_quickly(store, as_json=as_json):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        return
    if show:
        samples = measurements.samples(store)
    else:
        ready = [spec.name for spec, missing in open_studio(state).models() if not missing and not spec.bundled]
        asked = [find_model(name).name for name in model or ()]
        samples = list(_measured(store, asked or ready or ["wan2.1-1.3b"]))
    if as_json:
        sys.stdout.writelines(sample.model_dump_json() + "\n" for sample in samples)
        return
    rows = []
    for sample in samples:
        kind = sample.kind
        clip = (kind.model, f"{kind.width}x{kind.height}", str(kind.num_frames), sample.phase)
        measured = "OOM" if sample.out_of_memory else gib(sample.measured_bytes)
        held = "" if sample.held_bytes is None else gib(sample.held_bytes)
        took = ["" if value is None else seconds(value) for value in (sample.predicted_s, sample.measured_s)]
        rows.append((*clip, gib(sample.predicted_held_bytes), measured, held, *took))
    words, heads = words_here(), ("model", "size", "frames", "phase", "predicted", "tensors", "allocator")
    print_table([words(f"shell.{head}") for head in (*heads, "predicted", "took")], rows)
    history = History(samples)
    for where, gpu in {provenance_of(sample.kind): sample.kind.gpu for sample in samples}.items():
        for lesson in history.calibration(where).lessons:
            frames, height, width = lesson.shape
            factors = (("memory", lesson.factor, lesson.samples), ("time", lesson.seconds, lesson.timed))
            learned = [words(f"shell.lesson_{what}", factor=f"{factor:.2f}", n=n) for what, factor, n in factors if n]
            about = {"model": lesson.model, "size": f"{width}x{height}", "frames": frames, "phase": lesson.phase}
            print_lines([words("shell.lesson", **about, gpu=gpu, learned=words("unit.comma").join(learned))])


def _measured(store: "Store", models: list[str]) -> "Iterator[Sample]":
    """A sample per phase of two short clips per model, kept as they come."""
    from turbodiff.gpu.probe import machine_now
    from turbodiff.jobs import measurements
    from turbodiff.plan.planner import plan_request
    from turbodiff.spec.models import Inventory, find_model
    from turbodiff.spec.request import make_request
    from turbodiff.supervisor.worker_process import new_run_id, worker_environment

    def used_bytes(device: str) -> int:
        return sum(gpu.used_bytes or 0 for gpu in machine_now().gpus if f"cuda:{gpu.index}" == device)

    machine = machine_now()
    if not machine.gpus:
        raise RequestError(
            "there is no GPU to measure",
            code="no_gpu",
            got=f"{machine.gpu_state} {machine.gpu_error}".strip(),
            expected=f"a GPU, to run clips of {FRAMES[0]} and {FRAMES[1]} frames of {', '.join(models)} on",
            try_instead="turbodiff doctor",
        )
    for name in models:
        picture = {"image": "picture.jpg"} if find_model(name).kind == "i2v" else {}
        for frames in FRAMES:
            fields = {"prompt": "a cat runs", "model": name, "num_frames": frames, "steps": 1, **picture}
            plan = plan_request(make_request(fields), machine, Inventory())
            before_bytes = used_bytes(plan.device)
            environment = worker_environment(new_run_id(), plan.device.partition(":")[2] or "0", machine.allocator)
            command, text = plan.model_dump_json() + "\n", subprocess.PIPE
            try:
                done = subprocess.run(MEASURE, input=command, env=environment, stdout=text, text=True, check=False)
            except OSError as error:
                raise not_started(MEASURE[0], error) from None
            moved_bytes = abs(used_bytes(plan.device) - before_bytes)
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            for sample in samples_of(plan, rows, machine, moved_bytes):
                measurements.keep_sample(store, sample)
                yield sample


def samples_of(plan: "Plan", rows: Sequence[Mapping[str, Any]], machine: "Machine", moved_bytes: int) -> "list[Sample]":
    """Rows of turbodiff/memory_lab/measure.py as samples of a plan; one that ran out is left to real jobs."""
    from turbodiff.plan.calibration import Sample, kind_of

    gpu = machine.gpus[int(plan.device.partition(":")[2] or 0)]
    kind = kind_of(gpu, machine, plan.request, plan.levers)
    return [
        Sample(
            kind=kind,
            phase=row["name"],
            predicted_bytes=row["planned_work_bytes"],
            slack_bytes=row["slack_bytes"],
            measured_bytes=max(0, row["measured_bytes"] - row["weights_bytes"]),
            neighbours_moved_bytes=moved_bytes,
            held_bytes=row["reserved_bytes"] and max(0, row["reserved_bytes"] - row["weights_bytes"]),
            reserved_bytes=row["reserved_bytes"],
        )
        for row in rows
        if "oom" not in row
    ]


def measure_quickly(store: "Store", *, as_json: bool) -> Iterator[str]:
    """Measure every kind of card of this machine, keep what was found, and say it in lines.

    A part that hangs or takes its process down costs what it had not told yet, nothing else.
    """
    from turbodiff.cli.link_rate import link_rates
    from turbodiff.cli.show import why_no_gpu, words_here
    from turbodiff.gpu.card_measurements import keep_measurement
    from turbodiff.gpu.probe import machine_now
    from turbodiff.jobs import measurements
    from turbodiff.plan.calibration import STILL_BYTES

    machine, words = machine_now(), words_here()
    if not machine.usable_gpus or machine.pretended:
        told = words("shell.pretended_card") if machine.pretended else why_no_gpu(machine, words)
        yield json.dumps({"measured": False, "reason": told}) if as_json else words("shell.not_measured", told=told)
        return
    for gpu in {(card.name, card.total_bytes): card for card in reversed(machine.usable_gpus)}.values():
        start_s, before_bytes = time.monotonic(), gpu.used_bytes or 0
        facts, samples = _quick_findings(gpu, machine, start_s + QUICK_S)
        if "no_cuda" in facts:
            told = words("value.no_cuda_here", torch=machine.torch)
            yield json.dumps({"measured": False, "reason": told}) if as_json else words("shell.not_measured", told=told)
            return
        now = [card.used_bytes or 0 for card in machine_now().gpus if card.uuid == gpu.uuid]
        moved_bytes = abs((now[0] if now else before_bytes) - before_bytes)
        if moved_bytes > STILL_BYTES:
            facts.pop("context_bytes", None)  # it holds what a neighbour took
        if rates := link_rates(gpu, machine):
            facts["link_bytes_s"] = rates
        measured = _measurement(gpu, machine, facts, time.monotonic() - start_s)
        keep_measurement(measured)
        for sample in samples:
            measurements.keep_sample(store, sample.model_copy(update={"neighbours_moved_bytes": moved_bytes}))
        yield from [measured.model_dump_json()] if as_json else _told(measured, words)


def _quick_findings(gpu: "GpuFacts", machine: "Machine", until_s: float) -> "tuple[dict[str, Any], list[Sample]]":
    """What the parts told about a card: fields of a CardMeasurement, and samples for plans."""
    from pydantic import ValidationError

    from turbodiff.gpu.allocator import EXPANDABLE, VARIABLES
    from turbodiff.plan.calibration import Sample
    from turbodiff.supervisor.worker_process import new_run_id, worker_environment

    facts: dict[str, Any] = {}
    samples: list[Sample] = []
    for part, part_s in PARTS_S.items():
        limit_s = min(part_s, until_s - time.monotonic())
        allocator = "limited" if facts.get("vmm_works") is False else machine.allocator
        environment = worker_environment(new_run_id(), gpu.uuid or str(gpu.index), allocator)
        if part == "vmm":
            environment |= dict.fromkeys(VARIABLES, EXPANDABLE)
        command = (*QUICK, part, "--seconds", str(max(1.0, limit_s - END_S)))
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
            )
            output, failed = done.stdout, done.returncode != 0
        except subprocess.TimeoutExpired as stopped:
            output, failed = (stopped.stdout or b"").decode("utf-8", "replace"), True
        except OSError as error:
            raise not_started(command[0], error) from None
        for line in output.splitlines():
            try:
                finding = json.loads(line)
                facts |= finding.get("facts", {}) | {name: True for name in ("no_cuda",) if finding.get(name)}
                samples += [Sample.model_validate(finding["sample"])] if "sample" in finding else []
            except (ValueError, ValidationError):  # a library's own words, or a line that was cut
                continue
        if "no_cuda" in facts:
            break
        if part == "vmm" and failed:
            facts["vmm_works"] = False
    return facts, samples


def _measurement(gpu: "GpuFacts", machine: "Machine", facts: Mapping[str, Any], took_s: float) -> "CardMeasurement":
    from turbodiff.gpu.card_measurements import CardMeasurement

    known = {name: value for name, value in facts.items() if name in CardMeasurement.model_fields}
    about = {"name": gpu.name, "total_bytes": gpu.total_bytes or 0, "driver": machine.driver or ""}
    when = {"torch": machine.torch or "", "at": datetime.now().astimezone(), "seconds": round(took_s, 1)}
    return CardMeasurement.model_validate({**known, **about, **when})


def _told(measured: "CardMeasurement", words: "Words") -> Iterator[str]:
    """A measurement in lines."""
    from turbodiff.spec.numbers import GB, gib

    unknown = words("shell.not_known")

    def size(n_bytes: int | None) -> str:
        return unknown if n_bytes is None else gib(n_bytes)

    def rate(bytes_s: float | None) -> str:
        return unknown if bytes_s is None else f"{bytes_s / GB:.1f} GB/s"

    def share(value: float | None) -> str:
        return unknown if value is None else words("shell.of_table", value=f"{value:.2f}")

    works = {True: "segments_work", False: "segments_fail", None: "not_known"}
    limit = "locked_refused" if measured.page_lock_refused else "locked_no_limit"
    rates = {"locked": rate(measured.pcie_bytes_s), "pageable": rate(measured.pageable_bytes_s)}
    caps = {"size": size(measured.smallest_cap_bytes), "planned": size(measured.planned_cap_bytes)}
    rows = {
        "context": size(measured.context_bytes),
        "segments": words(f"shell.{works[measured.vmm_works]}"),
        "locked": words(f"shell.{limit}", size=size(measured.page_locked_bytes)),
        "to_card": words("shell.to_card_rates", **rates),
        "from_card": rate(measured.pcie_to_host_bytes_s),
        "within_card": rate(measured.memory_bytes_s),
        "block": share(measured.block_rate),
        "two_frames": share(measured.decode_rate),
        "smallest_cap": words("shell.smallest_caps", **caps),
    }
    card = {"name": measured.name, "driver": measured.driver, "torch": measured.torch}
    yield words("shell.measured_card", **card, seconds=f"{measured.seconds:.0f}")
    for name, value in rows.items():
        yield f"  {words(f'shell.{name}'):20} {value}"
    for cards, bytes_s in measured.link_bytes_s or ():
        yield f"  {words('shell.among_cards', n=cards):20} {rate(bytes_s)}"
    for name, why in measured.kernels.items():
        yield f"  {words('shell.kernel', name=name):20} {why or words('shell.fused')}"
