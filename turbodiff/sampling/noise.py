"""The noise of a seed: one stream for the start and for every SDE step."""

import torch
from torch import Tensor


class Noise:
    """A seeded stream of float32 normal draws of one shape.

    On the CPU, the default, a seed means the same picture on every machine. With `device="cuda"` the stream is
    TurboDiffusion's own, which depends on the GPU; the draws then lie on that device.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self) -> Tensor:
        """The next draw, float32 of the shape, on the stream's device."""
        generator = self._generator
        return torch.randn(self.shape, generator=generator, dtype=torch.float32, device=generator.device)
