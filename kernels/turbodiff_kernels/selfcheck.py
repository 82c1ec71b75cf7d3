"""Does a kernel compute on this very card what its reference computes? Small odd shapes, seconds, before first use.

Compilers, drivers and architectures that nobody tried are the rule; a kernel that is wrong there must not make a clip.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6
POISON_BYTES = (2**19,) * 16 + (2**24,)  # the allocator keeps small and large pieces apart


class Inputs(NamedTuple):
    """Reproducible tensors of one dtype on one device."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, the same on every device: a test here says that no choice of blocks hangs by a rounding."""
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.device, dtype or self.dtype)


def _heads(make: Inputs) -> list[Tensor]:
    """Queries, keys with a mean, values [1, 330, 2, 128]: views of one packed projection, as a block makes them.

    Each block of tokens has something in common, so that which blocks belong together is plain.
    """
    q, k, v = (t.unflatten(-1, (2, 128)) for t in make.randn(1, 330, 768).chunk(3, dim=-1))
    for t, block, seed in ((q, 128, 7), (k, 64, 8)):
        t.add_(make.randn(1, -(-330 // block), 2, 128, seed=seed).repeat_interleave(block, 1)[:, :330])
    return [q, k.add_(make.randn(2, 128, seed=1)), v]


def _projections(make: Inputs) -> list[Tensor | float]:
    """Queries, keys and values [1, 330, 256] before their norm, its weights, angles and epsilon."""
    angles = make.randn(330, 64, seed=6, dtype=torch.float32) / 8
    weights = [1 + make.randn(256, seed=seed) / 4 for seed in (4, 5)]
    return [*(t.flatten(2) for t in _heads(make)), *weights, angles.cos(), angles.sin(), EPS]


def results(op: str, m: ModuleType, make: Inputs) -> list[Tensor]:
    """What a module, kernel or reference, makes of the inputs of the check of `op`."""
    if op == "norm":
        x, y = make.randn(2, 65, 384)[:, 1:64], make.randn(2, 63, 384, seed=1)
        shift, scale = make.randn(2, 2, 384, seed=2, dtype=torch.float32).split(1, dim=1)
        weight, bias = make.randn(384, seed=3), make.randn(384, seed=4)
        angles = make.randn(63, 64, seed=5, dtype=torch.float32)
        rotated, normed, added = x.clone(), x.clone(), y.clone()
        m.rms_norm_rope_(rotated, weight, angles.cos(), angles.sin(), EPS)
        m.rms_norm_(normed, weight, EPS)
        m.residual_add_(added, x, shift)
        images = make.randn(3, 5, 7, 96).movedim(-1, 1)
        silu = m.rms_norm_silu(images, make.randn(96, seed=6))
        plain = [m.norm_modulate(x, shift, scale, EPS), m.layer_norm(x, weight, bias, EPS)]
        summed = x.clone()
        sums = m.rms_norm_rope_sum_(summed, weight, angles.cos(), angles.sin(), EPS)
        statistics = m.rope_statistics(x, weight, angles.cos(), angles.sin(), EPS)
        quantised = m.norm_modulate_quantize(x, shift, scale, EPS)
        return [*plain, *quantised, rotated, normed, added, silu, summed, sums, *statistics, m.rms_factor(x, EPS)]
    if op == "quant":
        x = make.randn(130, 200)
        return [*m.quantize_tiles(x), *m.quantize_tokens(x)]
    if op == "gemm":
        quant = import_module("turbodiff_kernels.quant.reference")
        a, b, bias = make.randn(130, 256), make.randn(272, 256, seed=1) / 16, make.randn(272, seed=2)
        gate, out = make.randn(2, 1, 272, seed=3, dtype=torch.float32), []
        for quantize in (quant.quantize_tiles, quant.quantize_tokens):
            matrices = *quantize(a), *quantize(b)
            residual = make.randn(2, 65, 272, seed=4)
            m.int8_linear_add_(residual, gate, *matrices, bias)
            out += [
                residual,
                m.int8_linear(*matrices, bias, make.dtype, True),
                m.int8_linear(*matrices, None, make.dtype),
            ]
        return out + [
            *m.int8_linear_quantize(*quant.quantize_tiles(a), *quant.quantize_tiles(b), bias, make.dtype, True)
        ]
    if op == "sage":
        return [m.sage_attention(*_heads(make)), m.normed_sage_attention_(*_projections(make))]
    more = (make.randn(128, 128, seed=2) / 11, make.randn(128, seed=3), 0.5, op == "sagesla")
    return [m.sla_attention(*_heads(make), *more), m.normed_sla_attention_(*_projections(make), *more)]


class Check(NamedTuple):
    """Folder of an operation, and the largest relative L2 difference between its kernel and its reference."""

    folder: str
    bound: float


# bounds: some roundings to bfloat16 (2^-9 each); with FP8 values three bits of mantissa, averaged over the keys
CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "norm": Check("norm", 0.01),
        "quant": Check("quant", 0.01),
        "gemm": Check("gemm", 0.01),
        "sage": Check("sage", 0.08),
        "sla": Check("sla", 0.02),
        "sagesla": Check("sla", 0.08),
    }
)


@torch.no_grad()
def difference(op: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """What is wrong with the numbers of the kernel of `op` on `device`; "" when it equals its reference.

    Raises:
        Exception: of any kind, where it could not be compiled or launched; nothing is known about its numbers then.
    """
    check, make = CHECKS[op], Inputs(device, dtype)
    modules = [import_module(f"turbodiff_kernels.{check.folder}.{kind}") for kind in ("kernel", "reference")]
    # freed at once, so that what a kernel is given next and forgets to write is NaN
    [torch.full((size // 4,), float("nan"), device=device) for size in POISON_BYTES].clear()
    got, expected = (results(op, module, make) for module in modules)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        distance = ((g.double() - e.double()).norm() / e.double().norm()).item()
        if not distance <= check.bound:
            return f"result {i} is off by {distance:.2g}, allowed {check.bound:.2g}"
    return ""
