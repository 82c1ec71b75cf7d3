"""Attention with INT8 scores in Triton, and what all kinds of attention share: quantised rows and values, the launch
of the loop (loop.py, on Hopper hopper.py where it proved itself). The maths is in kernels/README.md."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbodiff_kernels.backend import arch, hopper_loop, triton_version
from turbodiff_kernels.norm.kernel import rms_factor, rope_statistics
from turbodiff_kernels.sage.hopper import attend_hopper, linear_pass
from turbodiff_kernels.sage.loop import attend_kernel, in_fours, value_scale
from turbodiff_kernels.sage.reference import BLOCK_K, BLOCK_Q
from turbodiff_kernels.sage.rows import NormRope, Quantized, quantize

SUMS_FP8_IN_FP16 = triton_version() >= (3, 6)  # 3.4 cannot compile that product


class LinearBranch(NamedTuple):
    """What the linear branch of SLA adds to a row q: `phi(q) @ state / (eps + phi(q) . total) + bias`, phi = softmax.

    q [B, L, H, D] unquantised; state [B, H, D, D] with the projection folded in; total float32 [B, H, D]; bias [D];
    peaks float32 [B, H, D], `largest_values` of v where they are wanted.
    """

    q: Tensor
    state: Tensor
    total: Tensor
    bias: Tensor
    eps: float
    peaks: Tensor | None


class Settings(NamedTuple):
    """Warps and pipeline stages of the attention loop; whether the value product runs in FP8 (`fp8`), an iteration
    takes two blocks of keys (`pair`), INT32 scores become float32 by their bits (`bits`, see OFFSET), FP8 products of
    one block are summed in float16 (`half`), which GeForce cards do at twice the rate; whether FP8 weights and values
    lie `in_fours`, where both products leave a thread the same rows (all but data-centre Blackwell).
    """

    warps: int
    stages: int
    fp8: bool
    pair: bool
    bits: bool
    half: bool
    fours: bool


def settings(capability: int, int8: bool, linear: bool) -> Settings:
    """Shipped configuration per architecture: chosen from ahead-of-time compiles (no spills, shared memory fits).

    FP8 values go with INT8 scores, on every card that multiplies FP8 (as SageAttention2 does).
    """
    crowded = capability >= 120 and int8 and linear  # a third stage or four constants more spill registers
    pair = capability == 90  # elsewhere two blocks spill or gain nothing
    bits, half = int8 and not pair and not crowded, int8 and capability in (89, 120, 121) and SUMS_FP8_IN_FP16
    fp8 = int8 and capability >= 89
    return Settings(8, 2 if crowded else 3, fp8, pair, bits, half, fp8 and capability // 10 != 10)


def wants_fp8(v: Tensor, int8: bool) -> bool:
    """Whether the values go with INT8 (or 16-bit) scores into an FP8 product on their card."""
    return settings(arch(v.device), int8, linear=False).fp8


def sage_attention(q: Tensor, k: Tensor, v: Tensor, *, hopper: bool | None = None) -> Tensor:
    """Dense attention with INT8 scores, as the operator declares; `hopper` is that of `attend`."""
    q, k, v = (channels_last(t) for t in (q, k, v))
    return attend(quantize(q, None, BLOCK_Q), quantize(k, k.mean(dim=1), BLOCK_K), v, hopper=hopper)


def normed_sage_attention_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    *, hopper: bool | None = None,
) -> Tensor:  # fmt: skip
    """The same of projections before their norm and rotation, in the place of q: q and k are read twice before that."""
    cos, sin = cos.contiguous(), sin.contiguous()
    dim = 2 * cos.shape[-1]
    k_factor, sums = rope_statistics(k, k_weight, cos, sin, eps)
    total = sums.sum(1)
    del sums
    norms = NormRope(rms_factor(q, eps), q_weight, cos, sin), NormRope(k_factor, k_weight, cos, sin)
    heads, k, v = (channels_last(t).unflatten(-1, (-1, dim)) for t in (q, k, v))
    rows = quantize(heads, None, BLOCK_Q, norms[0]), quantize(k, total, BLOCK_K, norms[1], count=k.shape[1])
    return settle(q, attend(*rows, v, into=heads, spare=k, hopper=hopper))


def attend(
    q: Tensor | Quantized, k: Tensor | Quantized, v: Tensor, kept: Tensor | None = None,
    linear: LinearBranch | None = None, into: Tensor | None = None, spare: Tensor | None = None,
    hopper: bool | None = None,
) -> Tensor:  # fmt: skip
    """Attention of [B, L, H, D] to all key blocks, or to those in `kept` int64 [B, H, ceil(L / 128), n].

    Rows that are not quantised give exact attention. Channels must be contiguous. Where they are contiguous the result
    lies in `into` and FP8 values in `spare`. `into` may be the queries: a program reads those of its own 128 rows and
    one head, and what it writes there depends on all of them.

    `hopper`: whether INT8 rows go through Hopper's own loop; None: where the card is one and it proved itself there.
    """
    int8 = isinstance(q, Quantized)
    q_rows, k_rows = (q.rows, k.rows) if int8 else (q, k)
    q_scale, k_scale = (q.scale, k.scale) if int8 else (None, None)
    batch, length, heads, dim = q_rows.shape
    assert dim in (64, 128), f"head_dim {dim}: the kernels know 64 and 128"
    out = into if into is not None and into.is_contiguous() else v.new_empty(q_rows.shape)
    warps, stages, fp8, pair, bits, half, fours = settings(arch(v.device), int8, linear is not None)
    v_peaks = None
    if fp8:
        v_peaks = linear.peaks if linear and linear.peaks is not None else largest_values(v)
        v = quantize_values(v, v_peaks, spare, half=half, fours=fours)
    blocks = triton.cdiv(length, BLOCK_K) if kept is None else kept.shape[-1]
    factor = math.log2(math.e) / dim**0.5
    if hopper is None:
        hopper = int8 and dim == 128 and hopper_loop("sage" if kept is None else "sagesla", v.device)
    if hopper and int8:
        if linear:
            linear_pass(linear.q, linear.state, linear.total, linear.bias, linear.eps, out)
        rows = q_rows, k_rows, v, out, q_scale, k_scale, v_peaks
        attend_hopper(*rows, kept, blocks, factor, add=linear is not None)
        return out
    v_strides = [v.stride(axis) for axis in ((0, 3, 1, 2) if fp8 else (0, 1, 2, 3))]
    lin = linear or LinearBranch(q_rows, None, None, None, 0.0, None)
    attend_kernel[(triton.cdiv(length, BLOCK_Q), batch * heads)](
        q_rows, k_rows, v, out, q_scale, k_scale, v_peaks, kept, lin.q, lin.state, lin.total, lin.bias,
        length, blocks, heads, factor, lin.eps,
        *q_rows.stride()[:3], *k_rows.stride()[:3], *v_strides, *lin.q.stride()[:3],
        INT8=int8, FP8=fp8, SPARSE=kept is not None, LINEAR=linear is not None, PAIR=pair, BITS=bits, HALF=half,
        FOURS=fours, ROWS=BLOCK_Q, COLUMNS=BLOCK_K, DIM=dim, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def settle(q: Tensor, out: Tensor) -> Tensor:
    """q [B, L, H * D], which holds a result [B, L, H, D]: copied only where it was not made there."""
    return q if out.data_ptr() == q.data_ptr() else q.copy_(out.flatten(2))


def largest_values(v: Tensor) -> Tensor:
    """max|v| over the tokens of v [B, L, H, D]: [B, H, D] in its dtype."""
    return torch.linalg.vector_norm(v, float("inf"), dim=1)  # makes no copy of |v|


def quantize_values(
    v: Tensor, peaks: Tensor, spare: Tensor | None = None, *, half: bool, fours: bool = False
) -> Tensor:  # fmt: skip
    """v [B, L, H, D] -> float8_e4m3 [B, H, D, L padded with zeros to whole key blocks], times `value_scale`.

    Channels first, because the FP8 matrix units read both operands along the summed axis. `peaks`: `largest_values`.
    `half`: products are summed in float16; `fours`: the tokens lie `in_fours`. `spare`: what may be overwritten; where
    it is not contiguous or too small, memory of its own is taken.
    """
    batch, length, heads, dim = v.shape
    shape = (batch, heads, dim, triton.cdiv(length, BLOCK_K) * BLOCK_K)
    if spare is not None and spare.is_contiguous() and spare.nbytes >= math.prod(shape):
        out = spare.flatten().view(torch.float8_e4m3fn)[: math.prod(shape)].view(shape)
    else:
        out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=v.device)
    _quantize_values_kernel[(triton.cdiv(out.shape[-1], BLOCK_K), batch * heads)](
        v, peaks, out, length, out.shape[-1], heads, *v.stride()[:3],
        HALF=half, FOURS=fours, ROWS=BLOCK_K, DIM=dim, num_warps=4,
    )  # fmt: skip
    return out


def channels_last(x: Tensor) -> Tensor:
    """[B, L, H, D] with contiguous channels; a view wherever possible."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["length"])
def _quantize_values_kernel(
    v, peaks, out, length, padded, heads, v_batch, v_row, v_head,
    HALF: tl.constexpr, FOURS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    at = head // heads * v_batch + head % heads * v_head + row.to(tl.int64)[:, None] * v_row + d[None, :]
    y = tl.load(v + at, mask=(row < length)[:, None], other=0.0).to(tl.float32)
    y = (y / value_scale(tl.load(peaks + head * DIM + d), HALF)[None, :]).to(out.dtype.element_ty)
    to = (head * DIM + d)[:, None] * padded + row[None, :]
    y = tl.trans(y)
    if FOURS:
        y = in_fours(y, DIM, ROWS)
    tl.store(out + to, y, mask=(row < padded)[None, :])
