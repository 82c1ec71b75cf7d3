"""The norms in plain PyTorch: float32 inside, the tokens' dtype outside, differentiable."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiff_kernels.quant.reference import PART_ELEMENTS, part_rows, quantize_tokens

CACHED_ELEMENTS = 1 << 19  # 2 MiB in float32, the L2 cache of a core
GROUP = 16  # tokens of one sum: few enough to fill a card, enough that the sums are a sixteenth of the tokens
LARGEST_BLOCK = 128  # tokens that attention pools together; sums cover whole blocks


def by_tokens(step: Callable[..., Tensor], x: Tensor, *rows: Tensor, into: Tensor | None = None) -> Tensor:
    """`step` of x [B, L, C] and tables [L, ...], a few tokens at a time; into a new tensor or into `into`, which may be
    x. On a CPU parts stay in its cache on their way through a step, which halves its time. Where gradients are
    recorded all at once: then nothing is overwritten."""
    size = part_rows(x.shape[-1], CACHED_ELEMENTS if x.device.type == "cpu" and into is not None else None)
    if torch.is_grad_enabled() or (into is None and x.shape[1] <= size):
        return step(x, *rows)
    into = torch.empty_like(x) if into is None else into
    tables = zip(*(table.split(size) for table in rows), strict=True) if rows else ((),) * -(-x.shape[1] // size)
    for part, out, more in zip(x.split(size, dim=1), into.split(size, dim=1), tables, strict=True):
        out.copy_(step(part, *more))
    return into


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without affine, then `* (1 + scale) + shift` (adaLN-zero, arXiv 2212.09748)."""

    def step(part: Tensor) -> Tensor:
        if len(part) == 1:  # one pass
            affine = (1 + scale).flatten(), shift.flatten()
            return F.layer_norm(part.float(), part.shape[-1:], *affine, eps).to(part.dtype)
        y = F.layer_norm(part.float(), part.shape[-1:], eps=eps)
        return (y * (1 + scale) + shift).to(part.dtype)

    return by_tokens(step, x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm with affine weight and bias."""

    def step(part: Tensor) -> Tensor:
        return F.layer_norm(part.float(), part.shape[-1:], weight.float(), bias.float(), eps).to(part.dtype)

    return by_tokens(step, x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` (arXiv 1910.07467)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMS norm over all channels, then rotary embedding (arXiv 2104.09864) of the pairs (0,1), (2,3), ... of a head."""
    pairs = torch.view_as_complex(rms_norm(x.float(), weight, eps).unflatten(-1, (-1, cos.shape[-1], 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(2).to(x.dtype)


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm`, without gradients into `x`."""
    return by_tokens(lambda part: rms_norm(part, weight, eps), x, into=x)


def rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`rms_norm_rope`, without gradients into `x`."""
    return by_tokens(lambda part, *turn: rms_norm_rope(part, weight, *turn, eps), x, cos, sin, into=x)


def groups(length: int) -> int:
    """Groups of tokens whose sums cover `length` tokens, in whole blocks of 128."""
    return -(-length // LARGEST_BLOCK) * (LARGEST_BLOCK // GROUP)


def rms_norm_rope_sum_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`rms_norm_rope` into `x`, and its sums of every 16 tokens: float32 [B, groups(L), C], zeros past the end."""
    x.copy_(rms_norm_rope(x, weight, cos, sin, eps))
    missing = groups(x.shape[1]) * GROUP - x.shape[1]
    return F.pad(x.float(), (0, 0, 0, missing)).unflatten(1, (-1, GROUP)).sum(2)


def rope_statistics(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_factor` of each token and the sums of `rms_norm_rope_sum_`; x stays as it is."""
    return rms_factor(x, eps), rms_norm_rope_sum_(x.clone(), weight, cos, sin, eps)


def rms_factor(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each token, float32 [B, L]."""
    return torch.rsqrt(x.float().square().mean(-1) + eps)


def block_means(sums: Tensor, block: int, length: int) -> Tensor:
    """Sums of 16 tokens [B, groups, C] -> means of blocks of `block` tokens, float32 [B, ceil(L / block), C]."""
    blocks = -(-length // block)
    counts = torch.full((blocks, 1), block, device=sums.device)
    counts[-1] = length - (blocks - 1) * block
    return sums.unflatten(1, (-1, block // GROUP)).sum(2)[:, :blocks].div_(counts)


def norm_modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`norm_modulate` in float32, then INT8 with one scale per token."""
    values, scales = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:2], dtype=torch.float32)
    size = part_rows(x.shape[-1])
    for part, into, steps in zip(*(t.split(size, dim=1) for t in (x, values, scales)), strict=True):
        rows, step = quantize_tokens(norm_modulate(part.float(), shift, scale, eps).flatten(0, 1))
        into.copy_(rows.view(part.shape))
        steps.copy_(step.view(part.shape[:2]))
    return values, scales


def residual_add_(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * y`, without gradients into `x`; the gate is rounded to the dtype of x first (TurboDiffusion)."""
    y, gate = y.to(x.dtype), gate.to(x.dtype)
    return x + y * gate if torch.is_grad_enabled() else x.addcmul_(y, gate)


def rms_norm_silu_(out: Tensor, x: Tensor, gamma: Tensor, y: Tensor | None, bias: Tensor | None) -> Tensor:
    """SiLU of `s / max(|s|, 1e-12) * sqrt(C) * gamma` over axis 1 (Wan2.1's VAE), s = x + y + bias rounded to the
    dtype of x."""
    scale, rows = (gamma.float() * x.shape[1] ** 0.5).view(-1, 1, 1), max(1, PART_ELEMENTS * x.shape[-2] // x.numel())
    for part, into, more in zip(*(t.split(rows, dim=-2) for t in (x, out, x if y is None else y)), strict=True):
        total = part.float() if y is None else part.float() + more.float()
        total = (total if bias is None else total + bias.float().view(-1, 1, 1)).to(x.dtype)
        if y is not None:
            part.copy_(total)
        into.copy_(F.silu(F.normalize(total.float(), dim=1, eps=1e-12) * scale))
    return out
