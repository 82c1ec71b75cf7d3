"""Sparse-linear attention in plain PyTorch; differentiable, and the production path on a CPU.

The sparse branch gathers the kept key blocks of one block of queries at a time, so its cost and memory are those of
the kept blocks, never of the L x L matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiff_kernels.norm.reference import rms_norm_rope_
from turbodiff_kernels.sage.reference import round_qk

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
    kept = kept_blocks(q, k, topk, *blocks)
    sparse = _sparse(*round_qk(q, k, *blocks), v.float(), kept, *blocks) if int8 else _sparse(q, k, v, kept, *blocks)
    return sparse.to(q.dtype) + F.linear(_linear(q, k, v), weight.to(q.dtype), bias.to(q.dtype))


def normed_sla_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    weight: Tensor, bias: Tensor, topk: float, int8: bool = False,
) -> Tensor:  # fmt: skip
    """The same after norm and rotation of q and k, which are overwritten; q, k, v, out [B, L, H * D]."""
    rms_norm_rope_(q, q_weight, cos, sin, eps)
    rms_norm_rope_(k, k_weight, cos, sin, eps)
    q, k, v = (t.unflatten(-1, (-1, 2 * cos.shape[-1])) for t in (q, k, v))
    return sla_attention(q, k, v, weight, bias, topk, int8).flatten(2)


def kept_blocks(q: Tensor, k: Tensor, topk: float, block_q: int = BLOCK_Q, block_k: int = BLOCK_K) -> Tensor:
    """Indices of the key blocks that each block of queries attends to, int64 [B, H, ceil(L / bq), n], unordered.

    The n = topk * blocks best products of mean query and mean smoothed key, in the dtype of q as in TurboDiffusion;
    never fewer than one block, where the original would divide by zero.
    """
    smooth = k - k.mean(dim=1, keepdim=True)
    return choose_blocks(_block_means(q, block_q), _block_means(smooth, block_k), topk)


def choose_blocks(q_means: Tensor, k_means: Tensor, topk: float) -> Tensor:
    """The same from the block means [B, H, blocks, D] of queries and of smoothed keys."""
    scores = q_means @ k_means.transpose(-1, -2)
    count = max(1, min(scores.shape[-1], int(topk * scores.shape[-1])))
    return scores.topk(count, dim=-1, sorted=False).indices


def block_map(q: Tensor, k: Tensor, topk: float, block_q: int = BLOCK_Q, block_k: int = BLOCK_K) -> Tensor:
    """`kept_blocks` as int8 [B, H, ceil(L / bq), ceil(L / bk)]: 1 where a key block is kept."""
    kept = kept_blocks(q, k, topk, block_q, block_k)
    key_blocks = -(-k.shape[1] // block_k)
    empty = torch.zeros(*kept.shape[:3], key_blocks, dtype=torch.int8, device=q.device)
    return empty.scatter_(-1, kept, 1)


def _block_means(x: Tensor, block: int) -> Tensor:
    """[B, L, H, D] -> means of `block` consecutive rows [B, H, ceil(L / block), D]; the last block may be shorter."""
    means = [part.float().mean(dim=1) for part in x.split(block, dim=1)]
    return torch.stack(means, dim=2).to(x.dtype)


def _sparse(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block_q: int, block_k: int) -> Tensor:
    """Softmax attention restricted to the kept key blocks; q, k, v, out [B, L, H, D]."""
    length = q.shape[1]
    k, v = (_blocks(t, block_k) for t in (k, v))
    offsets = torch.arange(block_k, device=q.device)
    out = []
    for i, rows in enumerate(q.split(block_q, dim=1)):
        index = kept[:, :, i]
        keys, values = (_take(t, index) for t in (k, v))
        mask = None
        if length % block_k:
            positions = index[..., None] * block_k + offsets
            mask = (positions < length).flatten(2)[:, :, None]
        out.append(F.scaled_dot_product_attention(rows.transpose(1, 2), keys, values, attn_mask=mask))
    return torch.cat(out, dim=2).transpose(1, 2)


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, L, H, D] -> [B, H, ceil(L / block), block, D], zeros after the end."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)


def _take(blocks: Tensor, index: Tensor) -> Tensor:
    """Blocks [B, H, K, block, D] at index [B, H, n] -> rows [B, H, n * block, D]."""
    index = index[..., None, None].expand(*index.shape, *blocks.shape[3:])
    return blocks.gather(2, index).flatten(2, 3)


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention over all tokens with softmax over the channels as feature map; q, k, v, out [B, L, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q.softmax(dim=-1), k.softmax(dim=-1), v))
    state = k.transpose(-1, -2) @ v
    total = k.sum(dim=-2, keepdim=True)
    return ((q @ state) / (1e-5 + (q * total).sum(dim=-1, keepdim=True))).transpose(1, 2)
