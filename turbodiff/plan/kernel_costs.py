"""What attention and its neighbours hold for themselves, as fused kernels and as references, and which of them run.

A fused kernel holds its quantised rows (kernels/README.md). A reference computes in float32 on parts of its input
(turbodiff_kernels): parts of tokens for norms and quantisation, rows of INT8 products beside a float32 weight, a few
heads of attention. Coefficients are read off the kernels and references themselves on meta tensors; tests hold both.
"""

import math
from typing import NamedTuple

from turbodiff.spec.attention import SPARSE_ATTENTION
from turbodiff.spec.models import DitFacts
from turbodiff.spec.shapes import HEAD_TOKENS, INT8_TILE

KERNEL_UNITS = {"sage": 1.0, "sla": 0.0, "sagesla": 1.0}  # INT8 rows of q and k (kernels/README.md)
BLOCK_Q, BLOCK_K = 128, 64  # queries and keys of a block in sparse attention
MEANS_UNITS = 3 / 64  # float32 means of those blocks
STATES = 512  # partial states of SLA's linear branch, D x D float32 each; fewer where there are fewer blocks
REFERENCE_ROWS = 140  # what SLA's reference pads
# parts of turbodiff_kernels' references: quant's PART_ELEMENTS, gemm's ROW_TILES, sage's HEADS
PART_ELEMENTS, GEMM_ROWS, HEADS_AT_A_TIME = 1 << 23, 8 * INT8_TILE, 4
NORM_BYTES, QUANT_BYTES = 12, 10  # a norm's three float32 copies of a part; two and the rounded one
REFERENCE_UNITS = {"sage": 11.0, "sla": 5.1, "sagesla": 14.9}  # of all heads, for 16-bit q, k and v
LAUNCHES, LAUNCH_S = 8, 1e-5  # of SLA's reference, for each block of queries and group of heads


class KernelsHere(NamedTuple):
    """Which operations are fused where a plan runs; False: their references run."""

    norm: bool = True
    quant: bool = True
    gemm: bool = True
    attention: bool = True


FUSED = KernelsHere()


def attention_inside(
    kind: str, facts: DitFacts, tokens: int, unit: int, topk: float, *, on_cpu: bool, fused: bool
) -> int:
    """Bytes that an attention holds beside q, k and v; unit: N = 2 L d bytes, 4 L d on a CPU.

    Dense attention its result, which takes q's place with the others, as FP8 values take that of k. Those hold INT8
    rows; for the sparse kinds the means of blocks, the indices of those kept (int64), and the linear branch's partial
    states. Of references those of a few heads, counted on them (tests/plan/kernel_bytes.py).
    """
    if kind == "dense":
        return unit
    queries, keys = -(-tokens // BLOCK_Q), -(-tokens // BLOCK_K)
    kept = max(1, int(topk * keys))
    heads_share = min(1.0, HEADS_AT_A_TIME / facts.num_heads)
    if on_cpu:
        padded = queries * BLOCK_Q / tokens
        units = {
            "sage": 1 + max(5.0, 4 * padded),
            "sla": 5 + REFERENCE_ROWS / tokens,
            "sagesla": 1 + max(5 + 2 * kept / keys, 4 * padded),
        }
        return math.ceil(units[kind] * unit * heads_share)
    if not fused:
        return math.ceil(REFERENCE_UNITS[kind] * unit * heads_share)
    rows = KERNEL_UNITS[kind]
    if kind not in SPARSE_ATTENTION:
        return math.ceil(rows * unit)
    heads, square = facts.num_heads, facts.head_dim**2
    state = 4 * square * (1 + min(keys, -(-STATES // heads))) * heads
    return math.ceil((rows + MEANS_UNITS) * unit) + state + 8 * heads * queries * kept


def widest_reference(facts: DitFacts, tokens: int, part_tokens: int, int8: bool, here: KernelsHere) -> int:
    """The widest point of a step where a reference runs, in bytes beside what lives through all steps; 0 where none
    does. `part_tokens`: those of a chunk of the feed-forward.

    A norm turns q beside the stream, k and v; a float32 norm runs in the head; v is made beside the stream, its INT8
    rows, q and k; the feed-forward's rows are INT8 beside the stream.
    """
    d, f = facts.dim, facts.ffn_dim
    n, part = 2 * tokens * d, 2 * part_tokens * d
    some = min(tokens, _part_rows(d))
    points = [0]
    if not here.norm:
        points += [4 * n + NORM_BYTES * some * d, n + 8 * min(tokens, HEAD_TOKENS) * d + NORM_BYTES * some * d]
    if int8 and not here.quant:
        points.append(2 * n + n // 2 + QUANT_BYTES * some * d)
    if int8 and not here.gemm:
        inner = part * f // d // 2  # INT8 rows of the hidden width
        points += [
            4 * n + n // 2 + _product_bytes(d, d, tokens),
            n + part // 2 + inner + _product_bytes(f, d, part_tokens, quantised=True),
            n + inner + _product_bytes(d, f, part_tokens),
        ]
    return max(points)


def _product_bytes(columns: int, inner: int, tokens: int, *, quantised: bool = False) -> int:
    """What the reference of an INT8 product holds: the weight, rows of input and output in float32, the result; with
    GELU and its quantisation two results, or those beside what quantising a part takes."""
    rows = min(tokens, GEMM_ROWS)
    product = rows * (4 * inner + (8 if quantised else 6) * columns)
    rounding = rows * 4 * columns + QUANT_BYTES * min(rows, _part_rows(columns)) * columns
    return 4 * columns * inner + (max(product, rounding) if quantised else product)


def _part_rows(width: int) -> int:
    """Rows of a part, as turbodiff_kernels' quant.reference.part_rows."""
    return max(1, PART_ELEMENTS // width // INT8_TILE) * INT8_TILE
