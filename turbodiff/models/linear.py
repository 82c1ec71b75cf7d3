"""The linear layers of a Wan block, 16-bit and INT8, and what a block does around them.

`norm_modulate`, `quantize_input`, `linear_gelu` and `residual_add_` are the steps of a block, named after their maths.
They take the layer that the step leads into or out of: an INT8 layer gets fused passes, and its input as INT8 rows.
INT8 layers know no gradients.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels import norm
from turbodiff_kernels.gemm import int8_linear, int8_linear_add_, int8_linear_quantize
from turbodiff_kernels.quant import (
    TILE,
    dequantize_tiles,
    quantize_tiles,
    quantize_tokens,
    quantize_tokens_into_,
    tiles,
)

from turbodiff.spec.errors import RequestError
from turbodiff.spec.shapes import FLOAT32_ELEMENTS, INT8_PART_TOKENS

INT8_VARIABLE = "TURBODIFF_INT8"
HIDDEN_PART_TOKENS = 16 * TILE  # whose hidden values in 16 bits (37-57 MB) stay in the L2 cache of a 4090 (72 MB)
HIDDEN_COLUMNS = 2304  # 17 MiB for 2,000 tokens: the last cache of a server; whole products stay as fast
BAND_ROWS = TILE  # of a weight that are wide at a time while it is quantised

Int8Mode = Literal["tiles", "tokens"]
Network = TypeVar("Network", bound=nn.Module)


class Int8Rows(NamedTuple):
    """Tokens [B, L, in] as INT8: values int8 [B * L, in], their scales, and the B and dtype they came with."""

    values: Tensor
    scale: Tensor
    batch: int
    dtype: torch.dtype


class Linear(nn.Linear):
    """`x @ weight.T + bias` in the dtype of the weight; a layer of a block, which `int8_blocks` may replace."""


class Int8Linear(nn.Module):
    """The same with the weight stored as INT8; the shape of the scales says which of two modes.

    Tiles of 128 x 128, as in TurboDiffusion's `quant_linear` files: scale float32 [ceil(out / 128), ceil(in / 128)],
    tokens quantised in such tiles too. Rows, the fast mode: scale float32 [out], one scale per token.
    int8_weight int8 [out, in]; bias [out] in the dtype of the model.

    A LoRA is a low-rank branch beside the weight, `layer(x) + up @ down @ x`: down [rank, in], up [out, rank], or None.
    """

    int8_weight: Tensor
    scale: Tensor
    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        grid = (tiles(out_features), tiles(in_features))
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(grid, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.register_parameter("down", None)
        self.register_parameter("up", None)

    @property
    def tiled(self) -> bool:
        """Whether the scales are those of tiles, and not of rows."""
        return self.scale.dim() == 2

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the fused products take: the integers, their scales, the bias."""
        return self.int8_weight, self.scale, self.bias

    def forward(self, x: Tensor | Int8Rows) -> Tensor:
        """x [..., in] or what `quantize_input` made of it -> [..., out] in the dtype of x."""
        rows = self.quantize_input(x)
        y = int8_linear(rows.values, rows.scale, *self.weights, rows.dtype)
        if self.down is not None:
            y.add_(self.low_rank(rows))
        return y.view(*(x.shape[:-1] if isinstance(x, Tensor) else (rows.batch, -1)), self.out_features)

    def quantize_input(self, x: Tensor | Int8Rows) -> Int8Rows:
        """Tokens [..., in] as INT8, once for several layers of one mode; rows as they are."""
        if isinstance(x, Int8Rows):
            return x
        values, scale = quantize_tiles(x.flatten(0, -2)) if self.tiled else quantize_tokens(x.flatten(0, -2))
        return Int8Rows(values, scale, len(x), x.dtype)

    def add_low_rank(self, down: Tensor, up: Tensor) -> None:
        """Put a low-rank branch beside the weight, in the dtype of the bias."""
        self.down, self.up = (nn.Parameter(t.to(self.bias.dtype), requires_grad=False) for t in (down, up))

    def low_rank(self, rows: Int8Rows) -> Tensor:
        """`up @ down @ x` [B * L, out] in the dtype of the tokens; few of the rows are ever wide at a time."""
        assert self.down is not None and self.up is not None
        parts = []
        for start in range(0, len(rows.values), INT8_PART_TOKENS):
            values = rows.values[start : start + INT8_PART_TOKENS]
            if self.tiled:
                x = dequantize_tiles(values, rows.scale[start // TILE :][: tiles(len(values))])
            else:
                x = values * rows.scale[start : start + INT8_PART_TOKENS, None]
            parts.append(F.linear(x.to(self.down.dtype), self.down))
        return F.linear(torch.cat(parts), self.up).to(rows.dtype)


BlockLinear: TypeAlias = Linear | Int8Linear


def quantize_input(x: Tensor, layer: BlockLinear) -> Tensor | Int8Rows:
    """`x` as `layer` and layers like it take it: INT8 rows, or the tokens as they are."""
    return layer.quantize_input(x) if isinstance(layer, Int8Linear) else x


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, layer: BlockLinear) -> Tensor | Int8Rows:
    """`layer_norm(x) * (1 + scale) + shift` as input of `layer`; shift and scale float32 [B, 1, in].

    In the fast INT8 mode the normed tokens never reach memory.
    """
    if not isinstance(layer, Int8Linear) or layer.tiled:
        return quantize_input(norm.norm_modulate(x, shift, scale, eps), layer)
    values, step = norm.norm_modulate_quantize(x, shift, scale, eps)
    return Int8Rows(values.flatten(0, 1), step.flatten(), len(x), x.dtype)


def linear_gelu(x: Tensor | Int8Rows, layer: BlockLinear) -> Tensor | Int8Rows:
    """`gelu(layer(x))` (tanh) as input of the next layer; in INT8 few of the wide rows are ever 16 bits in memory."""
    if not isinstance(layer, Int8Linear):
        y = layer(x)
        return F.gelu(y, approximate="tanh") if torch.is_grad_enabled() else torch.ops.aten.gelu_(y, approximate="tanh")
    if layer.down is not None:
        return F.gelu(layer(x), approximate="tanh")
    rows = layer.quantize_input(x)
    if layer.tiled:
        return Int8Rows(
            *int8_linear_quantize(rows.values, rows.scale, *layer.weights, rows.dtype, True), rows.batch, rows.dtype
        )
    values = rows.values.new_empty(len(rows.values), layer.out_features)
    scale = rows.scale.new_empty(len(rows.values))
    for first in range(0, len(values), HIDDEN_PART_TOKENS):
        part = slice(first, first + HIDDEN_PART_TOKENS)
        wide = int8_linear(rows.values[part], rows.scale[part], *layer.weights, rows.dtype, True)
        quantize_tokens_into_(values[part], scale[part], wide)
    return Int8Rows(values, scale, rows.batch, rows.dtype)


def residual_add_(x: Tensor, layer: BlockLinear, y: Tensor | Int8Rows, gate: Tensor | None = None) -> Tensor:
    """`x + gate * layer(y)`: tokens x [B, L, out], gate [B, 1, out] or 1; without gradients x is overwritten."""
    if not isinstance(layer, Int8Linear):
        if gate is not None:
            return norm.residual_add_(x, layer(y), gate)
        return x + layer(y).to(x.dtype) if torch.is_grad_enabled() else x.add_(layer(y))
    rows = layer.quantize_input(y)
    branch = None if layer.down is None else layer.low_rank(rows).view_as(x)
    if branch is not None and gate is not None:  # before x is touched: an out-of-memory leaves all of it or nothing
        branch.mul_(gate.to(x.dtype))
    by = x.new_ones(1, 1, layer.out_features) if gate is None else gate
    int8_linear_add_(x, by, rows.values, rows.scale, *layer.weights)
    return x if branch is None else x.add_(branch)


def feed_forward_(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, eps: float, first: BlockLinear, second: BlockLinear
) -> Tensor:
    """`x + gate * second(gelu(first(norm_modulate(x))))`; without gradients x is overwritten, as a whole or not at all.

    On a CPU, where memory is slow, all hidden values never exist at once: HIDDEN_COLUMNS of each token are made, and
    their share of the second product is added to that of those before.
    """
    here = x.device.type == "cpu" and x.dtype == torch.float32
    here = here and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if not here or isinstance(first, Int8Linear) or isinstance(second, Int8Linear):
        hidden = linear_gelu(norm_modulate(x, shift, scale, eps, first), first)
        return residual_add_(x, second, hidden, gate)
    y = norm.norm_modulate(x, shift, scale, eps).flatten(0, 1)
    total = second.bias.repeat(len(y), 1)
    columns = (t.split(HIDDEN_COLUMNS, dim=-1) for t in (first.weight.T, first.bias, second.weight))
    for inward, bias, outward in zip(*columns, strict=True):
        total.addmm_(torch.ops.aten.gelu_(torch.addmm(bias, y, inward), approximate="tanh"), outward.T)
    return norm.residual_add_(x, total.view_as(x), gate)


def make_linear(in_features: int, out_features: int, quant: bool) -> BlockLinear:
    """A linear layer of a block, INT8 when `quant`."""
    return Int8Linear(in_features, out_features) if quant else Linear(in_features, out_features)


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
    return cast(Int8Mode, mode)


@torch.no_grad()
def int8_blocks(dit: Network, mode: Int8Mode | None = None) -> Network:
    """The linear layers below the blocks in INT8, one at a time, by default in `int8_mode`; the network is changed."""
    for path, make in int8_layers(dit, mode).items():
        parent, _, name = path.rpartition(".")
        setattr(dit.get_submodule(parent), name, make(dit.get_submodule(path)))
    return dit


def int8_layers(dit: nn.Module, mode: Int8Mode | None = None) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """The layers below the blocks that INT8 changes, by name: what turns each into its INT8 layer."""
    made = partial(to_int8, mode=mode or int8_mode())
    changed = {
        name: cast(Callable[[nn.Module], nn.Module], made)
        for name, layer in dit.named_modules()
        if name.startswith("blocks.") and isinstance(layer, BlockLinear)
        and not (isinstance(layer, Int8Linear) and (not layer.tiled or made.keywords["mode"] == "tiles"))
    }  # fmt: skip
    return changed


@torch.no_grad()
def to_int8(layer: BlockLinear, mode: Int8Mode) -> Int8Linear:
    """The layer with its weight in INT8: tiles, what TurboDiffusion's -quant files hold for it, or one scale per row.

    A layer in tiles becomes one of rows too: each weight is rounded a second time, by half a step of its row at most.
    Another rounding than TurboDiffusion's tiles: a seed gives a slightly other clip.
    """
    if isinstance(layer, Int8Linear):
        if mode == "tokens" and layer.tiled:
            layer.int8_weight, layer.scale = _quantized(layer.int8_weight, layer.scale, quantize_tokens)
        return layer
    with torch.device("meta"):
        quantised = Int8Linear(layer.in_features, layer.out_features)
    quantise = quantize_tiles if mode == "tiles" else quantize_tokens
    quantised.int8_weight, quantised.scale = _quantized(layer.weight.detach(), None, quantise)
    quantised.bias = layer.bias
    return quantised.requires_grad_(False)


def _quantized(
    weight: Tensor, scale: Tensor | None, quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A weight [out, in], or one in tiles with their scales, in INT8: band by band, so that no more than a band of it
    is ever wide in memory."""
    values, scales = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), []
    for first in range(0, len(weight), BAND_ROWS):
        band = weight[first : first + BAND_ROWS]
        if scale is not None:
            band = dequantize_tiles(band, scale[first // TILE : -(-(first + len(band)) // TILE)])
        values[first : first + len(band)], part = quantise(band)
        scales.append(part)
    return values, torch.cat(scales)


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32 whatever its dtype and whatever autocast says: the time path and the head are that fine.

    Of a 16-bit weight FLOAT32_ELEMENTS at most are float32 at a time: all of Wan 14B's time projection were 629 MB.
    """
    device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"  # meta tensors have none
    with torch.autocast(device, enabled=False):
        rows = max(1, FLOAT32_ELEMENTS // layer.in_features)
        if layer.weight.dtype == torch.float32 or rows >= layer.out_features:
            return F.linear(x.float(), layer.weight.float(), layer.bias.float())
        parts = zip(layer.weight.split(rows), layer.bias.split(rows), strict=True)
        return torch.cat([F.linear(x.float(), weight.float(), bias.float()) for weight, bias in parts], dim=-1)
