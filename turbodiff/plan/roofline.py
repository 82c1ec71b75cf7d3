"""Seconds: a roofline per card and the kernels that run there. Predictions, and labelled so, until a card is measured.

FLOP formulas: research on TurboDiffusion's DiT (arXiv 2512.16093), one forward, batch 1:
    linears  n (2 L 6 d^2 + 4 L d f)        q, k, v, o, cross q, cross o, and the feed-forward
    dense    n 4 L^2 d                       self-attention
    sparse   dense x top-k + n 6 L D d       kept key blocks and the linear branch
    cross    n 4 L 512 d
    keys     n 4 512 d^2                     keys and values of the text, once per clip or in every pass
"""

from typing import NamedTuple

from turbodiff.plan.cards import card_of
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.plan.kernel_costs import BLOCK_Q, FUSED, HEADS_AT_A_TIME, LAUNCH_S, LAUNCHES, KernelsHere
from turbodiff.spec.attention import PLAINER_ATTENTION, AttentionKind
from turbodiff.spec.models import DitFacts
from turbodiff.spec.numbers import GB
from turbodiff.spec.request import Exchange

TERA = 10**12
DISK_BYTES_S = 2.0 * GB  # NVMe through the page cache; a cold hard disk is ten times slower
PAGEABLE_SHARE = 0.5  # of the page-locked rate: the driver copies each piece to a page-locked buffer of its own first
TRAFFIC_BYTES = 200  # HBM bytes per token, channel and block outside weights: between the fused ~100 and eager ~400
EAGER_BYTES = 600  # the same where norms are references, which read and write float32 copies
VAE_FLOPS_PER_PIXEL = 8.5e6  # 275 TFLOP for 81 frames of 832x480, both directions alike within a factor of two
# 14.5 GB for four frames of 832x480 with fused norms, counted on the real decoder by tests/models/test_vae.py
CONV_SHARE = 0.36  # of the bf16 peak, convolutions alone: 0.3 with the 38 GB that moved between them before
VAE_BYTES_PER_PIXEL = 9100  # of the memory of a card, at bf16 and 96 channels, outside of convolutions
INT8_SENT_BYTES = 1 + 4 / 128  # of an element that travels in INT8, with the scale of its token and head of 128
# HBM bytes of an element that travels in INT8 beyond those of one that does not: it is quantised, put beside its scale
# and packed (2 + 1, 1 + 1, 1 + 1 of 4), and turned back (1 + 2)
INT8_PACKING_BYTES = 6
TEXT_SECONDS_CPU = 20.0  # umt5-xxl, 512 tokens, bf16 on a desktop CPU


class Speed(NamedTuple):
    """Achieved, not peak, rates of a device."""

    bf16_flops: float
    int8_flops: float
    attention_flops: float
    conv_flops: float
    memory_bytes_s: float
    pcie_bytes_s: float
    pageable_bytes_s: float  # host memory that is not page-locked to device
    decode_bytes_s: float  # of the card's memory, where the VAE reads and writes it
    fp32_flops: float = 0.0  # outside tensor cores: INT8 products and attention of references


# Share of the data sheet's INT8 rate that our product of 128 x 128 tiles reaches. Up to Ada and on GeForce Blackwell
# its instructions are the tensor cores' own. On Hopper and datacentre Blackwell it gains nothing over bf16:
# TurboDiffusion says so of such tiles on H20 (docs/acceleration.md); arXiv 2402.13499 measured 62 % of the peak for
# these instructions, and scaling each tile takes a third of that.
INT8_SHARE, INT8_SHARE_WGMMA = 0.65, 0.35
WGMMA = (9, 10, 11)  # major capability


def speed_of(gpu: GpuFacts | None, cpu_count: int | None) -> Speed:
    """The rates of a card (plan/cards.py), with what was measured on it in their place; of a CPU when `gpu` is None."""
    if gpu is None:
        flops = 25e9 * (cpu_count or 4)  # float32 GEMM per core, AVX2
        return Speed(flops, flops / 4, flops / 2, flops / 3, *(10 * GB,) * 4, flops)
    card = card_of(gpu.name, gpu.facts)
    pcie_bytes_s = gpu.pcie_bytes_s or 0.9 * card.copy_gb_s * GB
    block, decode = gpu.block_rate or 1.0, gpu.decode_rate or 1.0
    memory_bytes_s = gpu.memory_bytes_s or 0.8 * card.memory_gb_s * GB
    return Speed(
        bf16_flops=0.75 * block * card.bf16_tflops * TERA,
        int8_flops=(INT8_SHARE_WGMMA if card.capability[0] in WGMMA else INT8_SHARE) * block * card.int8_tops * TERA,
        attention_flops=0.45 * block * card.bf16_tflops * TERA,
        conv_flops=CONV_SHARE * decode * card.bf16_tflops * TERA,
        memory_bytes_s=memory_bytes_s,
        pcie_bytes_s=pcie_bytes_s,
        pageable_bytes_s=gpu.pageable_bytes_s or PAGEABLE_SHARE * pcie_bytes_s,
        decode_bytes_s=decode * memory_bytes_s,
        fp32_flops=0.7 * block * card.fp32_tflops * TERA,
    )


def vae_seconds(speed: Speed, pixels: int, base: int, element_bytes: int) -> float:
    """Decode or encode so many pixels of all frames: convolutions, and the passes over memory between them."""
    work, traffic = VAE_FLOPS_PER_PIXEL * (base / 96) ** 2, VAE_BYTES_PER_PIXEL * base / 96 * element_bytes / 2
    return pixels * (work / speed.conv_flops + traffic / speed.decode_bytes_s)


def kernels_here(kind: AttentionKind, machine: Machine, gpu: GpuFacts | None) -> tuple[AttentionKind, KernelsHere]:
    """The attention that runs where `kind` is asked for, and what is fused there.

    As models/attention.py `resolve_attention`: on a card a kernel that did not prove itself makes room for the next
    plainer kind, unless references were asked for; a CPU runs the reference of what was asked.
    """

    def fused(name: AttentionKind) -> bool:
        return name == "dense" or machine.runs_fused(gpu, name)

    if gpu is not None and (gpu.kernels or machine.kernels).wish != "reference":
        while not fused(kind) and kind in PLAINER_ATTENTION:
            kind = PLAINER_ATTENTION[kind]
    norm, quant, gemm = (
        machine.runs_fused(gpu, "norm"),
        machine.runs_fused(gpu, "quant"),
        machine.runs_fused(gpu, "gemm"),
    )
    return kind, KernelsHere(norm, quant, gemm, fused(kind))


def dit_seconds(
    dit: DitFacts,
    speed: Speed,
    tokens: int,
    topk: float | None,
    int8: bool,
    text_rows: int,
    here: KernelsHere | None = None,
) -> float:
    """One forward of the whole DiT with its weights on the device; `topk` None for dense attention.

    `here`: which operations are fused on a card, None: all, or a CPU, whose rates are those of references.
    """
    here = here or FUSED
    dim, blocks = dit.dim, dit.num_layers
    linear = blocks * (12 * tokens * dim**2 + 4 * tokens * dim * dit.ffn_dim)
    dense = blocks * 4 * tokens**2 * dim
    self_attention = dense if topk is None else dense * topk + blocks * 6 * tokens * 128 * dim
    cross = blocks * 4 * tokens * text_rows * dim
    rate = _linear_rate(speed, int8, here)
    traffic = blocks * (TRAFFIC_BYTES if here.norm else EAGER_BYTES) * tokens * dim / speed.memory_bytes_s
    seconds = linear / rate + cross / speed.attention_flops + traffic
    if here.attention:
        return seconds + self_attention / speed.attention_flops
    if topk is not None:
        groups = -(-dit.num_heads // HEADS_AT_A_TIME) * -(-tokens // BLOCK_Q)
        seconds += blocks * groups * LAUNCHES * LAUNCH_S
    return seconds + self_attention / min(speed.fp32_flops, speed.attention_flops)


def text_keys_seconds(dit: DitFacts, speed: Speed, rows: int, int8: bool, here: KernelsHere | None = None) -> float:
    """Keys and values of so many rows of text in all blocks, once."""
    return dit.num_layers * 4 * rows * dit.dim**2 / _linear_rate(speed, int8, here or FUSED)


def sent_bytes(dit: DitFacts, tokens: int, ranks: int, element_bytes: float = 2) -> int:
    """Bytes that one of `ranks` cards sends in one forward pass."""
    return int(dit.num_layers * 4 * tokens * dit.dim * element_bytes * (ranks - 1) / ranks**2)


def exchange_seconds(
    dit: DitFacts, tokens: int, ranks: int, link_bytes_s: float, memory_bytes_s: float, exchange: Exchange = "full",
    element_bytes: float = 2,
) -> float:  # fmt: skip
    """Seconds of one forward pass in which one of `ranks` cards sends, and for INT8 quantises and packs as well."""
    if exchange == "full":
        return sent_bytes(dit, tokens, ranks, element_bytes) / link_bytes_s
    packing_bytes = dit.num_layers * 4 * tokens * dit.dim / ranks * INT8_PACKING_BYTES
    return sent_bytes(dit, tokens, ranks, INT8_SENT_BYTES) / link_bytes_s + packing_bytes / memory_bytes_s


def _linear_rate(speed: Speed, int8: bool, here: KernelsHere) -> float:
    return speed.bf16_flops if not int8 else speed.int8_flops if here.gemm else speed.fp32_flops
