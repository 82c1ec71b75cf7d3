"""What several cards gain on one clip: bytes that they exchange, seconds, and when two clips side by side are better.

A prediction from the seconds of one card. Each block sends q, k and v to the ranks that own their heads, and the result
back: 4 L d elements, of which a rank holds 1 / R and keeps 1 / R of that (models/parallel.py). What is not shared is
done at the pace of one card (Amdahl). Checked against Wan2.2's published table: tests/plan/test_shared_clip.py.
"""

from typing import NamedTuple

from turbodiff.spec.models import DitFacts
from turbodiff.spec.plan import Plan
from turbodiff.spec.shapes import DECODER_MARGINS, INT8_TILE

MIN_SPEEDUP = 1.2  # below it a second card is worth more on a clip of its own, and the wait is hardly shorter
INT8_BYTES = 1 + 4 / 128  # of an element that travels in INT8, with the scale of its token and head of 128

# What an all-to-all reaches of NVLink, one way: of H100's 450 GB/s, from LightX2V's published seconds on 8 cards
# (README, 2025-12-01)
NVLINK_SHARE = 92 / 450


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


def sent_bytes(dit: DitFacts, tokens: int, ranks: int, element_bytes: float = 2) -> int:
    """Bytes that one of `ranks` cards sends in one forward pass."""
    return int(dit.num_layers * 4 * tokens * dit.dim * element_bytes * (ranks - 1) / ranks**2)


def possible_ranks(heads: int, tokens: int, cards: int) -> list[int]:
    """How many processes may share a clip, most first: the heads must divide, and each needs a tile of tokens."""
    tiles = -(-tokens // INT8_TILE)
    return [ranks for ranks in range(min(cards, tiles), 1, -1) if heads % ranks == 0]


def strip_factor(width: int, ranks: int) -> float:
    """Seconds of a strip of the picture over those of the whole, `width` latent pixels wide: its share and its margins,
    those of the second block as a mean of all."""
    return min(1.0, (width / ranks + 2 * DECODER_MARGINS[1] / 2) / width)


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
    strips_s = seconds.get("vae_decode", 0.0)
    forwards = sum(2 if request.guidance_of(expert) > 1 else 1 for expert in request.experts)
    return [
        shared(
            dit, latent.tokens, ranks, split_s=split_s, strips_s=strips_s, width=latent.width,
            serial_s=plan.seconds - split_s - strips_s, forwards=forwards, link_bytes_s=link_bytes_s,
            element_bytes=INT8_BYTES if int8 else 2,
        )
        for ranks in possible_ranks(dit.num_heads, latent.tokens, cards)
    ]  # fmt: skip
