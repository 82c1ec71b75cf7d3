"""What each waiting job costs on each card as it is now, for `dispatch` to choose by (jobs/dispatch.py)."""

from collections.abc import Callable, Mapping, Sequence

from turbodiff.gpu.host_memory import private_bytes
from turbodiff.jobs.attempts import Hold, may_start
from turbodiff.jobs.cards import (
    FLEET,
    NAMES,
    CardState,
    Fleet,
    FleetCard,
    labels,
    switches,
    weights_of,
)
from turbodiff.jobs.dispatch import Card, Choice, Price, Together, WaitingJob, dispatch, overtaken_by
from turbodiff.jobs.store import as_job
from turbodiff.jobs.waiting import expire
from turbodiff.plan.planner import card_groups, seconds_on
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.models import Inventory
from turbodiff.supervisor.context import SupervisorContext
from turbodiff.supervisor.slots import GpuSlot
from turbodiff.weights.locate import with_loras

WINDOW = 64  # waiting jobs that are looked at
EVERY_S = 0.5
QUIET_S = 4.0  # between two times that the same is written down
UNKNOWN_S = 300.0  # of a job without a plan, alike on every card
STARTING_S = 5.0  # of a worker
Chosen = Mapping[int, Choice]  # by the slot's number
SAME_BYTES, SAME_RAM_BYTES = 1 << 28, 1 << 30  # by which free memory must change for a job to be priced anew


class Placement:
    """Chooses the jobs that start on several cards, and writes down what it goes by; remembers prices."""

    def __init__(self, context: SupervisorContext, slots: Callable[[], Sequence[GpuSlot]]) -> None:
        self.context = context
        context.promised_bytes = lambda slot: promised_bytes(slots(), slot)
        self._prices: dict[tuple[object, ...], Price | None] = {}
        self._groups: dict[tuple[object, ...], tuple[Together, ...]] = {}
        self._states: dict[str, CardState] = {}
        self._names: dict[str, str] = {}
        self._fleet: Fleet | None = None
        self._chosen_s, self._written_s = -EVERY_S, -QUIET_S

    def choose(self, slots: Sequence[GpuSlot]) -> Chosen | None:
        """The job that each slot starts now, by the slot's number; None: each takes the next one, for there is one card
        alone, or nothing is known of the cards."""
        far = any(slot.context.node for slot in slots)  # on another machine nothing starts that was not looked at
        several = len(slots) > 1 and all(slot.seen or slot.context.node for slot in slots)
        due = self.context.now() - self._chosen_s >= EVERY_S
        if due:
            self._chosen_s = self.context.now()
            self._states = switches(self.context.store)
        waiting = self._look(slots, several) if due else []
        if not (several or far):
            return {} if any(self._state(slot) != "on" for slot in slots) else None
        free = {slot.index for slot in slots if slot.free}
        if not due or not free or self._fleet is None:
            return {}
        starts = [
            start
            for start in dispatch(waiting, self._fleet.workers)
            if start.start_s == 0 and free.issuperset(start.slots)
        ]
        if len(starts) > 1:  # one at a time: what the first will take of the RAM counts for the next, a tenth later
            self._chosen_s -= EVERY_S
        return {start.slot: Choice(start.job, tuple(overtaken_by(start, waiting)), start.also) for start in starts[:1]}

    def start(self, slot: GpuSlot) -> None:
        """Start the worker of a slot if it has none; of an excluded card it is ended once it has no job."""
        if self._state(slot) != "excluded":
            slot.start()
        elif slot.free:
            slot.log("its card is not to be used")
            slot.stop("its card is not to be used")

    def _state(self, slot: GpuSlot) -> CardState:
        return self._states.get(slot.gpu.uuid, "on")

    def _look(self, slots: Sequence[GpuSlot], several: bool) -> list[WaitingJob]:
        """What waits, priced for each card that takes jobs; it is written down for page and shell."""
        store = self.context.store
        for job_id in expire(store):
            self.context.log.say("it waited longer than it may", job=job_id)
        rows = store.rows("SELECT * FROM job WHERE state = 'queued' ORDER BY place, id LIMIT ?", WINDOW)
        queued = [as_job(row) for row in rows]
        running = {slot.index: store.job(slot.job.id) for slot in slots if slot.job}
        for slot in slots:
            if slot.lent_to and slot.lent and slot.lent_to.slot.index in running:
                running[slot.index] = running[slot.lent_to.slot.index]
        coming = {job.nonce for job in (*running.values(), *queued)}
        jobs = []
        for job in queued:
            hold = Hold.of(job)
            if len(slots) < 2 and hold.after in coming:  # one card runs a storyboard in the order of the queue
                hold = hold._replace(after="")
            if may_start(store, hold._replace(gpu=""), None, ""):
                jobs.append(job)
        on = [slot for slot in slots if self._state(slot) == "on" and not slot.broken]
        waiting = [self._waiting(job, on, slots, several) for job in jobs]
        known = {job.job for job in waiting}
        self._prices = {key: price for key, price in self._prices.items() if key[0] in known}
        self._groups = {key: groups for key, groups in self._groups.items() if key[0] in known}
        workers = [self._worker(slot, running.get(slot.index)) for slot in on]
        machines = {slot.context.node: slot.context for slot in slots if slot.seen}
        names: dict[str, str] = {}
        for context in machines.values():
            gpus = machine.gpus if (machine := context.memory.machine()) else ()
            names |= {gpu.uuid: name for gpu, name in zip(gpus, labels(gpus, context.host), strict=True)}
        cards = []
        for slot in slots:
            uuid = slot.gpu.uuid or (slot.device if slot.context.node else "")  # a silent node's card keeps its name
            name = names.get(uuid) or self._names.get(uuid, "")
            cards.append(FleetCard(slot=slot.index, uuid=uuid, name=name, state=self._state(slot)))
        ends = [job.plan or (job.progress and job.progress.eta_s is not None) for job in running.values()]
        self._names = self._names or store.fact(NAMES) or {}
        if self._names | names != self._names:
            self._names = self._names | names
            store.put(NAMES, self._names)
        told = all(ends) and all(job.plan for job in jobs)
        fleet = Fleet(cards=tuple(cards), workers=tuple(workers), waiting=tuple(waiting), told=told, names=self._names)
        if fleet != self._fleet or self.context.now() - self._written_s > QUIET_S:
            self._fleet, self._written_s = fleet, self.context.now()
            store.put(FLEET, fleet.model_dump(mode="json"), durable=False)
        return waiting

    def _worker(self, slot: GpuSlot, job: QueuedJob | None) -> Card:
        """A slot as `dispatch` sees it."""
        if job is None:
            return Card(slot.index, 0.0 if slot.free else STARTING_S, slot.weights)
        planned_s = job.plan.seconds if job.plan else UNKNOWN_S
        left_s = planned_s - (self.context.store.now() - (job.started_s or 0.0))
        if job.progress and job.progress.eta_s is not None:
            left_s = job.progress.eta_s
        return Card(slot.index, max(1.0, left_s), weights_of(job.plan) if job.plan and not slot.lent else "")

    def _waiting(self, job: QueuedJob, on: Sequence[GpuSlot], slots: Sequence[GpuSlot], several: bool) -> WaitingJob:
        found: dict[str, Inventory] = {}  # by machine
        prices: dict[int, Price] = {}
        for slot in on:
            gpu, context, free_bytes = slot.gpu, slot.context, slot.available_bytes
            if not context.has_weights(job.request.model):
                continue
            if not may_start(self.context.store, Hold(job.hold_bytes, None, "", job.request.gpu), free_bytes, gpu.uuid):
                continue
            planned_s = job.plan.seconds if job.plan else UNKNOWN_S
            price: Price | None = Price(planned_s, planned_s)  # the plan was made for the one card that there is
            machine = context.memory.machine() if several and slot.seen else None
            if machine is not None:
                ram_bytes = machine.ram_available_bytes
                if ram_bytes is not None:
                    ram_bytes = max(0, ram_bytes - promised_bytes(slots, slot.index))
                own_bytes = private_bytes(slot.worker.pid) if slot.worker and not context.node else 0
                room = (ram_bytes or 0) + own_bytes
                key = (
                    job.id,
                    job.attempt,
                    context.node,
                    slot.device,
                    (free_bytes or 0) // SAME_BYTES,
                    room // SAME_RAM_BYTES,
                )
                if key not in self._prices:
                    if context.node not in found:
                        found[context.node] = with_loras(context.inventory, job.request.loras)
                    here = machine.model_copy(
                        update={"ram_available_bytes": ram_bytes, "ram_reclaimable_bytes": own_bytes}
                    )
                    if job.plan is None or job.plan.band == "no":  # "Run anyway", and what its worker plans
                        self._prices[key] = Price(UNKNOWN_S, UNKNOWN_S)
                    else:
                        on_card = seconds_on(job.plan, gpu, here, found[context.node])
                        self._prices[key] = on_card and Price(*on_card)
                price = self._prices[key]
            if price:
                prices[slot.index] = price
        together = self._together(job, on, slots) if several else ()
        if job.strikes and prices:  # what failed on several cards begins again on one
            together = ()
        if any(not group.alone for group in together):
            prices = {}
        weights = weights_of(job.plan) if job.plan else ""
        return WaitingJob(job.id, weights, prices, job.overtaken, job.user, job.place, together)

    def _together(self, job: QueuedJob, on: Sequence[GpuSlot], slots: Sequence[GpuSlot]) -> tuple[Together, ...]:
        """The cards of this machine that may make a job together."""
        machine, held = self.context.memory.machine(), Hold(job.hold_bytes)
        if machine is None or job.plan is None or job.request.gpu or job.request.cards == 1:
            return ()
        here = [slot for slot in on if slot.context is self.context and slot.seen]
        by_uuid = {s.device: s for s in here if may_start(self.context.store, held, s.available_bytes, s.device)}
        gpus = tuple([gpu for gpu in machine.gpus if gpu.uuid in by_uuid])
        ram_bytes = machine.ram_available_bytes
        if ram_bytes is not None:
            ram_bytes = max(0, ram_bytes - max([promised_bytes(slots, slot.index) for slot in on], default=0))
        room = [((gpu.free_bytes or 0) + gpu.reclaimable_bytes) // SAME_BYTES for gpu in gpus]
        key = (job.id, job.attempt, tuple(by_uuid), tuple(room), (ram_bytes or 0) // SAME_RAM_BYTES)
        if key not in self._groups:
            then = machine.model_copy(update={"gpus": gpus, "ram_available_bytes": ram_bytes})
            found = card_groups(job.plan, then, with_loras(self.context.inventory, job.request.loras))
            numbers = {uuid: slot.index for uuid, slot in by_uuid.items()}
            self._groups[key] = tuple([Together.of(group, numbers) for group in found])
        return self._groups[key]


def promised_bytes(slots: Sequence[GpuSlot], but: int) -> int:
    """RAM that the jobs on all slots of a machine but one will still take: the most that their plans say, less what
    their workers hold already, which is no longer free; of another machine's workers that is not known."""
    total_bytes, here = 0, {slot.context.node for slot in slots if slot.index == but}
    for slot in slots:
        if slot.index != but and slot.context.node in here and slot.job and slot.job.plan and slot.worker:
            most_bytes = max(phase.host_ram_bytes for phase in slot.job.plan.phases) * slot.job.plan.levers.cards
            total_bytes += max(0, most_bytes - (0 if slot.context.node else private_bytes(slot.worker.pid)))
    return total_bytes
