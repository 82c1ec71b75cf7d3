"""SageAttention: dense attention whose query-key product is INT8 (arXiv 2410.02367, 2411.10958)."""

import torch
from torch import Tensor

from turbodiff_kernels import backend
from turbodiff_kernels.norm.reference import rms_norm_rope
from turbodiff_kernels.sage import reference


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v, out [B, L, H, D]; scale 1/sqrt(D)."""
    if torch.is_grad_enabled():
        return reference.sage_attention(q, k, v)
    return _sage_attention(q, k, v)


@backend.operator("sage_attention")
def _sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return backend.choose("sage", q.device).sage_attention(q, k, v).contiguous()


@backend.fake("sage_attention")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def normed_sage_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """`sage_attention` of q and k after an RMS norm over all heads and the rotation of each head's pairs.

    q, k, v, out [B, L, H * D]; q_weight, k_weight [H * D]; cos, sin float32 [L, D / 2]. Without gradients q and k may
    be overwritten.
    """
    if torch.is_grad_enabled():
        q, k = rms_norm_rope(q, q_weight, cos, sin, eps), rms_norm_rope(k, k_weight, cos, sin, eps)
        return reference.sage_attention(*(t.unflatten(-1, (-1, 2 * cos.shape[-1])) for t in (q, k, v))).flatten(2)
    return _normed_sage_attention(q, k, v, q_weight, k_weight, cos, sin, eps)


@backend.operator("normed_sage_attention", mutates=("q", "k"))
def _normed_sage_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    module = backend.choose("sage", q.device)
    return module.normed_sage_attention(q, k, v, q_weight, k_weight, cos, sin, eps).contiguous()


@backend.fake("normed_sage_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    return q.new_empty(q.shape)
