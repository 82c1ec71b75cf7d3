"""The last look before a job starts and before each of its phases: the plan to run, with levers for what is free now.

What was lowered of the picture stays as it was shown; only levers that cost no pixel are pulled here. Where even the
smallest way to go on does not fit beside somebody who grew, the job waits for the bytes that it lacks.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbodiff.gpu.probe import machine_now
from turbodiff.plan.calibration import Calibration
from turbodiff.plan.hardware import CONTEXT_BYTES, Machine, only
from turbodiff.plan.planner import Shortage, band_of, from_phase, plan_request, replan, told_as
from turbodiff.runtime import offload
from turbodiff.runtime.device import Device
from turbodiff.runtime.latents_cache import earlier_plan
from turbodiff.spec.plan import PhaseName, Plan
from turbodiff.spec.request import Request
from turbodiff.weights.locate import inventory


class Waits(Exception):
    """A job cannot go on beside a neighbour that grew: no error, it goes back to the queue."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(shortage)
        self.shortage = shortage


def machine_of(order: Mapping[str, Any], device: Device) -> Machine | None:
    """The machine with this worker's card alone; None where a plan came along that a CPU runs as it is."""
    if device.is_cuda:
        return own_card(machine_now(own_pids=frozenset({os.getpid()})), device)
    return None if _given(order) else machine_now(own_pids=frozenset({os.getpid()}))


def plan_for(order: Mapping[str, Any], machine: Machine | None, device: Device) -> Plan | Shortage:
    """The plan that an order starts with; on a GPU torch's allocator stops at its budget.

    After an out-of-memory the order has no plan, and the new one stays below its `cap_bytes`; where the latents of the
    failed attempt are there, it is the same clip, and only its decode must fit. A plan that comes along gets the
    lossless levers for what is free now; "Run anyway" (band "no") runs as it came.

    Raises:
        DoesNotFitError: nothing that the pins allow is below the cap, or host memory is short.
    """
    plan = _given(order)
    if plan is None:
        assert machine is not None
        plan = _below(order, machine)
    elif machine is not None:
        fresh = replan(plan, machine, inventory, calibration=calibration_of(order))
        if isinstance(fresh, Shortage):
            return fresh
        plan = fresh
    hold_to(plan, machine, device)
    return plan


def at_phase(
    plan: Plan, name: PhaseName, machine: Machine, device: Device, calibration: Calibration | None = None
) -> Plan | Shortage:
    """The plan for what is left from phase `name` on: as it is where that fits now, else with other lossless levers.

    Asks torch what is free, which takes microseconds; the driver's library is the probe's to ask.
    """
    free_bytes = device.available_bytes()
    if free_bytes is None or not machine.gpus or plan.band == "no":
        return plan
    machine = with_free(machine, free_bytes)
    fresh = replan(plan, machine, inventory, at=name, calibration=calibration)
    if not isinstance(fresh, Shortage):
        hold_to(fresh, machine, device)
    return fresh


def hold_to(plan: Plan, machine: Machine | None, device: Device) -> None:
    """Stop torch's allocator at what this machine has for us; "Run anyway" may take what it needs."""
    if device.is_cuda and machine is not None and machine.gpus:
        room_bytes = max(machine.largest_budget_bytes, plan.peak_bytes if plan.band == "no" else 0)
        offload.cap(device.torch_device, room_bytes - context_bytes(machine))


def own_card(machine: Machine, device: Device) -> Machine:
    """The machine with the card of this process alone, what torch holds counted as ours also where NVML cannot see
    pids (containers)."""
    machine = only(machine, f"cuda:{device.torch_device.index or 0}")
    held_bytes = device.held_bytes()
    ours = held_bytes + CONTEXT_BYTES if held_bytes else 0
    known = [gpu.model_copy(update={"reclaimable_bytes": max(gpu.reclaimable_bytes, ours)}) for gpu in machine.gpus]
    return machine.model_copy(update={"gpus": tuple(known)})


def with_free(machine: Machine, free_bytes: int) -> Machine:
    """The machine with so many bytes of its one card free or ours, the CUDA context beside them."""
    (gpu,) = machine.gpus
    ours = free_bytes + context_bytes(machine)
    total = gpu.total_bytes
    free = ours if total is None else min(total, ours)
    used = None if total is None else total - free
    now = gpu.model_copy(update={"free_bytes": free, "used_bytes": used, "reclaimable_bytes": 0})
    return machine.model_copy(update={"gpus": (now,)})


def context_bytes(machine: Machine | None) -> int:
    """Bytes of the CUDA context, which are part of every budget and none of the allocator's."""
    return machine.gpus[0].cuda_context_bytes if machine and machine.gpus else CONTEXT_BYTES


def calibration_of(order: Mapping[str, Any]) -> Calibration | None:
    """What measured runs taught, as the order says it."""
    told = order.get("calibration")
    return Calibration(*told) if told else None


def _given(order: Mapping[str, Any]) -> Plan | None:
    if not order.get("plan") or order.get("cap_bytes") is not None:
        return None
    return Plan.model_validate(order["plan"])


def _below(order: Mapping[str, Any], machine: Machine) -> Plan:
    """A plan below the cap of the order."""
    request, cap_bytes = Request.model_validate(order["request"]), order.get("cap_bytes")
    earlier = earlier_plan(Path(order["state"]), order["job"], request)
    if earlier is not None:
        decoding = _decode_only(earlier, machine, cap_bytes)
        if decoding is not None:
            return decoding
    calibration = calibration_of(order)
    return plan_request(request, machine, inventory(), limit_bytes=cap_bytes, calibration=calibration)


def _decode_only(earlier: Plan, machine: Machine, cap_bytes: int | None) -> Plan | None:
    """What is left of a clip whose latents are there, or None where that does not fit."""
    fresh = plan_request(earlier.request, machine, inventory(), policy="anyway", limit_bytes=cap_bytes)
    phases = from_phase(fresh, "vae_decode")
    peak_bytes = max(phase.peak_bytes for phase in phases)
    band = band_of(peak_bytes, fresh.budget_bytes)
    rest = {"phases": phases, "peak_bytes": peak_bytes, "band": band}
    return None if band == "no" else told_as(earlier, fresh.model_copy(update=rest))
