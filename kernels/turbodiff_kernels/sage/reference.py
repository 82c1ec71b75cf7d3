"""SageAttention in plain PyTorch: quantise, dequantise, attend.

The product of two INT8 blocks is exact, so attending with the dequantised rows is the same function as multiplying
in INT8 and scaling the scores.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiff_kernels.norm.reference import rms_norm_rope_

BLOCK_Q, BLOCK_K = 128, 64  # rows that share one scale (SpargeAttn's per-block granularity)
HEADS = 4  # that attend at a time: float32 copies of all of them would be 12 times the queries


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of INT8 queries with INT8 smoothed keys; q, k, v, out [B, L, H, D]."""
    q8, k8 = (t.transpose(1, 2) for t in round_qk(q, k, BLOCK_Q, BLOCK_K))
    out = F.scaled_dot_product_attention(q8, k8, v.float().transpose(1, 2))
    return out.transpose(1, 2).to(q.dtype)


def normed_sage_attention_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """The same after norm and rotation of q and k, as the operator declares; q, k, v, out [B, L, H * D]."""
    q, k = rms_norm_rope_(q, q_weight, cos, sin, eps), rms_norm_rope_(k, k_weight, cos, sin, eps)
    heads = by_heads_(sage_attention, *(t.unflatten(-1, (-1, 2 * cos.shape[-1])) for t in (q, k, v)))
    return heads.flatten(2) if torch.is_grad_enabled() else q


def by_heads_(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` of q, k, v [B, L, H, D] in the place of q, a few heads at a time: each attends alone. With gradients all
    at once, and q stays."""
    if torch.is_grad_enabled():
        return attend(q, k, v)
    for some in zip(*(t.split(HEADS, dim=2) for t in (q, k, v)), strict=True):
        some[0].copy_(attend(*some))
    return q


def round_qk(q: Tensor, k: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Queries and mean-free keys [B, L, H, D] after the way through INT8, float32.

    Subtracting the mean over L from k shifts all scores of a query alike: softmax does not see it, the scale does.
    """
    k = k - k.mean(dim=1, keepdim=True)
    return _dequantize(*quantize_rows(q, block_q), block_q), _dequantize(*quantize_rows(k, block_k), block_k)


def quantize_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x [B, L, H, D] -> int8 of that shape and scale float32 [B, ceil(L / block), H]: one scale per block and head.

    scale = max|block| / 127 + 1e-7, rounding half away from zero (SpargeAttn).
    """
    b, length, h, d = x.shape
    blocks = -(-length // block)
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, blocks * block - length)).view(b, blocks, block, h, d)
    scale = padded.abs().amax(dim=(2, 4)) / 127 + 1e-7
    scaled = padded / scale[:, :, None, :, None]
    rounded = torch.trunc(scaled + 0.5 * scaled.sign()).to(torch.int8)
    return rounded.flatten(1, 2)[:, :length], scale


def _dequantize(x: Tensor, scale: Tensor, block: int) -> Tensor:
    return x.float() * scale.repeat_interleave(block, dim=1)[:, : x.shape[1], :, None]
