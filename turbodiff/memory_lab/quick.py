"""What one card does, in under a minute: `turbodiff calibrate --quick` runs this in processes of its own.

    python -m turbodiff.memory_lab.quick vmm|card --seconds 20

Each finding is a JSON line on standard output, as soon as it is known, so that a part that is stopped leaves what it
found: {"facts": {...}} are fields of gpu/card_measurements.CardMeasurement, {"sample": {...}} is a Sample for plans.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from turbodiff.gpu.host_memory import host_memory
from turbodiff.gpu.probe import machine_now
from turbodiff.memory_lab.dry_run import Ledger
from turbodiff.memory_lab.measure import DummyModels, run_phase, synchronize
from turbodiff.plan import phase_costs
from turbodiff.plan.calibration import Sample, kind_of, work_bytes
from turbodiff.plan.candidates import as_wished
from turbodiff.plan.context import plan_context
from turbodiff.plan.hardware import Machine
from turbodiff.plan.offload_search import cost_inputs
from turbodiff.plan.phase_costs import CostInputs, PhaseCost
from turbodiff.plan.planner import plan_request
from turbodiff.plan.tiers import first_request, tier_here
from turbodiff.runtime import offload
from turbodiff.runtime.device import Device
from turbodiff.spec.models import Inventory, find_model
from turbodiff.spec.numbers import GIB, MIB
from turbodiff.spec.out_of_memory import memory_failure
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

TWO_LATENT_FRAMES = 5  # of a clip
COPY_BYTES, COPIES = 256 * MIB, 3
PIECE_BYTES, MOST_LOCKED_BYTES = 256 * MIB, 4 * GIB
LOCK_SHARE = 4  # at most one such part of what is free of the computer's memory is page-locked for the test
CAP_STEP = 0.01  # of the planned cap: a closer one is no news
CAP_ROOM = 1.5  # of the planned cap, where a search for one that works gives up
TRIED_BYTES = 64 * MIB
SMALLEST_MODEL = "wan2.1-1.3b"  # of cards below all tiers


class Measured(NamedTuple):
    """One phase at work: seconds, most bytes of tensors beside the weights, and the smallest cap of the allocator that
    works, less the weights; None where time was up before it was known."""

    seconds: float
    work_bytes: int
    held_bytes: int | None


def main(argv: list[str] | None = None) -> int:
    """Measure one part; 0 unless the card failed."""
    parser = argparse.ArgumentParser(prog="turbodiff-quick")
    parser.add_argument("part", choices=("vmm", "card"))
    parser.add_argument("--seconds", type=float, default=20.0, help="begin nothing after that")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():  # what a CPU does is no fact of a card
        tell(no_cuda=True)
        return 1
    until_s, device = time.monotonic() + args.seconds, torch.device("cuda")
    if args.part == "vmm":  # under expandable segments, which this process was started with
        grown = [torch.zeros(TRIED_BYTES, dtype=torch.uint8, device=device) for _ in range(3)]
        tell(facts={"vmm_works": bool(sum(int(one.sum()) for one in grown) == 0)})
        return 0
    before = machine_now()  # before this process has a context
    card = Device.pick()
    tell(facts={"kernels": kernels(card)})
    for _ in measure_card(card, before, until_s):
        pass
    return 0


def tell(**finding: object) -> None:
    """Print a finding."""
    sys.stdout.write(json.dumps(finding) + "\n")
    sys.stdout.flush()


def kernels(device: Device) -> dict[str, str]:
    """Operation -> why its fused kernel does not run, "" where it proved itself: the self-check, whose verdicts the
    worker and the plan read too."""
    from turbodiff_kernels import backend

    chosen: list[backend.Implementation] = []
    backend.check_all(device.torch_device, chosen.append)  # with Hopper's loop, whose time is measured here, too
    return {one.op: "" if one.runs == "triton" else one.why for one in chosen}


def measure_card(device: Device, before: Machine, until_s: float) -> Iterator[str]:
    """Everything about a card but its kernels and expandable segments, told as it comes; yields the names of parts."""
    rates = copy_rates(device)
    tell(facts=rates)
    yield "copies"
    tell(facts=page_lock(min(until_s, time.monotonic() + 5.0)))
    yield "page_lock"
    tier = tier_here(before)
    spec = find_model((tier.t2v.model if tier else None) or SMALLEST_MODEL)
    for finding in measure_clip(first_request(spec, before), before, device, until_s):
        tell(**finding)
    yield "clip"
    if (context_bytes := context(before, device)) is not None:
        tell(facts={"context_bytes": context_bytes})
    yield "context"


def context(before: Machine, device: Device) -> int | None:
    """Bytes of this process on the card beside what torch's allocator holds, or what the card has less than before it
    had a context; None where neither is told."""
    after = machine_now()
    used = [gpu.used_bytes for machine in (before, after) for gpu in machine.gpus[:1]]
    if len(used) != 2 or used[0] is None or used[1] is None:
        return None
    return max(0, used[1] - used[0] - device.held_bytes()) or None


def copy_rates(device: Device) -> dict[str, float]:
    """Bytes a second: from page-locked and from pageable host memory to the card, back, and within the card (read and
    write counted)."""
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device.torch_device)
    other, pageable = torch.empty_like(there), torch.zeros(COPY_BYTES, dtype=torch.uint8)
    copies = {"memory_bytes_s": (other, there, 2), "pageable_bytes_s": (there, pageable, 1)}
    if device.is_cuda:
        locked = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        copies |= {"pcie_bytes_s": (there, locked, 1), "pcie_to_host_bytes_s": (locked, there, 1)}
    found = {}
    for name, (into, source, passes) in copies.items():
        best_s = float("inf")
        for _ in range(COPIES):
            synchronize(device.torch_device)
            start_s = time.perf_counter()
            into.copy_(source, non_blocking=True)
            synchronize(device.torch_device)
            best_s = min(best_s, time.perf_counter() - start_s)
        found[name] = passes * COPY_BYTES / max(best_s, 1e-6)
    return found


def page_lock(until_s: float, make: Callable[[int], object] = offload.PAGE_LOCKED) -> dict[str, int | bool]:
    """Bytes of host memory that were page-locked, and whether more was refused.

    At most 4 GiB and a quarter of what is free: no more is needed to tell a limit (WSL2 ends between 0.5 and 1 GiB).
    """
    most_bytes = min(MOST_LOCKED_BYTES, (host_memory().available_bytes or 0) // LOCK_SHARE)
    held: list[object] = []
    while (len(held) + 1) * PIECE_BYTES <= most_bytes and time.monotonic() < until_s:
        try:
            held.append(make(PIECE_BYTES))
        except RuntimeError:
            return {"page_locked_bytes": len(held) * PIECE_BYTES, "page_lock_refused": True}
    return {"page_locked_bytes": len(held) * PIECE_BYTES, "page_lock_refused": False}


def measure_clip(request: Request, machine: Machine, device: Device, until_s: float) -> Iterator[dict[str, object]]:
    """One block at the size of this card's first clip and two latent frames of its decode, as findings."""
    plan = plan_request(request, machine, Inventory(), policy="anyway")
    spec, choice = plan.request.spec, as_wished(plan.request, False)
    one = spec.model_copy(update={"dit": spec.dit.model_copy(update={"num_layers": 1})})
    here = frozenset({"vae", *(expert.component for expert in spec.experts)})
    planned = plan_context(machine, Inventory(), loaded=here)
    block = cost_inputs(plan.request, choice._replace(spec=one), planned)
    frames = cost_inputs(plan.request, choice._replace(num_frames=TWO_LATENT_FRAMES), planned)
    work, expert = phase_costs.step_work(block, plan.levers.ffn_chunks, plan.levers.text_keys), block.experts[-1]
    block_cost = phase_costs.denoise(block, expert, "resident", 0, work)
    decode_cost = phase_costs.vae(frames, "vae_decode", plan.levers.tile)
    short = plan.request.model_copy(update={"num_frames": TWO_LATENT_FRAMES})
    levers = plan.levers.model_copy(update={"experts": "resident"})
    clips = (
        (DummyModels(one, device), plan.model_copy(update={"levers": levers}), block_cost, block, work.seconds),
        (
            DummyModels(spec, device),
            plan.model_copy(update={"request": short}),
            decode_cost,
            frames,
            decode_cost.seconds,
        ),
    )
    planned_cap = smallest_cap = 0
    for (models, clip, cost, inputs, formula_s), rate in zip(clips, ("block_rate", "decode_rate"), strict=True):
        found = measure_phase(models, clip, cost, inputs, until_s)
        yield {"facts": {rate: formula_s / max(found.seconds, 1e-6)}}
        fixed_bytes = fixed(inputs)
        if found.held_bytes is not None:
            planned_cap = max(planned_cap, cost.peak_bytes - fixed_bytes)
            smallest_cap = max(smallest_cap, cost.weights_bytes + found.held_bytes)
            for sample in samples(plan if rate == "block_rate" else clip, cost, found, fixed_bytes, machine):
                yield {"sample": sample.model_dump(mode="json")}
    if smallest_cap:
        yield {"facts": {"planned_cap_bytes": planned_cap, "smallest_cap_bytes": smallest_cap}}


def fixed(inputs: CostInputs) -> int:
    """Bytes of a peak that are none of the allocator's: the CUDA context, on a CPU the process."""
    return phase_costs.CPU_PROCESS_BYTES if inputs.on_cpu else inputs.context_bytes


def samples(plan: Plan, cost: PhaseCost, found: Measured, fixed_bytes: int, machine: Machine) -> Iterator[Sample]:
    """What a measured phase says about a plan. What the plan holds beyond it (the text of further blocks) are plain
    tensors, known to the byte: they are added to both sides."""
    name = cost.name.partition("_")[0]
    for phase in plan.phases if machine.gpus and found.held_bytes is not None else ():
        if phase.name != cost.name and not (name == "denoise" and phase.name.startswith(name)):
            continue
        work = work_bytes(plan, phase)
        here = cost.peak_bytes - cost.weights_bytes - fixed_bytes - cost.learned_bytes
        tensors = work - (here - cost.slack_bytes) if name == "denoise" else 0
        more = work + phase.slack_bytes - here if name == "denoise" else 0
        if more < 0 or (name != "denoise" and plan.request.num_frames != TWO_LATENT_FRAMES):
            continue
        predicted = work if name == "denoise" else here - cost.slack_bytes
        yield Sample(
            kind=kind_of(machine.gpus[0], machine, plan.request, plan.levers),
            phase=phase.name,
            predicted_bytes=predicted,
            slack_bytes=phase.slack_bytes if name == "denoise" else cost.slack_bytes,
            measured_bytes=found.work_bytes + tensors,
            held_bytes=(found.held_bytes or 0) + more,
        )


def measure_phase(models: DummyModels, plan: Plan, cost: PhaseCost, inputs: CostInputs, until_s: float) -> Measured:
    """A phase of a plan: its seconds once warm, its tensors, and the smallest cap by bisection."""
    device, name = models.device, cost.name
    planned_cap = cost.peak_bytes - fixed(inputs)
    with capped(models, name, plan, None) as peak_bytes, torch.inference_mode():
        run_phase(models, plan, name)
        start_s = time.perf_counter()
        step_s = run_phase(models, plan, name)  # kernels are built and libraries loaded by now
        synchronize(device.torch_device)
        seconds = step_s if name.startswith("denoise") else time.perf_counter() - start_s
        work = max(0, peak_bytes() - cost.weights_bytes)

    def runs(cap_bytes: int) -> bool:
        try:
            with capped(models, name, plan, cap_bytes), torch.inference_mode():
                run_phase(models, plan, name)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if memory_failure(error) is None:
                raise
            return False
        return True

    cap = bisect_cap(runs, planned_cap, cost.weights_bytes, until_s)
    return Measured(seconds, work, None if cap is None else max(0, cap - cost.weights_bytes))


def bisect_cap(runs: Callable[[int], bool], planned_bytes: int, least_bytes: int, until_s: float) -> int | None:
    """The smallest cap with which `runs`, within 1 % of the planned one; None where time was up before one worked, or
    none up to half as much again does.

    Args:
        planned_bytes: tried first. least_bytes: known to be too little.
    """
    low, high = least_bytes, planned_bytes
    if not runs(high):
        low, high = high, round(CAP_ROOM * planned_bytes)
        if time.monotonic() > until_s or not runs(high):
            return None
    while high - low > CAP_STEP * planned_bytes and time.monotonic() < until_s:
        middle = (low + high) // 2
        if runs(middle):
            high = middle
        else:
            low = middle
    return high


@contextmanager
def capped(models: DummyModels, phase: str, plan: Plan, cap_bytes: int | None) -> Iterator[Callable[[], int]]:
    """The device with room for so many bytes, None: all it has; yields how to ask for the peak. On a CPU a ledger
    stands for the card, to which weights count as if they had been brought there."""
    device = models.device
    if device.is_cuda:
        offload.free_cached(device.torch_device)
        offload.cap_allocator(device.torch_device, 1 << 60 if cap_bytes is None else cap_bytes)
        device.reset_peak()
        try:
            yield device.peak_bytes
        finally:
            offload.cap_allocator(device.torch_device, 1 << 60)
            offload.free_cached(device.torch_device)
        return
    int8 = plan.request.quant_linear == "on"
    network = models.get_or_make("vae" if phase == "vae_decode" else "int8 dit" if int8 else "dit")
    with Ledger(device.torch_device.type, cap_bytes) as ledger:
        ledger.see_module(network)
        yield lambda: ledger.peak_bytes


if __name__ == "__main__":
    sys.exit(main())
