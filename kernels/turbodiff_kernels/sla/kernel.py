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
from turbodiff_kernels.norm.reference import block_means
from turbodiff_kernels.sage.kernel import (
    LinearBranch,
    attend,
    channels_last,
    feature_map,
    quantize,
    quantize_pool,
    settle,
)
from turbodiff_kernels.sla.reference import BLOCK_K, BLOCK_Q, choose_blocks

PROGRAMS = 512  # enough to fill any card; a constant, so that sums are split alike on every card


def sla_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, int8: bool) -> Tensor:
    """Sum of both branches, as the operator declares."""
    q, k, v = (channels_last(t) for t in (q, k, v))
    k_rows, k_means = quantize_pool(k, k.mean(dim=1), BLOCK_K, int8=int8)
    q_rows, q_means = quantize_pool(q, None, BLOCK_Q, int8=int8)
    kept = choose_blocks(q_means, k_means, topk).int()
    return attend(q_rows, k_rows, v, kept, linear_branch(q, k, v, weight, bias))


def normed_sla_attention_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    weight: Tensor, bias: Tensor, topk: float, int8: bool = False,
) -> Tensor:  # fmt: skip
    """The same of projections before their norm and rotation, in the place of q, as the operator declares.

    Block means come from the pass that norms and rotates. The mean of a block of smoothed keys is the mean of the
    block less the mean of all, so keys need no pass of their own for it.
    """
    dim, length = 2 * cos.shape[-1], k.shape[1]
    q_means = block_means(rms_norm_rope_sum_(q, q_weight, cos, sin, eps), BLOCK_Q, length)
    sums = rms_norm_rope_sum_(k, k_weight, cos, sin, eps)
    mean = sums.sum(1) / length
    k_means = block_means(sums, BLOCK_K, length).sub_(mean[:, None])
    del sums
    kept = choose_blocks(*(t.to(q.dtype).unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q_means, k_means)), topk)
    heads, k, v = (channels_last(t).unflatten(-1, (-1, dim)) for t in (q, k, v))
    q_rows, k_rows = (quantize(heads, None, BLOCK_Q), quantize(k, mean.to(k.dtype), BLOCK_K)) if int8 else (heads, k)
    linear = linear_branch(heads, k, v, weight, bias)
    return settle(q, attend(q_rows, k_rows, v, kept.int(), linear, into=heads, spare=k))


def linear_branch(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> LinearBranch:
    """State and total of the linear branch over all tokens, divided by L, with `proj_l` folded in.

    (phi(q) S / z) W^T = phi(q) (S W^T) / z: one D x D product per head replaces one per token. The division by L
    changes nothing (it cancels) and keeps long clips inside float16.
    """
    batch, length, heads, dim = k.shape
    splits = min(triton.cdiv(length, BLOCK_K), triton.cdiv(PROGRAMS, batch * heads))
    steps = triton.cdiv(triton.cdiv(length, BLOCK_K), splits)
    states = k.new_empty((splits, batch, heads, dim, dim), dtype=torch.float32)
    totals = k.new_empty((splits, batch, heads, dim), dtype=torch.float32)
    _state_kernel[(splits, batch * heads)](
        k, v, states, totals, length, steps, heads, *k.stride()[:3], *v.stride()[:3],
        ROWS=BLOCK_K, DIM=dim, num_warps=8, num_stages=2,
    )  # fmt: skip
    state = states.sum(0).div_(length) @ weight.float().T
    return LinearBranch(q, state.to(v.dtype), totals.sum(0).div_(length), bias, 1e-5 / length)


@triton.jit(do_not_specialize=["length", "steps"])
def _state_kernel(
    k, v, states, totals, length, steps, heads, k_batch, k_row, k_head, v_batch, v_row, v_head,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    split, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = slot // heads, slot % heads
    r, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    k_at = k + batch * k_batch + head * k_head + r[:, None] * k_row + d[None, :]
    v_at = v + batch * v_batch + head * v_head + r[:, None] * v_row + d[None, :]
    state = tl.zeros((DIM, DIM), tl.float32)
    total = tl.zeros((DIM,), tl.float32)
    for step in range(steps):
        first = (split * steps + step) * ROWS
        known = (r < length - first)[:, None]
        wide = first.to(tl.int64)
        keys = tl.load(k_at + wide * k_row, mask=known, other=0.0)
        values = tl.load(v_at + wide * v_row, mask=known, other=0.0)
        phi = tl.where(known, feature_map(keys.to(tl.float32)), 0.0).to(values.dtype)
        total += tl.sum(phi.to(tl.float32), 0)
        state = tl.dot(tl.trans(phi), values, state)
    to = split * tl.num_programs(1) + slot
    tl.store(states + to * DIM * DIM + d[:, None] * DIM + d[None, :], state)
    tl.store(totals + to * DIM + d, total)
