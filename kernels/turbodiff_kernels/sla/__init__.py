"""Sparse-linear attention (arXiv 2509.24006): the few key blocks that matter exactly, all the rest by a linear branch.

`sagesla` is the same with the query-key product of the sparse branch in INT8.
"""

import torch
from torch import Tensor

from turbodiff_kernels import backend
from turbodiff_kernels.sla import reference
from turbodiff_kernels.sla.reference import BLOCK_K, BLOCK_Q, block_map, kept_blocks

__all__ = ["BLOCK_K", "BLOCK_Q", "block_map", "kept_blocks", "sla_attention"]


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
