"""The Wan2.1 VAE under its original parameter names, with a forward made for fast training on a CPU.

Equal to the published streaming VAE (checked in tests/demo against the reference tensors), but whole clips go
through at once, and every causal 3-D convolution is one 2-D convolution over the stacked past frames
(channels-last, bfloat16 friendly). Layout: Wan2.1, `vae.py`; dim_mult [1, 2, 4, 4], 2 residual blocks.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Z_DIM = 16
MULT = (1, 2, 4, 4)


def _past(x: Tensor, count: int) -> list[Tensor]:
    """`x` [B, T, C, H, W] delayed by count-1 .. 0 frames, zeros before the first."""
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, count - 1, 0))
    return [padded[:, i : i + x.shape[1]] for i in range(count)]


class CausalConv(nn.Module):
    """A (kt, k, k) convolution over [B, T, C, H, W] that sees only the past."""

    def __init__(self, inner: int, outer: int, kt: int, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outer, inner, kt, k, k))
        self.bias = nn.Parameter(torch.zeros(outer))
        nn.init.kaiming_normal_(self.weight[:, :, -1], nonlinearity="linear")
        with torch.no_grad():
            self.weight[:, :, :-1] = 0  # starts as a picture network; time is learned on top

    def forward(self, x: Tensor) -> Tensor:
        kt, k = self.weight.shape[2], self.weight.shape[3]
        batch, frames = x.shape[:2]
        if kt == 1 or frames == 1:
            return _conv2d(x.flatten(0, 1), self.weight[:, :, -1], self.bias, k // 2).unflatten(0, (batch, frames))
        stacked = torch.cat(_past(x, kt), dim=2).flatten(0, 1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        return _conv2d(stacked, weight, self.bias, k // 2).unflatten(0, (batch, frames))


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: int, stride: int = 1) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias.to(x.dtype), stride, padding)


class Norm(nn.Module):
    """Channel RMS norm: x / |x| * sqrt(C) * gamma over dim -3."""

    def __init__(self, dim: int, video: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, 1) if video else torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(dim=-3, keepdim=True, dtype=torch.float32) + 1e-12).to(x.dtype)
        return x * scale * self.gamma.flatten()[:, None, None].to(x.dtype)


class Residual(nn.Module):
    """Norm, SiLU, conv, twice, plus the input (through a 1x1x1 `shortcut` where widths differ)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": Norm(inner),
                "2": CausalConv(inner, outer, 3, 3),
                "3": Norm(outer),
                "6": CausalConv(outer, outer, 3, 3),
            }
        )
        self.shortcut = CausalConv(inner, outer, 1, 1) if inner != outer else None
        with torch.no_grad():
            self.residual["6"].weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual["2"](F.silu(self.residual["0"](x)))
        y = self.residual["6"](F.silu(self.residual["3"](y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """Single-head attention inside each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = Norm(dim, video=False)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, _dim, height, width = x.shape
        qkv = self.to_qkv(self.norm(x).flatten(0, 1)).flatten(2).transpose(1, 2)
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj(y).unflatten(0, (batch, frames))


class Down(nn.Module):
    """Halve height and width; with `time` also halve the frames after the first."""

    def __init__(self, dim: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3)})
        self.time_conv = CausalConv(dim, dim, 3, 1) if time else None
        if self.time_conv is not None:
            with torch.no_grad():
                self.time_conv.weight[:, :, -1, 0, 0] = torch.eye(dim)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.resample["1"]
        y = _conv2d(F.pad(x.flatten(0, 1), (0, 1, 0, 1)), conv.weight, conv.bias, 0, stride=2).unflatten(0, x.shape[:2])
        if self.time_conv is None or y.shape[1] == 1:
            return y
        return torch.cat((y[:, :1], self.time_conv(y)[:, 2::2]), dim=1)


class Up(nn.Module):
    """Double height and width and halve the channels; with `time` also double the frames after the first."""

    def __init__(self, dim: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim // 2, 3, padding=1)})
        self.time_conv = CausalConv(dim, dim * 2, 3, 1) if time else None
        if self.time_conv is not None:
            with torch.no_grad():
                self.time_conv.weight[:, :, -1, 0, 0] = torch.cat((torch.eye(dim), torch.eye(dim)))

    def forward(self, x: Tensor) -> Tensor:
        if self.time_conv is not None and x.shape[1] > 1:
            # The published code starts this convolution afresh at the second latent frame.
            pairs = self.time_conv(x[:, 1:]).unflatten(2, (2, x.shape[2])).flatten(1, 2)
            x = torch.cat((x[:, :1], pairs), dim=1)
        conv = self.resample["1"]
        big = F.interpolate(x.flatten(0, 1), scale_factor=2, mode="nearest")
        return _conv2d(big, conv.weight, conv.bias, 1).unflatten(0, x.shape[:2])


def _middle(dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": Residual(dim, dim), "1": Attention(dim), "2": Residual(dim, dim)})


def _head(dim: int, outer: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": Norm(dim), "2": CausalConv(dim, outer, 3, 3)})


class Half(nn.Module):
    """The encoder or the decoder: conv1, stages and middle in either order, head."""

    def __init__(self, base: int, decode: bool) -> None:
        super().__init__()
        self.decode = decode
        widths = [base * m for m in (1, *MULT)]
        widths = [base * m for m in (MULT[-1], *reversed(MULT))] if decode else widths
        self.conv1 = CausalConv(Z_DIM if decode else 3, widths[0], 3, 3)
        stages: list[nn.Module] = []
        for level, (inner, outer) in enumerate(itertools.pairwise(widths)):
            inner = inner // 2 if decode and level > 0 else inner
            blocks = 3 if decode else 2
            stages += [Residual(inner if i == 0 else outer, outer) for i in range(blocks)]
            if level < 3:
                stages.append(Up(outer, time=level < 2) if decode else Down(outer, time=level > 0))
        setattr(self, "upsamples" if decode else "downsamples", nn.ModuleList(stages))
        self.middle = _middle(widths[0] if decode else widths[-1])
        self.head = _head(widths[-1], 3 if decode else 2 * Z_DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        middle = list(self.middle.values())
        layers = [*middle, *self.upsamples] if self.decode else [*self.downsamples, *middle]
        for layer in layers:
            x = layer(x)
        return self.head["2"](F.silu(self.head["0"](x)))


class WanVAE(nn.Module):
    """Encoder and decoder over [B, T, C, H, W]; latents are raw here, standard constants are folded in at export."""

    def __init__(self, base: int = 16) -> None:
        super().__init__()
        self.encoder, self.decoder = Half(base, decode=False), Half(base, decode=True)
        self.conv1, self.conv2 = CausalConv(2 * Z_DIM, 2 * Z_DIM, 1, 1), CausalConv(Z_DIM, Z_DIM, 1, 1)

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 4k+1, 3, H, W] in [-1, 1] -> latent means [B, k+1, 16, H/8, W/8]."""
        return self.conv1(self.encoder(video))[:, :, :Z_DIM]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, k+1, 16, h, w] -> video [B, 4k+1, 3, 8h, 8w], not clamped."""
        return self.decoder(self.conv2(latents))
