"""UMT5's encoder (arXiv 2304.09151): token ids in, the rows that the video attends to out.

Of our own though transformers has it: that package takes two of the five seconds from the shell to a first clip, and
asks of a mask what meta tensors cannot answer. Parameter names are transformers' (UMT5EncoderModel, the oracle of
the tests), so its files load as they are.

T5 differs from most encoders: norms without mean or bias, logits that are not scaled, no biases in linears, and
positions that are only a bias of the logits by distance, in UMT5 one table for each layer.
"""

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from turbodiff.spec.models import TextFacts

EPS = 1e-6  # of the norms (config.json of google/umt5-xxl)


class TextEncoder(nn.Module):
    """Ids [B, n] -> rows [B, n, dim]. One table of tokens under two names, as files have it."""

    def __init__(self, facts: "TextFacts") -> None:
        super().__init__()
        self.shared = random_table(facts.vocab, facts.dim)
        self.encoder = Layers(facts, self.shared)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask [B, n], which is 0 where there is no token, -> rows in the dtype of the table."""
        rows: Tensor = self.encoder(self.shared(ids), mask)
        return rows


class Layers(nn.Module):
    """The layers, and the norm after the last one."""

    def __init__(self, facts: "TextFacts", table: nn.Embedding) -> None:
        super().__init__()
        self.buckets, self.max_distance = facts.num_buckets, facts.max_distance
        self.embed_tokens = table
        self.block = nn.ModuleList(Layer(facts) for _ in range(facts.num_layers))
        self.final_layer_norm = Norm(facts.dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Embedded tokens [B, n, dim], mask [B, n] -> rows [B, n, dim]."""
        places = torch.arange(x.shape[1], device=x.device)
        buckets = distance_buckets(places - places[:, None], self.buckets, self.max_distance)
        seen = mask[:, None, None, :].bool()
        for layer in self.block:
            x = layer(x, buckets, seen)
        return cast(Tensor, self.final_layer_norm(x))


class Layer(nn.Module):
    """Self-attention and feed-forward, each after a norm and added to the stream."""

    def __init__(self, facts: "TextFacts") -> None:
        super().__init__()
        self.layer = nn.ModuleList((
            nn.ModuleDict({"SelfAttention": SelfAttention(facts), "layer_norm": Norm(facts.dim)}),
            nn.ModuleDict({"DenseReluDense": FeedForward(facts), "layer_norm": Norm(facts.dim)}),
        ))  # fmt: skip

    def forward(self, x: Tensor, buckets: Tensor, seen: Tensor) -> Tensor:
        """x [B, n, dim]; buckets of the distances [n, n]; seen bool [B, 1, 1, n]."""
        first, second = (cast(nn.ModuleDict, part) for part in self.layer)
        x = x + first["SelfAttention"](first["layer_norm"](x), buckets, seen)
        return cast(Tensor, x + second["DenseReluDense"](second["layer_norm"](x)))


class SelfAttention(nn.Module):
    """Attention of the tokens to each other, with a bias of each head for each bucket of distances."""

    def __init__(self, facts: "TextFacts") -> None:
        super().__init__()
        self.heads = facts.num_heads
        self.q, self.k, self.v = (nn.Linear(facts.dim, facts.dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(facts.dim_attn, facts.dim, bias=False)
        self.relative_attention_bias = random_table(facts.num_buckets, facts.num_heads)

    def forward(self, x: Tensor, buckets: Tensor, seen: Tensor) -> Tensor:
        """x, out [B, n, dim]; buckets [n, n]; seen bool [B, 1, 1, n]."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)
        bias = torch.where(seen, bias, torch.finfo(bias.dtype).min)  # not -inf: rows of padding may see nothing
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.contiguous(), scale=1.0)
        return cast(Tensor, self.o(y.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linears, the GELU (tanh) of one times the other, and a third."""

    def __init__(self, facts: "TextFacts") -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(facts.dim, facts.dim_ffn, bias=False) for _ in range(2))
        self.wo = nn.Linear(facts.dim_ffn, facts.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x, out [B, n, dim]."""
        return cast(Tensor, self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)))


class Norm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> the same in the dtype of the weight."""
        factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
        return self.weight * (x * factor).to(self.weight.dtype)


def random_table(rows: int, columns: int) -> nn.Embedding:
    """An embedding of uniform numbers: the normal ones of torch's own would import torch's compiler where they are
    meta tensors, which takes longer than to read a prompt."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, columns).uniform_(-1, 1))
    return table


def distance_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance in tokens (int64, to the right positive): T5's (arXiv 1910.10683, section 2.1).

    Half of them are for the left, half for the right; of each half the first half for one distance each, the others for
    ranges that grow by a factor up to `max_distance`, the last for all beyond.
    """
    side, far = buckets // 2, distance.abs()
    exact = side // 2
    growth = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (side - exact)
    wide = (exact + growth.long()).clamp(max=side - 1)
    return torch.where(far < exact, far, wide) + side * (distance > 0)


def make_text_encoder(facts: "TextFacts") -> TextEncoder:
    """An encoder of these sizes with random weights; build it under `torch.device("meta")` to fill it from a file."""
    return TextEncoder(facts).eval().requires_grad_(False)


@torch.no_grad()
def encode(model: TextEncoder, ids: Tensor, mask: Tensor, text_len: int = 512) -> Tensor:
    """Token ids and mask [B, n], n <= text_len -> text [B, text_len, dim] in the dtype of the model.

    Rows past the prompt are zeros (Wan2.1); padding may be left out of ids, it only costs time.
    """
    hidden = model(ids, mask).masked_fill(mask[..., None] == 0, 0)
    return F.pad(hidden, (0, 0, 0, text_len - ids.shape[1]))
