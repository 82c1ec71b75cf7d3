"""What several cards gain on one clip: bytes that they exchange, seconds, and when two clips side by side are better.

A prediction from the seconds of one card. Each block sends q, k and v to the ranks that own their heads, and the result
back: 4 L d elements, of which a rank holds 1 / R and keeps 1 / R of that (models/parallel.py). What is not shared is
done at the pace of one card (Amdahl). Checked against Wan2.2's published table: tests/plan/test_shared_clip.py.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from turbodiff.plan.hardware import GpuFacts, Machine, sharing_cards
from turbodiff.plan.links import possible_ranks
from turbodiff.plan.roofline import INT8_SENT_BYTES, exchange_seconds, sent_bytes
from turbodiff.plan.vae_costs import strip_factor
from turbodiff.spec.models import DitFacts
from turbodiff.spec.plan import CardShare, Levers, Phase
from turbodiff.spec.request import Exchange, Request

if TYPE_CHECKING:
    from turbodiff.plan.phase_costs import PhaseCost

SHARED_PHASES = ("image_encode", "denoise", "denoise_high", "denoise_low", "vae_decode")
MEMORY_BYTES_S = 1.4e12  # of a card, where nobody says: RTX 5090
MIN_SPEEDUP = 1.2  # below it a second card is worth more on a clip of its own, and the wait is hardly shorter


def asked_ranks(request: Request, machine: Machine) -> int:
    """Processes that a request wants for its clip, of those that the machine has cards for, a CPU for all, and that may
    share it: others need no part of the host's memory. "auto" is one: who dispatches the clip knows if others wait.
    """
    if request.cards == "auto":
        return 1
    on_gpu = machine.usable_gpus and not (machine.torch or "").endswith("+cpu")
    most = min(request.cards, len(sharing_cards(machine))) if on_gpu else request.cards
    return next(iter(possible_ranks(request.spec.dit.num_heads, request.shape.latent.tokens, most)), 1)


def worth_their_number(seconds: Mapping[int, float]) -> list[int]:
    """Of these numbers of cards, with a clip's seconds on them, those that are faster than every smaller one; most
    first."""
    found, least_s = list[int](), float("inf")
    for cards, took_s in sorted(seconds.items()):
        if took_s < least_s:
            found, least_s = [cards, *found], took_s
    return found


class SharedClip(NamedTuple):
    """One clip on so many cards.

    Args:
        seconds: from start to file; speedup: of one card's seconds over them.
        sent_bytes, exchange_s: of one card, in one forward pass.
        side_by_side: clips that as many cards finish in the time of one shared clip, when each has a clip of its own.
    """

    ranks: int
    seconds: float
    speedup: float
    sent_bytes: int
    exchange_s: float
    side_by_side: float

    @property
    def efficiency(self) -> float:
        """Share of the cards' time that is won."""
        return self.speedup / self.ranks

    @property
    def helps(self) -> bool:
        """Whether it is worth offering to somebody who waits for one clip."""
        return self.speedup >= MIN_SPEEDUP


def card_shares(
    phases: Sequence["PhaseCost"], ranks: int, cards: Sequence[GpuFacts], machine: Machine, budget_bytes: int
) -> tuple[CardShare, ...]:
    """Each card's part of a clip that several share, () where one makes it alone; without cards each process' of a CPU,
    which may use `budget_bytes`."""
    if ranks == 1:
        return ()
    peaks = [max(phase.peak_bytes for phase in phases), *[follower_bytes(phases)] * (ranks - 1)]
    if not cards:
        process = {"device": "cpu", "device_name": "CPU", "budget_bytes": max(0, budget_bytes)}
        return tuple([CardShare.model_validate({**process, "peak_bytes": peak_bytes}) for peak_bytes in peaks])
    return tuple([
        CardShare(
            device=f"cuda:{gpu.index}", device_name=gpu.name, uuid=gpu.uuid, peak_bytes=peak_bytes,
            budget_bytes=max(0, machine.card_budget_bytes(gpu)),
        ) for gpu, peak_bytes in zip(cards, peaks, strict=False)
    ])  # fmt: skip


def follower_bytes(phases: Sequence["PhaseCost"] | Sequence[Phase]) -> int:
    """What those processes need that take part in the shared phases only."""
    return max(phase.peak_bytes for phase in phases if phase.name in SHARED_PHASES)


def shared(
    dit: DitFacts, tokens: int, ranks: int, *, split_s: float, strips_s: float, width: int, serial_s: float,
    forwards: int, link_bytes_s: float, exchange: Exchange = "full", memory_bytes_s: float = MEMORY_BYTES_S,
) -> SharedClip:  # fmt: skip
    """One clip on `ranks` cards, from the seconds of its parts on one.

    split_s: of the transformer; strips_s: of the VAE; serial_s: of all else. link_bytes_s: what one card sends a second
    in an all-to-all among all of them, measured (scripts/bench_parallel.py) or given.
    """
    exchange_s = exchange_seconds(dit, tokens, ranks, link_bytes_s, memory_bytes_s, exchange)
    sent = sent_bytes(dit, tokens, ranks, 2 if exchange == "full" else INT8_SENT_BYTES)
    alone_s = split_s + strips_s + serial_s
    seconds = split_s / ranks + forwards * exchange_s + strips_s * strip_factor(width, ranks) + serial_s
    speedup = alone_s / seconds
    return SharedClip(ranks, seconds, speedup, sent, exchange_s, ranks / speedup)


def with_cards(levers: Levers, cards: int) -> Levers:
    """The same for another number of cards, each with as many blocks as before; the others wait in host memory."""
    shared = levers.blocks_shared
    if shared is not None:
        shared = None if cards == 1 else min(shared, shared // levers.cards * cards)
    page_locked = levers.blocks_page_locked if shared == levers.blocks_shared else 0
    exchange = levers.exchange if cards > 1 else "full"
    own = {"blocks_shared": shared, "blocks_page_locked": page_locked, "exchange": exchange}
    return levers.model_copy(update={"cards": cards, **own})
