"""The norms in Triton: one reading and one writing of the tokens, float32 in registers only.

One program per token, or per group of tokens where sums over tokens are wanted too. C channels are covered by two
powers of two, masked where they reach further; rows are addressed in int64, because batch * tokens * channels passes
2^31 at three clips of Wan 14B.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbodiff_kernels.norm.reference import GROUP, groups
from turbodiff_kernels.quant.kernel import block_warps, round_to_int8


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
    block = triton.next_power_of_2(channels)
    per_program = max(1, 4096 // block)
    strides = [_pixel_stride(t) for t in (x, out)]
    assert y is None or _pixel_stride(y) == channels, "y must be dense"
    _rms_norm_silu_kernel[(triton.cdiv(count, per_program),)](
        x, y, bias, gamma, out, count, *strides, channels**0.5,
        ADD=y is not None, BIAS=bias is not None, CHANNELS=channels, ROWS=per_program, BLOCK=block, num_warps=4,
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
    main, rest = pieces(channels)
    _layer_norm_kernel[(batch * length,)](
        x, weight, bias, out, out_scale, length, x.stride(0), x.stride(1),
        weight.stride(0) if modulate else 0, bias.stride(0) if modulate else 0, eps,
        MODULATE=modulate, QUANTIZE=out_scale is not None, CHANNELS=channels, MAIN=main, REST=rest,
        num_warps=block_warps(main),
    )  # fmt: skip


def _rms_norm_rope_(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, *,
    out: Tensor | None = None, sums: Tensor | None = None, factor: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes those of `out` (x itself), `sums` and `factor` that are given."""
    assert x.stride(-1) == 1, "channels must be contiguous to be overwritten"
    batch, length, channels = x.shape
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    main, rest = pieces(channels)
    _rms_norm_rope_kernel[(length if sums is None else sums.shape[1], batch)](
        x, weight, cos, sin, factor, sums, length, x.stride(0), x.stride(1), eps,
        WRITE=out is not None, ROTATE=cos is not None, FACTOR=factor is not None, SUM=sums is not None,
        HALF=1 if cos is None else cos.shape[-1], GROUP=1 if sums is None else GROUP,
        CHANNELS=channels, MAIN=main, REST=rest, num_warps=block_warps(main),
    )  # fmt: skip


def pieces(channels: int) -> tuple[int, int]:
    """Two powers of two that cover the channels, 4096 + 1024 for 5120; (one, 0) where two save nothing."""
    main = 1 << (channels.bit_length() - 1)
    rest = triton.next_power_of_2(channels - main) if channels > main else 0
    return (2 * main, 0) if rest == main else (main, rest)


@triton.jit
def rotate_pairs(y, cosine, sine, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Rows [ROWS, SIZE] with the pairs (0,1), (2,3), ... turned by angles [ROWS, SIZE / 2] (arXiv 2104.09864)."""
    even, odd = tl.split(tl.reshape(y, (ROWS, SIZE // 2, 2)))
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (ROWS, SIZE))


@triton.jit
def _read(at, FIRST: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels FIRST to FIRST + SIZE of a row in float32, zeros behind the last channel; masked only where needed."""
    c = FIRST + tl.arange(0, SIZE)
    if FIRST + SIZE > CHANNELS:
        return tl.load(at + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    return tl.load(at + c).to(tl.float32)


@triton.jit
def _write(at, y, FIRST: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    c = FIRST + tl.arange(0, SIZE)
    if FIRST + SIZE > CHANNELS:
        tl.store(at + c, y.to(at.dtype.element_ty), mask=c < CHANNELS)
    else:
        tl.store(at + c, y.to(at.dtype.element_ty))


@triton.jit
def _centre(y, mean, FIRST: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """y - mean, zeros behind the last channel."""
    if FIRST + SIZE > CHANNELS:
        return tl.where(FIRST + tl.arange(0, SIZE) < CHANNELS, y - mean, 0.0)
    return y - mean


@triton.jit
def _affine(
    y, by, weight, bias, MODULATE: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr
):
    w, b = _read(weight, FIRST, SIZE, CHANNELS), _read(bias, FIRST, SIZE, CHANNELS)
    return y * by * (w + 1.0 if MODULATE else w) + b


@triton.jit(do_not_specialize=["length"])
def _layer_norm_kernel(
    x, weight, bias, out, out_scale, length, x_batch, x_row, weight_batch, bias_batch, eps,
    MODULATE: tl.constexpr, QUANTIZE: tl.constexpr, CHANNELS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // length, row % length
    line, to = x + batch * x_batch + token * x_row, out + row * CHANNELS
    weight += batch * weight_batch
    bias += batch * bias_batch
    y = _read(line, 0, MAIN, CHANNELS)
    total = tl.sum(y, 0)
    if REST:
        z = _read(line, MAIN, REST, CHANNELS)
        total += tl.sum(z, 0)
    y = _centre(y, total / CHANNELS, 0, MAIN, CHANNELS)
    square = tl.sum(y * y, 0)
    if REST:
        z = _centre(z, total / CHANNELS, MAIN, REST, CHANNELS)
        square += tl.sum(z * z, 0)
    by = tl.rsqrt(square / CHANNELS + eps)
    y = _affine(y, by, weight, bias, MODULATE, 0, MAIN, CHANNELS)
    if REST:
        z = _affine(z, by, weight, bias, MODULATE, MAIN, REST, CHANNELS)
    if QUANTIZE:
        largest = tl.max(tl.abs(y), 0)
        if REST:
            largest = tl.maximum(largest, tl.max(tl.abs(z), 0))
        largest = tl.maximum(largest, 1e-8)
        tl.store(out_scale + row, largest / 127.0)
        y = round_to_int8(y * (127.0 / largest))
    _write(to, y, 0, MAIN, CHANNELS)
    if REST:
        if QUANTIZE:
            z = round_to_int8(z * (127.0 / largest))
        _write(to, z, MAIN, REST, CHANNELS)


@triton.jit
def _rotated(
    y, by, x, weight, cos, sin, row, ROTATE: tl.constexpr, HALF: tl.constexpr,
    FIRST: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Channels of one row after norm, weight and rotation, in the dtype of the tokens x."""
    y = y * by * _read(weight, FIRST, SIZE, CHANNELS)
    if ROTATE:
        at = row * HALF + (FIRST // 2 + tl.arange(0, SIZE // 2)) % HALF
        cosine, sine = tl.load(cos + at), tl.load(sin + at)
        even, odd = tl.split(tl.reshape(y, (SIZE // 2, 2)))
        y = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (SIZE,))
    return y.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["length"])
def _rms_norm_rope_kernel(
    x, weight, cos, sin, factor, sums, length, x_batch, x_row, eps,
    WRITE: tl.constexpr, ROTATE: tl.constexpr, FACTOR: tl.constexpr, SUM: tl.constexpr,
    HALF: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    total, rest_total = tl.zeros((MAIN,), tl.float32), tl.zeros((REST or 1,), tl.float32)
    first = tl.program_id(0) * GROUP
    for step in range(0, tl.minimum(GROUP, length - first) if SUM else 1):
        row = first + step
        line = x + batch * x_batch + row.to(tl.int64) * x_row
        y = _read(line, 0, MAIN, CHANNELS)
        square = tl.sum(y * y, 0)
        if REST:
            z = _read(line, MAIN, REST, CHANNELS)
            square += tl.sum(z * z, 0)
        by = tl.rsqrt(square / CHANNELS + eps)
        if FACTOR:
            tl.store(factor + batch * length + row, by)
        if WRITE or SUM:
            y = _rotated(y, by, x, weight, cos, sin, row, ROTATE, HALF, 0, MAIN, CHANNELS)
            if REST:
                z = _rotated(z, by, x, weight, cos, sin, row, ROTATE, HALF, MAIN, REST, CHANNELS)
            if WRITE:
                _write(line, y, 0, MAIN, CHANNELS)
                if REST:
                    _write(line, z, MAIN, REST, CHANNELS)
            if SUM:
                total += y.to(tl.float32)
                if REST:
                    rest_total += z.to(tl.float32)
    if SUM:
        to = sums + (batch * tl.num_programs(0) + tl.program_id(0)) * CHANNELS
        _write(to, total, 0, MAIN, CHANNELS)
        if REST:
            _write(to, rest_total, MAIN, REST, CHANNELS)


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
    ADD: tl.constexpr, BIAS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (c < CHANNELS)[None, :]
    at = row[:, None] * x_stride + c[None, :]
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        s += tl.load(y + row[:, None] * CHANNELS + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        s += tl.load(bias + c, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if ADD or BIAS:
        s = s.to(x.dtype.element_ty)
        if ADD:
            tl.store(x + at, s, mask=inside)
        s = s.to(tl.float32)
    g = tl.load(gamma + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(s * s, 1))
    s = s * (root / tl.maximum(length, 1e-12))[:, None] * g[None, :]
    half = tl.rsqrt(1.0 + tl.exp(-s))  # root of the sigmoid: one instruction where a division takes ten
    s = s * half * half
    tl.store(out + row[:, None] * out_stride + c[None, :], s.to(out.dtype.element_ty), mask=inside)
