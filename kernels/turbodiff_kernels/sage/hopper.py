"""The attention loop for Hopper: one group of warps copies keys and values, two compute 64 queries each.

In the plain loop (loop.py) barriers keep both groups in step: while one waits for its products, so does the other. Here
the tensor memory accelerator copies, each group waits for it alone, and the softmax of one runs beside the products of
the other, as FlashAttention-3 does (arXiv 2407.08608). The compiler divides the work; what it cannot divide is kept out
of the kernel: the linear branch of SLA is a pass of its own. The maths is that of loop.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from turbodiff_kernels.quant.kernel import widen
from turbodiff_kernels.sage.loop import FP8_BITS, exponentials, in_fours, value_scale
from turbodiff_kernels.sage.reference import BLOCK_K, BLOCK_Q

LINEAR_ROWS = 64
WARPS, STAGES = 4, 3  # of one group; the compiler adds two groups


def attend_hopper(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, q_scale: Tensor, k_scale: Tensor, peaks: Tensor,
    kept: Tensor | None, blocks: int, factor: float, *, add: bool,
) -> None:  # fmt: skip
    """Attention of INT8 rows q, k [B, L, H, D] and FP8 values v [B, H, D, L padded], `in_fours`, into `out`, or added
    to what is there. All are contiguous; the other arguments are those of `attend_kernel`."""
    batch, length, heads, dim = q.shape
    triton.set_allocator(_scratch)
    rows = TensorDescriptor.from_tensor(k.view(batch * length, heads * dim), [BLOCK_K, dim])
    columns = TensorDescriptor.from_tensor(v.view(batch * heads * dim, -1), [dim, BLOCK_K])
    attend_hopper_kernel[(triton.cdiv(length, BLOCK_Q), batch * heads)](
        q, rows, columns, out, q_scale, k_scale, peaks, kept, length, blocks, heads, factor,
        SPARSE=kept is not None, ADD=add, ROWS=BLOCK_Q, COLUMNS=BLOCK_K, DIM=dim, STAGES=STAGES,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def linear_pass(q: Tensor, state: Tensor, total: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """`LinearBranch` of the queries q [B, L, H, D] into `out`, contiguous and of that shape; it may be q."""
    batch, length, heads, dim = q.shape
    linear_kernel[(triton.cdiv(length, LINEAR_ROWS), batch * heads)](
        q, state, total, bias, out, length, heads, eps, *q.stride()[:3], ROWS=LINEAR_ROWS, DIM=dim, num_warps=4
    )


def _scratch(size_bytes: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that programs make, 128 bytes each; freed in the order of the stream."""
    return torch.empty(size_bytes, dtype=torch.int8, device="cuda")


@triton.jit(do_not_specialize=["length", "blocks"])
def attend_hopper_kernel(
    q, k, v, out, q_scale, k_scale, v_peaks, kept, length, blocks, heads, factor,
    SPARSE: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Launched by `attend_hopper`; k and v are descriptors."""
    block, slot = tl.program_id(0), tl.program_id(1)
    first, channel = slot // heads * length, slot % heads * DIM
    row, column, d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DIM)
    # made here, since the compiler halves it between the groups
    q_rows = tl.make_tensor_descriptor(q, [first + length, heads * DIM], [heads * DIM, 1], [ROWS, DIM])
    queries = q_rows.load([first + block * ROWS, channel])
    if SPARSE:
        kept += (slot.to(tl.int64) * tl.num_programs(0) + block) * blocks
    factor *= tl.load(q_scale + slot * tl.num_programs(0) + block)
    k_scale += slot * tl.cdiv(length, COLUMNS)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for i in tl.range(0, blocks, warp_specialize=True, num_stages=STAGES):
        at = tl.load(kept + i).to(tl.int32) if SPARSE else i
        keys = k.load([first + at * COLUMNS, channel])
        x = tl.dot(queries, keys.T, out_dtype=tl.int32).to(tl.float32)
        x = tl.where((column < length - at * COLUMNS)[None, :], x, float("-inf"))
        by = factor * tl.load(k_scale + at)
        base = tl.maximum(peak, tl.max(x, 1) * by - FP8_BITS)
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(tl.fma(x, by, -base[:, None]))
        mass = mass * shrink + tl.sum(weights, 1)
        weights = in_fours(weights.to(v.dtype), ROWS, COLUMNS)
        added = tl.dot(weights, v.load([slot * DIM, at * COLUMNS]).T, out_dtype=tl.float32)
        acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], (ROWS, DIM)), added)
        peak = base
    acc *= (1.0 / mass)[:, None]
    acc *= value_scale(tl.load(v_peaks + slot * DIM + d), False)[None, :]
    here = (row < length)[:, None]
    to = out + (first + row).to(tl.int64)[:, None] * heads * DIM + channel + d[None, :]
    if ADD:
        acc += tl.load(to, mask=here, other=0.0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["length"])
def linear_kernel(
    q, state, total, bias, out, length, heads, eps, q_batch, q_row, q_head, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """Launched by `linear_pass`."""
    slot = tl.program_id(1).to(tl.int64)
    batch, head = slot // heads, slot % heads
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    here, wide = (row < length)[:, None], row.to(tl.int64)[:, None]
    # instead of what is not there the last row, again
    at = q + batch * q_batch + head * q_head + tl.minimum(row, length - 1).to(tl.int64)[:, None] * q_row + d[None, :]
    # phi is what follows over its sum, which stands above and below the line, so it is never taken
    x = exponentials(widen(tl.load(at)))
    below = tl.sum(x * (tl.load(total + slot * DIM + d) + eps)[None, :], 1)
    square = tl.load(state + slot * DIM * DIM + d[:, None] * DIM + d[None, :])
    y = tl.dot(x.to(square.dtype), square) * (1.0 / below)[:, None] + tl.load(bias + d).to(tl.float32)[None, :]
    to = out + (batch * length + wide) * heads * DIM + head * DIM + d[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=here)
