"""Sparse-linear attention in Triton, in few passes over the tokens.

Block means of keys and queries come from the pass that norms and rotates them; INT8 rows are one pass more. Keys and
values are read once for the state of the linear branch, and all three once by the attention loop, which also adds the
linear branch. The maths is in kernels/README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbodiff_kernels.norm.kernel import rms_norm_rope_sum_
from turbodiff_kernels.norm.reference import GROUP
from turbodiff_kernels.sage.kernel import (
    LinearBranch,
    attend,
    channels_last,
    settle,
    wants_fp8,
)
from turbodiff_kernels.sage.loop import feature_map
from turbodiff_kernels.sage.rows import quantize, quantize_pool
from turbodiff_kernels.sla.reference import BLOCK_K, BLOCK_Q, choose_blocks

FOLD_ROWS = 32  # of a state that one program multiplies by the projection
PROGRAMS = 512  # enough to fill any card; a constant, so that sums are split alike on every card


def sla_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, int8: bool,
    *, hopper: bool | None = None,
) -> Tensor:  # fmt: skip
    """Sum of both branches, as the operator declares; `hopper` is that of `attend`."""
    q, k, v = (channels_last(t) for t in (q, k, v))
    k_rows, k_means = quantize_pool(k, k.mean(dim=1), BLOCK_K, int8=int8)
    q_rows, q_means = quantize_pool(q, None, BLOCK_Q, int8=int8)
    kept = choose_blocks(q_means, k_means, topk)
    return attend(q_rows, k_rows, v, kept, linear_branch(q, k, v, weight, bias, int8), hopper=hopper)


def normed_sla_attention_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    weight: Tensor, bias: Tensor, topk: float, int8: bool = False, *, hopper: bool | None = None,
) -> Tensor:  # fmt: skip
    """The same of projections before their norm and rotation, in the place of q, as the operator declares.

    Block means come from the pass that norms and rotates. The mean of a block of smoothed keys is the mean of the
    block less the mean of all, so keys need no pass of their own for it.
    """
    dim = 2 * cos.shape[-1]
    heads, keys, v = (channels_last(t).unflatten(-1, (-1, dim)) for t in (q, k, v))
    q_means = pool(rms_norm_rope_sum_(q, q_weight, cos, sin, eps), None, BLOCK_Q, q, dim)
    sums = rms_norm_rope_sum_(k, k_weight, cos, sin, eps)
    total = sums.sum(1)
    k_means = pool(sums, total, BLOCK_K, k, dim)
    del sums
    kept = choose_blocks(q_means, k_means, topk)
    q_rows, k_rows = (
        (quantize(heads, None, BLOCK_Q), quantize(keys, total, BLOCK_K, count=k.shape[1])) if int8 else (heads, keys)
    )
    linear = linear_branch(heads, keys, v, weight, bias, int8)
    return settle(q, attend(q_rows, k_rows, v, kept, linear, into=heads, spare=keys, hopper=hopper))


def pool(sums: Tensor, total: Tensor | None, block: int, like: Tensor, dim: int) -> Tensor:
    """Means of blocks of tokens [B, H, blocks, D] in the dtype of `like` [B, L, H * D], from their sums of 16 tokens
    [B, groups, H * D]; less the mean of all, where their `total` [B, H * D] is given."""
    batch, length, channels = like.shape
    means = like.new_empty(batch, channels // dim, triton.cdiv(length, block), dim)
    _pool_kernel[(means.shape[2], batch * means.shape[1])](
        sums, total, means, length, sums.shape[1], means.shape[1],
        SMOOTH=total is not None, ROWS=block, GROUP=GROUP, DIM=dim, num_warps=1,
    )  # fmt: skip
    return means


def linear_branch(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, int8: bool) -> LinearBranch:
    """State and total of the linear branch over all tokens, divided by L, with `proj_l` folded in.

    (phi(q) S / z) W^T = phi(q) (S W^T) / z: one D x D product per head replaces one per token. The division by L
    changes nothing (it cancels) and keeps long clips inside float16. Where the values are to be FP8, their largest ones
    are found in passing.
    """
    peaks = wants_fp8(v, int8)
    batch, length, heads, dim = k.shape
    splits = min(triton.cdiv(length, BLOCK_K), triton.cdiv(PROGRAMS, batch * heads))
    steps = triton.cdiv(triton.cdiv(length, BLOCK_K), splits)
    partial = k.new_empty((splits, batch, heads, dim + 1 + peaks, dim), dtype=torch.float32)
    _state_kernel[(splits, batch * heads)](
        k, v, partial, length, steps, heads, *k.stride()[:3], *v.stride()[:3],
        PEAKS=peaks, ROWS=BLOCK_K, DIM=dim, num_warps=8, num_stages=2,
    )  # fmt: skip
    state = v.new_empty((batch, heads, dim, dim))
    total, largest = (k.new_empty((batch, heads, dim), dtype=torch.float32) for _ in range(2))
    _fold_kernel[(dim // FOLD_ROWS, batch * heads)](
        partial, weight, state, total, largest, length, splits,
        PEAKS=peaks, ROWS=FOLD_ROWS, DIM=dim, num_warps=4,
    )  # fmt: skip
    return LinearBranch(q, state, total, bias, 1e-5 / length, largest if peaks else None)


@triton.jit(do_not_specialize=["length", "groups"])
def _pool_kernel(
    sums, total, means, length, groups, heads,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    block, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, d = block * (ROWS // GROUP) + tl.arange(0, ROWS // GROUP), tl.arange(0, DIM)
    at = (slot // heads * groups + group)[:, None] * heads * DIM + slot % heads * DIM + d[None, :]
    mean = tl.sum(tl.load(sums + at), 0) * (1.0 / tl.minimum(length - block * ROWS, ROWS).to(tl.float32))
    if SMOOTH:
        mean -= tl.load(total + slot * DIM + d) * (1.0 / length.to(tl.float32))
    tl.store(means + (slot * tl.num_programs(0) + block) * DIM + d, mean.to(means.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "steps"])
def _state_kernel(
    k, v, partial, length, steps, heads, k_batch, k_row, k_head, v_batch, v_row, v_head,
    PEAKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    split, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = slot // heads, slot % heads
    r, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    k_at = k + batch * k_batch + head * k_head + r[:, None] * k_row + d[None, :]
    v_at = v + batch * v_batch + head * v_head + r[:, None] * v_row + d[None, :]
    state = tl.zeros((DIM, DIM), tl.float32)
    total = tl.zeros((DIM,), tl.float32)
    peaks = tl.zeros((DIM,), tl.float32)
    for step in range(steps):
        first = (split * steps + step) * ROWS
        known = (r < length - first)[:, None]
        wide = first.to(tl.int64)
        keys = tl.load(k_at + wide * k_row, mask=known, other=0.0)
        values = tl.load(v_at + wide * v_row, mask=known, other=0.0)
        phi = tl.where(known, feature_map(keys.to(tl.float32)), 0.0).to(values.dtype)
        total += tl.sum(phi.to(tl.float32), 0)
        state = tl.dot(tl.trans(phi), values, state)
        if PEAKS:
            peaks = tl.maximum(peaks, tl.max(tl.abs(values.to(tl.float32)), 0))
    # D rows of the state, one of the total, one of the peaks
    to = partial + (split * tl.num_programs(1) + slot) * (DIM + 1 + PEAKS) * DIM
    tl.store(to + d[:, None] * DIM + d[None, :], state)
    tl.store(to + DIM * DIM + d, total)
    if PEAKS:
        tl.store(to + (DIM + 1) * DIM + d, peaks)


@triton.jit(do_not_specialize=["length", "splits"])
def _fold_kernel(
    partial, weight, state, total, largest, length, splits,
    PEAKS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Some rows of (sum of the partial states / L) @ weight.T; sums of the totals / L; largest of the peaks."""
    slot, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    row, inner, d = first + tl.arange(0, ROWS), tl.arange(0, ROWS), tl.arange(0, DIM)
    size: tl.constexpr = (DIM + 1 + PEAKS) * DIM
    at, apart = partial + slot * size, tl.num_programs(1).to(tl.int64) * size
    folded = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(0, DIM, ROWS):
        sums = tl.zeros((ROWS, ROWS), tl.float32)
        for split in range(splits):
            sums += tl.load(at + split * apart + row[:, None] * DIM + start + inner[None, :])
        sums = tl.div_rn(sums, tl.zeros((ROWS, ROWS), tl.float32) + length)
        w = tl.load(weight + d[None, :] * DIM + start + inner[:, None]).to(tl.float32)
        folded = tl.dot(sums, w, folded, input_precision="ieee")
    tl.store(state + slot * DIM * DIM + row[:, None] * DIM + d[None, :], folded.to(state.dtype.element_ty))
    mass, peak = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for split in range(splits):
        mass += tl.load(at + split * apart + DIM * DIM + row)
        if PEAKS:
            peak = tl.maximum(peak, tl.load(at + split * apart + (DIM + 1) * DIM + row))
    tl.store(total + slot * DIM + row, tl.div_rn(mass, tl.zeros((ROWS,), tl.float32) + length))
    if PEAKS:
        tl.store(largest + slot * DIM + row, peak)
