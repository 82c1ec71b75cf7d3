"""Which waiting job runs on which card, and when: pure arithmetic on prices, no clock, no store.

A card runs its jobs in the order of the queue, and jobs go to cards so that the sum of their finishing times is least:
a slower card takes a job only where that ends sooner than to wait for a faster one. A job that waits for a busy card
while one that it could use is idle lets later jobs have that one, three of them at most, then none before it starts.
A job that several cards make together has those that are free first, and keeps the idle ones of them for itself.

The sum is searched job by job, keeping the best few beginnings (a beam). On 500 random fleets of 2-3 cards and 3-7 jobs
it was at most 1.13 times the least of all assignments and never above that of giving each free card the next job.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from turbodiff.plan.together import CardGroup

MOST_OVERTAKEN = 3
BEAM, DEEP = 32, 12  # beginnings that are kept, for the first jobs; fewer where there are many cards
MOST_WAYS = 512
NEAREST = 4  # of alike cards, those that are free first: 32 alike ones are searched as fast as 4


class Price(NamedTuple):
    """Seconds of a job on a card: with its weights still to read, and with them in memory."""

    cold_s: float
    warm_s: float


class Together(NamedTuple):
    """Cards that make one job together.

    Args:
        cards: so many of `slots`, which are alike, the freest first.
        seconds: of the job on them, its weights still to read: all processes but the first are new.
        alone: only where no other job waits.
    """

    cards: int
    slots: tuple[int, ...]
    seconds: float
    alone: bool = False

    @classmethod
    def of(cls, group: "CardGroup", slots: Mapping[str, int]) -> "Together":
        """A group of cards by the numbers of their slots, given by UUID."""
        return cls(group.cards, tuple([slots[gpu.uuid] for gpu in group.gpus]), group.seconds, group.alone)


class WaitingJob(NamedTuple):
    """A job in the queue.

    Args:
        weights: what a worker holds after it, "" for nothing that lasts.
        prices: by slot, of the plan for that card; only the cards that can hold it, with no more given up of the
            picture than the person was shown.
        overtaken: how many later jobs have started on one of those cards.
        user: whose it is; no later job of the same user starts before it on a card that it could use. "" for jobs of
            nobody in particular, which may pass each other as others do.
        place: in the queue.
        together: the cards that may make it together; a job that asks for that has no prices.
        ram_bytes: of the host, the most that its plan takes.
    """

    job: int
    weights: str
    prices: Mapping[int, Price]
    overtaken: int = 0
    user: str = ""
    place: float = 0.0
    together: tuple[Together, ...] = ()
    ram_bytes: int = 0


class Card(NamedTuple):
    """A card and its worker.

    Args:
        busy_s: until its job is done, 0 for a card that is idle.
        weights: what the worker holds then.
    """

    slot: int
    busy_s: float = 0.0
    weights: str = ""


class Start(NamedTuple):
    """A job on a card, in seconds from now; `also`: the other cards that make it together with that one."""

    job: int
    slot: int
    start_s: float
    end_s: float
    also: tuple[int, ...] = ()

    @property
    def slots(self) -> tuple[int, ...]:
        """All of its cards."""
        return (self.slot, *self.also)


class Choice(NamedTuple):
    """A job that starts now, the earlier ones that could have used its card, and its other cards."""

    job: int
    passes: tuple[int, ...] = ()
    also: tuple[int, ...] = ()


class _Later(NamedTuple):
    """A job that will start later: when, the cards that it could use, how many jobs may still pass it there, whose."""

    start_s: float
    slots: Collection[int]
    may_pass: int
    user: str


class _Beginning(NamedTuple):
    """The first jobs of the queue on their cards: the sum of their ends, and when each card is free with what."""

    total_s: float
    cards: Mapping[int, Card]
    starts: tuple[Start, ...] = ()
    later: tuple[_Later, ...] = ()


def dispatch(waiting: Sequence[WaitingJob], cards: Sequence[Card], now_alone: bool = False) -> tuple[Start, ...]:
    """Where and when each waiting job runs, in the order of the queue; those with `start_s` 0 start now.

    Jobs that no card can take are left out: they wait, and hold up nobody. With `now_alone` those that start later may
    be left out, too: of 64 jobs for 32 cards of which six are idle, the last fifty need not be placed.
    """
    width = max(1, min(BEAM, MOST_WAYS // max(1, len(cards))))
    alone = len([one for one in waiting if one.prices or one.together]) == 1
    kinds = {card.slot: tuple([_use(one, card.slot) for one in waiting]) for card in cards}
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds.values()))}
    alike = {slot: numbers[kind] for slot, kind in kinds.items()}
    beam = [_Beginning(0.0, {card.slot: card for card in cards})]
    for place, one in enumerate(waiting):
        ways = [
            (beginning.total_s + start.end_s, beginning, start)
            for beginning in beam
            for start in _ways(beginning, one, alike, alone)
        ]
        best = sorted(ways, key=lambda way: way[0])[: width if place < DEEP else 1]
        beam = [_longer(beginning, one, start) for _, beginning, start in best] or beam
        if now_alone and len(beam) == 1 and all(card.busy_s > 0 for card in beam[0].cards.values()):
            break  # which jobs those are is settled, and no card is idle for another one
    return beam[0].starts


def _use(one: WaitingJob, slot: int) -> tuple[Price | None, tuple[bool, ...]]:
    """What a card is to a job: what all cards of a kind have in common."""
    return one.prices.get(slot), tuple([slot in group.slots for group in one.together])


def _nearest(beginning: _Beginning, one: WaitingJob, alike: Mapping[int, int]) -> Iterator[int]:
    """The cards that can take the next job; of those that are alike, to all jobs and in what they hold, the ones that
    are free first."""
    here = [beginning.cards[slot] for slot in one.prices if slot in beginning.cards]
    if len(here) > NEAREST:
        count = Counter[tuple[int, str]]()
        near = set[int]()
        for card in sorted(here, key=lambda card: card.busy_s):
            kind = alike[card.slot], card.weights
            count[kind] += 1
            if count[kind] <= NEAREST:
                near.add(card.slot)
        here = [card for card in here if card.slot in near]
    return (card.slot for card in here)


def _ways(beginning: _Beginning, one: WaitingJob, alike: Mapping[int, int], alone: bool) -> Iterator[Start]:
    """The next job on each card that can take it, see `_nearest`, and on those that may make it together."""
    for slot in _nearest(beginning, one, alike):
        price, start_s = one.prices[slot], _free_s(beginning, slot, one.user)
        warm = bool(one.weights) and beginning.cards[slot].weights == one.weights
        yield Start(one.job, slot, start_s, start_s + (price.warm_s if warm else price.cold_s))
    for group in one.together:
        here = [slot for slot in group.slots if slot in beginning.cards]
        if len(here) >= group.cards and (alone or not group.alone):
            first, *also = sorted(here, key=lambda slot: _free_s(beginning, slot, one.user))[: group.cards]
            start_s = max([_free_s(beginning, slot, one.user) for slot in (first, *also)])
            yield Start(one.job, first, start_s, start_s + group.seconds, tuple(also))


def _free_s(beginning: _Beginning, slot: int, user: str) -> float:
    """When a card can take the next job: it is idle, and no job waits for it that may be passed no more or is an
    earlier one of the same user."""
    fences = [
        later.start_s for later in beginning.later
        if slot in later.slots and (later.may_pass <= 0 or (user and later.user == user))
    ]  # fmt: skip
    return max([beginning.cards[slot].busy_s, *fences])


def _longer(beginning: _Beginning, one: WaitingJob, start: Start) -> _Beginning:
    """A beginning with one more job."""
    later = [
        other._replace(
            may_pass=other.may_pass - (start.start_s < other.start_s and not set(start.slots).isdisjoint(other.slots))
        )
        for other in beginning.later
    ]
    if start.start_s > 0:  # cards that make it together are kept for it: nobody passes there
        could = {*one.prices, *[slot for group in one.together for slot in group.slots]}
        may_pass = MOST_WAYS if start.also else MOST_OVERTAKEN - one.overtaken
        later.append(_Later(start.start_s, could, may_pass, one.user))
    lent = {slot: Card(slot, start.end_s) for slot in start.also}  # their workers are started anew
    cards = {**beginning.cards, start.slot: Card(start.slot, start.end_s, one.weights), **lent}
    return _Beginning(beginning.total_s + start.end_s, cards, (*beginning.starts, start), tuple(later))


def overtaken_by(start: Start, waiting: Sequence[WaitingJob]) -> list[int]:
    """The jobs that a start passes by: earlier ones that could use its cards."""
    before = [one.job for one in waiting].index(start.job)
    return [one.job for one in waiting[:before] if not one.prices.keys().isdisjoint(start.slots)]
