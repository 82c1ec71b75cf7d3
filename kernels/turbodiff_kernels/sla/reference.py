"""Sparse-linear attention in plain PyTorch; differentiable, and the production path on a CPU.

The sparse branch gathers the kept key blocks of one block of queries at a time, so its cost and memory are those of
the kept blocks, never of the L x L matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiff_kernels.norm.reference import rms_norm_rope_
from turbodiff_kernels.sage.reference import by_heads_, round_qk

BLOCK_Q, BLOCK_K = 128, 64  # TurboDiffusion runs its checkpoints with these


def sla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    topk: float,
    int8: bool = False,
    blocks: tuple[int, int] = (BLOCK_Q, BLOCK_K),
) -> Tensor:
    """Sum of both branches: `sparse + proj_l(linear)`; `blocks`: queries and keys per block."""
    kept = choose_blocks(_block_means(q, blocks[0]), _block_means(k - k.mean(dim=1, keepdim=True), blocks[1]), topk)
    sparse = _sparse(*round_qk(q, k, *blocks), v.float(), kept, *blocks) if int8 else _sparse(q, k, v, kept, *blocks)
    linear = _linear(q, k, v).contiguous()  # else torch adds the bias apart for some numbers of heads: other roundings
    return sparse.to(q.dtype) + F.linear(linear, weight.to(q.dtype), bias.to(q.dtype))


def normed_sla_attention_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    weight: Tensor, bias: Tensor, topk: float, int8: bool = False,
) -> Tensor:  # fmt: skip
    """The same after norm and rotation of q and k, as the operator declares; q, k, v, out [B, L, H * D]."""
    q, k = rms_norm_rope_(q, q_weight, cos, sin, eps), rms_norm_rope_(k, k_weight, cos, sin, eps)
    qkv = [t.unflatten(-1, (-1, 2 * cos.shape[-1])) for t in (q, k, v)]
    heads = by_heads_(lambda *some: sla_attention(*some, weight, bias, topk, int8), *qkv)
    return heads.flatten(2) if torch.is_grad_enabled() else q


def choose_blocks(q_means: Tensor, k_means: Tensor, topk: float) -> Tensor:
    """Indices of the key blocks that each block of queries attends to, int64 [B, H, ceil(L / bq), n], unordered.

    From the block means [B, H, blocks, D] of queries and of keys without their mean over L. The n = topk * blocks best
    products, in the dtype of q as in TurboDiffusion; never fewer than one, where the original would divide by zero.
    """
    scores = q_means @ k_means.transpose(-1, -2)
    count = max(1, min(scores.shape[-1], int(topk * scores.shape[-1])))
    return scores.topk(count, dim=-1, sorted=False).indices


def _block_means(x: Tensor, block: int) -> Tensor:
    """[B, L, H, D] -> means of `block` consecutive rows [B, H, ceil(L / block), D]; the last block may be shorter."""
    means = [part.float().mean(dim=1) for part in x.split(block, dim=1)]
    return torch.stack(means, dim=2).to(x.dtype)


def _sparse(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_q: int, block_k: int) -> Tensor:
    """Softmax attention restricted to the kept key blocks; q, k, v, out [B, L, H, D]."""
    length = q.shape[1]
    k, v = (  # [B, L, H, D] -> [B, H, ceil(L / block), block, D], zeros after the end
        F.pad(t, (0, 0, 0, 0, 0, -length % block_k)).unflatten(1, (-1, block_k)).permute(0, 3, 1, 2, 4) for t in (k, v)
    )
    offsets = torch.arange(block_k, device=q.device)
    out = []
    for i, rows in enumerate(q.split(block_q, dim=1)):
        index = kept[:, :, i]  # [B, H, n]
        gather = index[..., None, None].expand(*index.shape, *k.shape[3:])
        keys, values = (t.gather(2, gather).flatten(2, 3) for t in (k, v))  # [B, H, n * block, D]
        mask = None
        if length % block_k:
            positions = index[..., None] * block_k + offsets
            mask = (positions < length).flatten(2)[:, :, None]
        out.append(F.scaled_dot_product_attention(rows.transpose(1, 2), keys, values, attn_mask=mask))
    return torch.cat(out, dim=2).transpose(1, 2)


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention over all tokens with softmax over the channels as feature map; q, k, v, out [B, L, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q.softmax(dim=-1), k.softmax(dim=-1), v))
    state = k.transpose(-1, -2) @ v
    total = k.sum(dim=-2, keepdim=True)
    return ((q @ state) / (1e-5 + (q * total).sum(dim=-1, keepdim=True))).transpose(1, 2)
