"""Sparse-linear attention (arXiv 2509.24006): the few key blocks that matter exactly, all the rest by a linear branch.

`sagesla` is the same with the query-key product of the sparse branch in INT8.
"""

import torch
from torch import Tensor

from turbodiff_kernels.backend import operator
from turbodiff_kernels.sla import reference


@operator(reference.normed_sla_attention_, lambda *args, int8=False: "sagesla" if int8 else "sla", mutates=("q", "k"))
def normed_sla_attention_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    weight: Tensor, bias: Tensor, topk: float, *, int8: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of q and k after an RMS norm over all heads and the rotation of each head's pairs.

    q, k, v, out [B, L, H * D]; q_weight, k_weight [H * D]; cos, sin float32 [L, D / 2]. weight [D, D], bias [D]:
    projection of the linear branch (`proj_l`). topk: share of key blocks kept per block of queries, at least one block.
    int8: the sparse branch multiplies queries and keys in INT8 (SageSLA). The block means that choose the blocks are
    made in the pass that norms and rotates. Without gradients the result takes the place of q, and k is overwritten.
    """
    return q


@operator(reference.sla_attention, lambda *args, int8=False: "sagesla" if int8 else "sla")
def sla_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, topk: float, *, int8: bool = False
) -> Tensor:
    """The same of q and k that are normed and rotated already: q, k, v, out [B, L, H, D]."""
    return torch.empty_like(q)
