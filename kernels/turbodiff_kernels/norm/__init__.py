"""Norms of a Wan block, fused with what follows them: modulation and rotary position.

All arithmetic is float32 whatever the dtype of the tokens, and the result has the tokens' dtype (TurboDiffusion's
fast norms). Each operation is one `torch.library` op, so a dry run on fake tensors sees one input and one output and
not the float32 temporaries of the reference. Where a gradient is wanted the differentiable reference runs instead.
"""

import torch
from torch import Tensor

from turbodiff_kernels import backend
from turbodiff_kernels.norm import reference


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`: tokens [B, L, C], shift and scale float32 [B, 1, C]."""
    if torch.is_grad_enabled():
        return reference.norm_modulate(x, shift, scale, eps)
    return _norm_modulate(x, shift, scale, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Affine layer norm of tokens [B, L, C] with weight and bias [C]."""
    if torch.is_grad_enabled():
        return reference.layer_norm(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of tokens [B, L, C] over all C channels. Without gradients `x` is overwritten and returned."""
    if torch.is_grad_enabled():
        return reference.rms_norm(x, weight, eps)
    _rms_norm_(x, weight, eps)
    return x


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMS norm over all channels, then rotation of interleaved pairs within each head.

    x [B, L, H*D]; weight [H*D]; cos, sin float32 [L, D/2]. Without gradients `x` is overwritten and returned.
    """
    if torch.is_grad_enabled():
        return reference.rms_norm_rope(x, weight, cos, sin, eps)
    _rms_norm_rope_(x, weight, cos, sin, eps)
    return x


def norm_modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`norm_modulate` as INT8 [B, L, C] with one float32 scale per token [B, L]; no gradients."""
    return _norm_modulate_quantize(x, shift, scale, eps)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + y * gate`: tokens [B, L, C], gate [B, 1, C]. Without gradients `x` is overwritten and returned."""
    if torch.is_grad_enabled():
        return x + y.to(x.dtype) * gate.to(x.dtype)
    _add_gated_(x, y, gate)
    return x


def rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of the VAE's channel norm: x [N, C, ...] in channels-last memory order (others are copied), gamma [C]."""
    if torch.is_grad_enabled():
        return reference.rms_norm_silu(x, gamma)
    return _rms_norm_silu(x, gamma)


@backend.operator("norm_modulate")
def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return backend.choose("norm", x.device).norm_modulate(x, shift, scale, eps)


@backend.fake("norm_modulate")
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@backend.operator("layer_norm")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return backend.choose("norm", x.device).layer_norm(x, weight, bias, eps)


@backend.fake("layer_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@backend.operator("rms_norm_", mutates=("x",))
def _rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    backend.choose("norm", x.device).rms_norm_(x, weight, eps)


@backend.fake("rms_norm_")
def _(x: Tensor, weight: Tensor, eps: float) -> None:
    return None


@backend.operator("rms_norm_rope_", mutates=("x",))
def _rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    backend.choose("norm", x.device).rms_norm_rope_(x, weight, cos, sin, eps)


@backend.fake("rms_norm_rope_")
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    return None


@backend.operator("norm_modulate_quantize")
def _norm_modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return backend.choose("norm", x.device).norm_modulate_quantize(x, shift, scale, eps)


@backend.fake("norm_modulate_quantize")
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:2], dtype=torch.float32)


@backend.operator("add_gated_", mutates=("x",))
def _add_gated_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    backend.choose("norm", x.device).add_gated_(x, y, gate)


@backend.fake("add_gated_")
def _(x: Tensor, y: Tensor, gate: Tensor) -> None:
    return None


@backend.operator("rms_norm_silu")
def _rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    return backend.choose("norm", x.device).rms_norm_silu(x, gamma)


@backend.fake("rms_norm_silu")
def _(x: Tensor, gamma: Tensor) -> Tensor:
    return torch.empty_like(x)
