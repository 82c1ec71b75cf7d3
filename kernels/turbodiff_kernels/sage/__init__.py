"""SageAttention: dense attention whose query-key product is INT8 (arXiv 2410.02367, 2411.10958)."""

import torch
from torch import Tensor

from turbodiff_kernels import backend
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
