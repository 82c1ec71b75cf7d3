"""One clip on several cards: the workers of the others make way, and their cards are lent to the first for an attempt.

The first card's worker starts a process on each of the others (runtime/ranks.py). A lent card has no worker and takes
no job until that attempt has ended, however it ends: see `slots.Loan`.
"""

from collections.abc import Sequence
from dataclasses import replace

from turbodiff.jobs import measurements
from turbodiff.plan.planner import plan_request, told_as
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.plan import Plan
from turbodiff.supervisor.slots import GpuSlot, Loan
from turbodiff.weights.locate import with_loras

EXIT_S, TERM_S = 3.0, 2.0  # of an idle worker, whose models are on a card that is needed now


def run_job(slot: GpuSlot, job: QueuedJob, slots: Sequence[GpuSlot], also: Sequence[int]) -> bool:
    """Give a claimed job to the worker of a slot, and with it the cards of the slots of these numbers; False where the
    disk has no place for its clip."""
    if not also:
        on_cpu = job.plan is not None and job.plan.device == "cpu" and not job.strikes
        return slot.run(job, job.plan.followers if job.plan and on_cpu else ())
    lent = [other for other in slots if other.index in also and other.free and other.context is slot.context]
    for other in lent:
        other.log(f"its card is lent to job {job.id}")
        other.ask_to_end()
    lent = [other for other in lent if other.stop("its card is lent", EXIT_S, TERM_S)]
    plan = plan_together(job, [slot, *lent])
    if plan is None:  # another program has taken memory since: its worker plans for its own card, or waits
        return slot.run(job)
    started = slot.run(replace(job, plan=plan), plan.followers)
    if slot.monitor is not None:
        for other in lent:
            if other.device in plan.followers:
                share = next(share for share in plan.shares if share.uuid == other.device)
                other.lend(Loan(slot, slot.monitor), share.peak_bytes)
    return started


def plan_together(job: QueuedJob, slots: Sequence[GpuSlot]) -> Plan | None:
    """The job's plan for the cards of these slots, the first slot's card first; None where they cannot hold it as it
    was shown."""
    first = slots[0]
    machine = first.context.memory.machine()
    gpus = tuple([slot.gpu for slot in slots if slot.seen])
    if machine is None or job.plan is None or len(gpus) < 2:
        return None
    inventory = with_loras(first.context.inventory, job.request.loras)
    history = measurements.history(first.context.store)
    here = machine.model_copy(update={"gpus": gpus})
    try:
        plan = plan_request(job.plan.request, here, inventory, policy="never", history=history, ranks=len(gpus))
    except DoesNotFitError:
        return None
    peaks_bytes = [share.peak_bytes for share in plan.shares]
    places = sorted(plan.shares, key=lambda share: share.uuid != first.device)  # alike: any of them may be the first
    shares = tuple([
        place.model_copy(update={"peak_bytes": peak_bytes})
        for place, peak_bytes in zip(places, peaks_bytes, strict=True)
    ])  # fmt: skip
    if not shares or shares[0].uuid != first.device:
        return None
    return told_as(job.plan, plan).model_copy(update={"shares": shares, "device": shares[0].device})
