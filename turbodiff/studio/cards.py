"""The cards as page, shell and API ask for them: a person's switches, which card a job is for, and when it starts."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

from turbodiff.jobs import cards
from turbodiff.jobs.cards import WINDOW, CardState, Fleet, labels, weights_of
from turbodiff.jobs.database import as_column
from turbodiff.jobs.dispatch import Price, Start, Together, WaitingJob
from turbodiff.jobs.fair_share import place_for
from turbodiff.jobs.journal import Accepted, write_entry
from turbodiff.jobs.nodes import ClusterFacts, NodeDownload, NodeFacts, cluster_facts, whole_models
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

    def planned_on(self, machine: Machine, found: Inventory, card: str, model: str) -> tuple[Machine, Inventory]:
        """The machine with the cards that a job for `card` ("": any) may start on, all of them where that leaves none,
        and the weights there; `found` are those here. For a card of a node, or a job that no card here does, that is
        the node with that card or the freest one that has the model.

        Raises:
            RequestError: no such card.
        """
        nodes = () if machine.pretended else self._nodes()
        if machine.pretended or (not card and not nodes and len(machine.gpus) == 1):
            return machine, found
        said, uuid = self.switches(), self.uuid_of(card, machine)
        local = {gpu.uuid for gpu in machine.gpus}
        if (uuid and uuid not in local) or (not uuid and not self._runs_here(model, machine, found, nodes)):
            far = [
                ((model in node.models, gpu.uuid not in said, there.card_budget_bytes(gpu)),
                 there.model_copy(update={"gpus": (gpu,)}), node.inventory or found)
                for node, there in nodes for gpu in there.usable_gpus if uuid in ("", gpu.uuid)
            ]  # fmt: skip
            return max(far, key=lambda one: one[0])[1:] if far else (machine, found)
        gpus = tuple([gpu for gpu in machine.gpus if gpu.uuid == uuid or (not uuid and gpu.uuid not in said)])
        is_whole = not gpus or len(gpus) == len(machine.gpus)
        return machine if is_whole else machine.model_copy(update={"gpus": gpus}), found

    def may_download(self, model: str, found: Inventory) -> bool:
        """Whether a node downloads the weights of a model before it runs a job for it: they are not here, no node has
        them, and a person let the nodes download."""
        cluster = self.cluster()
        if cluster is None or not cluster.downloads or all(node.state != "ok" for node in cluster.nodes):
            return False
        return model not in whole_models(found).union(*(node.models for node in cluster.nodes))

    def models_there(self) -> frozenset[str]:
        """The models of which a node has every file."""
        return frozenset[str]().union(*(node.models for node, _ in self._nodes()))

    def _runs_here(
        self, model: str, machine: Machine, found: Inventory, nodes: Sequence[tuple[NodeFacts, Machine]]
    ) -> bool:
        """Whether jobs for a model run on this machine's own cards: it has some, and beside other machines that work
        for the queue the supervisor has a worker for one of them, and the weights are here or nowhere."""
        fleet = self.fleet() if nodes else None
        here = {gpu.uuid for gpu in machine.gpus}
        works = bool(machine.usable_gpus) and (fleet is None or any(card.uuid in here for card in fleet.cards))
        is_there = any(model in node.models for node, _ in nodes) or self.may_download(model, found)
        return works and not (is_there and model not in whole_models(found))

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
        nodes = self._nodes()
        there = [*[(one, node.inventory or found) for node, one in nodes], (machine, found)]
        here = {gpu.uuid: (gpu, one, weights) for one, weights in there for gpu in one.gpus}
        without = {gpu.uuid for one, weights in there for gpu in one.gpus
                   if nodes and plan.request.model not in whole_models(weights)}  # fmt: skip
        for worker in fleet.workers:
            at = fleet.card(worker.slot)
            if at is None or card not in ("", at.uuid) or at.uuid in without:
                continue
            price: tuple[float, float] | None = (plan.seconds, plan.seconds)
            if len(fleet.cards) > 1 and plan.band != "no":
                price = seconds_on(plan, *here[at.uuid]) if at.uuid in here else None
            if price:
                prices[worker.slot] = Price(*price)
        is_alone = bool(card) or len(fleet.cards) < 2 or not without.isdisjoint(gpu.uuid for gpu in machine.gpus)
        together = () if is_alone else self._together(fleet, plan, machine, found)
        if any(not group.alone for group in together):
            prices = {}
        place = place_for(store.rows, user)
        asked = WaitingJob(0, weights_of(plan), prices, user=user, place=place, together=together)
        start = fleet.starts([asked]).get(0)
        if start is None:
            return None if prices or card else self._first_begin(plan, machine, found, nodes)
        later_s = self._unlisted_s(store, fleet, asked, plan.seconds)
        return _begin(fleet, start._replace(start_s=start.start_s + later_s, end_s=start.end_s + later_s))

    def _first_begin(
        self, plan: Plan, machine: Machine, found: Inventory, nodes: Sequence[tuple[NodeFacts, Machine]]
    ) -> Begin | None:
        """What is told where no card is asked for yet, for nothing waits: the card of a node that would be."""
        model = plan.request.model
        if self._runs_here(model, machine, found, nodes):
            return None
        there, _ = self.planned_on(machine, found, "", model)
        for node, whole in [one for one in nodes if model in one[0].models]:
            names = zip(whole.gpus, labels(whole.gpus, node.host), strict=True)
            if name := next((name for gpu, name in names if gpu == there.gpus[0]), ""):
                return Begin(0.0, plan.seconds, name)
        return None

    def _unlisted_s(self, store: Store, fleet: Fleet, asked: WaitingJob, seconds: float) -> float:
        """How much later a job starts for those before it that the supervisor does not dispatch yet: each is taken for
        as long as those that it does on the card that is best for them, on all cards at once."""
        before = store.rows("SELECT count(*) FROM job WHERE state = 'queued' AND place <= ?", asked.place)[0][0]
        left = before - sum(one.place <= asked.place for one in fleet.waiting)
        least_s = [min(price.warm_s for price in one.prices.values()) for one in fleet.waiting if one.prices]
        mean_s = sum(least_s) / len(least_s) if least_s else seconds
        return max(0, left) * mean_s / max(1, len(fleet.workers)) if len(fleet.waiting) >= WINDOW else 0.0

    def _together(self, fleet: Fleet, plan: Plan, machine: Machine, found: Inventory) -> tuple[Together, ...]:
        """The cards that may make a clip together, as the supervisor's placement finds them."""
        working = {worker.slot for worker in fleet.workers}
        slots = {at.uuid: at.slot for at in fleet.cards if at.uuid and at.slot in working}
        here = machine.model_copy(update={"gpus": tuple([gpu for gpu in machine.gpus if gpu.uuid in slots])})
        return tuple([Together.of(group, slots) for group in card_groups(plan, here, found)])

    def _nodes(self) -> list[tuple[NodeFacts, Machine]]:
        """The other machines that answer."""
        cluster = self.cluster()
        return [(node, node.machine) for node in cluster.nodes if node.machine] if cluster else []

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
