"""How fast cards that share a clip send to each other, and how many may share it."""

from types import MappingProxyType
from typing import Literal, NamedTuple

from turbodiff.plan.cards import card_of, words_of
from turbodiff.plan.hardware import GpuFacts
from turbodiff.spec.numbers import GB
from turbodiff.spec.shapes import INT8_TILE

# What an all-to-all reaches of NVLink, one way: of H100's 450 GB/s, from LightX2V's published seconds on 8 cards
# (README, 2025-12-01)
NVLINK_SHARE = 92 / 450
NVLINK_GB_S = MappingProxyType(  # one way, of all links together (data sheets)
    {"A100": 300, "A800": 200, "H100": 450, "H800": 200, "H20": 450, "H200": 450, "B200": 900}
)
BRIDGED = frozenset({"PCIE", "NVL"})  # variants of these cards with NVLink between pairs at most
# GB/s of one card among so many: between cards that reach each other, where PCIe copies at 50 GB/s (gen 5), assumed;
# through host memory, as on GeForce since NVLink left it, gen 4 x16: from LightX2V's seconds on 4 and 8 RTX 4090, 2 is
# assumed
PEER_GB_S = MappingProxyType({2: 40.0, 4: 35.0, 8: 25.0})
HOST_GB_S = MappingProxyType({2: 9.0, 4: 4.5, 8: 3.2})
LOOPBACK_GB_S = 1.0  # gloo between processes of one CPU, assumed

LinkKind = Literal["measured", "nvlink", "peer", "host", "loopback"]


class Link(NamedTuple):
    """Bytes that one card sends a second in an all-to-all with its likes, and how that is known: measured on them, or
    assumed of the kind of link between them."""

    bytes_s: float
    kind: LinkKind


def link_of(gpu: GpuFacts | None, ranks: int) -> Link:
    """The link between `ranks` cards of this kind; None: processes on a CPU. What fewer cards measured is taken as far
    down as the assumed rate falls from so many to these."""
    if gpu is None:
        return Link(LOOPBACK_GB_S * GB, "loopback")
    if gpu.link_bytes_s:
        measured = dict(gpu.link_bytes_s)
        most = max(measured)
        if ranks <= most:
            return Link(measured[min([number for number in measured if number >= ranks])], "measured")
        assumed = _assumed(gpu, ranks)
        return assumed._replace(bytes_s=measured[most] * assumed.bytes_s / _assumed(gpu, most).bytes_s)
    return _assumed(gpu, ranks)


def _assumed(gpu: GpuFacts, ranks: int) -> Link:
    """The link between so many cards of this kind, of which nothing is measured."""
    words, card = words_of(gpu.name), card_of(gpu.name, gpu.facts)
    nvlink = [NVLINK_GB_S[word] for word in words & NVLINK_GB_S.keys()]
    if nvlink and not words & BRIDGED:
        return Link(NVLINK_SHARE * nvlink[0] * GB, "nvlink")
    among = next((number for number in PEER_GB_S if number >= ranks), max(PEER_GB_S))
    lanes = card.copy_gb_s / 50
    if card.full_rate and not words & {"GEFORCE", "TITAN"}:
        return Link(PEER_GB_S[among] * min(1.0, lanes) * GB, "peer")
    return Link(HOST_GB_S[among] * min(1.0, lanes * 2) * GB, "host")


def possible_ranks(heads: int, tokens: int, cards: int) -> list[int]:
    """How many processes may share a clip, most first: the heads must divide, and each needs a tile of tokens."""
    tiles = -(-tokens // INT8_TILE)
    return [ranks for ranks in range(min(cards, tiles), 1, -1) if heads % ranks == 0]
