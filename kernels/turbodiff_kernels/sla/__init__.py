"""Sparse-linear attention (arXiv 2509.24006): the few key blocks that matter exactly, all the rest by a linear branch.

`sagesla` is the same with the query-key product of the sparse branch in INT8.
"""

import torch
from torch import Tensor

from turbodiff_kernels import backend
from turbodiff_kernels.norm.reference import rms_norm_rope
from turbodiff_kernels.sla import reference
from turbodiff_kernels.sla.reference import BLOCK_K, BLOCK_Q, block_map, kept_blocks

__all__ = ["BLOCK_K", "BLOCK_Q", "block_map", "kept_blocks", "normed_sla_attention", "sla_attention"]


def sla_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, *, int8: bool = False
) -> Tensor:
    """Sparse-linear attention of q, k, v [B, L, H, D] -> [B, L, H, D].

    weight [D, D], bias [D]: projection of the linear branch (`proj_l`). topk: share of key blocks kept per block of
    queries, at least one block. int8: the sparse branch multiplies queries and keys in INT8 (SageSLA).
    """
    if torch.is_grad_enabled():
        return reference.sla_attention(q, k, v, weight, bias, topk, int8)
    return _sla_attention(q, k, v, weight, bias, topk, int8)


@backend.operator("sla_attention")
def _sla_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, int8: bool) -> Tensor:
    op = "sagesla" if int8 else "sla"
    return backend.choose(op, q.device).sla_attention(q, k, v, weight, bias, topk, int8).contiguous()


@backend.fake("sla_attention")
def _(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, int8: bool) -> Tensor:
    return q.new_empty(q.shape)


def normed_sla_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    weight: Tensor, bias: Tensor, topk: float, *, int8: bool = False,
) -> Tensor:  # fmt: skip
    """`sla_attention` of q and k after an RMS norm over all heads and the rotation of each head's pairs.

    q, k, v, out [B, L, H * D]; q_weight, k_weight [H * D]; cos, sin float32 [L, D / 2]. The block means that choose
    the blocks are made in the pass that norms and rotates. Without gradients q and k are overwritten.
    """
    if torch.is_grad_enabled():
        q, k = rms_norm_rope(q, q_weight, cos, sin, eps), rms_norm_rope(k, k_weight, cos, sin, eps)
        q, k, v = (t.unflatten(-1, (-1, 2 * cos.shape[-1])) for t in (q, k, v))
        return reference.sla_attention(q, k, v, weight, bias, topk, int8).flatten(2)
    return _normed_sla_attention(q, k, v, q_weight, k_weight, cos, sin, eps, weight, bias, topk, int8)


@backend.operator("normed_sla_attention", mutates=("q", "k"))
def _normed_sla_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    weight: Tensor, bias: Tensor, topk: float, int8: bool,
) -> Tensor:  # fmt: skip
    module = backend.choose("sagesla" if int8 else "sla", q.device)
    out = module.normed_sla_attention(q, k, v, q_weight, k_weight, cos, sin, eps, weight, bias, topk, int8)
    return out.contiguous()


@backend.fake("normed_sla_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    weight: Tensor, bias: Tensor, topk: float, int8: bool,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)
