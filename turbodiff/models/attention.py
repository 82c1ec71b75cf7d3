"""Attention of a Wan block: one call for the text, one call for the video, whatever the accelerator.

Layout everywhere: q, k, v, out [B, L, H, D]; before their norm the projections are [B, L, H * D].
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels import backend
from turbodiff_kernels.norm import rms_norm_rope_
from turbodiff_kernels.sage import normed_sage_attention
from turbodiff_kernels.sla import normed_sla_attention

from turbodiff.spec.errors import RequestError
from turbodiff.spec.request import PLAINER_ATTENTION, SPARSE_ATTENTION

AttentionKind = Literal["dense", "sage", "sla", "sagesla"]


@dataclass(frozen=True)
class AttentionPlan:
    """How the video attends to itself: the kind, and for the sparse kinds the share of key blocks that is kept."""

    kind: AttentionKind = "dense"
    topk: float = 0.1


@dataclass(frozen=True)
class Norms:
    """What q and k go through before they meet: an RMS norm over all heads (weights [H * D]) and the rotation of their
    pairs (cosines and sines, float32 [L, D / 2])."""

    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor
    eps: float


DENSE = AttentionPlan()


class Settled(NamedTuple):
    """The kind that runs where another may have been asked for, and what computes it: triton, reference or torch."""

    kind: AttentionKind
    backend: str


def resolve_attention(kind: AttentionKind, device: torch.device) -> Settled:
    """What `device` runs where `kind` is asked for.

    A kernel that did not prove itself on a GPU makes room for the next plainer kind, whose kernel may have: `sagesla`
    for `sla`, `sage` for torch's own dense attention. `sla` has nothing plainer with the same meaning: its reference
    runs. A CPU, and a person who insists on references, get the reference of what was asked for.
    """
    if kind == "dense":
        return Settled(kind, "torch")
    choice = backend.chosen(kind, device)
    plainer = PLAINER_ATTENTION.get(kind)
    if choice.runs == "triton" or plainer is None or device.type != "cuda" or backend.wish() == "reference":
        return Settled(kind, choice.runs)
    return resolve_attention(plainer, device)


def check_attention(plan: AttentionPlan, *, projections: bool) -> None:
    """Sparse attention adds a linear branch, which only a checkpoint trained for it brings (`proj_l`).

    Raises:
        RequestError: code attention_needs_projections, where it is asked of one without.
    """
    if plan.kind in SPARSE_ATTENTION and not projections:
        raise RequestError(
            "these weights were not trained for sparse-linear attention: they have no proj_l",
            code="attention_needs_projections",
            field="attention",
            got=plan.kind,
            expected="dense, sage or auto",
            try_instead="--attention auto, or the TurboWan weights of this model",
        )


def self_attention(
    q: Tensor, k: Tensor, v: Tensor, norms: Norms, plan: AttentionPlan, proj_l: nn.Linear | None
) -> Tensor:
    """Attention of every token of the clip to every other: projections q, k, v [B, L, H * D] -> [B, L, H * D].

    `proj_l` is the learnt projection of the linear branch; the sparse kinds need it, the dense kinds ignore it.
    Without gradients q and k may be overwritten.
    """
    n = norms
    args = (n.q_weight, n.k_weight, n.cos, n.sin, n.eps)
    if plan.kind == "dense":
        q, k = (rms_norm_rope_(t, w, n.cos, n.sin, n.eps) for t, w in ((q, n.q_weight), (k, n.k_weight)))
        return attention(*(t.unflatten(-1, (-1, 2 * n.cos.shape[-1])) for t in (q, k, v))).flatten(2)
    if plan.kind == "sage":
        return normed_sage_attention(q, k, v, *args)
    assert proj_l is not None, "check_attention comes first"
    int8 = plan.kind == "sagesla"
    return normed_sla_attention(q, k, v, *args, proj_l.weight, proj_l.bias, plan.topk, int8=int8)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _contiguous_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return _sdpa(q, k, v, bias).contiguous()  # looked up here: training swaps it for the process


@backend.operator(_contiguous_sdpa)
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense attention of q, k, v [B, L, H, D], scale 1/sqrt(D). `bias` [B, 1, 1, Lk] is added to the logits."""
    return torch.empty_like(q)
