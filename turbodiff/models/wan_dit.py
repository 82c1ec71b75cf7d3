"""Wan's diffusion transformer: Wan2.1 text to video and both experts of Wan2.2 A14B, in one class.

Parameter names are those of the original checkpoints with TurboDiffusion's 2-D patch embedding, so a file loads
without renaming. A forward pass is three steps, so that a caller may keep blocks elsewhere and bring them in turn:

    x, inputs = model.prepare(latents, timesteps, text, condition, attention=plan)
    for block in model.blocks:
        x = block(x, inputs)
    velocity = model.finish(x, inputs)

What does not change from step to step is computed once per clip and handed to `prepare`: the text as a
`CrossAttentionCache`, which remembers every block's keys and values, the rotary tables, and the time where two texts
share it.

Numerics follow TurboDiffusion: time path, modulation and head in float32; residual stream in the dtype of the model.
Without gradients the residual stream is updated in place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels import norm
from turbodiff_kernels.quant import TILE

from turbodiff.models.attention import DENSE, AttentionPlan, Norms, attention, check_attention, self_attention
from turbodiff.models.linear import make_linear
from turbodiff.models.rope import rope_tables
from turbodiff.spec import shapes

PATCH = (1, shapes.PATCH, shapes.PATCH)  # latent frames, rows and columns of one token (Wan2.1)


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one transformer. `sla`: the file has linear-branch projections; `quant_linear`: its blocks are INT8."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
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


class CrossAttentionCache:
    """The embedded text of one clip [B, Lt, d], and the keys and values that each block makes of it.

    The first forward pass fills it, the later ones read it. Blocks are known by their order, which every pass keeps,
    also where they are streamed through a few slots. It holds 2 * blocks * B * Lt * d elements: 400 MiB for Wan 14B.
    """

    def __init__(self, context: Tensor) -> None:
        self.context = context
        self._made: list[tuple[Tensor, Tensor]] = []
        self._turn = 0

    def rewind(self) -> "CrossAttentionCache":
        """Itself, before the first block of a forward pass."""
        self._turn = 0
        return self

    def keys_values(self, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What the block whose turn it is makes of the text, or made of it in an earlier pass."""
        if self._turn == len(self._made):
            self._made.append(make(self.context))
        self._turn += 1
        return self._made[self._turn - 1]


@dataclass(frozen=True)
class BlockInputs:
    """What every block of one forward pass shares: d = dim, Lt text rows, N video tokens."""

    time: Tensor  # float32 [B, d], for the head
    modulation: Tensor  # float32 [B, 6, d], for the blocks
    context: Tensor | CrossAttentionCache  # [B, Lt, d], embedded text
    context_bias: Tensor | None  # [B, 1, 1, Lt], added to the logits of cross-attention
    rope: tuple[Tensor, Tensor]  # cosines and sines, float32 [N, head_dim / 2]
    grid: tuple[int, int, int]  # tokens along time, height, width
    attention: AttentionPlan


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
        *,
        attention: AttentionPlan = DENSE,
        context_bias: Tensor | None = None,
        ffn_chunks: int = 1,
    ) -> Tensor:
        """Velocity, float32 [B, 16, T, H, W].

        latents [B, 16, T, H, W], H and W even; timesteps [B, 1], already x1000; text [B, Lt, text_dim], attended as
        given, without a mask; condition [B, 20, T, H, W] for image to video; context_bias [B, 1, 1, Lt].
        """
        x, inputs = self.prepare(
            latents, timesteps, self.embed_text(text), condition, attention=attention, context_bias=context_bias
        )
        for block in self.blocks:
            x = block(x, inputs, ffn_chunks)
        return self.finish(x, inputs)

    def embed_text(self, text: Tensor) -> Tensor:
        """Text encoder rows [B, Lt, text_dim] -> context [B, Lt, dim]; does not depend on time: once per clip."""
        return self.text_embedding(text.to(self.dtype))

    def prepare(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | CrossAttentionCache,
        condition: Tensor | None = None,
        *,
        attention: AttentionPlan = DENSE,
        context_bias: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        time: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, BlockInputs]:
        """Embedded tokens [B, N, dim] and what the blocks share.

        `rope` of `rope_tables` and `time` of `embed_time` may be handed in where several passes share them.

        Raises:
            RequestError: sparse attention, and the checkpoint has no projections for it.
        """
        check_attention(attention, projections=self.config.sla)
        x = latents if condition is None else torch.cat((latents, condition.to(latents.dtype)), dim=1)
        x = x.to(self.dtype)
        grid = tuple(size // patch for size, patch in zip(x.shape[2:], PATCH, strict=True))
        tokens = self.patch_embedding(patchify(x)).to(self.dtype)
        rope = rope or rope_tables(*grid, self.config.head_dim, device=x.device)
        context = context.rewind() if isinstance(context, CrossAttentionCache) else context
        return tokens, BlockInputs(*(time or self.embed_time(timesteps)), context, context_bias, rope, grid, attention)

    def finish(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Tokens after the last block [B, N, dim] -> velocity, float32 [B, 16, T, H, W]."""
        parts = [self.head(part, inputs.time) for part in x.split(shapes.HEAD_TOKENS, dim=1)]
        return unpatchify(torch.cat(parts, dim=1), inputs.grid)

    def embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, 1] -> float32 [B, d] and [B, 6, d]. A bf16 model sees bf16 timesteps, as it was trained."""
        waves = sinusoid(timesteps.flatten().to(self.dtype), self.config.freq_dim)
        hidden = F.silu(linear_float32(self.time_embedding[0], waves))
        time = linear_float32(self.time_embedding[2], hidden)
        modulation = linear_float32(self.time_projection[1], F.silu(time))
        return time, modulation.unflatten(1, (6, -1))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and the last modulated by time."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.dim
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, d) / d**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(d, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            make_linear(d, config.ffn_dim, config.quant_linear),
            nn.GELU("tanh"),
            make_linear(config.ffn_dim, d, config.quant_linear),
        )

    def forward(self, x: Tensor, inputs: BlockInputs, ffn_chunks: int = 1) -> Tensor:
        """Tokens [B, N, d] -> tokens [B, N, d]; without gradients `x` itself. `ffn_chunks` bounds the hidden tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + inputs.modulation).split(1, dim=1)
        x = self.self_attn(x, shift1, scale1, gate1, inputs)
        x = self.cross_attn(x, norm.layer_norm(x, self.norm3.weight, self.norm3.bias, self.eps), inputs)
        if ffn_chunks == 1 or torch.is_grad_enabled():
            return self._feed_forward(x, shift2, scale2, gate2)
        for part in x.split(chunk_tokens(x.shape[1], ffn_chunks), dim=1):
            self._feed_forward(part, shift2, scale2, gate2)
        return x

    def _feed_forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        first, _, second = self.ffn
        return second.add_to(x, first.gelu(first.take_modulated(x, shift, scale, self.eps)), gate)


class SelfAttention(nn.Module):
    """Attention of the video tokens to each other, with rotary positions."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d, quant = config.dim, config.quant_linear
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (make_linear(d, d, quant) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d), RMSNorm(d)
        if config.sla:
            proj_l = nn.Linear(config.head_dim, config.head_dim)
            nn.init.zeros_(proj_l.weight)
            nn.init.zeros_(proj_l.bias)
            self.attn_op = nn.ModuleDict({"local_attn": nn.ModuleDict({"proj_l": proj_l})})

    @property
    def proj_l(self) -> nn.Linear | None:
        """Projection of SLA's linear branch, shared by the heads, where the checkpoint has one."""
        return self.attn_op["local_attn"]["proj_l"] if hasattr(self, "attn_op") else None

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, inputs: BlockInputs) -> Tensor:
        """Tokens [B, N, d] plus gate * attention of the normed, modulated tokens; without gradients `x` itself.

        The normed copy is made here, once for q, k and v, so that it is gone when attention starts.
        """
        y = self.q.take_modulated(x, shift, scale, self.eps)
        q, k, v = self.q(y), self.k(y), self.v(y)
        del y
        norms = Norms(self.norm_q.weight, self.norm_k.weight, *inputs.rope, self.eps)
        out = self_attention(q, k, v, norms, inputs.attention, self.proj_l)
        del q, k, v
        return self.o.add_to(x, out, gate)


class CrossAttention(nn.Module):
    """Attention of the video tokens to the text; never sparse, never masked."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d, quant = config.dim, config.quant_linear
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q, self.k, self.v, self.o = (make_linear(d, d, quant) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d), RMSNorm(d)

    def forward(self, x: Tensor, y: Tensor, inputs: BlockInputs) -> Tensor:
        """Tokens x [B, N, d] plus the text as y, the normed tokens, sees it; without gradients `x` itself."""
        q = norm.rms_norm_(self.q(y), self.norm_q.weight, self.eps)
        text = inputs.context
        k, v = text.keys_values(self._keys_values) if isinstance(text, CrossAttentionCache) else self._keys_values(text)
        heads = [t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v)]
        return self.o.add_to(x, attention(*heads, inputs.context_bias).flatten(2))

    def _keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, Lt, d] -> keys and values [B, Lt, d]."""
        text = self.k.take(context)
        return norm.rms_norm_(self.k(text), self.norm_k.weight, self.eps), self.v(text)


class RMSNorm(nn.Module):
    """Holds the weight [dim] of a query or key norm; the maths is in `turbodiff_kernels.norm`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Head(nn.Module):
    """Tokens to velocity patches, modulated by time, in float32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, config.out_dim * config.patch_volume)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Tokens [B, n, d], time float32 [B, d] -> float32 [B, n, patch volume * out_dim]."""
        shift, scale = (self.modulation.float() + time[:, None]).split(1, dim=1)
        return linear_float32(self.head, norm.norm_modulate(x.float(), shift, scale, self.eps))


def patchify(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B, N, C * patch volume]; tokens in (t, h, w), channels in (c, t, h, w) order (Wan2.1)."""
    b, c, t, h, w = x.shape
    pt, ph, pw = PATCH
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B, N, patch volume * C] -> [B, C, T, H, W]; channels of a token come in (t, h, w, c) order (Wan2.1)."""
    x = x.unflatten(2, (*PATCH, -1)).unflatten(1, grid)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Positions [B] -> float32 [B, dim]: cosines first, then sines, of 10000^(-i / (dim/2)), in float64 (Wan2.1)."""
    half = torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim // 2)
    angles = torch.outer(positions.double(), 10000.0**-half)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32 whatever its dtype and whatever autocast says: the time path and the head are that fine."""
    device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"  # meta tensors have none
    with torch.autocast(device, enabled=False):
        return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def chunk_tokens(tokens: int, chunks: int) -> int:
    """Tokens per chunk: whole INT8 tiles, so that chunking never changes the numbers, in at most `chunks` chunks."""
    return -(-tokens // (chunks * TILE)) * TILE
