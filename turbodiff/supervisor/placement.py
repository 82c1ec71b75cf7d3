"""What each waiting job costs on each card as it is now, for `dispatch` to choose by (jobs/dispatch.py)."""

from collections.abc import Mapping, Sequence

from turbodiff.jobs.attempts import may_start
from turbodiff.jobs.dispatch import Card, Choice, Price, WaitingJob, dispatch, overtaken_by
from turbodiff.jobs.store import as_job
from turbodiff.plan.candidates import network_files
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.plan.planner import outlook
from turbodiff.plan.roofline import DISK_BYTES_S
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.models import Inventory
from turbodiff.supervisor.context import SupervisorContext
from turbodiff.supervisor.slots import GpuSlot
from turbodiff.weights.locate import inventory, with_loras

WINDOW = 64  # waiting jobs that are looked at
EVERY_S = 0.5
UNKNOWN_S = 300.0  # of a job without a plan, alike on every card
STARTING_S = 5.0  # of a worker
Chosen = Mapping[int, Choice]  # by the slot's number
SAME_BYTES = 1 << 28  # by which a card's free memory must change to be priced anew


class Placement:
    """Chooses the jobs that start on several cards; remembers prices."""

    def __init__(self, context: SupervisorContext) -> None:
        self.context = context
        self._prices: dict[tuple[object, ...], Price | None] = {}
        self._chosen_s = -EVERY_S

    def choose(self, slots: Sequence[GpuSlot]) -> Chosen | None:
        """The job that each slot starts now, by the slot's number; None: each takes the next one, for there is one card
        alone, or nothing is known of the cards."""
        machine = self.context.memory.machine()
        if len(slots) < 2 or machine is None or any(slot.card >= len(machine.gpus) for slot in slots):
            return None
        store, now_s = self.context.store, self.context.now()
        if now_s - self._chosen_s < EVERY_S or not any(slot.free for slot in slots):
            return {}
        self._chosen_s = now_s
        rows = store.rows("SELECT * FROM job WHERE state = 'queued' ORDER BY place, id LIMIT ?", WINDOW)
        cards = [card for slot in slots if not slot.broken and (card := self._card(slot))]
        jobs = [
            job for job in map(as_job, rows)
            if may_start(store, job.hold_bytes, job.started_s, job.request.after, free_bytes=None)
        ]  # fmt: skip
        waiting = [self._waiting(job, slots, machine) for job in jobs]
        known = {job.job for job in waiting}
        self._prices = {key: price for key, price in self._prices.items() if key[0] in known}
        free = {slot.index for slot in slots if slot.free}
        starts = [start for start in dispatch(waiting, cards) if start.start_s == 0 and start.slot in free]
        left, chosen = waiting, dict[int, Choice]()
        for start in starts:
            chosen[start.slot] = Choice(start.job, tuple(overtaken_by(start, left)))
            left = [job for job in left if job.job != start.job]
        return chosen

    def _card(self, slot: GpuSlot) -> Card:
        """A slot as `dispatch` sees it."""
        if slot.job is None:
            return Card(slot.index, 0.0 if slot.free else STARTING_S, slot.weights)
        job = self.context.store.job(slot.job.id)
        planned_s = job.plan.seconds if job.plan else UNKNOWN_S
        left_s = planned_s - (self.context.store.now() - (job.started_s or 0.0))
        if job.progress and job.progress.eta_s is not None:
            left_s = job.progress.eta_s
        return Card(slot.index, max(1.0, left_s), weights_of(job))

    def _waiting(self, job: QueuedJob, slots: Sequence[GpuSlot], machine: Machine) -> WaitingJob:
        found: Inventory | None = None
        prices: dict[int, Price] = {}
        for slot in slots:
            gpu = machine.gpus[slot.card]
            free_bytes = gpu.free_bytes and gpu.free_bytes + gpu.reclaimable_bytes
            key = (job.id, job.attempt, slot.device, (free_bytes or 0) // SAME_BYTES)
            if key not in self._prices:
                found = found or with_loras(inventory(), job.request.loras)
                self._prices[key] = price_of(job, gpu, machine, found)
            price = self._prices[key]
            if price and may_start(self.context.store, job.hold_bytes, None, "", free_bytes):
                prices[slot.index] = price
        return WaitingJob(job.id, weights_of(job), prices, job.overtaken)


def weights_of(job: QueuedJob) -> str:
    """What a worker holds after a job."""
    request = job.planned_request
    return f"{request.model} {request.quant_linear} {[(lora.path, lora.strength) for lora in request.loras]}"


def price_of(job: QueuedJob, gpu: GpuFacts, machine: Machine, found: Inventory) -> Price | None:
    """Seconds of a job on a card by the plan for that card; None where the card cannot hold it as it was shown.

    "Run anyway" may run everywhere, and so may a job without a plan: its worker makes one.
    """
    if job.plan is None or job.plan.band == "no":
        return Price(UNKNOWN_S, UNKNOWN_S)
    told = outlook(job.plan.request, machine.model_copy(update={"gpus": (gpu,)}), found, policy="never")
    if told.band == "no":
        return None
    read_s = sum(file.bytes for file in network_files(job.plan.request, found)) / DISK_BYTES_S
    return Price(told.seconds, max(0.1 * told.seconds, told.seconds - read_s))
