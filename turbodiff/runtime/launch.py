"""The last look before a job starts: the plan to run, made new where the one that came is missing or out of date."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from turbodiff.gpu.probe import machine_now
from turbodiff.plan.budget import CONTEXT_BYTES, device_budget
from turbodiff.plan.machine import Machine
from turbodiff.plan.planner import at_launch, make_plan
from turbodiff.runtime import residency
from turbodiff.runtime.device import Device
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request
from turbodiff.weights.locate import inventory


class Shortage(NamedTuple):
    """Somebody else holds the memory that even the smallest way to run this job needs."""

    need_bytes: int
    free_bytes: int


def plan_for(order: Mapping[str, Any], device: Device) -> Plan | Shortage:
    """The plan that an order starts with; on a GPU torch's allocator stops at its budget.

    After an out-of-memory the order has no plan, and the new one stays below its `cap_bytes`. A plan that comes along
    gets the lossless levers for what is free now; "Run anyway" (band "no") runs as it came.

    Raises:
        DoesNotFitError: nothing that the pins allow is below the cap.
    """
    plan = _given(order)
    if plan is None:
        request, machine = Request.model_validate(order["request"]), _machine(device)
        plan = make_plan(request, machine, inventory(), limit_bytes=order.get("cap_bytes"))
        residency.cap(device.torch_device, max(plan.peak_bytes, free_for_us(machine)))  # smaller, with all the room
        return plan
    if device.is_cuda and plan.band != "no":
        fresh = refit(plan, _machine(device))
        if isinstance(fresh, Shortage):
            return fresh
        plan = fresh
    residency.cap(device.torch_device, max(plan.budget_bytes, plan.peak_bytes))
    return plan


def refit(plan: Plan, machine: Machine) -> Plan | Shortage:
    """The same clip on the machine as it is now; what was lowered, and what else there was, is told as before.

    A machine whose cards cannot be seen at the moment changes nothing.
    """
    if not machine.gpus:
        return plan
    fresh = at_launch(plan, machine, inventory())
    if isinstance(fresh, int):
        return Shortage(fresh, free_for_us(machine))
    return fresh.model_copy(update={"changes": plan.changes, "alternatives": plan.alternatives})


def free_for_us(machine: Machine) -> int:
    """Bytes that a job may use on the freest card, 0 without one."""
    return max((device_budget(gpu, machine) for gpu in machine.gpus), default=0)


def _given(order: Mapping[str, Any]) -> Plan | None:
    if not order.get("plan") or order.get("cap_bytes") is not None:
        return None
    return Plan.model_validate(order["plan"])


def _machine(device: Device) -> Machine:
    machine = machine_now(own_pids=frozenset({os.getpid()}))
    return with_own_memory(machine, device) if device.is_cuda else machine


def with_own_memory(machine: Machine, device: Device) -> Machine:
    """The machine with what this process holds counted as ours, also where NVML cannot see pids (containers)."""
    held = torch.cuda.memory_reserved(device.torch_device)
    ours = held + CONTEXT_BYTES if held else 0
    gpus = tuple(
        gpu.model_copy(update={"reclaimable_bytes": max(gpu.reclaimable_bytes, ours)})
        if gpu.index == (device.torch_device.index or 0)
        else gpu
        for gpu in machine.gpus
    )
    return machine.model_copy(update={"gpus": gpus})
