"""SageAttention: dense attention whose query-key product is INT8 (arXiv 2410.02367, 2411.10958)."""

import torch
from torch import Tensor

from turbodiff_kernels.backend import operator
from turbodiff_kernels.sage import reference


@operator(reference.normed_sage_attention_, "sage", mutates=("q", "k"))
def normed_sage_attention_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """Attention of q and k after an RMS norm over all heads and the rotation of each head's pairs, scale 1/sqrt(D).

    q, k, v, out [B, L, H * D]; q_weight, k_weight [H * D]; cos, sin float32 [L, D / 2]. Without gradients the result
    takes the place of q, and k may be overwritten.
    """
    return q


@operator(reference.sage_attention, "sage")
def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of q and k that are normed and rotated already: q, k, v, out [B, L, H, D]."""
    return torch.empty_like(q)
