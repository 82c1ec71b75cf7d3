"""Norms of a Wan block, fused with what follows them: modulation and rotary position; and the gated residual.

All arithmetic is float32 whatever the dtype of the tokens, and the result has the tokens' dtype (TurboDiffusion's
fast norms). A function whose name ends in "_" overwrites its first argument and returns it, except where gradients
are recorded: then it returns a new tensor.
"""

import torch
from torch import Tensor

from turbodiff_kernels.backend import operator
from turbodiff_kernels.norm import reference


@operator(reference.norm_modulate, "norm")
def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`: tokens [B, L, C], shift and scale float32 [B, 1, C]."""
    return torch.empty_like(x)


@operator(reference.norm_modulate_quantize, "norm", differentiable=False)
def norm_modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`norm_modulate` as INT8 [B, L, C] with one float32 scale per token [B, L]."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:2], dtype=torch.float32)


@operator(reference.layer_norm, "norm")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Affine layer norm of tokens [B, L, C] with weight and bias [C]."""
    return torch.empty_like(x)


@operator(reference.rms_norm_, "norm", mutates=("x",))
def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of tokens [B, L, C] over all C channels."""
    return x


@operator(reference.rms_norm_rope_, "norm", mutates=("x",))
def rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMS norm over all channels, then rotation of interleaved pairs within each head.

    x [B, L, H*D]; weight [H*D]; cos, sin float32 [L, D/2].
    """
    return x


@operator(reference.residual_add_, "norm", mutates=("x",))
def residual_add_(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * y`: tokens [B, L, C], gate [B, 1, C]."""
    return x


@operator(reference.rms_norm_silu_, "norm", mutates=("out", "x"))
def rms_norm_silu_(out: Tensor, x: Tensor, gamma: Tensor, y: Tensor | None, bias: Tensor | None) -> Tensor:
    """Writes SiLU of the VAE's channel norm of `x + y + bias` to `out`; with y the sum to x as well.

    x, y and out [1, C, H, W], whose pixels lie one behind the other, channels last: those of x and out may be channels
    of a wider picture; gamma and bias [C].
    """
    return out
