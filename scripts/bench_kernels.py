"""Our kernels against torch's, and against TurboDiffusion's where its sources are given. Run it alone on the card.

    scripts/bench_kernels.py                                    Wan 1.3B and 14B at 480p, 81 frames
    scripts/bench_kernels.py --model 14b --size 720p --only attention
    scripts/bench_kernels.py --turbodiffusion PATH              PATH is the folder turbodiffusion/ of its checkout

Random inputs at real shapes. rel-L2 is the distance to the float32 answer on the same inputs (sparse-linear attention:
to its reference in the same dtype, first head only; INT8 products: to the product of the unquantised matrices).
Without a GPU nothing is measured, and the script says so; --dry runs every contender once at toy size on any device.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from turbodiff_kernels.gemm import kernel as gemm  # noqa: E402
from turbodiff_kernels.norm import kernel as norm  # noqa: E402
from turbodiff_kernels.norm import reference as norm_reference  # noqa: E402
from turbodiff_kernels.quant import kernel as quant  # noqa: E402
from turbodiff_kernels.sage import kernel as sage  # noqa: E402
from turbodiff_kernels.sage import rows  # noqa: E402
from turbodiff_kernels.sla import kernel as sla  # noqa: E402
from turbodiff_kernels.sla import reference as sla_reference  # noqa: E402

from scripts import bench_timing  # noqa: E402
from scripts.bench_timing import Job  # noqa: E402

EPS = 1e-6
TOPK = 0.1


class Shape(NamedTuple):
    """One clip's tokens in one model: L tokens, d channels, f hidden channels, heads of 128 channels."""

    name: str
    tokens: int
    dim: int
    hidden: int
    heads: int


MODELS = {"1.3b": (1536, 8960, 12), "14b": (5120, 13824, 40)}
TOKENS = {"480p": 32760, "720p": 75600}  # 81 frames, 16:9
TOY = Shape("toy", 130, 256, 384, 2)
GROUPS = ("norms", "keys", "channel_norm", "products", "attention")


class Bench:
    """The jobs at one shape on one device."""

    def __init__(self, shape: Shape, device: torch.device, turbodiffusion: str | None) -> None:
        self.shape, self.device, self.turbodiffusion = shape, device, turbodiffusion
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # Triton's interpreter has no bfloat16
        self.random = torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers: zeros would run faster than clips do."""
        return torch.randn(shape, generator=self.random, device=self.device, dtype=dtype or self.dtype)

    def norms(self) -> Iterator[Job]:
        """Memory-bound passes: bytes are those that must move."""
        s, f32 = self.shape, torch.float32
        unit = 2.0 * s.tokens * s.dim
        x, y = self.randn(1, s.tokens, s.dim), self.randn(1, s.tokens, s.dim)
        shift, scale, weight = self.randn(1, 1, s.dim, dtype=f32), self.randn(1, 1, s.dim, dtype=f32), self.randn(s.dim)
        angles = self.randn(s.tokens, 64, dtype=f32)
        rope, args = (weight, angles.cos(), angles.sin(), EPS), (x, shift, scale, EPS)
        yield Job(
            f"{s.name} norm + modulate",
            {"eager": partial(norm_reference.norm_modulate, *args), "turbodiff": partial(norm.norm_modulate, *args)},
            traffic_bytes=2 * unit,
            expected=lambda: norm_reference.norm_modulate(x.float(), shift, scale, EPS),
        )
        yield Job(
            f"{s.name} norm + modulate + quantise per token",
            {
                "turbodiff, two passes": lambda: quant.quantize_tokens(norm.norm_modulate(*args)[0]),
                "turbodiff": partial(norm.norm_modulate_quantize, *args),
            },
            traffic_bytes=1.5 * unit,
        )
        yield Job(
            f"{s.name} RMS norm + RoPE, in place",
            {"eager": lambda: x.copy_(norm_reference.rms_norm_rope(x, *rope)),
             "turbodiff": lambda: norm.rms_norm_rope_(x, *rope)},
            traffic_bytes=2 * unit,
        )  # fmt: skip
        yield Job(
            f"{s.name} gated residual, in place",
            {
                "addcmul_": lambda: y.addcmul_(x, shift.to(x.dtype)),
                "turbodiff": lambda: norm.residual_add_(y, x, shift),
            },
            traffic_bytes=3 * unit,
        )
        yield Job(
            f"{s.name} quantise",
            {"turbodiff tiles": lambda: quant.quantize_tiles(x[0]),
             "turbodiff tokens": lambda: quant.quantize_tokens(x[0])},
            traffic_bytes=1.5 * unit,
        )  # fmt: skip

    def keys(self) -> Iterator[Job]:
        """Norm, rotation and what attention needs of the keys: in passes of their own and in one."""
        s, f32 = self.shape, torch.float32
        unit = 2.0 * s.tokens * s.dim
        x, weight = self.randn(1, s.tokens, s.dim), self.randn(s.dim)
        angles = self.randn(s.tokens, 64, dtype=f32)
        rope = (weight, angles.cos(), angles.sin(), EPS)
        heads = lambda: x.unflatten(-1, (s.heads, -1))  # noqa: E731

        def separate() -> None:
            norm.rms_norm_rope_(x, *rope)
            rows.quantize_pool(heads(), heads().mean(1), 64, int8=False)

        def together() -> None:
            sums = norm.rms_norm_rope_sum_(x, *rope)
            norm_reference.block_means(sums, 64, s.tokens).sub_(sums.sum(1, keepdim=True) / s.tokens)

        def quantised_later() -> None:
            norm.rms_norm_rope_(x, *rope)
            rows.quantize(heads(), heads().mean(1), 64)

        def quantised() -> None:
            factor, sums = norm.rope_statistics(x, *rope)
            rows.quantize(heads(), (sums.sum(1) / s.tokens).to(x.dtype), 64, rows.NormRope(factor, *rope[:3]))

        for what, units, contenders in (
            ("means of blocks", 2, {"separate passes": separate, "turbodiff": together}),
            ("INT8 rows", 2.5, {"separate passes": quantised_later, "turbodiff": quantised}),
        ):
            yield Job(f"{s.name} keys: RMS norm + RoPE + {what}", contenders, traffic_bytes=units * unit)

    def channel_norm(self) -> Iterator[Job]:
        """The VAE decoder's most frequent pass, at its widest: 96 channels, full picture."""
        height, width = (480, 832) if self.shape.tokens > 1000 else (6, 8)
        x, y = (self.randn(1, 96, height, width).to(memory_format=torch.channels_last) for _ in range(2))
        out, gamma, bias = torch.empty_like(x), self.randn(96), self.randn(96)
        yield Job(
            f"VAE sum + RMS norm + SiLU 96x{height}x{width}",
            {
                "eager": lambda: norm_reference.rms_norm_silu_(out, x.clone(), gamma, y, bias),
                "turbodiff": lambda: norm.rms_norm_silu_(out, x.clone(), gamma, y, bias),
            },
            traffic_bytes=12.0 * x.numel(),
            expected=lambda: norm_reference.rms_norm_silu_(out.float(), x.float(), gamma, y, bias),
        )

    def products(self) -> Iterator[Job]:
        """Linear layers of a block, activations quantised inside the measured time unless said otherwise."""
        s = self.shape
        for inner, outer in ((s.dim, s.dim), (s.dim, s.hidden), (s.hidden, s.dim)):
            x, w = self.randn(s.tokens, inner), self.randn(outer, inner) / inner**0.5
            bias, tiled, rows = self.randn(outer), quant.quantize_tiles(w), quant.quantize_tokens(w)
            x_tiled, x_rows, dtype = quant.quantize_tiles(x), quant.quantize_tokens(x), self.dtype
            yield Job(
                f"{s.name} linear {inner} -> {outer}",
                {
                    "F.linear": partial(F.linear, x, w, bias),
                    "tiles": partial(_int8, quant.quantize_tiles, x, tiled, bias, dtype),
                    "tokens": partial(_int8, quant.quantize_tokens, x, rows, bias, dtype),
                    "tiles, x quantised": partial(gemm.int8_linear, *x_tiled, *tiled, bias, dtype),
                    "tokens, x quantised": partial(gemm.int8_linear, *x_rows, *rows, bias, dtype),
                    "torch._int_mm, x quantised": partial(_int_mm, x_rows, rows, bias, dtype),
                },
                flop=2.0 * s.tokens * inner * outer,
                expected=lambda x=x, w=w, bias=bias: F.linear(x[:512].float(), w.float(), bias.float()),
                answer=lambda result: result[:512],
            )

    def attention(self) -> Iterator[Job]:
        """Self-attention of the whole clip; FLOP are those of dense attention, so rates compare times, not hardware."""
        s = self.shape
        packed = self.randn(1, s.tokens, 3 * s.dim)
        q, k, v = (t.unflatten(-1, (s.heads, -1)) for t in packed.chunk(3, dim=-1))
        weight, bias = self.randn(128, 128) / 11, self.randn(128)
        flop = 4.0 * s.tokens**2 * s.dim
        yield Job(
            f"{s.name} dense attention",
            {
                "SDPA flash": partial(_sdpa, q, k, v, SDPBackend.FLASH_ATTENTION),
                "SDPA cuDNN": partial(_sdpa, q, k, v, SDPBackend.CUDNN_ATTENTION),
                "turbodiff 16 bit": partial(sage.attend, q, k, v),
                "turbodiff sage": partial(sage.sage_attention, q, k, v),
            },
            flop=flop,
            expected=lambda: _sdpa(*(t[:, :, :1].float() for t in (q, k, v)), SDPBackend.EFFICIENT_ATTENTION),
            answer=lambda result: result[:, :, :1],
        )
        contenders = {
            "SDPA cuDNN, dense": partial(_sdpa, q, k, v, SDPBackend.CUDNN_ATTENTION),
            "turbodiff sla": partial(sla.sla_attention, q, k, v, weight, bias, TOPK, False),
            "turbodiff sagesla": partial(sla.sla_attention, q, k, v, weight, bias, TOPK, True),
        }
        if self.turbodiffusion:
            contenders |= _turbodiffusion(self.turbodiffusion, [q, k, v], weight, bias)
        yield Job(f"{s.name} sparse-linear attention, top-k {TOPK}", contenders, flop=flop)
        yield Job(
            f"{s.name} sparse-linear attention, top-k {TOPK}: error",
            {name: run for name, run in contenders.items() if "dense" not in name},
            flop=flop,
            expected=lambda: sla_reference.sla_attention(
                *(t[:, :, :1] for t in (q, k, v)), weight, bias, TOPK, int8=False
            ),
            answer=lambda result: result[:, :, :1],
        )


def _int8(quantize, x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor, dtype: torch.dtype) -> Tensor:
    return gemm.int8_linear(*quantize(x), *weight, bias, dtype)


def _int_mm(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The product by cuBLAS; its scales are passes of their own."""
    return (torch._int_mm(x[0], weight[0].t()) * x[1][:, None] * weight[1] + bias).to(dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, which: SDPBackend) -> Tensor:
    if q.device.type != "cuda":
        which = SDPBackend.MATH
    with sdpa_kernel(which):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _turbodiffusion(path: str, heads: list[Tensor], weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """TurboDiffusion's own modules with the same projection; SageSLA needs SpargeAttn. What fails is its error."""

    @cache
    def module(kind: str) -> torch.nn.Module:
        sys.path.insert(0, path)
        import SLA  # type: ignore[import-not-found]

        sage = kind == "sagesla"
        made = SLA.SageSparseLinearAttention(128, TOPK) if sage else SLA.SparseLinearAttention(128, TOPK, BLKQ=128)
        made.proj_l.weight.data, made.proj_l.bias.data = weight.float(), bias.float()
        return made.requires_grad_(False)

    return {f"TurboDiffusion {kind}": lambda kind=kind: module(kind)(*heads) for kind in ("sla", "sagesla")}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = bench_timing.flags(__doc__ or "", rounds=20)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--size", choices=TOKENS, action="append")
    parser.add_argument("--only", choices=GROUPS, action="append")
    options = parser.parse_args(argv)
    return bench_timing.run("kernels", options, partial(jobs, options))


def jobs(options: argparse.Namespace, device: torch.device) -> Iterator[Job]:
    """Every job at every shape asked for."""
    sizes, models = options.size or ["480p"], options.model or MODELS
    shapes = [Shape(f"{model} {size}", TOKENS[size], *MODELS[model]) for size in sizes for model in models]
    for shape in [TOY] if options.dry else shapes:
        bench = Bench(shape, device, options.turbodiffusion)
        for group in options.only or GROUPS:
            yield from getattr(bench, group)()


if __name__ == "__main__":
    sys.exit(main())
