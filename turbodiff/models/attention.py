"""Attention of a Wan block: one call for the text, one call for the video, whatever the accelerator.

Layout everywhere: q, k, v, out [B, L, H, D].
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels import backend
from turbodiff_kernels.sage import sage_attention
from turbodiff_kernels.sla import sla_attention

AttentionKind = Literal["dense", "sage", "sla", "sagesla"]


@dataclass(frozen=True)
class AttentionPlan:
    """How the video attends to itself: the kind, and for the sparse kinds the share of key blocks that is kept."""

    kind: AttentionKind = "dense"
    topk: float = 0.1


DENSE = AttentionPlan()


def self_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, proj_l: nn.Linear | None) -> Tensor:
    """Attention of every token of the clip to every other.

    `proj_l` is the learnt projection of the linear branch; the sparse kinds need it, the dense kinds ignore it.
    """
    if plan.kind == "dense":
        return attention(q, k, v)
    if plan.kind == "sage":
        return sage_attention(q, k, v)
    assert proj_l is not None, f"{plan.kind} needs the projections of a checkpoint trained for it"
    return sla_attention(q, k, v, proj_l.weight, proj_l.bias, plan.topk, int8=plan.kind == "sagesla")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense attention, scale 1/sqrt(D). `bias` [B, 1, 1, Lk] is added to the logits."""
    if torch.is_grad_enabled():
        return _sdpa(q, k, v, bias)
    return _attention(q, k, v, bias)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@backend.operator("attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return _sdpa(q, k, v, bias).contiguous()


@backend.fake("attention")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(q)
