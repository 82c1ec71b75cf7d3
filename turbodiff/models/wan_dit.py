"""Wan's diffusion transformer: Wan2.1 text and image to video and both experts of Wan2.2 A14B, in one class.

Parameter names are those of the original checkpoints with TurboDiffusion's 2-D patch embedding, so a file loads
without renaming. A forward pass is three steps, so that a caller may keep blocks elsewhere and bring them in turn:

    x, inputs = model.prepare(latents, timesteps, text, condition, attention=plan)
    for index, block in enumerate(model.blocks):
        x = block(x, inputs, index)
    velocity = model.finish(x, inputs)

What does not change from step to step is computed once per clip and handed to `prepare`: the text as a
`CrossAttentionCache`, which keeps every block's keys and values, the rotary tables, and the time where two texts share
it.

Numerics follow TurboDiffusion: time path, modulation and head in float32; residual stream in the dtype of the model.
Without gradients the residual stream is updated in place.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels import norm
from turbodiff_kernels.norm import layer_norm, rms_norm_, rms_norm_rope_
from turbodiff_kernels.sage import normed_sage_attention_, sage_attention
from turbodiff_kernels.sla import normed_sla_attention_, sla_attention

from turbodiff.models.attention import DENSE, AttentionPlan, attention, rope_tables
from turbodiff.models.image_encoder import PictureEmbedding
from turbodiff.models.linear import (
    BlockLinear,
    feed_forward_,
    linear_float32,
    make_linear,
    norm_modulate,
    quantize_input,
    residual_add_,
)  # fmt: skip
from turbodiff.models.parallel import SequenceParallel
from turbodiff.models.patches import PATCH, patchify, unpatchify
from turbodiff.spec import shapes
from turbodiff.spec.attention import SPARSE_ATTENTION
from turbodiff.spec.errors import RequestError


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one transformer. `image_dim`: width of the picture's features that its blocks attend to beside the text
    (Wan2.1 image to video), 0 for none; `sla`: the file has linear-branch projections; `quant_linear`: its blocks are
    INT8."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int = 0
    sla: bool = False
    quant_linear: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of one attention head: 128 in every Wan model."""
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent positions in one token."""
        return PATCH[0] * PATCH[1] * PATCH[2]


@dataclass(frozen=True)
class CrossAttentionCache:
    """What one clip attends to, a text or the features of a picture, embedded [B, Lt, d]; and the keys and values that
    each block made of it, by block index.

    The first forward pass fills it, the later ones read it: 2 * blocks * B * Lt * d elements, 400 MiB for a text and
    Wan 14B. Without `keep` it stays empty, and blocks make theirs anew, with the same numbers.
    """

    context: Tensor
    keep: bool = True
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockInputs:
    """What every block of one forward pass shares: d = dim, Lt text rows, N video tokens."""

    time: Tensor  # float32 [B, d], for the head
    modulation: Tensor  # float32 [B, 6, d], for the blocks
    text: CrossAttentionCache
    picture: CrossAttentionCache | None  # where the network has a branch for it
    context_bias: Tensor | None  # [B, 1, 1, Lt], added to the logits of cross-attention
    rope: tuple[Tensor, Tensor]  # cosines and sines, float32 [N, head_dim / 2]
    grid: tuple[int, int, int]  # tokens along time, height, width
    attention: AttentionPlan
    parallel: SequenceParallel | None = None  # where the tokens are one share of N, and other processes hold the rest


class WanDiT(nn.Module):
    """The transformer: noisy latents, a time and a text go in, the velocity of the latents comes out."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        d = config.dim
        self.patch_embedding = nn.Linear(config.in_dim * config.patch_volume, d)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, d), nn.GELU("tanh"), nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        if config.image_dim:
            self.img_emb = PictureEmbedding(config.image_dim, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        condition: Tensor | None = None,
        picture: Tensor | None = None,
        *,
        attention: AttentionPlan = DENSE,
        context_bias: Tensor | None = None,
        ffn_chunks: int = 1,
    ) -> Tensor:
        """Velocity, float32 [B, 16, T, H, W].

        latents [B, 16, T, H, W], H and W even; timesteps [B, 1], already x1000; text [B, Lt, text_dim], attended as
        given, without a mask; condition [B, 20, T, H, W] for image to video; picture [B, Lp, image_dim], features of
        the picture encoder where the network has `image_dim`; context_bias [B, 1, 1, Lt].
        """
        x, inputs = self.prepare(
            latents, timesteps, self.embed_text(text), condition, self.embed_picture(picture), attention=attention,
            context_bias=context_bias,
        )  # fmt: skip
        for index, block in enumerate(self.blocks):
            x = block(x, inputs, index, ffn_chunks)
        return self.finish(x, inputs)

    def embed_text(self, text: Tensor) -> Tensor:
        """Text encoder rows [B, Lt, text_dim] -> context [B, Lt, dim]; does not depend on time: once per clip."""
        context: Tensor = self.text_embedding(text.to(self.dtype))
        return context

    def embed_picture(self, features: Tensor | None, keep: bool = True) -> CrossAttentionCache | None:
        """Features of the picture [B, Lp, image_dim], once per clip; None where the network has no branch for them."""
        if not self.config.image_dim:
            return None
        assert features is not None, "this network attends to a picture"
        return CrossAttentionCache(self.img_emb(features), keep)

    def prepare(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | CrossAttentionCache,
        condition: Tensor | None = None,
        picture: CrossAttentionCache | None = None,
        *,
        attention: AttentionPlan = DENSE,
        context_bias: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        time: tuple[Tensor, Tensor] | None = None,
        parallel: SequenceParallel | None = None,
    ) -> tuple[Tensor, BlockInputs]:
        """Embedded tokens [B, N, dim], with `parallel` this process' share of them, and what the blocks share.

        Several passes may share `rope` of `rope_tables`, `time` of `embed_time` and `picture` of `embed_picture`.

        Raises:
            RequestError: sparse attention, and the checkpoint has no projections for it.
        """
        if attention.kind in SPARSE_ATTENTION and not self.config.sla:
            raise RequestError(
                "these weights were not trained for sparse-linear attention: they have no proj_l",
                code="attention_needs_projections",
                field="attention",
                got=attention.kind,
                expected="dense, sage or auto",
                try_instead="--attention auto, or the TurboWan weights of this model",
            )
        x = latents if condition is None else torch.cat((latents, condition.to(latents.dtype)), dim=1)
        x = x.to(self.dtype)
        grid = (x.shape[2] // PATCH[0], x.shape[3] // PATCH[1], x.shape[4] // PATCH[2])
        patches, rope = patchify(x), rope or rope_tables(*grid, self.config.head_dim, device=x.device)
        if parallel is not None:
            patches, rope = parallel.share(patches, dim=1), (parallel.share(rope[0]), parallel.share(rope[1]))
        tokens = self.patch_embedding(patches).to(self.dtype)
        text = context if isinstance(context, CrossAttentionCache) else CrossAttentionCache(context)
        time = time or self.embed_time(timesteps)
        return tokens, BlockInputs(*time, text, picture, context_bias, rope, grid, attention, parallel)

    def finish(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Tokens after the last block [B, N, dim] -> velocity, float32 [B, 16, T, H, W]."""
        parts = [self.head(part, inputs.time) for part in x.split(shapes.HEAD_TOKENS, dim=1)]
        patches = torch.cat(parts, dim=1)
        if inputs.parallel is not None:
            patches = inputs.parallel.gather(patches, math.prod(inputs.grid))
        return unpatchify(patches, inputs.grid)

    def embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, 1] -> float32 [B, d] and [B, 6, d]. A bf16 model sees bf16 timesteps, as it was trained."""
        layers = self.time_embedding[0], self.time_embedding[2], self.time_projection[1]
        first, second, project = (cast(nn.Linear, layer) for layer in layers)
        # cosines, then sines, of 10000^(-i / half), in float64 (Wan2.1)
        half = self.config.freq_dim // 2
        positions = timesteps.flatten().to(self.dtype).double()
        frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=positions.device) / half)
        angles = torch.outer(positions, frequencies)
        waves = torch.cat((angles.cos(), angles.sin()), dim=1).float()
        time = linear_float32(second, F.silu(linear_float32(first, waves)))
        modulation = linear_float32(project, F.silu(time))
        return time, modulation.unflatten(1, (6, -1))


class Block(nn.Module):
    """Self-attention, cross-attention to the text and to a picture, feed-forward; first and last modulated by time."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.dim
        self.eps = config.eps
        self.modulation = random_modulation(6, d)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(d, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            make_linear(d, config.ffn_dim, config.quant_linear),
            nn.GELU("tanh"),
            make_linear(config.ffn_dim, d, config.quant_linear),
        )

    def forward(
        self, x: Tensor, inputs: BlockInputs, index: int, ffn_chunks: int = 1, added: set[int] | None = None
    ) -> Tensor:
        """Tokens [B, N, d] -> tokens [B, N, d]; without gradients `x` itself.

        `index`: which block of the network this is, also where blocks pass through shared modules. `ffn_chunks` bounds
        the hidden tokens of the feed-forward. `added`: the sums that `x` has already, filled in here: with it a block
        that ran out of memory may be called again without gradients. Each sum is added as a whole or not at all.
        """
        added = set() if added is None else added
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + inputs.modulation).split(1, dim=1)  # float32

        if 0 not in added:
            attn = self.self_attn
            y = norm_modulate(x, shift1, scale1, self.eps, attn.q)
            q, k, v = attn.q(y), attn.k(y), attn.v(y)
            del y  # gone when attention starts, as q, k and v are when its result is projected
            y = attn(q, k, v, inputs)
            del q, k, v
            x = residual_add_(x, attn.o, y, gate1)
            del y
            added.add(0)

        if 1 not in added:
            cross = self.cross_attn
            y = cross(cross.q(layer_norm(x, self.norm3.weight, self.norm3.bias, self.eps)), inputs, index)
            x = residual_add_(x, cross.o, y)
            del y
            added.add(1)

        first, second = (cast(BlockLinear, self.ffn[i]) for i in (0, 2))
        whole = ffn_chunks == 1 or torch.is_grad_enabled()
        parts = (x,) if whole else x.split(shapes.ffn_chunk_tokens(x.shape[1], ffn_chunks), dim=1)
        for number, part in enumerate(parts, 2):
            if number in added:
                continue
            part = feed_forward_(part, shift2, scale2, gate2, self.eps, first, second)
            added.add(number)
        return part if whole else x


def random_modulation(rows: int, d: int) -> nn.Parameter:
    """Modulation before any training [1, rows, d], of variance 1 / d. Uniform: normal numbers on the meta device, where
    networks are built to be filled from files, import torch's compiler."""
    bound = (3 / d) ** 0.5
    return nn.Parameter(torch.empty(1, rows, d).uniform_(-bound, bound))


class Projections(nn.Module):
    """The four linear layers of an attention, and the norms of its queries and keys."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d, quant = config.dim, config.quant_linear
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (make_linear(d, d, quant) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(d), nn.RMSNorm(d)  # their weights: fused kernels do the maths


class SelfAttention(Projections):
    """Attention of the video tokens to each other, with rotary positions."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.sla:
            proj_l = nn.Linear(config.head_dim, config.head_dim)
            nn.init.zeros_(proj_l.weight)
            nn.init.zeros_(proj_l.bias)
            self.attn_op = nn.ModuleDict({"local_attn": nn.ModuleDict({"proj_l": proj_l})})

    @property
    def proj_l(self) -> nn.Linear:
        """Projection of SLA's linear branch, shared by the heads; a checkpoint that was trained for it has one."""
        return cast(nn.Linear, self.get_submodule("attn_op.local_attn.proj_l"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: BlockInputs) -> Tensor:
        """RMS norm and rotation of q and k, then attention: q, k, v, out [B, N, d]. q and k may be overwritten."""
        (cos, sin), plan = inputs.rope, inputs.attention
        norms = self.norm_q.weight, self.norm_k.weight, cos, sin, self.eps
        if plan.kind == "dense" or inputs.parallel is not None:
            q, k = (rms_norm_rope_(t, weight, *norms[2:]) for t, weight in ((q, norms[0]), (k, norms[1])))
            if inputs.parallel is not None:
                attend = partial(self.attend_normed, plan)
                return inputs.parallel.attend(attend, q, k, v, self.num_heads, math.prod(inputs.grid))
            return attention(*(t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))).flatten(2)
        if plan.kind == "sage":
            return normed_sage_attention_(q, k, v, *norms)
        proj_l, int8 = self.proj_l, plan.kind == "sagesla"
        return normed_sla_attention_(q, k, v, *norms, proj_l.weight, proj_l.bias, plan.topk, int8=int8)

    def attend_normed(self, plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q and k that are normed and rotated, with some of the heads: q, k, v, out [B, N, h, D]."""
        if plan.kind == "dense":
            return attention(q, k, v)
        if plan.kind == "sage":
            return sage_attention(q, k, v)
        proj_l = self.proj_l
        return sla_attention(q, k, v, proj_l.weight, proj_l.bias, plan.topk, int8=plan.kind == "sagesla")


class CrossAttention(Projections):
    """Attention of the video tokens to the text, and to a picture where there is one; never sparse, never masked."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.image_dim:
            d = config.dim
            self.k_img, self.v_img = (make_linear(d, d, config.quant_linear) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(d)

    def forward(self, q: Tensor, inputs: BlockInputs, index: int) -> Tensor:
        """RMS norm of q, then attention to the text; to the picture with keys and values of its own, and the sum of
        both: q, out [B, N, d]."""
        q = rms_norm_(q, self.norm_q.weight, self.eps)
        y = self.attend(q, inputs.text, index, self.k, self.v, self.norm_k, inputs.context_bias)
        if inputs.picture is not None:
            z = self.attend(q, inputs.picture, index, self.k_img, self.v_img, self.norm_k_img)
            y = y + z if torch.is_grad_enabled() else y.add_(z)
        return y

    def attend(
        self, q: Tensor, to: CrossAttentionCache, index: int, to_k: BlockLinear, to_v: BlockLinear, norm_k: nn.RMSNorm,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of q to a context, whose keys and values are made once per clip, or anew: q, out [B, N, d]."""
        made = to.keys_values.get(index)
        if made is None:
            context = quantize_input(to.context, to_k)
            made = rms_norm_(to_k(context), norm_k.weight, self.eps), to_v(context)
            del context
            if to.keep:
                to.keys_values[index] = made
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, *made))
        return attention(q, k, v, bias).flatten(2)


class Head(nn.Module):
    """Tokens to velocity patches, modulated by time, in float32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = random_modulation(2, config.dim)
        self.head = nn.Linear(config.dim, config.out_dim * config.patch_volume)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Tokens [B, n, d], time float32 [B, d] -> float32 [B, n, patch volume * out_dim]."""
        shift, scale = (self.modulation + time[:, None]).split(1, dim=1)
        return linear_float32(self.head, norm.norm_modulate(x.float(), shift, scale, self.eps))
