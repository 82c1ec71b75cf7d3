"""The linear layers of a Wan block, plain and INT8, with one signature: `make_linear(in, out, quant)`, `layer(x)`."""

import torch
from torch import Tensor, nn
from turbodiff_kernels.gemm import int8_matmul
from turbodiff_kernels.quant import quantize_tiles, tiles


class Linear(nn.Linear):
    """`x @ weight.T + bias` in the dtype of the weight; x [..., in] -> [..., out]."""


class Int8Linear(nn.Module):
    """The same with the weight stored as INT8 tiles of 128 x 128 (TurboDiffusion's `quant_linear` files).

    int8_weight int8 [out, in]; scale float32 [ceil(out / 128), ceil(in / 128)]; bias [out] in the dtype of the model.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        grid = (tiles(out_features), tiles(in_features))
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(grid, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x, quantised on the way in tiles of 128 tokens x 128 channels."""
        x8, x_scale = quantize_tiles(x.flatten(0, -2))
        y = int8_matmul(x8, x_scale, self.int8_weight, self.scale, x.dtype)
        return y.add_(self.bias.to(x.dtype)).view(*x.shape[:-1], -1)


def make_linear(in_features: int, out_features: int, quant: bool) -> Linear | Int8Linear:
    """A linear layer of a block, INT8 when `quant`."""
    return Int8Linear(in_features, out_features) if quant else Linear(in_features, out_features)


@torch.no_grad()
def to_int8(layer: Linear) -> Int8Linear:
    """The layer with its weight in INT8 tiles: what TurboDiffusion's -quant files hold for the same weight."""
    with torch.device("meta"):
        quantised = Int8Linear(layer.in_features, layer.out_features)
    quantised.int8_weight, quantised.scale = quantize_tiles(layer.weight)
    quantised.bias = layer.bias
    return quantised.requires_grad_(False)


def quantize_blocks(dit: nn.Module) -> nn.Module:
    """Every `Linear` below the blocks of a transformer becomes INT8, one at a time; the transformer is changed."""
    for module in list(dit.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, to_int8(child))
    return dit
