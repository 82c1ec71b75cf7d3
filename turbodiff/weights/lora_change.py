"""What a LoRA changes of one weight [out, in], as the formulas of its kinds. Tensors are read when they are needed.

LoRA: scale * up @ down (arXiv 2106.09685). LoHa: scale * (a1 @ b1) * (a2 @ b2) elementwise (arXiv 2108.06098). LoKr:
scale * kron(w1, w2) (arXiv 2309.14859). DoRA around any of them: the rows or columns of weight + change get the length
`magnitude` (arXiv 2402.09353). A core between the halves (`lora_mid`, `hada_t1`, `lokr_t2`: CP decomposition of a
convolution) is multiplied into the lower half. Everything is float32.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """Something that a LoRA does to a weight."""

    def of(self, weight: Tensor) -> Tensor:
        """What is added to a weight float32 [out, in] at strength 1, in its shape."""


class Pair(NamedTuple):
    """Low rank, `scale * up @ down`: down [rank, in], up [out, rank] as stored."""

    down: Tensor
    up: Tensor
    scale: float

    def product(self) -> Tensor:
        """The change [out, in]."""
        return (self.up.float() @ self.down.float()).mul_(self.scale)

    def of(self, weight: Tensor) -> Tensor:
        """The same for every weight."""
        return self.product()


class Hadamard(NamedTuple):
    """LoHa: two low-rank products, elementwise."""

    first: Pair
    second: Pair
    scale: float

    def of(self, weight: Tensor) -> Tensor:
        """The same for every weight."""
        return self.first.product().mul_(self.second.product()).mul_(self.scale)


class Kronecker(NamedTuple):
    """LoKr: each factor whole, or low rank as a pair."""

    first: Tensor | Pair
    second: Tensor | Pair
    scale: float

    def of(self, weight: Tensor) -> Tensor:
        """The same for every weight."""
        first, second = (
            factor.product() if isinstance(factor, Pair) else factor.float() for factor in (self.first, self.second)
        )
        return torch.kron(first, second).mul_(self.scale)


class Whole(NamedTuple):
    """A value that stands in place of the weight (PEFT's modules_to_save)."""

    value: Tensor

    def of(self, weight: Tensor) -> Tensor:
        """From the weight to the value."""
        return self.value.float().reshape(weight.shape) - weight


class Difference(NamedTuple):
    """A change of every number of a weight, as extractions write it."""

    value: Tensor

    def of(self, weight: Tensor) -> Tensor:
        """The same for every weight."""
        return self.value.float().reshape(weight.shape)


class Dora(NamedTuple):
    """A change around which the rows (or columns) of the sum get the length `magnitude` [out] (or [in])."""

    inner: Change
    magnitude: Tensor
    columns: bool

    def of(self, weight: Tensor) -> Tensor:
        """Of the network's own weight, whatever other LoRAs do to it: the order of LoRAs makes no difference."""
        total = weight + self.inner.of(weight)
        length = total.norm(dim=0 if self.columns else 1, keepdim=True)
        factor = self.magnitude.float().reshape(length.shape) / length
        return total.mul_(factor.masked_fill(length == 0, 1.0)).sub_(weight)
