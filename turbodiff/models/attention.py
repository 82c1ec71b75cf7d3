"""Attention of a Wan block: which kind runs where, dense attention, and the rotary position of a token in a video."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from turbodiff_kernels import backend

from turbodiff.spec.attention import PLAINER_ATTENTION, AttentionKind


@dataclass(frozen=True)
class AttentionPlan:
    """How the video attends to itself: the kind, and for the sparse kinds the share of key blocks that is kept."""

    kind: AttentionKind = "dense"
    topk: float = 0.1


DENSE = AttentionPlan()
# torch tries flash first; on Hopper that is FlashAttention 2, at 370 of the 620 TFLOP/s that cuDNN reaches (published)
HOPPER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
COPIED_ELEMENTS = 1 << 22  # of q, k and v each at a time: 16 MiB in float32
THETA = 10000.0  # base of the rotary frequencies, Wan2.1


class ResolvedAttention(NamedTuple):
    """The kind that runs where another may have been asked for, and what computes it: triton, reference or torch."""

    kind: AttentionKind
    backend: str


def resolve_attention(kind: AttentionKind, device: torch.device) -> ResolvedAttention:
    """What `device` runs where `kind` is asked for.

    A kernel that did not prove itself on a GPU makes room for the next plainer kind, whose kernel may have: `sagesla`
    for `sla`, `sage` for torch's own dense attention. `sla` has nothing plainer with the same meaning: its reference
    runs. A CPU, and a person who insists on references, get the reference of what was asked for.
    """
    if kind == "dense":
        return ResolvedAttention(kind, "torch")
    choice = backend.chosen(kind, device)
    plainer = PLAINER_ATTENTION.get(kind)
    if choice.runs == "triton" or plainer is None or device.type != "cuda" or backend.wish() == "reference":
        return ResolvedAttention(kind, choice.runs)
    return resolve_attention(plainer, device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        return _sdpa_of_whole_heads(q, k, v, mask)
    with _order_of_backends(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _sdpa_of_whole_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same of q, k, v [B, H, L, D] -> [B, L, H, D], each head copied to where its rows follow each other: to the
    same bits a tenth faster in torch's CPU kernel. Of a long clip few heads at a time, so that copies stay small."""
    heads = max(1, COPIED_ELEMENTS // max(q[:, 0].numel(), k[:, 0].numel()))
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask)
    if heads >= q.shape[1]:
        return attend(q.contiguous(), k.contiguous(), v.contiguous()).transpose(1, 2)
    out = torch.empty_like(q.transpose(1, 2))
    parts = (t.split(heads, dim=1) for t in (q, k, v, out.transpose(1, 2)))
    for *part, into in zip(*parts, strict=True):
        into.copy_(attend(*(t.contiguous() for t in part)))
    return out


def _order_of_backends(device: torch.device) -> AbstractContextManager[None]:
    """Which of torch's implementations comes first; those after it run what it cannot."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return sdpa_kernel(list(HOPPER), set_priority=True) if hopper else nullcontext()


def _contiguous_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return _sdpa(q, k, v, bias).contiguous()  # looked up here: training swaps it for the process


@backend.operator(_contiguous_sdpa)
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense attention of q, k, v [B, L, H, D], scale 1/sqrt(D). `bias` [B, 1, 1, Lk] is added to the logits."""
    return torch.empty_like(q)


def rope_tables(
    frames: int, height: int, width: int, head_dim: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for a grid of tokens, positions from 0, each float32 [frames * height * width, head_dim / 2].

    `frames`, `height`, `width` count tokens, not pixels. A head's channels are shared between time, height and width:
    128 -> 44, 42, 42 and 64 -> 24, 20, 20 (Wan2.1). Angles are float32 as in TurboDiffusion.
    """
    grid, space = (frames, height, width), head_dim // 6 * 2
    angles = []
    for axis, channels in enumerate((head_dim - 2 * space, space, space)):
        frequencies = THETA ** -(torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
        along = torch.outer(torch.arange(grid[axis], dtype=torch.float32, device=device), frequencies)
        shape = [size if i == axis else 1 for i, size in enumerate(grid)]
        angles.append(along.view(*shape, -1).expand(*grid, -1))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos(), table.sin()
