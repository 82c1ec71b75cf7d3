"""What several cards gain on one clip: bytes that they exchange, seconds, and when two clips side by side are better.

A prediction from the seconds of one card. Each block sends q, k and v to the ranks that own their heads, and the result
back: 4 L d elements, of which a rank holds 1 / R and keeps 1 / R of that (models/parallel.py). What is not shared is
done at the pace of one card (Amdahl). Checked against Wan2.2's published table: tests/plan/test_shared_clip.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from turbodiff.plan.hardware import GpuFacts, Machine, sharing_cards
from turbodiff.plan.links import possible_ranks
from turbodiff.plan.roofline import sent_bytes
from turbodiff.plan.vae_costs import strip_factor
from turbodiff.spec.models import DitFacts
from turbodiff.spec.plan import CardShare, Levers, Phase, Plan
from turbodiff.spec.request import Request

if TYPE_CHECKING:
    from turbodiff.plan.phase_costs import PhaseCost

SHARED_PHASES = ("image_encode", "denoise", "denoise_high", "denoise_low", "vae_decode")
MIN_SPEEDUP = 1.2  # below it a second card is worth more on a clip of its own, and the wait is hardly shorter
INT8_BYTES = 1 + 4 / 128  # of an element that travels in INT8, with the scale of its token and head of 128


def asked_ranks(request: Request, machine: Machine) -> int:
    """Processes that a request wants for its clip, of those that the machine has cards for; a CPU has for all. "auto"
    is one: who dispatches the clip knows whether others wait."""
    if request.cards == "auto":
        return 1
    on_gpu = machine.usable_gpus and not (machine.torch or "").endswith("+cpu")
    return min(request.cards, max(1, len(sharing_cards(machine)))) if on_gpu else request.cards


class SharedClip(NamedTuple):
    """One clip on so many cards.

    Args:
        seconds: from start to file; speedup: of one card's seconds over them.
        sent_bytes: by one card, in one forward pass.
        side_by_side: clips that as many cards finish in the time of one shared clip, when each has a clip of its own.
    """

    ranks: int
    seconds: float
    speedup: float
    sent_bytes: int
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
    forwards: int, link_bytes_s: float, element_bytes: float = 2,
) -> SharedClip:  # fmt: skip
    """One clip on `ranks` cards, from the seconds of its parts on one.

    split_s: of the transformer; strips_s: of the VAE; serial_s: of all else. link_bytes_s: what one card sends a second
    in an all-to-all among all of them, measured (scripts/bench_parallel.py) or given.
    """
    sent = sent_bytes(dit, tokens, ranks, element_bytes)
    alone_s = split_s + strips_s + serial_s
    seconds = split_s / ranks + forwards * sent / link_bytes_s + strips_s * strip_factor(width, ranks) + serial_s
    speedup = alone_s / seconds
    return SharedClip(ranks, seconds, speedup, sent, ranks / speedup)


def shared_plans(plan: Plan, cards: int, link_bytes_s: float, *, int8: bool = False) -> list[SharedClip]:
    """A planned clip on as many of `cards` as may share it, most first; also where it does not help."""
    request, seconds = plan.request, {phase.name: phase.seconds for phase in plan.phases}
    latent, dit = request.shape.latent, request.spec.dit
    split_s = sum(value for name, value in seconds.items() if name.startswith("denoise"))
    strips_s = seconds.get("vae_decode", 0.0) + seconds.get("image_encode", 0.0)
    forwards = sum(2 if request.guidance_of(expert) > 1 else 1 for expert in request.experts)
    return [
        shared(
            dit, latent.tokens, ranks, split_s=split_s, strips_s=strips_s, width=latent.width,
            serial_s=plan.seconds - split_s - strips_s, forwards=forwards, link_bytes_s=link_bytes_s,
            element_bytes=INT8_BYTES if int8 else 2,
        )
        for ranks in possible_ranks(dit.num_heads, latent.tokens, cards)
    ]  # fmt: skip


def with_cards(levers: Levers, cards: int) -> Levers:
    """The same for another number of cards, each with as many blocks as before; the others wait in host memory."""
    shared = levers.blocks_shared
    if shared is not None:
        shared = None if cards == 1 else min(shared, shared // levers.cards * cards)
    page_locked = levers.blocks_page_locked if shared == levers.blocks_shared else 0
    return levers.model_copy(update={"cards": cards, "blocks_shared": shared, "blocks_page_locked": page_locked})
