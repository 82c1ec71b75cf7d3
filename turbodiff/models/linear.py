"""The linear layers of a Wan block, 16-bit and INT8, and what a block does around them, with one signature.

A block speaks to both kinds alike: `take` makes the input once for several layers, a call multiplies it, `gelu` and
`add_to` multiply and go on. An INT8 layer answers with fused passes and hands INT8 rows on; it knows no gradients.
"""

import os
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels import norm
from turbodiff_kernels.gemm import int8_linear, int8_linear_add_, int8_linear_quantize
from turbodiff_kernels.quant import TILE, dequantize_tiles, quantize_tiles, quantize_tokens, tiles

from turbodiff.spec.errors import RequestError

PART_TOKENS = 64 * TILE  # tokens whose wide rows exist in 16 bits at a time
INT8_VARIABLE = "TURBODIFF_INT8"

Int8Mode = Literal["tiles", "tokens"]


class Int8Rows(NamedTuple):
    """Tokens [B, L, in] as INT8: values int8 [B * L, in], their scales, and the B, L and dtype they came with."""

    values: Tensor
    scale: Tensor
    batch: int
    dtype: torch.dtype


class Linear(nn.Linear):
    """`x @ weight.T + bias` in the dtype of the weight; x [B, L, in] -> [B, L, out]."""

    def take(self, x: Tensor) -> Tensor:
        """Input for this layer and for others like it: the tokens as they are."""
        return x

    def take_modulated(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """`take(layer_norm(x) * (1 + scale) + shift)`, shift and scale float32 [B, 1, in]."""
        return norm.norm_modulate(x, shift, scale, eps)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU (tanh) of the product, as input for the next layer."""
        y = self(x)
        return F.gelu(y, approximate="tanh") if torch.is_grad_enabled() else torch.ops.aten.gelu_(y, approximate="tanh")

    def add_to(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        """`x + gate * (y @ weight.T + bias)`, x [B, L, out], gate [B, 1, out]; without gradients x is overwritten."""
        if gate is not None:
            return norm.residual_add_(x, self(y), gate)
        return x + self(y).to(x.dtype) if torch.is_grad_enabled() else x.add_(self(y))


class Int8Linear(nn.Module):
    """The same with the weight stored as INT8; the shape of the scales says which of two modes.

    Tiles of 128 x 128, as in TurboDiffusion's `quant_linear` files: scale float32 [ceil(out / 128), ceil(in / 128)],
    tokens quantised in such tiles too. Rows, the fast mode: scale float32 [out], one scale per token.
    int8_weight int8 [out, in]; bias [out] in the dtype of the model.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        grid = (tiles(out_features), tiles(in_features))
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(grid, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features))

    @property
    def tiled(self) -> bool:
        """Whether the scales are those of tiles, and not of rows."""
        return self.scale.dim() == 2

    def forward(self, x: Tensor | Int8Rows) -> Tensor:
        """x [..., in] or what `take` made of it -> [..., out] in the dtype of x."""
        rows = self.take(x) if isinstance(x, Tensor) else x
        y = int8_linear(rows.values, rows.scale, *self._weight, rows.dtype)
        return y.view(*(x.shape[:-1] if isinstance(x, Tensor) else (rows.batch, -1)), self.out_features)

    def take(self, x: Tensor) -> Int8Rows:
        """Tokens [..., in] quantised once for several layers of one mode."""
        quantize = quantize_tiles if self.tiled else quantize_tokens
        return Int8Rows(*quantize(x.flatten(0, -2)), len(x), x.dtype)

    def take_modulated(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Int8Rows:
        """`take(layer_norm(x) * (1 + scale) + shift)`; in the fast mode the normed tokens never reach memory."""
        if self.tiled:
            return self.take(norm.norm_modulate(x, shift, scale, eps))
        values, step = norm.norm_modulate_quantize(x, shift, scale, eps)
        return Int8Rows(values.flatten(0, 1), step.flatten(), len(x), x.dtype)

    def gelu(self, x: Int8Rows) -> Int8Rows:
        """GELU (tanh) of the product, quantised for the next layer; few of the wide rows are ever 16 bits in memory."""
        if self.tiled:
            tiles_of = int8_linear_quantize(x.values, x.scale, *self._weight, x.dtype, True)
            return Int8Rows(*tiles_of, x.batch, x.dtype)
        values = x.values.new_empty(len(x.values), self.out_features)
        scale = x.scale.new_empty(len(x.values))
        for first in range(0, len(values), PART_TOKENS):
            part = slice(first, first + PART_TOKENS)
            wide = int8_linear(x.values[part], x.scale[part], *self._weight, x.dtype, True)
            values[part], scale[part] = quantize_tokens(wide)
        return Int8Rows(values, scale, x.batch, x.dtype)

    def add_to(self, x: Tensor, y: Tensor | Int8Rows, gate: Tensor | None = None) -> Tensor:
        """`x += gate * (y @ weight.T + bias)`, x [B, L, out] overwritten and returned, gate [B, 1, out]."""
        rows = self.take(y) if isinstance(y, Tensor) else y
        gate = x.new_ones(1, 1, self.out_features) if gate is None else gate
        return int8_linear_add_(x, gate, rows.values, rows.scale, *self._weight)

    @property
    def _weight(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.int8_weight, self.scale, self.bias


class SideBranch(nn.Module):
    """An INT8 layer and a low-rank change beside it, `layer(x) + up @ down @ x`: how INT8 weights wear a LoRA.

    down [rank, in], up [out, rank] in the dtype of the layer's bias. The branch reads what the layer reads: INT8 rows.
    """

    def __init__(self, layer: Int8Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(down.to(layer.bias.dtype), requires_grad=False)
        self.up = nn.Parameter(up.to(layer.bias.dtype), requires_grad=False)

    def take(self, x: Tensor) -> Int8Rows:
        """As the layer takes it."""
        return self.layer.take(x)

    def take_modulated(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Int8Rows:
        """As the layer takes it."""
        return self.layer.take_modulated(x, shift, scale, eps)

    def forward(self, x: Tensor | Int8Rows) -> Tensor:
        """x [..., in] or what `take` made of it -> [..., out] in the dtype of x."""
        rows = self.take(x) if isinstance(x, Tensor) else x
        y = self.layer(rows)
        y.view(-1, y.shape[-1]).add_(self._change(rows))
        return y.view(*x.shape[:-1], -1) if isinstance(x, Tensor) else y

    def gelu(self, x: Int8Rows) -> Tensor:
        """GELU (tanh) of the product; the next layer quantises it."""
        return F.gelu(self(x), approximate="tanh")

    def add_to(self, x: Tensor, y: Tensor | Int8Rows, gate: Tensor | None = None) -> Tensor:
        """`x += gate * (layer(y) + up @ down @ y)`, x [B, L, out] overwritten and returned, gate [B, 1, out]."""
        rows = self.take(y) if isinstance(y, Tensor) else y
        change = self._change(rows).view_as(x)
        return self.layer.add_to(x, rows, gate).add_(change if gate is None else change * gate.to(x.dtype))

    def _change(self, rows: Int8Rows) -> Tensor:
        """[B * L, out] in the dtype of the tokens; whole tiles at a time, so that few of them are ever wide."""
        parts = []
        for start in range(0, len(rows.values), PART_TOKENS):
            values = rows.values[start : start + PART_TOKENS]
            if self.layer.tiled:
                x = dequantize_tiles(values, rows.scale[start // TILE :][: tiles(len(values))])
            else:
                x = values * rows.scale[start : start + PART_TOKENS, None]
            parts.append(F.linear(x.to(self.down.dtype), self.down))
        return F.linear(torch.cat(parts), self.up).to(rows.dtype)


def make_linear(in_features: int, out_features: int, quant: bool) -> Linear | Int8Linear:
    """A linear layer of a block, INT8 when `quant`."""
    return Int8Linear(in_features, out_features) if quant else Linear(in_features, out_features)


def to_int8(layer: Linear) -> Int8Linear:
    """The layer with its weight in INT8 tiles: what TurboDiffusion's -quant files hold for the same weight."""
    return _int8_layer(layer, *quantize_tiles(layer.weight.detach()))


def to_fast_int8(layer: Linear | Int8Linear) -> Int8Linear:
    """The layer with one scale per output channel, from a 16-bit weight or from tiles; a fast layer as it is."""
    if isinstance(layer, Linear):
        return _int8_layer(layer, *quantize_tokens(layer.weight.detach()))
    if layer.tiled:
        layer.int8_weight, layer.scale = quantize_tokens(dequantize_tiles(layer.int8_weight, layer.scale))
    return layer


def int8_mode() -> Int8Mode:
    """How INT8 layers scale, by $TURBODIFF_INT8: "tiles", TurboDiffusion's numbers on every card, or "tokens".

    Raises:
        RequestError: it is neither.
    """
    mode = os.environ.get(INT8_VARIABLE) or "tiles"
    if mode not in get_args(Int8Mode):
        raise RequestError(
            "an INT8 mode that does not exist",
            code="bad_int8_mode",
            field=INT8_VARIABLE,
            got=mode,
            expected=" | ".join(get_args(Int8Mode)),
            try_instead=f"{INT8_VARIABLE}=tiles",
        )
    return mode  # type: ignore[return-value]


def int8_blocks(dit: nn.Module) -> nn.Module:
    """The linear layers below the blocks in INT8, in the mode that this process was started with."""
    return fast_int8_(dit) if int8_mode() == "tokens" else quantize_blocks(dit)


def quantize_blocks(dit: nn.Module) -> nn.Module:
    """Every `Linear` below the blocks of a transformer becomes INT8, one at a time; the transformer is changed."""
    return _convert(dit, Linear, to_int8)


def fast_int8_(dit: nn.Module) -> nn.Module:
    """Every linear layer below the blocks goes into the fast INT8 mode, one at a time; the transformer is changed.

    It takes plain weights and INT8 files alike; from a file each weight is rounded a second time, by half a step of
    its row at most. Another rounding than TurboDiffusion's tiles: a seed gives a slightly other clip.
    """
    return _convert(dit, (Linear, Int8Linear), to_fast_int8)


def _int8_layer(layer: Linear, values: Tensor, scale: Tensor) -> Int8Linear:
    with torch.device("meta"):
        quantised = Int8Linear(layer.in_features, layer.out_features)
    quantised.int8_weight, quantised.scale, quantised.bias = values, scale, layer.bias
    return quantised.requires_grad_(False)


@torch.no_grad()
def _convert(dit: nn.Module, kinds: type | tuple[type, ...], convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for module in list(dit.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds):
                setattr(module, name, convert(child))
    return dit
