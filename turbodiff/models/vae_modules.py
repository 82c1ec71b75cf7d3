"""Where the parameters of the Wan2.1 VAE hang: names and shapes of diffusers' AutoencoderKLWan, no maths (vae.py).

diffusers itself is not imported: that takes over a second, and a cold clip waits for it.
"""

from itertools import pairwise

import torch
from torch import nn

RGB = 3
HALVES_TIME = (False, True, True)  # whether a level of the encoder halves time as well, first to last
# of each latent channel over the training set (Wan2.1)
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class Norm(nn.Module):
    """`x / |x| * sqrt(C) * gamma` over the channels; gamma [C, 1, ...], as many axes as the file has."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))


class Residual(nn.Module):
    """Two normed convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(channels), nn.Conv3d(channels, out, 3)
        self.norm2, self.conv2 = Norm(out), nn.Conv3d(out, out, 3)
        self.conv_shortcut = nn.Identity() if channels == out else nn.Conv3d(channels, out, 1)


class Attention(nn.Module):
    """One head of all channels over the pixels of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, axes=2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)


class Middle(nn.Module):
    """What sees the whole picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList(Residual(channels, channels) for _ in range(2))


class Down(nn.Module):
    """Half the picture and, with `time`, half the frames."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if time:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1))


class Up(nn.Module):
    """A picture twice as large with half the channels and, with `time`, twice the frames."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels // 2, 3, padding=1))
        if time:
            self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1))


class Level(nn.Module):
    """Residual blocks of one size of the picture, and the way to the next where there is one."""

    def __init__(self, channels: int, out: int, blocks: int, up: Up | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(out if block else channels, out) for block in range(blocks))
        if up is not None:
            self.upsamplers = nn.ModuleList([up])


class Encoder(nn.Module):
    """Frames to mean and log variance of latents."""

    def __init__(self, widths: list[int], z_dim: int, blocks: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(RGB, widths[0], 3)
        layers: list[nn.Module] = []
        for level, (channels, out) in enumerate(pairwise([widths[0], *widths])):
            layers += [Residual(out if block else channels, out) for block in range(blocks)]
            layers += [Down(out, HALVES_TIME[level])] if level + 1 < len(widths) else []
        self.down_blocks, self.mid_block = nn.ModuleList(layers), Middle(widths[-1])
        self.norm_out, self.conv_out = Norm(widths[-1]), nn.Conv3d(widths[-1], 2 * z_dim, 3)


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, widths: list[int], z_dim: int, blocks: int) -> None:
        super().__init__()
        given, levels = widths[-1], list[Level]()
        self.conv_in, self.mid_block = nn.Conv3d(z_dim, given, 3), Middle(given)
        for level, out in enumerate(reversed(widths)):
            up = Up(out, HALVES_TIME[-1 - level]) if level + 1 < len(widths) else None
            levels.append(Level(given, out, blocks + 1, up))
            given = out // 2
        self.up_blocks = nn.ModuleList(levels)
        self.norm_out, self.conv_out = Norm(widths[0]), nn.Conv3d(widths[0], RGB, 3)


class Vae(nn.Module):
    """Both directions; base_dim 96 is the published width."""

    def __init__(self, base_dim: int, z_dim: int, dim_mult: tuple[int, ...], num_res_blocks: int) -> None:
        super().__init__()
        widths = [base_dim * times for times in dim_mult]
        self.encoder = Encoder(widths, z_dim, num_res_blocks)
        self.quant_conv, self.post_quant_conv = nn.Conv3d(2 * z_dim, 2 * z_dim, 1), nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(widths, z_dim, num_res_blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters."""
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.quant_conv.weight.device
