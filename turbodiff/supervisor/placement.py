"""What each waiting job costs on each card as it is now, for `dispatch` to choose by (jobs/dispatch.py)."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import NamedTuple

from turbodiff.gpu.host_memory import private_bytes
from turbodiff.jobs.attempts import HOLD_COLUMNS, Hold, hold_of, may_start
from turbodiff.jobs.cards import (
    FLEET,
    NAMES,
    WINDOW,
    CardState,
    Fleet,
    FleetCard,
    labels,
    switches,
    weights_of,
)
from turbodiff.jobs.dispatch import Card, Choice, Price, Start, Together, WaitingJob, dispatch, overtaken_by
from turbodiff.jobs.store import as_job
from turbodiff.jobs.waiting import expire
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.plan.planner import WORDS, card_groups, seconds_on
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.models import Inventory
from turbodiff.spec.request import Request
from turbodiff.supervisor.context import SupervisorContext
from turbodiff.supervisor.slots import GpuSlot
from turbodiff.weights.locate import with_loras

BEHIND = 128  # waiting jobs behind the window that are looked at, where a card is idle for which none of them is
EVERY_S = 0.5
QUIET_S = 4.0  # between two times that the same is written down
HELD_S = 1.0  # between two times that it is read how much RAM a worker holds
MANY, MANY_S = 256, 2.0  # more waiting jobs x cards than that are not written down more often
UNKNOWN_S = 300.0  # of a job without a plan, alike on every card
STARTING_S = 5.0  # of a worker
Chosen = Mapping[int, Choice]  # by the slot's number
SAME_BYTES, SAME_RAM_BYTES = 1 << 28, 1 << 30  # by which free memory must change for a job to be priced anew
PLENTY_RAM_BYTES = 128 << 30  # more than all weights of one clip: beyond it no plan depends on how much there is
KEPT_PRICES = 4096
# of a card that no price depends on beside the free memory
OF_NOW = dict.fromkeys(("utilisation", "power_w", "temperature_c", "free_bytes", "used_bytes"))
ALIKE = {**OF_NOW, "uuid": "", "index": 0, "reclaimable_bytes": 0, "display": None}


class CardNow(NamedTuple):
    """A card that takes jobs, at one look.

    Args:
        free_bytes: with what its own worker gives back; None is unknown.
        machine: with the RAM that a job there may take; None where the plan's own seconds are the price.
        room_bytes: that RAM, with what its own worker gives back.
        kind: what is alike of cards that have the same prices.
    """

    slot: GpuSlot
    gpu: GpuFacts
    free_bytes: int | None
    machine: Machine | None
    room_bytes: int
    kind: tuple[object, ...]


class Placement:
    """Chooses the jobs that start on several cards, and writes down what it goes by; remembers prices."""

    def __init__(self, context: SupervisorContext, slots: Callable[[], Sequence[GpuSlot]]) -> None:
        self.context = context
        context.promised_bytes = lambda slot: promised_bytes(slots(), self._held_bytes).get(slot, 0)
        self._prices: dict[tuple[object, ...], Price | None] = {}
        self._groups: dict[tuple[object, ...], tuple[Together, ...]] = {}
        self._states: dict[str, CardState] = {}
        self._names: dict[str, str] = {}
        self._fleet: Fleet | None = None
        self._read: dict[int, tuple[sqlite3.Row, QueuedJob]] = {}
        self._held: dict[int, tuple[float, int]] = {}  # by pid: when it was read, what private_bytes said
        self._chosen_s, self._written_s = -EVERY_S, -QUIET_S
        self._several = False
        self._cards: dict[int, CardNow] = {}
        self._kinds: dict[tuple[object, ...], list[CardNow]] = {}  # the same, those with the same prices together
        self._behind_at, self._idle = WINDOW, frozenset[int]()
        self._here: dict[str, CardNow] = {}  # those of this machine, by UUID

    def choose(self, slots: Sequence[GpuSlot]) -> Chosen | None:
        """The job that each slot starts now, by the slot's number; None: each takes the next one, for there is one card
        alone, or nothing is known of the cards."""
        if self._several and len(slots) > 1 and self.context.now() - self._chosen_s < EVERY_S:
            return {}
        # what is for another machine is not started unseen, there nor here
        far = self.context.has_cluster or any(slot.context.node for slot in slots)
        several = self._several = len(slots) > 1 and all(slot.seen or slot.context.node for slot in slots)
        due = self.context.now() - self._chosen_s >= EVERY_S
        if due:
            self._chosen_s = self.context.now()
            self._states = switches(self.context.store)
        waiting = self._look(slots, several) if due else []
        if not (several or far):
            return {} if any(self._state(slot) != "on" for slot in slots) else None
        free = {slot.index for slot in slots if slot.free}
        if not (due and free and waiting) or self._fleet is None:
            return {}
        starts = self._starts(waiting, free)
        if more := self._behind(free.difference(*[start.slots for start in starts])):
            waiting += more
            starts = self._starts(waiting, free)
        now = self._at_once(starts, waiting)
        if len(starts) > len(now):  # what these will take of the RAM counts for the next, a tenth later
            self._chosen_s -= EVERY_S
        return {start.slot: Choice(start.job, tuple(overtaken_by(start, waiting)), start.also) for start in now}

    def _starts(self, waiting: Sequence[WaitingJob], free: Set[int]) -> list[Start]:
        assert self._fleet is not None
        found = dispatch(waiting, self._fleet.workers, now_alone=True)
        return [start for start in found if start.start_s == 0 and free >= {*start.slots}]

    def _behind(self, idle: Set[int]) -> list[WaitingJob]:
        """The first jobs behind the window that can use the idle cards, one for each: what stands before them there can
        not, so that nothing is passed. So many rows a look; where there is none among them the next look goes on, and
        begins again where another card is idle.
        """
        idle = idle & self._cards.keys()
        if not idle <= self._idle:
            self._behind_at = WINDOW
        self._idle = frozenset(idle)
        if not idle or len(self._read) < WINDOW:
            return []
        store, found = self.context.store, list[WaitingJob]()
        uuids = {"", *(self._cards[slot].gpu.uuid for slot in idle)}
        rows = store.rows(
            f"SELECT {HOLD_COLUMNS} FROM job WHERE state = 'queued' ORDER BY place, id LIMIT ? OFFSET ?",
            BEHIND, self._behind_at,
        )  # fmt: skip
        for row in rows:
            hold = hold_of(row)
            if (
                len(found) == len(idle)
                or hold.gpu not in uuids
                or not may_start(store, hold._replace(gpu=""), None, "")
            ):
                continue
            one = self._waiting(store.job(row["id"]))
            could = {*one.prices, *[slot for group in one.together for slot in group.slots]}
            if not idle.isdisjoint(could):
                found.append(one)
        if not found:
            self._behind_at = self._behind_at + BEHIND if len(rows) == BEHIND else WINDOW
        return found

    def _at_once(self, starts: Sequence[Start], waiting: Sequence[WaitingJob]) -> list[Start]:
        """The first of these starts, and those behind it whose price does not depend on the RAM that the ones before
        take; of a user with a name only such as begin in their order, for slots take their jobs one after another, and
        one on several cards by itself.
        """
        jobs, chosen = {one.job: one for one in waiting}, list[Start]()
        last, taken_bytes = dict[str, int](), dict[str, int]()  # the last slot of a user; by node
        for start in starts:
            one, card = jobs[start.job], self._cards[start.slot]
            node, room_bytes = card.slot.context.node, card.room_bytes
            left_bytes = room_bytes - taken_bytes.get(node, 0)
            is_same_room = left_bytes // SAME_RAM_BYTES == room_bytes // SAME_RAM_BYTES
            is_other_price = not is_same_room and left_bytes < PLENTY_RAM_BYTES
            is_before = bool(one.user) and start.slot < last.get(one.user, -1)
            if chosen and (is_before or is_other_price or start.also or chosen[0].also):
                break
            chosen.append(start)
            last[one.user] = start.slot
            taken_bytes[node] = taken_bytes.get(node, 0) + one.ram_bytes
        return chosen

    def start(self, slot: GpuSlot) -> None:
        """Start the worker of a slot if it has none; of an excluded card it is ended once it has no job."""
        if self._state(slot) != "excluded":
            slot.start()
        elif slot.free:
            slot.log("its card is not to be used")
            slot.stop("its card is not to be used")

    def _state(self, slot: GpuSlot) -> CardState:
        return self._states.get(slot.gpu.uuid, "on") if self._states else "on"

    def _look(self, slots: Sequence[GpuSlot], several: bool) -> list[WaitingJob]:
        """What waits, priced for each card that takes jobs; it is written down for page and shell."""
        store = self.context.store
        for job_id in expire(store):
            self.context.log.say("it waited longer than it may", job=job_id)
        rows = store.rows("SELECT * FROM job WHERE state = 'queued' ORDER BY place, id LIMIT ?", WINDOW)
        read = self._read
        self._read = {
            row["id"]: read[row["id"]] if row["id"] in read and read[row["id"]][0] == row else (row, as_job(row))
            for row in rows
        }
        queued = [job for _, job in self._read.values()]
        running = {slot.index: slot.job for slot in slots if slot.job}
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
        promised = promised_bytes(slots, self._held_bytes)
        machines = {slot.context.node: slot.context.memory.machine() for slot in slots}
        self._cards = {
            slot.index: self._card_now(slot, machines[slot.context.node] if several else None, promised) for slot in on
        }
        self._kinds.clear()
        for card in self._cards.values():
            self._kinds.setdefault((card.slot.context.node, *card.kind), []).append(card)
        self._here = {
            card.slot.device: card
            for card in self._cards.values()
            if card.machine and card.slot.context is self.context
        }
        waiting = [self._waiting(job) for job in jobs]
        if len(self._prices) + len(self._groups) > KEPT_PRICES:
            self._prices.clear()
            self._groups.clear()
        workers = [self._worker(slot, running.get(slot.index)) for slot in on]
        cards = self._named(slots, machines)
        ends = [job.plan or (job.progress and job.progress.eta_s is not None) for job in running.values()]
        told = all(ends) and all(job.plan for job in jobs)
        fleet = Fleet.model_construct(
            cards=cards, workers=tuple(workers), waiting=tuple(waiting), told=told, names=self._names
        )
        rest_s = MANY_S if len(workers) * len(waiting) > MANY else 0.0
        since_s, is_new, self._fleet = self.context.now() - self._written_s, fleet != self._fleet, fleet
        if since_s > QUIET_S or (is_new and since_s >= rest_s):
            self._written_s = self.context.now()
            store.put(FLEET, fleet.model_dump(mode="json"), durable=False)
        return waiting

    def _named(self, slots: Sequence[GpuSlot], machines: Mapping[str, Machine | None]) -> tuple[FleetCard, ...]:
        """The cards of all slots, of the machines by node; their names are kept for when they are gone."""
        hosts = {slot.context.node: slot.context.host for slot in slots if slot.context.node}
        names: dict[str, str] = {}
        for node, machine in machines.items():
            gpus = machine.gpus if machine else ()
            names |= {gpu.uuid: name for gpu, name in zip(gpus, labels(gpus, hosts.get(node, "")), strict=True)}
        self._names = self._names or self.context.store.fact(NAMES) or {}
        if self._names | names != self._names:
            self._names = self._names | names
            self.context.store.put(NAMES, self._names)
        cards = []
        for slot in slots:
            uuid = slot.gpu.uuid or (slot.device if slot.context.node else "")  # a silent node's card keeps its name
            cards.append(FleetCard(slot=slot.index, uuid=uuid, name=self._names.get(uuid, ""), state=self._state(slot)))
        return tuple(cards)

    def _card_now(self, slot: GpuSlot, machine: Machine | None, promised: Mapping[int, int]) -> CardNow:
        """A card at this look. `machine`: None where no price is asked for; `promised`: see `promised_bytes`."""
        gpus = machine.gpus if machine else ()
        found = next((gpu for gpu in gpus if gpu.uuid and gpu.uuid == slot.device), None)
        gpu, node = found or slot.gpu, slot.context.node
        free_bytes = gpu.free_bytes and gpu.free_bytes + gpu.reclaimable_bytes
        if machine is None or not (found or slot.seen):
            return CardNow(slot, gpu, free_bytes, None, 0, ())
        ram_bytes = machine.ram_available_bytes
        if ram_bytes is not None:
            ram_bytes = max(0, ram_bytes - promised[slot.index])
        own_bytes = self._held_bytes(slot.worker.pid) if slot.worker and not node else 0
        room_bytes = (ram_bytes or 0) + own_bytes
        here = machine.model_copy(update={"ram_available_bytes": ram_bytes, "ram_reclaimable_bytes": own_bytes})
        kind = (node, _alike(gpu), (free_bytes or 0) // SAME_BYTES, min(room_bytes, PLENTY_RAM_BYTES) // SAME_RAM_BYTES)
        return CardNow(slot, gpu, free_bytes, here, room_bytes, kind)

    def _held_bytes(self, pid: int) -> int:
        """`private_bytes` of a worker, read at most once a second: each start of a job asks for those of all others."""
        now_s = self.context.now()
        if pid not in self._held or now_s - self._held[pid][0] >= HELD_S:
            self._held = {one: kept for one, kept in self._held.items() if now_s - kept[0] < HELD_S}
            self._held[pid] = now_s, private_bytes(pid)
        return self._held[pid][1]

    def _worker(self, slot: GpuSlot, job: QueuedJob | None) -> Card:
        """A slot as `dispatch` sees it."""
        if job is None:
            return Card(slot.index, 0.0 if slot.free else STARTING_S, slot.weights)
        planned_s = job.plan.seconds if job.plan else UNKNOWN_S
        left_s = planned_s - (self.context.store.now() - (job.started_s or 0.0))
        if job.progress and job.progress.eta_s is not None:
            left_s = job.progress.eta_s
        return Card(slot.index, max(1.0, left_s), weights_of(job.plan) if job.plan and not slot.lent else "")

    def _waiting(self, job: QueuedJob) -> WaitingJob:
        found: dict[str, Inventory] = {}  # by machine
        prices: dict[int, Price] = {}
        hold = Hold(job.hold_bytes, None, "", job.request.gpu)
        is_held = hold.bytes is not None or bool(hold.gpu)
        planned_s = job.plan.seconds if job.plan else UNKNOWN_S
        asked = _without_words(job.plan.request) if job.plan else ""
        for cards in self._kinds.values():
            card, context = cards[0], cards[0].slot.context
            if not context.has_weights(job.request.model):
                continue
            if is_held:
                cards = [one for one in cards if may_start(self.context.store, hold, one.free_bytes, one.gpu.uuid)]
            price: Price | None = Price(planned_s, planned_s)  # the plan was made for the one card that there is
            if card.machine is not None:
                key = (asked, job.plan and job.plan.band, *card.kind)
                if key not in self._prices:
                    if context.node not in found:
                        found[context.node] = with_loras(context.inventory, job.request.loras)
                    if job.plan is None or job.plan.band == "no":  # "Run anyway", and what its worker plans
                        self._prices[key] = Price(UNKNOWN_S, UNKNOWN_S)
                    else:
                        on_card = seconds_on(job.plan, card.gpu, card.machine, found[context.node])
                        self._prices[key] = on_card and Price(*on_card)
                price = self._prices[key]
            prices |= {one.slot.index: price for one in cards if price}
        prices = dict(sorted(prices.items()))
        left = {share.uuid for share in job.plan.shares} if job.plan and "rank" in job.strikes else None
        together = self._together(job, asked, left)
        if left is not None and (prices or together):
            prices = {slot: price for slot, price in prices.items() if self._cards[slot].gpu.uuid in left} or prices
        elif left is not None:  # where those that are left cannot hold it
            together = self._together(job, asked)
        if prices and job.strikes.keys() - {"rank"}:  # what failed on several cards begins again on one
            together = ()
        if any(not group.alone for group in together):
            prices = {}
        weights = weights_of(job.plan) if job.plan else ""
        ram_bytes = max([phase.host_ram_bytes for phase in job.plan.phases], default=0) if job.plan else 0
        return WaitingJob(job.id, weights, prices, job.overtaken, job.user, job.place, together, ram_bytes)

    def _together(self, job: QueuedJob, asked: str, among: Set[str] | None = None) -> tuple[Together, ...]:
        """The cards of this machine that may make a job together, of all or `among` these, by UUID."""
        if job.plan is None or job.request.gpu or job.request.cards == 1:
            return ()
        if not self.context.has_weights(job.request.model):
            return ()
        held = Hold(job.hold_bytes)
        by_uuid = {
            uuid: card for uuid, card in self._here.items()
            if (among is None or uuid in among)
            and (held.bytes is None or may_start(self.context.store, held, card.free_bytes, uuid))
        }  # fmt: skip
        here = [card.machine for card in by_uuid.values() if card.machine]
        if len(here) < 2:
            return ()
        rooms = [machine.ram_available_bytes for machine in here if machine.ram_available_bytes is not None]
        ram_bytes = min(rooms, default=None)
        key: tuple[object, ...] = (
            asked,
            job.plan.band,
            job.plan.seconds,
            tuple(by_uuid),
            (ram_bytes or 0) // SAME_RAM_BYTES,
        )
        key += tuple([(card.free_bytes or 0) // SAME_BYTES for card in by_uuid.values()])
        if key not in self._groups:
            gpus = tuple([gpu for gpu in here[0].gpus if gpu.uuid in by_uuid])
            then = here[0].model_copy(
                update={"gpus": gpus, "ram_available_bytes": ram_bytes, "ram_reclaimable_bytes": 0}
            )
            found = card_groups(job.plan, then, with_loras(self.context.inventory, job.request.loras))
            numbers = {uuid: card.slot.index for uuid, card in by_uuid.items()}
            self._groups[key] = tuple([Together.of(group, numbers) for group in found])
        return self._groups[key]


@lru_cache(256)
def _alike(gpu: GpuFacts) -> str:
    """What is the same of cards with the same prices, as they are while they have the same free memory."""
    return gpu.model_copy(update=ALIKE).model_dump_json()


@lru_cache(256)
def _without_words(request: Request) -> str:
    """What a price depends on of a request."""
    return request.model_copy(update=WORDS).model_dump_json()


def promised_bytes(slots: Sequence[GpuSlot], held_bytes_of: Callable[[int], int]) -> Mapping[int, int]:
    """By slot: RAM that the jobs on all other slots of its machine will still take: the most that their plans say, less
    what their workers hold already (by pid), which is no longer free; of another machine's workers that is not known.
    """
    left_bytes, of_node = dict[int, int](), Counter[str]()
    for slot in slots:
        if slot.job and slot.job.plan and slot.worker:
            most_bytes = max(phase.host_ram_bytes for phase in slot.job.plan.phases) * slot.job.plan.levers.cards
            held_bytes = 0 if slot.context.node else held_bytes_of(slot.worker.pid)
            left_bytes[slot.index] = max(0, most_bytes - held_bytes)
            of_node[slot.context.node] += left_bytes[slot.index]
    return {slot.index: of_node[slot.context.node] - left_bytes.get(slot.index, 0) for slot in slots}
