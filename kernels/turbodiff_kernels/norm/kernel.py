"""The norms in Triton: one reading and one writing of the tokens, float32 in registers only.

One program per token, or per group of tokens where they share weights or are summed. A row is read in parts of 256
channels a warp, masked where the last reaches further; rows are addressed in int64, because batch * tokens * channels
passes 2^31 at three clips of Wan 14B.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbodiff_kernels.backend import HOPPER, arch
from turbodiff_kernels.norm.reference import GROUP, groups
from turbodiff_kernels.quant.kernel import (
    larger,
    largest_of_pairs,
    peak,
    read_part,
    read_parts,
    round_to_int8,
    row_warps,
    widen,
    write_part,
)

LAYER_NORM_GROUP = 32  # tokens of one program, which reads their weights once; 1,024 programs of a clip of 480p


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`, as the operator declares."""
    out = x.new_empty(x.shape)
    _layer_norm(x, scale, shift, eps, out, None)
    return out


def norm_modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same as INT8 [B, L, C] with one float32 scale per token [B, L]."""
    out, out_scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:2], dtype=torch.float32)
    _layer_norm(x, scale, shift, eps, out, out_scale)
    return out, out_scale


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Affine layer norm, as the operator declares."""
    out = x.new_empty(x.shape)
    _layer_norm(x, weight, bias, eps, out, None)
    return out


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    """RMS norm over all channels, into `x`."""
    _rms_norm_rope_(x, weight, None, None, eps, out=x)


def rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    """RMS norm over all channels, then rotation of interleaved pairs within each head, into `x`."""
    _rms_norm_rope_(x, weight, cos, sin, eps, out=x)


def rms_norm_rope_sum_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The same, and in the same pass the sums of what was written, as in the reference."""
    sums = x.new_empty((x.shape[0], groups(x.shape[1]), x.shape[2]), dtype=torch.float32)
    _rms_norm_rope_(x, weight, cos, sin, eps, out=x, sums=sums)
    return sums


def rope_statistics(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Factors and sums without writing the tokens, as in the reference."""
    sums = x.new_empty((x.shape[0], groups(x.shape[1]), x.shape[2]), dtype=torch.float32)
    factor = x.new_empty(x.shape[:2], dtype=torch.float32)
    _rms_norm_rope_(x, weight, cos, sin, eps, sums=sums, factor=factor)
    return factor, sums


def rms_factor(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each token, float32 [B, L]."""
    factor = x.new_empty(x.shape[:2], dtype=torch.float32)
    _rms_norm_rope_(x, None, None, None, eps, factor=factor)
    return factor


def residual_add_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    """`x += y * gate`: tokens x, y [B, L, C], gate [B, 1, C]."""
    batch, length, channels = x.shape
    y, gate, block = _rows(y), gate.expand(batch, 1, channels), 1024
    strides = (x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0))
    grid = (batch * length, triton.cdiv(channels, block))
    _residual_add_kernel[grid](x, y, gate, length, channels, *strides, BLOCK=block, num_warps=4)


def rms_norm_silu_(out: Tensor, x: Tensor, gamma: Tensor, y: Tensor | None, bias: Tensor | None) -> Tensor:
    """`silu(s / max(|s|, 1e-12) * sqrt(C) * gamma)` over the channels, axis 1, s = x + y + bias; `x = s` with y."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    size = triton.next_power_of_2(triton.cdiv(channels, 3))  # of a part: nothing is wasted on 96, 192 or 384 channels
    per_program = max(1, 2048 // size)
    strides = [_pixel_stride(t) for t in (x, out)]
    assert y is None or _pixel_stride(y) == channels, "y must be dense"
    _rms_norm_silu_kernel[(triton.cdiv(count, per_program),)](
        x, y, bias, gamma, out, count, *strides, channels**0.5,
        ADD=y is not None, BIAS=bias is not None, CHANNELS=channels, ROWS=per_program, SIZE=size, num_warps=4,
    )  # fmt: skip
    return out


def _pixel_stride(x: Tensor) -> int:
    """Elements from one pixel of x [N, C, H, W] to the next."""
    stride = x.stride(-1)
    assert x.stride(1) == 1 and x.stride(2) == x.shape[3] * stride, "pixels must follow one another"
    assert len(x) == 1 or x.stride(0) == x.shape[2] * x.stride(2), "pictures must follow one another"
    return stride


def _rows(x: Tensor) -> Tensor:
    """`x` with contiguous channels; a view wherever possible."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, out_scale: Tensor | None) -> None:
    """Weight and bias [C], or [B, 1, C] for modulation, where the weight counts from one."""
    x, modulate = _rows(x), weight.dim() == 3
    batch, length, channels = x.shape
    if modulate:
        weight, bias = (t.expand(batch, 1, channels) for t in (weight, bias))
    warps = row_warps(channels)
    _layer_norm_kernel[(triton.cdiv(length, LAYER_NORM_GROUP), batch)](
        x, weight, bias, out, out_scale, length, x.stride(0), x.stride(1),
        weight.stride(0) if modulate else 0, bias.stride(0) if modulate else 0, eps,
        MODULATE=modulate, QUANTIZE=out_scale is not None, PAIRS=arch(x.device) == HOPPER, CHANNELS=channels,
        SIZE=256 * warps, GROUP=LAYER_NORM_GROUP, num_warps=warps,
    )  # fmt: skip


def _rms_norm_rope_(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, *,
    out: Tensor | None = None, sums: Tensor | None = None, factor: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes those of `out` (x itself), `sums` and `factor` that are given."""
    assert x.stride(-1) == 1, "channels must be contiguous to be overwritten"
    batch, length, channels = x.shape
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    warps = row_warps(channels)
    _rms_norm_rope_kernel[(length if sums is None else sums.shape[1], batch)](
        x, weight, cos, sin, factor, sums, length, x.stride(0), x.stride(1), eps,
        WRITE=out is not None, ROTATE=cos is not None, FACTOR=factor is not None, SUM=sums is not None,
        HALF=1 if cos is None else cos.shape[-1], GROUP=1 if sums is None else GROUP,
        CHANNELS=channels, SIZE=256 * warps, num_warps=warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def _layer_norm_kernel(
    x, weight, bias, out, out_scale, length, x_batch, x_row, weight_batch, bias_batch, eps,
    MODULATE: tl.constexpr, QUANTIZE: tl.constexpr, PAIRS: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * GROUP
    weights = read_parts(weight + batch * weight_batch, SIZE, CHANNELS)
    biases = read_parts(bias + batch * bias_batch, SIZE, CHANNELS)
    count: tl.constexpr = (CHANNELS + SIZE - 1) // SIZE
    token = batch * length + first
    line, to = x + batch * x_batch + first.to(tl.int64) * x_row, out + token * CHANNELS
    member, quanta = tl.arange(0, GROUP), tl.zeros((GROUP,), tl.float32)
    for step in range(0, tl.minimum(GROUP, length - first)):
        parts = read_parts(line, SIZE, CHANNELS)
        total, square = parts[0], parts[0] * parts[0]
        for i in tl.static_range(1, count):
            total += parts[i]
            square += parts[i] * parts[i]
        # One reduction for both. The difference costs digits where a row's mean is many times its deviation: a
        # thousandth at 100 times, less than bfloat16 rounds; where nothing is left of it, mean / 2048 stands in.
        mean, square = tl.split(tl.sum(tl.join(total, square), 0) / CHANNELS)
        by = tl.rsqrt(larger(square - mean * mean, mean * mean * 2.0**-22) + eps)
        shift = mean * by
        normed = ()
        for i in tl.static_range(count):
            normed += ((parts[i] * by - shift) * (weights[i] + 1.0 if MODULATE else weights[i]) + biases[i],)
        if QUANTIZE:
            largest = largest_of_pairs(normed[0], SIZE) if PAIRS else tl.abs(normed[0])
            for i in tl.static_range(1, count):
                if PAIRS:
                    largest = tl.maximum(largest, largest_of_pairs(normed[i], SIZE))
                else:
                    largest = larger(largest, tl.abs(normed[i]))
            quantum = larger(peak(largest), 1e-8) / 127.0
            quanta = tl.where(member == step, quantum, quanta)
            factor = tl.rsqrt(quantum * quantum)  # 1 / quantum in two instructions instead of eight
        for i in tl.static_range(count):
            y = normed[i]
            if QUANTIZE:
                y = round_to_int8(y * factor)
            write_part(to, y, i * SIZE, SIZE, CHANNELS)
        line += x_row
        to += CHANNELS
    if QUANTIZE:
        tl.store(out_scale + token + member, quanta, mask=member < length - first)


@triton.jit(do_not_specialize=["length"])
def _rms_norm_rope_kernel(
    x, weight, cos, sin, factor, sums, length, x_batch, x_row, eps,
    WRITE: tl.constexpr, ROTATE: tl.constexpr, FACTOR: tl.constexpr, SUM: tl.constexpr,
    HALF: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    batch, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * GROUP
    count: tl.constexpr = (CHANNELS + SIZE - 1) // SIZE
    line = x + batch * x_batch + first.to(tl.int64) * x_row
    pair = tl.arange(0, SIZE // 2)
    if WRITE or SUM:
        weights = read_parts(weight, SIZE, CHANNELS)
    evens, odds = (), ()
    for _ in tl.static_range(count if SUM else 0):
        evens += (tl.zeros((SIZE // 2,), tl.float32),)
        odds += (tl.zeros((SIZE // 2,), tl.float32),)
    for row in range(first, tl.minimum(first + GROUP, length) if SUM else first + 1):
        parts = read_parts(line, SIZE, CHANNELS)
        square = parts[0] * parts[0]
        for i in tl.static_range(1, count):
            square += parts[i] * parts[i]
        by = tl.rsqrt(tl.sum(square, 0) / CHANNELS + eps)
        if FACTOR:
            tl.store(factor + batch * length + row, by)
        written, even_sums, odd_sums = (), (), ()
        for i in tl.static_range(count if WRITE or SUM else 0):
            if ROTATE:
                at = row * HALF + (i * SIZE // 2 % HALF + pair) % HALF  # the same for all parts of whole heads
                cosine, sine = tl.load(cos + at) * by, tl.load(sin + at) * by
                even, odd = tl.split(tl.reshape(parts[i] * weights[i], (SIZE // 2, 2)))
                if WRITE:
                    even, odd = even * cosine - odd * sine, even * sine + odd * cosine
                    written += (tl.reshape(tl.join(even, odd), (SIZE,)),)
                    if SUM:
                        even_sums += (evens[i] + even,)
                        odd_sums += (odds[i] + odd,)
                else:
                    even_sums += (tl.fma(even, cosine, tl.fma(-odd, sine, evens[i])),)
                    odd_sums += (tl.fma(even, sine, tl.fma(odd, cosine, odds[i])),)
            else:
                written += (parts[i] * by * weights[i],)
        for i in tl.static_range(len(written)):
            write_part(line, written[i], i * SIZE, SIZE, CHANNELS)
        evens, odds = even_sums, odd_sums
        line += x_row
    if SUM:
        to = sums + (batch * tl.num_programs(0) + tl.program_id(0)) * CHANNELS
        for i in tl.static_range(count):
            write_part(to, tl.reshape(tl.join(evens[i], odds[i]), (SIZE,)), i * SIZE, SIZE, CHANNELS)


@triton.jit(do_not_specialize=["length"])
def _residual_add_kernel(
    x, y, gate, length, channels, x_batch, x_row, y_batch, y_row, gate_batch, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // length, row % length
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    line = x + batch * x_batch + token * x_row + c
    add = tl.load(y + batch * y_batch + token * y_row + c, mask=inside, other=0.0).to(tl.float32)
    # the gate is rounded to the tokens' dtype first, as TurboDiffusion does
    by = tl.load(gate + batch * gate_batch + c, mask=inside, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    old = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    tl.store(line, (old + add * by).to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _rms_norm_silu_kernel(
    x, y, bias, gamma, out, count, x_stride, out_stride, root,
    ADD: tl.constexpr, BIAS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known, row = (row < count)[:, None], row[:, None]
    parts = ()
    for first in tl.static_range(0, CHANNELS, SIZE):
        c = first + tl.arange(0, SIZE)[None, :]
        inside = known & (c < CHANNELS) if first + SIZE > CHANNELS else known
        s = widen(tl.load(x + row * x_stride + c, mask=inside, other=0.0))
        if ADD:
            s += widen(tl.load(y + row * CHANNELS + c, mask=inside, other=0.0))
        if BIAS:
            s += read_part(bias, first, SIZE, CHANNELS)[None, :]
        if ADD:
            tl.store(x + row * x_stride + c, s.to(x.dtype.element_ty), mask=inside)
        parts += (s,)
    square = parts[0] * parts[0]
    for i in tl.static_range(1, len(parts)):
        square += parts[i] * parts[i]
    by = (root * tl.rsqrt(larger(tl.sum(square, 1), 1e-24)))[:, None]
    for i in tl.static_range(len(parts)):
        c = i * SIZE + tl.arange(0, SIZE)[None, :]
        inside = known & (c < CHANNELS) if i * SIZE + SIZE > CHANNELS else known
        s = parts[i] * by * read_part(gamma, i * SIZE, SIZE, CHANNELS)[None, :]
        half = tl.rsqrt(1.0 + tl.exp2(s * -1.4426950408889634))  # root of the sigmoid: one instruction, a division ten
        tl.store(out + row * out_stride + c, (s * half * half).to(out.dtype.element_ty), mask=inside)
