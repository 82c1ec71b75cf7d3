"""The cards that may make a clip of the queue together: what dispatch chooses from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from turbodiff.plan.hardware import GpuFacts
from turbodiff.plan.links import possible_ranks
from turbodiff.plan.shared_clip import MIN_SPEEDUP, worth_their_number
from turbodiff.spec.plan import Plan


class CardGroup(NamedTuple):
    """Any so many (`cards`) of these, which are alike.

    Args:
        seconds: of the clip on them.
        alone: only where no other job waits: nobody asked for several, and two clips side by side are done sooner.
    """

    cards: int
    gpus: tuple[GpuFacts, ...]
    seconds: float
    alone: bool


def groups_among(
    plan: Plan, alike: Sequence[GpuFacts], seconds_on: Callable[[Sequence[GpuFacts]], float | None]
) -> tuple[CardGroup, ...]:
    """The groups of these cards for a planned clip, most cards first: as many as it asks for, or as many as there are;
    where it leaves that to us, each number that makes it at least `MIN_SPEEDUP` times as fast as one card, and
    faster than fewer.

    Args:
        seconds_on: seconds of the clip on cards together, None where they cannot hold it as it was shown.
    """
    request = plan.request
    asked = len(alike) if request.cards == "auto" else request.cards
    sizes = possible_ranks(request.spec.dit.num_heads, request.shape.latent.tokens, min(asked, len(alike)))
    if plan.band == "no" or not sizes:
        return ()
    if request.cards != "auto":
        took_s = seconds_on(alike[: sizes[0]])
        return () if took_s is None else (CardGroup(sizes[0], tuple(alike), took_s, alone=False),)
    alone_s = seconds_on(alike[:1])
    found = {cards: took_s for cards in sizes if (took_s := seconds_on(alike[:cards])) is not None}
    return tuple([
        CardGroup(cards, tuple(alike), found[cards], alone=True)
        for cards in worth_their_number(found) if alone_s is not None and alone_s >= MIN_SPEEDUP * found[cards]
    ])  # fmt: skip
