"""Which cards take jobs, and what waits for them: a person's switches, and the queue as the supervisor dispatches it.

The supervisor writes down once a second what it dispatches by (`Fleet`); page and shell dispatch the same numbers, so
that a start that is told is the one that the supervisor means, not an estimate of another kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field, ValidationError

from turbodiff.jobs.database import Database
from turbodiff.jobs.dispatch import Card, Start, WaitingJob, dispatch
from turbodiff.jobs.nodes import STALE_S
from turbodiff.jobs.waiting import held_until
from turbodiff.plan.hardware import GpuFacts
from turbodiff.spec.models import Frozen
from turbodiff.spec.plan import Plan

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store

CardState = Literal["on", "paused", "excluded"]
FLEET, NAMES, SWITCH = "fleet", "card_names", "card "  # facts; the last one with a UUID
WINDOW = 64  # waiting jobs that are priced and dispatched; for those behind them see `Placement`


class FleetCard(Frozen):
    """A card with a worker; `name` tells it apart from the others here."""

    slot: int
    uuid: str = ""
    name: str = ""
    state: CardState = "on"


class Fleet(Frozen):
    """What the supervisor dispatches by: every card, those that take jobs with their workers, and the jobs that wait.

    Args:
        told: whether it is known when the running jobs end and what each waiting one takes.
        names: of the cards that were ever seen here, by UUID.
    """

    cards: tuple[FleetCard, ...] = ()
    workers: tuple[Card, ...] = ()
    waiting: tuple[WaitingJob, ...] = ()
    told: bool = True
    names: Mapping[str, str] = Field(default_factory=dict)

    def starts(self, more: Sequence[WaitingJob] = ()) -> dict[int, Start]:
        """When and where each waiting job starts, by its number, with `more` at their places among them, behind those
        of the same place; {} where that is unknown."""
        queue = sorted([*self.waiting, *more], key=lambda one: one.place)
        found = dispatch(queue, self.workers) if self.told else ()
        return {start.job: start for start in found}

    def named(self, slots: Sequence[int]) -> str:
        """The names of the cards of slots, "" where the first is gone."""
        cards = [self.card(slot) for slot in slots]
        return " + ".join([card.name for card in cards if card]) if cards[0] else ""

    def card(self, slot: int) -> FleetCard | None:
        """The card of a slot."""
        return next((card for card in self.cards if card.slot == slot), None)

    def called(self, uuid: str) -> str:
        """A card's name, also of one that is gone."""
        here = next((card.name for card in self.cards if card.uuid == uuid), "")
        return here or self.names.get(uuid) or uuid[:12]

    def blocked(self, uuid: str) -> str:
        """Why a job that is for one card alone cannot start there: "gone", "paused", "excluded"; "" where it can."""
        card = next((card for card in self.cards if card.uuid == uuid), None)
        return "" if not uuid or (card and card.state == "on") else card.state if card else "gone"


def labels(gpus: Sequence[GpuFacts], host: str = "") -> list[str]:
    """Short names that tell cards apart: "RTX 4090", "RTX 4090 #2" where a machine has more than one, and
    "RTX 4090 (studio-2)" on another `host`."""
    short = [gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ") for gpu in gpus]
    many = Counter(short)
    there = f" ({host})" if host else ""
    numbers = [f" #{gpu.index + 1}" if many[name] > 1 else "" for name, gpu in zip(short, gpus, strict=True)]
    return [f"{name}{number}{there}" for name, number in zip(short, numbers, strict=True)]


def switches(store: Database) -> dict[str, CardState]:
    """The cards that a person paused or excluded, by UUID."""
    rows = store.rows("SELECT name, value FROM fact WHERE name LIKE 'card %'")
    said = {row["name"].removeprefix(SWITCH): str(row["value"]).strip('"') for row in rows}
    return {uuid: state for uuid, value in said.items() for state in get_args(CardState)[1:] if value == state}


def fleet(store: Store) -> Fleet | None:
    """The newest that the supervisor wrote down, with the switches as they are now, and no start before the time that a
    person chose; None without a supervisor."""
    rows = store.rows("SELECT value, at_s FROM fact WHERE name = ?", FLEET)
    if not rows or abs(store.now() - rows[0]["at_s"]) > STALE_S:
        return None
    try:
        found = Fleet.model_validate_json(rows[0]["value"])
    except ValidationError:  # of another version, or damaged; the next second has another
        return None
    set_to = switches(store)
    cards = [card.model_copy(update={"state": set_to.get(card.uuid, "on")}) for card in found.cards]
    held_s = max(0.0, held_until(store) - store.now())
    workers = tuple([worker._replace(busy_s=max(worker.busy_s, held_s)) for worker in found.workers])
    told = found.told and not store.paused
    return found.model_copy(update={"cards": tuple(cards), "workers": workers, "told": told})


def weights_of(plan: Plan) -> str:
    """What a worker holds after a job."""
    request = plan.request
    return f"{request.model} {request.quant_linear} {[(lora.path, lora.strength) for lora in request.loras]}"
