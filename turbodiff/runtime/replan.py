"""The plan that a job starts with, and a check before each of its phases: levers for what is free now.

What was lowered of the picture stays as it was shown; only levers that cost no pixel change here. Where even the
smallest way to go on does not fit beside another program that grew, the job waits for the bytes that it lacks.
"""

import os
from typing import Literal

from turbodiff.gpu.host_memory import host_memory
from turbodiff.gpu.probe import machine_now
from turbodiff.plan import planner
from turbodiff.plan.hardware import CONTEXT_BYTES, Machine, only
from turbodiff.plan.planner import Refusal, Shortage, band_of, from_phase, plan_request, told_as
from turbodiff.plan.shared_clip import with_cards
from turbodiff.runtime import offload
from turbodiff.runtime.device import Device
from turbodiff.runtime.latents_cache import LatentsCache
from turbodiff.spec.events import RunCommand
from turbodiff.spec.plan import Calibration, Levers, PhaseName, Plan
from turbodiff.weights.locate import inventory, with_loras


class WaitForMemory(Exception):
    """A job cannot go on beside a program that grew: no error, it goes back to the queue."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(shortage)
        self.shortage = shortage


def machine_for(command: RunCommand, device: Device) -> Machine | None:
    """The machine with this worker's card alone; None where a plan came along that a CPU runs as it is.

    What torch holds is counted as ours also where NVML cannot see process ids (containers).
    """
    if not device.is_cuda and command.given_plan:
        return None
    machine = machine_now(own_pids=frozenset({os.getpid()}))
    if command.promised_ram_bytes and machine.ram_available_bytes is not None:
        ram_bytes = max(0, machine.ram_available_bytes - command.promised_ram_bytes)
        machine = machine.model_copy(update={"ram_available_bytes": ram_bytes})
    if not device.is_cuda:
        return machine
    machine, held_bytes = only(machine, f"cuda:{device.torch_device.index or 0}"), device.held_bytes()
    ours = held_bytes + CONTEXT_BYTES if held_bytes else 0
    known = [gpu.model_copy(update={"reclaimable_bytes": max(gpu.reclaimable_bytes, ours)}) for gpu in machine.gpus]
    return machine.model_copy(update={"gpus": tuple(known)})


def outside_bytes(device: Device) -> int | None:
    """Bytes that the driver shows for this process beside what torch's allocator holds: the CUDA context, libraries and
    kernels. None on a CPU, and where NVML does not know this process's id (containers, WSL2). It asks NVML in a process
    of its own, which takes a tenth of a second.
    """
    if not device.is_cuda:
        return None
    machine = only(machine_now(own_pids=frozenset({os.getpid()})), f"cuda:{device.torch_device.index or 0}")
    shown_bytes = sum([gpu.reclaimable_bytes for gpu in machine.gpus])
    return max(0, shown_bytes - device.held_bytes()) if shown_bytes else None


def first_plan(command: RunCommand, machine: Machine | None, device: Device) -> Plan:
    """The plan that an attempt starts with; on a GPU torch's allocator stops at its budget.

    A plan that comes along gets the lossless levers for what is free now; "Run anyway" (band "no") runs as it came.
    Otherwise the new one stays below `cap_bytes`; where the latents of the failed attempt are there, it is the same
    clip, and only its decode must fit.

    Raises:
        WaitForMemory: another program holds what even the smallest way to run needs.
        DoesNotFitError: nothing that the pins allow is below the cap, or host memory is short.
    """
    plan, ranks = command.given_plan, 1 + len(command.cards)
    if plan is not None and plan.levers.cards != ranks:  # it was shown for more or fewer cards than there are now
        plan = for_cards(plan, ranks, machine, command.calibration)
    if plan is not None:
        return plan if machine is None else replan(plan, machine, device, command.calibration, at="launch")
    assert machine is not None
    cap_bytes = command.cap_bytes
    earlier = LatentsCache(command.state, command.job).load_plan(command.request)
    if earlier is not None:
        fresh = plan_request(earlier.request, machine, inventory(), policy="anyway", limit_bytes=cap_bytes, ranks=ranks)
        phases = from_phase(fresh, "vae_decode")
        peak_bytes = max(phase.peak_bytes for phase in phases)
        band = band_of(peak_bytes, fresh.budget_bytes)
        rest = fresh.model_copy(update={"phases": phases, "peak_bytes": peak_bytes, "band": band})
        plan = None if band == "no" else told_as(earlier, rest)
    if plan is None:
        calibration = command.calibration
        found = with_loras(inventory(), command.request.loras)
        plan = plan_request(
            command.request, machine, found, limit_bytes=cap_bytes, calibration=calibration, ranks=ranks
        )
    _cap_allocator(plan, machine, device)
    return plan


def replan(
    plan: Plan,
    machine: Machine,
    device: Device,
    calibration: Calibration | None = None,
    *,
    at: Literal["launch"] | PhaseName,
) -> Plan:
    """The plan for what is left from `at` on: as it is where that fits now, else with other lossless levers.

    At launch `machine` says what is free; before a phase torch does, which takes microseconds.

    Raises:
        WaitForMemory: no levers are enough.
        DoesNotFitError: at launch, host memory is short.
    """
    if at != "launch":
        now = machine_at(machine, device)
        if now is None or plan.band == "no":
            return plan
        machine = now
    fresh = planner.replan(plan, machine, inventory, at=at, calibration=calibration)
    if isinstance(fresh, Shortage):
        raise WaitForMemory(fresh)
    _cap_allocator(fresh, machine, device)
    return fresh


def machine_at(machine: Machine, device: Device) -> Machine | None:
    """The machine of an attempt with what its device has for us at this moment; None where it cannot be asked."""
    free_bytes = device.available_bytes()
    if free_bytes is None or not machine.gpus:
        return None
    (gpu,) = machine.gpus
    if gpu.total_bytes is None:  # its memory is that of the host
        host = host_memory((os.getpid(),))
        ours = host.available_bytes + host.reclaimable_bytes + device.held_bytes()
        return machine.model_copy(update={"ram_available_bytes": ours, "ram_reclaimable_bytes": 0})
    ours = free_bytes + gpu.cuda_context_bytes
    free = min(gpu.total_bytes, ours)
    gpu = gpu.model_copy(update={"free_bytes": free, "used_bytes": gpu.total_bytes - free, "reclaimable_bytes": 0})
    return machine.model_copy(update={"gpus": (gpu,)})


def budget_now(plan: Plan, machine: Machine, device: Device) -> int | None:
    """Bytes that a job may use on the device at this moment, its context included, which is where torch's allocator
    stops from now on; None where nobody can say, and for "Run anyway"."""
    now = machine_at(machine, device)
    if now is None or plan.band == "no":
        return None
    _cap_allocator(plan, now, device)
    return now.largest_budget_bytes


def for_cards(
    plan: Plan, cards: int, machine: Machine | None, calibration: Calibration | None = None, *,
    at: Literal["launch"] | PhaseName = "launch",
) -> Plan:  # fmt: skip
    """The same clip on so many of its cards, this one first, where it was planned for more or fewer: with the lossless
    levers of a plan made for them, since what was chosen for several may not fit on one where other levers would. "Run
    anyway", and a clip on a machine that is not known, keeps its levers as far as they can be kept.

    Args:
        at: only what is left from this phase on must fit.

    Raises:
        WaitForMemory: another program holds what even the smallest way to go on needs.
        DoesNotFitError: these cards could not hold it if nobody else used them, or host memory is short.
    """
    plan = plan.model_copy(update={"shares": plan.shares[:cards] if cards > 1 else ()})
    if machine is None or plan.band == "no":
        return with_levers(plan, with_cards(plan.levers, cards), machine)
    found, cached = with_loras(inventory(), plan.request.loras), plan.levers.text == "cached"
    limit_bytes = min([share.budget_bytes for share in plan.shares[1:]], default=None)
    try:
        fresh = plan_request(
            plan.request, machine, found, policy="never", calibration=calibration, text_cached=cached,
            limit_bytes=limit_bytes, ranks=cards,
        )  # fmt: skip
    except Refusal as refusal:
        fresh = _as_left(refusal, machine, at)
    fresh = told_as(plan, fresh)
    return fresh.model_copy(update={"shares": fresh.shares[: fresh.levers.cards]})  # heads must divide


def _as_left(refusal: Refusal, machine: Machine, at: Literal["launch"] | PhaseName) -> Plan:
    """The plan that was refused, where what is left of it fits all the same; raises as `for_cards`."""
    plan, gpu = refusal.plan, next(iter(machine.usable_gpus), None)
    rest = plan.phases if at == "launch" else from_phase(plan, at)
    need_bytes = max([phase.peak_bytes for phase in rest])
    if len(rest) < len(plan.phases) and need_bytes <= plan.budget_bytes:
        return plan.model_copy(update={"band": band_of(need_bytes, plan.budget_bytes)})
    reserved_bytes = machine.reserved_bytes(gpu) if gpu else 0
    total_bytes = gpu.total_bytes if gpu else 0
    if refusal.code == "does_not_fit_host" or (total_bytes is not None and need_bytes + reserved_bytes > total_bytes):
        raise refusal
    raise WaitForMemory(Shortage(need_bytes + reserved_bytes, machine.largest_budget_bytes + reserved_bytes)) from None


def with_levers(plan: Plan, levers: Levers, machine: Machine | None) -> Plan:
    """The same clip with other levers; its figures stay as they were where the machine is not known."""
    if machine is None:
        return plan.model_copy(update={"levers": levers})
    return planner.with_levers(plan, levers, machine, inventory())


def _cap_allocator(plan: Plan, machine: Machine, device: Device) -> None:
    """Stop torch's allocator at what this machine has for us; "Run anyway" may take what it needs."""
    if device.is_cuda and machine.gpus:
        room_bytes = max(machine.largest_budget_bytes, plan.peak_bytes if plan.band == "no" else 0)
        offload.cap_allocator(device.torch_device, room_bytes - machine.gpus[0].cuda_context_bytes)
