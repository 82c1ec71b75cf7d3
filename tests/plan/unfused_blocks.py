"""Blocks of Wan as other programs run them, operation by operation, to count what they hold on meta tensors.

Written from what their code does, not from what they published as peaks:
    wan2.1     Wan-Video/Wan2.1 wan/modules/model.py: the gates are float32, so the stream is; norms are modulated in
               float32; rotary embedding in complex128, one clip at a time, then float32 q and k
    wan2.2     the same with the timestep embedded for every token: six float32 vectors, and their sum with the block's
    diffusers  transformer_wan.py: the stream stays bf16, modulated norms are computed in float32 and cast back; rotary
               embedding in float32 on the even and the odd half
"""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiff.memory_lab.dry_run import Ledger
from turbodiff.spec.models import DitFacts

Block = Literal["wan2.1", "wan2.2", "diffusers"]


@cache
def held_bytes(block: Block, facts: DitFacts, tokens: int, float32_weights: bool = False) -> int:
    """Most bytes that one block holds beside its weights, its input and the embedded timestep included.

    With float32 weights the norms of q and k return float32, since their gains are (autocast casts products only).
    """
    gain = torch.float32 if float32_weights else torch.bfloat16
    ledger = Ledger("meta")
    with torch.inference_mode(), torch.device("meta"), ledger:
        if block == "diffusers":
            x = torch.empty(tokens, facts.dim, dtype=torch.bfloat16)
            _diffusers(x, torch.empty(6, 1, facts.dim), facts)
        else:
            x = torch.empty(tokens, facts.dim)
            rows = tokens if block == "wan2.2" else 1
            _wan(x, torch.empty(rows, facts.dim), torch.empty(rows, 6, facts.dim), facts, gain)
    return ledger.peak_bytes


def _linear(x: Tensor, width: int) -> Tensor:
    """A bf16 product; a float32 input is cast for it, as autocast does."""
    return x.bfloat16() @ torch.empty(x.shape[1], width, dtype=torch.bfloat16)


def _rms(x: Tensor, gain: torch.dtype) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).type_as(x) * torch.empty(x.shape[1], dtype=gain)


def _attend(q: Tensor, k: Tensor, v: Tensor, facts: DitFacts) -> Tensor:
    """Flash attention: nothing beside bf16 q, k, v and the result."""
    q, k, v = (x.bfloat16().view(len(x), facts.num_heads, -1).transpose(0, 1)[None] for x in (q, k, v))
    return torch.empty_like(q)[0].transpose(0, 1).reshape(q.shape[2], facts.dim)


def _complex_rope(x: Tensor, facts: DitFacts) -> Tensor:
    turn = torch.empty(len(x), 1, facts.head_dim // 2, dtype=torch.complex128)
    pairs = torch.view_as_complex(x.double().reshape(len(x), facts.num_heads, -1, 2))
    pairs = torch.view_as_real(pairs * turn).flatten(2)
    pairs = torch.cat([pairs, x[:0].double().view(0, *pairs.shape[1:])])
    return torch.stack([pairs]).float().reshape(len(x), facts.dim)


def _real_rope(x: Tensor, facts: DitFacts) -> Tensor:
    even, odd = x.view(len(x), facts.num_heads, -1, 2).unbind(-1)
    cos = sin = torch.empty(len(x), 1, facts.head_dim // 2)
    out = torch.empty_like(x).view(len(x), facts.num_heads, -1)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.view(len(x), facts.dim)


def _wan(x: Tensor, time: Tensor, embedded: Tensor, facts: DitFacts, gain: torch.dtype) -> Tensor:
    e = (torch.empty(1, 6, facts.dim) + embedded).chunk(6, dim=1)
    e = [part.squeeze(1) for part in e]
    y = _wan_attention(F.layer_norm(x, x.shape[1:]).float() * (1 + e[1]) + e[0], facts, gain)
    x = x + y * e[2]
    del y
    x = x + _cross(F.layer_norm(x, x.shape[1:]), facts, gain)
    y = _feed_forward(F.layer_norm(x, x.shape[1:]).float() * (1 + e[4]) + e[3], facts)
    return x + y * e[5]


def _wan_attention(x: Tensor, facts: DitFacts, gain: torch.dtype) -> Tensor:
    q, k, v = _rms(_linear(x, facts.dim), gain), _rms(_linear(x, facts.dim), gain), _linear(x, facts.dim)
    return _linear(_attend(_complex_rope(q, facts), _complex_rope(k, facts), v, facts), facts.dim)


def _cross(x: Tensor, facts: DitFacts, gain: torch.dtype) -> Tensor:
    q, rows = _rms(_linear(x, facts.dim), gain), torch.empty(512, facts.dim, dtype=torch.bfloat16)
    return _linear(_attend(q, rows, rows, facts), facts.dim)


def _feed_forward(x: Tensor, facts: DitFacts) -> Tensor:
    return _linear(F.gelu(_linear(x, facts.ffn_dim), approximate="tanh"), facts.dim)


def _diffusers(x: Tensor, e: Tensor, facts: DitFacts) -> Tensor:
    normed = (F.layer_norm(x.float(), x.shape[1:]) * (1 + e[1]) + e[0]).type_as(x)
    q, k, v = (_linear(normed, facts.dim) for _ in range(3))
    q, k = F.rms_norm(q, q.shape[1:]), F.rms_norm(k, k.shape[1:])
    q, k = _real_rope(q, facts), _real_rope(k, facts)
    y = _linear(_attend(q, k, v, facts), facts.dim)
    del q, k, v
    x = (x.float() + y * e[2]).type_as(x)
    normed = F.layer_norm(x.float(), x.shape[1:]).type_as(x)
    x = x + _cross(normed, facts, torch.bfloat16)
    normed = (F.layer_norm(x.float(), x.shape[1:]) * (1 + e[4]) + e[3]).type_as(x)
    y = _feed_forward(normed, facts)
    return (x.float() + y.float() * e[5]).type_as(x)
