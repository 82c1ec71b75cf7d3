"""How many cards are worth offering for a clip: those that make it at least 1.2 times as fast, or alone make it fit,
and faster than fewer of them."""

from collections.abc import Iterator

from turbodiff.plan.candidates import Candidate, as_wished
from turbodiff.plan.context import PlanContext, plan_context
from turbodiff.plan.hardware import sharing_cards
from turbodiff.plan.links import possible_ranks
from turbodiff.plan.offload_search import CandidateCost, evaluate
from turbodiff.plan.shared_clip import MIN_SPEEDUP, worth_their_number
from turbodiff.spec.plan import CardOffer
from turbodiff.spec.request import Request


def card_offers(wish: Request, context: PlanContext, choice: Candidate, cost: CandidateCost) -> Iterator[CardOffer]:
    """The offers for a plan, most cards first, whatever number it was made for."""
    machine, alone = context.machine, context.alone or context
    tokens = choice.shape.latent.tokens
    sizes = possible_ranks(choice.spec.dit.num_heads, tokens, len(sharing_cards(machine)))
    if context.gpu is None or not sizes:
        return
    asked = as_wished(wish, choice.int8)
    one = evaluate(wish, asked, alone)
    needed, target = not one.fits, asked
    if one.fits and choice.visible != asked.visible:  # it would fit, but so slowly that another is made
        one, target = evaluate(wish, choice, alone), choice
    found = {}
    for cards in sizes:
        here = context if context.ranks == cards else plan_context(machine, context.inventory, asked=wish, ranks=cards)
        together = cost if here is context and target is choice else evaluate(wish, target, here)
        if together.fits and (needed or one.seconds >= MIN_SPEEDUP * together.seconds):
            found[cards] = together.seconds
    for cards in worth_their_number(found):
        clips = 0.0 if needed else round(cards * found[cards] / one.seconds, 2)
        yield CardOffer(cards=cards, seconds=round(found[cards], 1), clips=clips)
