"""Seconds: a roofline per class of card. Predictions until a calibration measured the card; always labelled so.

FLOP formulas: research on TurboDiffusion's DiT (arXiv 2512.16093), one forward, batch 1:
    linears  n (2 L 6 d^2 + 4 L d f)        q, k, v, o, cross q, cross o, and the feed-forward
    dense    n 4 L^2 d                       self-attention
    sparse   dense x top-k + n 6 L D d       kept key blocks and the linear branch
    cross    n 4 L 512 d + n 4 512 d^2
"""

from typing import NamedTuple

from turbodiff.plan.hardware import GpuFacts
from turbodiff.spec.models import DitFacts
from turbodiff.spec.numbers import GB, GIB

TERA = 10**12
DISK_BYTES_S = 2.0 * GB  # NVMe through the page cache; a cold hard disk is ten times slower
TRAFFIC_BYTES = 200  # HBM bytes per token, channel and block outside weights: between the fused ~100 and eager ~400
VAE_FLOPS_PER_PIXEL = 8.5e6  # 275 TFLOP for 81 frames of 832x480, both directions alike within a factor of two
TEXT_SECONDS_CPU = 20.0  # umt5-xxl, 512 tokens, bf16 on a desktop CPU


class Speed(NamedTuple):
    """Achieved, not peak, rates of a device."""

    bf16_flops: float
    int8_flops: float
    attention_flops: float
    conv_flops: float
    memory_bytes_s: float
    pcie_bytes_s: float


# peak bf16, int8 (TFLOP/s, dense, fp32 accumulation), HBM and PCIe (GB/s), from the makers' data sheets
_CARDS = (
    ("H200", 990, 1980, 4300, 50),
    ("H100", 990, 1980, 3350, 50),
    ("B200", 2250, 4500, 8000, 50),
    ("A100", 312, 624, 1555, 25),
    ("L40", 181, 362, 864, 25),
    ("RTX PRO 6000", 252, 1008, 1792, 50),
    ("6000 Ada", 182, 728, 960, 25),
    ("A6000", 77, 310, 768, 25),
    ("5090", 210, 838, 1792, 50),
    ("5080", 112, 450, 960, 50),
    ("5070 Ti", 88, 352, 896, 50),
    ("5060 Ti", 48, 190, 448, 25),
    ("4090", 165, 660, 1008, 25),
    ("4080", 97, 390, 717, 25),
    ("4070", 58, 233, 504, 25),
    ("4060", 30, 121, 272, 12),
    ("3090", 71, 284, 936, 25),
    ("3080", 60, 238, 760, 25),
    ("3060", 25, 102, 360, 25),
)
_BY_MEMORY = ((9, "4060"), (13, "3060"), (17, "4080"), (25, "4090"), (33, "5090"), (49, "A6000"), (81, "H100"))


def speed_of(gpu: GpuFacts | None, cpu_count: int | None) -> Speed:
    """The rates of a card, by name, else of a typical card of its size; of a CPU when `gpu` is None."""
    if gpu is None:
        flops = 25e9 * (cpu_count or 4)  # float32 GEMM per core, AVX2
        return Speed(flops, flops / 4, flops / 2, flops / 3, 10 * GB, 10 * GB)
    total_gib = (gpu.total_bytes or 0) / GIB
    like = next((name for limit, name in _BY_MEMORY if total_gib <= limit), "H200")
    _, bf16, int8, memory, pcie = next(
        (card for card in _CARDS if card[0] in gpu.name), next(card for card in _CARDS if card[0] == like)
    )
    hopper = gpu.capability is not None and gpu.capability[0] == 9
    return Speed(
        bf16_flops=0.75 * bf16 * TERA,
        int8_flops=(0.55 if hopper else 0.65) * int8 * TERA,
        attention_flops=0.45 * bf16 * TERA,
        conv_flops=0.3 * bf16 * TERA,
        memory_bytes_s=0.8 * memory * GB,
        pcie_bytes_s=gpu.pcie_bytes_s or 0.9 * pcie * GB,
    )


def dit_seconds(dit: DitFacts, speed: Speed, tokens: int, topk: float | None, int8: bool, text_rows: int) -> float:
    """One forward of the whole DiT with its weights on the device; `topk` None for dense attention."""
    dim, blocks = dit.dim, dit.num_layers
    linear = blocks * (12 * tokens * dim**2 + 4 * tokens * dim * dit.ffn_dim)
    dense = blocks * 4 * tokens**2 * dim
    self_attention = dense if topk is None else dense * topk + blocks * 6 * tokens * 128 * dim
    cross = blocks * (4 * tokens * text_rows * dim + 4 * text_rows * dim**2)
    rate = speed.int8_flops if int8 else speed.bf16_flops
    traffic = blocks * TRAFFIC_BYTES * tokens * dim / speed.memory_bytes_s
    return linear / rate + (self_attention + cross) / speed.attention_flops + traffic
