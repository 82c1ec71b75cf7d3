"""The VAE's convolutions in float32 on a CPU, where products cost the most: the same sums from fewer of them.

Over time by Winograd's F(2, 3): two frames of a convolution of three frames cost four convolutions in two dimensions
and not six (arXiv 1509.09308). In space by phases: a picture that is made twice as large by repeating its pixels, then
convolved, has four kinds of pixels, each of which sees 2 x 2 pixels and not 3 x 3. In 16 bits sums of weights and of
frames would be rounded, so this is for float32 alone.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 2  # frames that a temporal convolution sees beside the newest
# what the taps at -1, 0, 1 of a large picture are to the two rows that a pixel of it sees, of even pixels and of odd
PHASES = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


class FramePairs:
    """The last frames that a temporal convolution was given, one by one or in pairs, and how many there were."""

    def __init__(self) -> None:
        self.count, self._new, self._frames = 0, 0, list[Tensor]()

    def next(self, like: Tensor) -> Tensor:
        """Where to write the next frames [1 or 2, C, H, W], which are like these."""
        given = torch.empty_like(like, memory_format=torch.channels_last)
        self.count, self._new = self.count + len(like), len(like)
        self._frames = [*self._frames[-KEPT:], *given.split(1)]
        return given

    def conv(self, layer: nn.Conv3d, bias: Tensor | None) -> Tensor:
        """The convolution's frames at those that were given last; what is before the first are zeros."""
        taps, frames = layer.weight.unbind(2), self._frames
        conv = partial(F.conv2d, padding=[size // 2 for size in layer.kernel_size[1:]])
        if self._new == 1:
            out = conv(frames[-1], taps[-1], bias)
            for frame, tap in zip(frames[-2::-1], taps[-2::-1], strict=False):
                out.add_(conv(frame, tap))
        else:
            missing = [torch.zeros_like(frames[0])] * (KEPT + 2 - len(frames))
            a, b, c, d = *missing, *frames
            outer = taps[0] + taps[2]
            even, odd = conv(b + c, (outer + taps[1]) / 2, bias), conv(c - b, (outer - taps[1]) / 2)
            out = torch.empty((2, *even.shape[1:]), memory_format=torch.channels_last)
            torch.add(even, odd, out=out[:1])
            torch.sub(even, odd, out=out[1:])
            del even, odd
            out[:1].add_(conv(a - c, taps[0]))
            out[1:].sub_(conv(b - d, taps[2]))
        self._frames = frames[-KEPT:]
        return out


def upsample_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Pictures [n, C, h, w], each pixel repeated 2 x 2, then convolved 3 x 3: [n, O, 2h, 2w]."""
    (n, _, rows, columns), channels = x.shape, layer.out_channels
    phases = torch.tensor(PHASES)
    weight = torch.einsum("pat,qbs,oits->pqoiab", phases, phases, layer.weight).flatten(0, 2)
    bias = None if layer.bias is None else layer.bias.repeat(4)
    y = F.conv2d(x, weight, bias, padding=1).unflatten(1, (2, 2, channels))
    out = torch.empty((n, channels, 2 * rows, 2 * columns), memory_format=torch.channels_last)
    for p in (0, 1):
        for q in (0, 1):
            out[:, :, p::2, q::2] = y[:, p, q, :, p : p + rows, q : q + columns]
    return out
