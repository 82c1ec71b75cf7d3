"""What a kernel, and a step of a whole network, should take on a card: from machine code, by few stated assumptions.

    matrix loop     cycles = matrix cycles + warps / 4 x (other instructions), per iteration; where several blocks
                    share a multiprocessor, one block's matrix instructions hide another's rest
    loop of Hopper  the larger of both: two groups of warps, each of which waits for itself; what it could be at best
    memory pass     time = bytes / copy rate + half of the cycles in which its instructions are issued
    step            the sum of its kernels; nothing overlaps

It is a prediction. Fed with what the same compiler makes of SageAttention 1's Triton kernel it gives that kernel's
published rates within 15 % on four cards (PEERS); nothing of ours was measured.
"""

import re
from math import ceil
from typing import NamedTuple

from scripts.kernel_launches import Measured

SCHEDULERS = 4  # of a multiprocessor; each issues one warp instruction a clock
HOPPER_LOOP = "attend_hopper_kernel"
LATENCY_CYCLES = 900  # from a block's start until its first bytes are there
REGISTERS, REGISTER_UNIT, BLOCK_SHARED = 65536, 8, 1024  # of a multiprocessor; shared memory that CUDA keeps per block


class Card(NamedTuple):
    """Assumptions about a card. Matrix rates: FLOP per clock and multiprocessor (NVIDIA's architecture papers)."""

    arch: int
    multiprocessors: int
    ghz: float  # sustained under load
    bf16: int  # accumulated in float32
    fp16: int  # accumulated in float16
    int8: int
    fp8: int  # accumulated in float32
    fp8_fp16: int  # accumulated in float16
    copy_tb_s: float  # copy rate, 85-92 % of the data sheet
    cublas: float  # share of the bf16 peak that cuBLAS reaches
    sdpa_tflops: float  # torch's flash attention, as published
    cudnn_tflops: float  # torch's cuDNN attention, as published; where there is none, flash again
    warps: int  # at most on a multiprocessor
    shared_kb: int  # of a multiprocessor


CARDS = {
    "A100": Card(80, 108, 1.41, 2048, 2048, 4096, 0, 0, 1.75, 0.80, 204, 204, 64, 164),
    "H100": Card(90, 132, 1.70, 4096, 4096, 8192, 8192, 8192, 2.95, 0.76, 370, 620, 64, 228),
    "H200": Card(90, 132, 1.70, 4096, 4096, 8192, 8192, 8192, 4.30, 0.76, 370, 620, 64, 228),
    "4090": Card(89, 128, 2.55, 512, 1024, 2048, 1024, 2048, 0.92, 0.90, 160, 160, 48, 100),
    "5090": Card(120, 170, 2.70, 512, 1024, 2048, 1024, 2048, 1.60, 0.90, 209, 209, 48, 100),
}


class Peer(NamedTuple):
    """A published rate, and what the compiler made of that kernel's loop: SageAttention 1's Triton kernel, D = 128,
    8 warps, 128 queries x 64 keys, triton 3.7.1 (instructions other than matrix ones)."""

    card: str
    other_instructions: int
    published_tflops: float


PEERS = (  # rates: figures of SageAttention's repository
    Peer("A100", 545, 278),
    Peer("H100", 526, 516),
    Peer("4090", 543, 322),
    Peer("5090", 547, 480),
)


def peer_tflops(peer: Peer) -> float:
    """What the model says of a peer."""
    card, flop = CARDS[peer.card], 2 * 128 * 64 * 128
    cycles = flop / card.int8 + flop / card.fp16 + 8 / SCHEDULERS * peer.other_instructions
    return tflops(card, 2 * flop, cycles)


def tflops(card: Card, flop: float, cycles: float) -> float:
    """A multiprocessor does `flop` in `cycles`; all of them together."""
    return flop / cycles * card.multiprocessors * card.ghz / 1000


def blocks_an_sm(row: Measured, card: Card) -> int:
    """Blocks of a launch that a multiprocessor holds at a time."""
    registers = -(-row.registers // REGISTER_UNIT) * REGISTER_UNIT * 32 * row.warps
    shared = row.shared_bytes + BLOCK_SHARED
    return max(1, min(REGISTERS // registers, card.shared_kb * 1024 // shared, card.warps // row.warps, 32))


def computing_warps(row: Measured) -> int:
    """Warps of a block: all of them, but for the loop of Hopper, one of whose three groups only copies."""
    return row.warps * 2 // 3 if row.name.endswith(HOPPER_LOOP) else row.warps


def matrix_work(row: Measured, card: Card) -> tuple[float, float]:
    """FLOP and matrix cycles of one iteration of a block's loop."""
    flop = cycles = 0.0
    warps = computing_warps(row)
    for name, count in row.code.loop_matrix.items():
        if size := re.search(r"(\d+)x(\d+)x(\d+)", name):  # wgmma: four warps together
            work = 2 * int(size[1]) * int(size[2]) * int(size[3]) * count * warps / 4
        else:  # 16816 is 16 x 8 x 16
            m, n, k = re.search(r"\.(16)(8)(\d+)", name).groups()  # type: ignore[union-attr]
            work = 2 * int(m) * int(n) * int(k) * count * warps
        flop, cycles = flop + work, cycles + work / _rate(name, card)
    return flop, cycles


def _rate(name: str, card: Card) -> int:
    half = ".F16" in name.replace(".F16.F32", "").replace(".F32.F16", "")
    if name.startswith("I"):
        return card.int8
    if name.startswith("Q"):
        return card.fp8_fp16 if half else card.fp8
    return card.fp16 if half and ".BF16" not in name else card.bf16


class Rate(NamedTuple):
    """Of a matrix loop: share of the matrix peak, TFLOP/s, and cycles per iteration of one block."""

    share: float
    tflops: float
    cycles: float


def matrix_rate(row: Measured, card: Card) -> Rate:
    """The loop alone; what a block does before and after it is in `block_cycles`."""
    flop, matrix = matrix_work(row, card)
    code = row.code
    other = code.loop_instructions - code.optional_instructions - sum(code.loop_matrix.values())
    issue, blocks = other * computing_warps(row) / SCHEDULERS, blocks_an_sm(row, card)
    together = 0.0 if row.name.endswith(HOPPER_LOOP) else matrix + issue
    cycles = max(matrix, issue, together / blocks)
    return Rate(matrix / cycles, tflops(card, flop, cycles), cycles)


def block_cycles(row: Measured, card: Card, iterations: float) -> float:
    """Of a whole block of a matrix kernel: its loop, what is outside of it once, and the wait for its first bytes."""
    around = (row.code.instructions - row.code.loop_instructions) * row.warps / SCHEDULERS
    return iterations * matrix_rate(row, card).cycles + around + LATENCY_CYCLES / blocks_an_sm(row, card)


def rounds(row: Measured) -> int:
    """How often a pass over memory goes through its loop: once for every token of a group, or for every head."""
    if not row.code.loop_instructions:
        return 1
    tokens = row.constants.get("GROUP", 1) // row.constants.get("ROWS", 1)  # type: ignore[operator]
    return max(1, row.constants.get("HEADS", tokens))  # type: ignore[call-overload]


def copy_share(row: Measured, card: Card) -> float:
    """Of a pass over memory: the share of the copy rate that it reaches. A loop waits for its bytes in every round,
    since the compiler reads nothing ahead in loops without a matrix product; other blocks go on meanwhile.

    Bytes are those of the card's memory: what several programs read again from its second cache counts once.
    """
    times = rounds(row)
    issue = (row.code.instructions + (times - 1) * row.code.loop_instructions) * row.warps / SCHEDULERS
    memory = row.traffic_bytes / row.programs / (card.copy_tb_s * 1000 / card.multiprocessors / card.ghz)
    alone = times * LATENCY_CYCLES + issue + memory
    return memory / max(memory + issue / 2, alone / blocks_an_sm(row, card))


def gemm_ms(row: Measured, card: Card, m: int, n: int, k: int) -> float:
    """An INT8 product: waves of tiles, each K / 128 iterations deep and an epilogue."""
    rows, columns = row.constants["ROWS"], row.constants["COLUMNS"]
    waves = ceil(ceil(m / rows) * ceil(n / columns) / card.multiprocessors)  # type: ignore[operator]
    iterations = 2 * rows * columns * k / matrix_work(row, card)[0]  # type: ignore[operator]
    return waves * block_cycles(row, card, ceil(iterations)) / card.ghz / 1e6


def attention_ms(row: Measured, card: Card, heads: int, length: int, key_blocks: float) -> float:
    """The attention loop over so many blocks of 64 keys for each 128 queries. An iteration's keys are counted by its
    matrix instructions, since a loop may take several blocks at once."""
    rows, dim = row.constants["ROWS"], row.constants["DIM"]
    waves = heads * ceil(length / rows) / card.multiprocessors  # type: ignore[operator]
    iterations = ceil(4 * rows * 64 * key_blocks * dim / matrix_work(row, card)[0])  # type: ignore[operator]
    return waves * block_cycles(row, card, iterations) / card.ghz / 1e6


class Shape(NamedTuple):
    """A model at a length: L tokens, d channels, f hidden channels, heads, blocks of the network."""

    tokens: int
    dim: int
    hidden: int
    heads: int
    layers: int


SHAPES = {
    "1.3B 480p": Shape(32760, 1536, 8960, 12, 30),
    "14B 480p": Shape(32760, 5120, 13824, 40, 40),
    "14B 720p": Shape(75600, 5120, 13824, 40, 40),
}
TEXT_TOKENS = 512
LINEARS = ("bf16", "tiles", "tokens")


def sparse_ms(rows: dict[str, Measured], card: Card, shape: Shape, kind: str, topk: float, hopper: bool) -> float:
    """The attention of `kind` with its linear branch, or both by the loop of Hopper: a pass that reads q and writes the
    linear branch, which the loop reads."""
    length, dim, heads = shape.tokens, shape.dim, shape.heads
    blocks = max(1, int(topk * ceil(length / 64)))
    if not hopper:
        return attention_ms(rows[f"{kind}: attend_kernel"], card, heads, length, blocks)
    pass_ms = 3 * 2 * length * dim / card.copy_tb_s / 1e9 / copy_share(rows["hopper sagesla: linear_kernel"], card)
    return pass_ms + attention_ms(rows[f"hopper {kind}: {HOPPER_LOOP}"], card, heads, length, blocks)


def step_ms(
    rows: dict[str, Measured], card: Card, shape: Shape, kind: str, linear: str, topk: float = 0.1, hopper: bool = False
) -> float:
    """A step of `kind` (sla, sagesla) with linears in bf16 or in one of the INT8 modes: the sum of its kernels.

    Left out: patches, head, time, block choice and host (1-2 % together). Passes over the tokens in units of one 16-bit
    copy of them, N = 2 L d bytes.
    """
    length, dim, hidden, *_ = shape
    unit_ms = 2 * length * dim / card.copy_tb_s / 1e9
    narrow, rho = " 1536" if dim == 1536 else "", hidden / dim
    int8, sage = linear != "bf16", kind == "sagesla"

    def passes(units: float, name: str) -> float:
        return units * unit_ms / copy_share(rows[name], card)

    def product(m: int, n: int, k: int, after: str = "") -> float:
        if not int8:
            return 2 * m * n * k / (card.cublas * card.bf16 * card.multiprocessors * card.ghz) / 1e6
        return gemm_ms(rows[f"int8 {linear}{after}: _int8_linear_kernel"], card, m, n, k)

    quantize = passes(1.5, f"quantize_{linear}: _quantize_{linear}_kernel") if int8 else 0.0
    fused = linear == "tokens"
    norm = f"norm_modulate{'_quantize' if fused else ''}{narrow}: _layer_norm_kernel"
    total = 2 * (passes(1.5 if fused else 2, norm) + (0 if fused else quantize))
    total += passes(2, f"layer_norm{narrow}: _layer_norm_kernel") + 3 * quantize  # inputs of cross q, o and cross o
    total += 5 * product(length, dim, dim) + product(length, dim, dim, " gate add" if int8 else "")
    sums = "normed sagesla 1536" if narrow else "normed sla"
    total += passes(4, f"{sums}: _rms_norm_rope_kernel") + passes(2, "sla: _state_kernel")
    if sage:
        total += passes(3, "sage: _quantize_pool_kernel")
        if card.fp8:
            total += passes(1.5, "sage: _quantize_values_kernel")
    total += sparse_ms(rows, card, shape, kind, topk, hopper)
    total += passes(2, "rms_norm: _rms_norm_rope_kernel")
    total += 4 * length * TEXT_TOKENS * dim / card.sdpa_tflops / 1e9
    add = passes(3, "residual_add: _residual_add_kernel")
    if int8:
        total += product(length, hidden, dim, " gelu quant" if linear == "tiles" else " gelu")
        total += 0 if linear == "tiles" else passes(1.5 * rho, "quantize_tokens 13824: _quantize_tokens_kernel")
        total += product(length, dim, hidden, " gate add")
    else:
        total += product(length, hidden, dim) + 2 * rho * unit_ms + product(length, dim, hidden) + 3 * add
    return total * shape.layers


def sparse_gain(
    rows: dict[str, Measured], card: Card, shape: Shape, kind: str, topk: float = 0.1, hopper: bool = False
) -> float:
    """How much faster the whole operation of `kind` is than torch's dense attention: cuDNN where it is the faster."""
    unit_ms = 2 * shape.tokens * shape.dim / card.copy_tb_s / 1e9
    dense = 4 * shape.tokens**2 * shape.dim / card.cudnn_tflops / 1e9
    units = {"sla: _state_kernel": 2.0, "sla: _quantize_pool_kernel": 2.0}
    if kind == "sagesla":
        units |= {"sage: _quantize_pool_kernel": 3.0} | ({"sage: _quantize_values_kernel": 1.5} if card.fp8 else {})
    op = sum(count * unit_ms / copy_share(rows[name], card) for name, count in units.items())
    return dense / (op + sparse_ms(rows, card, shape, kind, topk, hopper))
