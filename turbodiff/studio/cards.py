"""The cards as page, shell and API ask for them: a person's switches, which card a job is for, and when it starts."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

from turbodiff.jobs import cards
from turbodiff.jobs.cards import CardState, Fleet, labels, weights_of
from turbodiff.jobs.database import as_column
from turbodiff.jobs.dispatch import Price, Start, Together, WaitingJob
from turbodiff.jobs.fair_share import place_for
from turbodiff.jobs.journal import Accepted, write_entry
from turbodiff.jobs.nodes import ClusterFacts, NodeDownload, cluster_facts
from turbodiff.jobs.store import Store
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.plan.planner import card_groups, seconds_on
from turbodiff.spec.errors import RequestError
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.models import Inventory
from turbodiff.spec.plan import Plan

LEAST_OF_UUID = 8  # characters that name a card


class Begin(NamedTuple):
    """When a job would start, how long it takes on its card, and the card's name, "" where there is one alone."""

    start_s: float
    seconds: float
    card: str


class Cards:
    """The cards of this machine, and those of other machines that work for its queue.

    Args:
        store: the queue, None where there is none yet: asking leaves no file behind.
    """

    def __init__(self, store: Callable[[], Store | None]) -> None:
        self._store = store

    def fleet(self) -> Fleet | None:
        """What the supervisor dispatches by; None without a supervisor."""
        store = self._store()
        return cards.fleet(store) if store else None

    def cluster(self) -> ClusterFacts | None:
        """The cluster that the running app works with; None without an app, or where it works with none."""
        store = self._store()
        return cluster_facts(store) if store else None

    def switches(self) -> Mapping[str, CardState]:
        """The cards that a person paused or excluded, by UUID."""
        store = self._store()
        return cards.switches(store) if store else {}

    def switch(self, card: str, state: str, machine: Machine) -> str:
        """Pause, exclude or use a card, kept over restarts; returns its name.

        Raises:
            RequestError: no such card, or no such state.
        """
        uuid, store = self.uuid_of(card, machine), self._store()
        if state not in get_args(CardState) or store is None:
            raise RequestError("no such state of a card", code="bad_card_state", field="card", got=state[:40],
                               expected=" | ".join(get_args(CardState)))  # fmt: skip
        store.put(cards.SWITCH + uuid, state)
        here = {gpu.uuid: name for gpu, name in zip(machine.gpus, labels(machine.gpus), strict=True)}
        return here.get(uuid) or (self.fleet() or Fleet()).called(uuid)

    def release(self, job: int) -> None:
        """Let a waiting job that is for one card alone run on any."""
        store = self._store()
        waits = store.job(job) if store else None
        if store and waits and waits.state == "queued" and waits.request.gpu:
            request = as_column(waits.request.model_copy(update={"gpu": ""}))
            with store.write() as db:
                db.execute("UPDATE job SET request = ? WHERE id = ? AND state = 'queued'", (request, job))
            write_entry(store.path.parent, Accepted.of(store.job(job)))

    def device_of(self, card: str, machine: Machine) -> str:
        """The device of the card that a person names, "cuda:1".

        Raises:
            RequestError: none here goes by that, or more than one.
        """
        return f"cuda:{self._find(card, machine).index}"

    def uuid_of(self, card: str, machine: Machine) -> str:
        """The UUID of the card that a person names: by it or its first characters, by number, or by its name; one of
        another machine that works for this queue by UUID or name.

        Raises:
            RequestError: none goes by that, or more than one.
        """
        here, fleet = {gpu.uuid for gpu in machine.gpus}, self.fleet() if card else None
        for one in fleet.cards if fleet else ():
            if one.uuid and one.uuid not in here and card.lower() in (one.uuid.lower(), one.name.lower()):
                return one.uuid
        return self._find(card, machine).uuid if card else ""

    def planned_on(self, machine: Machine, card: str) -> Machine:
        """The machine with the cards that a job for `card` ("": any) may start on; all of them where that leaves none.
        For a card of a node, or where this machine has none, the node with that card or the freest one.

        Raises:
            RequestError: no such card.
        """
        if machine.pretended or (not card and len(machine.gpus) == 1):
            return machine
        said, uuid = self.switches(), self.uuid_of(card, machine)
        if not machine.usable_gpus or uuid not in ("", *(gpu.uuid for gpu in machine.gpus)):
            far = [
                (node.card_budget_bytes(gpu), node.model_copy(update={"gpus": (gpu,)})) for node in self._nodes()
                for gpu in node.usable_gpus if gpu.uuid == uuid or (not uuid and gpu.uuid not in said)
            ]  # fmt: skip
            return max(far, key=lambda one: one[0])[1] if far else machine
        gpus = tuple([gpu for gpu in machine.gpus if gpu.uuid == uuid or (not uuid and gpu.uuid not in said)])
        return machine if not gpus or len(gpus) == len(machine.gpus) else machine.model_copy(update={"gpus": gpus})

    def begin_of(self, job: QueuedJob) -> Begin | None:
        """When and where a job of the queue starts; None for one that does not wait, and where that is not known."""
        fleet = self.fleet()
        start = fleet.starts().get(job.id) if fleet and job.state == "queued" else None
        return _begin(fleet, start) if fleet and start else None

    def begin(self, plan: Plan, machine: Machine, found: Inventory, card: str = "", user: str = "") -> Begin | None:
        """When and where a job that this user queues now would start, dispatched at the place in the queue that it
        would get; None where that is not known."""
        fleet, store = self.fleet(), self._store()
        if fleet is None or store is None or not fleet.told:
            return None
        prices = dict[int, Price]()
        here = {gpu.uuid: (gpu, one) for one in (*self._nodes(), machine) for gpu in one.gpus}
        for worker in fleet.workers:
            at = fleet.card(worker.slot)
            if at is None or card not in ("", at.uuid):
                continue
            price: tuple[float, float] | None = (plan.seconds, plan.seconds)
            if len(fleet.cards) > 1 and plan.band != "no":
                price = seconds_on(plan, *here[at.uuid], found) if at.uuid in here else None
            if price:
                prices[worker.slot] = Price(*price)
        together = self._together(fleet, plan, machine, found) if not card and len(fleet.cards) > 1 else ()
        if any(not group.alone for group in together):
            prices = {}
        place = place_for(store.rows, user)
        asked = WaitingJob(0, weights_of(plan), prices, user=user, place=place, together=together)
        start = fleet.starts([asked]).get(0)
        return _begin(fleet, start) if start else None

    def _together(self, fleet: Fleet, plan: Plan, machine: Machine, found: Inventory) -> tuple[Together, ...]:
        """The cards that may make a clip together, as the supervisor's placement finds them."""
        working = {worker.slot for worker in fleet.workers}
        slots = {at.uuid: at.slot for at in fleet.cards if at.uuid and at.slot in working}
        here = machine.model_copy(update={"gpus": tuple([gpu for gpu in machine.gpus if gpu.uuid in slots])})
        return tuple([Together.of(group, slots) for group in card_groups(plan, here, found)])

    def _nodes(self) -> list[Machine]:
        """The other machines that answer."""
        cluster = self.cluster()
        return [node.machine for node in cluster.nodes if node.machine] if cluster else []

    def _find(self, card: str, machine: Machine) -> GpuFacts:
        names = labels(machine.gpus)
        found = [
            gpu for gpu, name in zip(machine.gpus, names, strict=True)
            if card.lower() in (gpu.uuid.lower(), str(gpu.index), name.lower(), gpu.name.lower())
            or (len(card) >= LEAST_OF_UUID and gpu.uuid.startswith(card))
        ]  # fmt: skip
        if len(found) != 1 or not found[0].uuid:
            raise RequestError(
                "no such card here", code="card_unknown", field="gpu", got=card[:60],
                expected=" | ".join(names) or "no card is seen", try_instead="turbodiff gpu",
            )  # fmt: skip
        return found[0]


def _begin(fleet: Fleet, start: Start) -> Begin | None:
    """A start as it is told; None where its card is gone."""
    name = fleet.named(start.slots)
    return Begin(start.start_s, start.end_s - start.start_s, name if len(fleet.cards) > 1 else "") if name else None


__all__ = ["Begin", "Cards", "ClusterFacts", "Fleet", "NodeDownload"]
