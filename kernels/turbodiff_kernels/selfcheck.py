"""Does a kernel compute on this very card what its reference computes, and sooner than what else would?

Small odd shapes and Wan's widths, seconds, before first use. Compilers, drivers and architectures that nobody tried are
the rule; a kernel that is wrong there must not make a clip, and one that is slow there must not slow it down.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS = 1e-6
WIDTHS = (1536, 5120)  # of Wan 1.3B and 14B: what compiles for them is compiled for no other width
WIDE = (8960, 13824)  # of their feed-forward
VAE_WIDTHS = (96, 192, 384)
TIMED_TOKENS, TIMED_HEADS, TIMED_RUNS, CALLS = 8192, 12, 3, 5
SLOWER = "slower than "  # how a verdict about time begins
MARGIN = 1.1  # a measurement is that uncertain; a verdict is kept
HOPPER = MappingProxyType({"hopper sage": "sage", "hopper sagesla": "sagesla"})  # checks of a second loop of these
CRASHES = MappingProxyType({  # other signals come from outside
    number.value: number.name
    for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGTRAP)
})  # fmt: skip
APART_S = 300.0  # most that a check in a process apart may take; one takes some seconds
APART = """
import json, sys, torch
from turbodiff_kernels import selfcheck
device = torch.device(sys.argv[2])
if device.type == "cuda":
    torch.cuda.set_device(device)  # Triton launches on the current one
print(json.dumps(selfcheck.verdict_apart(sys.argv[1], device)))
"""
POISON_BYTES = (2**19,) * 16 + (2**24,)  # the allocator keeps small and large pieces apart


class Inputs(NamedTuple):
    """Reproducible tensors of one dtype on one device."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, the same on every device: a test here says that no choice of blocks hangs by a rounding."""
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.device, dtype or self.dtype)


def _heads(make: Inputs, count: int = 2) -> list[Tensor]:
    """Queries, keys with a mean, values [1, 330, count, 128]: views of one packed projection, as a block makes them.

    Each block of tokens has something in common, so that which blocks belong together is plain. One clip: a prompt and
    a negative prompt are passes of their own (runtime/denoise.py), so attention never meets two.
    """
    q, k, v = (t.unflatten(-1, (count, 128)) for t in make.randn(1, 330, 384 * count).chunk(3, dim=-1))
    for t, block, seed in ((q, 128, 7), (k, 64, 8)):
        t.add_(make.randn(1, -(-330 // block), count, 128, seed=seed).repeat_interleave(block, 1)[:, :330])
    return [q, k.add_(make.randn(count, 128, seed=1)), v]


def _projections(make: Inputs, heads: int = 2) -> list[Tensor | float]:
    """Queries, keys and values [1, 330, heads * 128] before their norm, its weights, angles and epsilon."""
    angles = make.randn(330, 64, seed=6, dtype=torch.float32) / 8
    weights = [1 + make.randn(heads * 128, seed=seed) / 4 for seed in (4, 5)]
    return [*(t.flatten(2) for t in _heads(make, heads)), *weights, angles.cos(), angles.sin(), EPS]


def _norms(m: ModuleType, make: Inputs, width: int, length: int) -> list[Tensor]:
    """What the norms make of tokens [2, length, width]."""
    x, y = make.randn(2, length + 2, width)[:, 1:-1], make.randn(2, length, width, seed=1)
    shift, scale = make.randn(2, 2, width, seed=2, dtype=torch.float32).split(1, dim=1)
    weight, bias = make.randn(width, seed=3), make.randn(width, seed=4)
    angles = make.randn(length, 64, seed=5, dtype=torch.float32)
    rope = weight, angles.cos(), angles.sin(), EPS
    rotated, normed, summed, added = x.clone(), x.clone(), x.clone(), y.clone()
    m.rms_norm_rope_(rotated, *rope)
    m.rms_norm_(normed, weight, EPS)
    m.residual_add_(added, x, shift)
    plain = [m.norm_modulate(x, shift, scale, EPS), m.layer_norm(x, weight, bias, EPS)]
    passes = [m.rms_norm_rope_sum_(summed, *rope), *m.rope_statistics(x, *rope), m.rms_factor(x, EPS)]
    return [*plain, *m.norm_modulate_quantize(x, shift, scale, EPS), rotated, normed, added, summed, *passes]


def _channel_norms(m: ModuleType, make: Inputs, width: int) -> list[Tensor]:
    """What the VAE's norm makes of a frame of so many channels, with and without what is added first, in a third of a
    wider one."""
    x, y, wide = (make.randn(1, 5, 7, n * width, seed=seed).movedim(-1, 1) for seed, n in enumerate((1, 1, 3)))
    gamma, bias, found = make.randn(width, seed=6), make.randn(width, seed=8), list[Tensor]()
    for added in ((None, None), (None, bias), (y, bias)):
        total, out = x.clone(), wide.clone()
        m.rms_norm_silu_(out[:, width : 2 * width], total, gamma, *added)
        found += [total, out]
    return found


def results(op: str, m: ModuleType, make: Inputs) -> list[Tensor]:
    """What a module, kernel or reference, makes of the inputs of the check of `op`."""
    loop = {"hopper": op in HOPPER} if m.__name__.endswith(".kernel") else {}
    op = HOPPER.get(op, op)
    if op == "norm":
        silu = [y for width in VAE_WIDTHS for y in _channel_norms(m, make, width)]
        return [*_norms(m, make, 384, 63), *(y for width in WIDTHS for y in _norms(m, make, width, 5)), *silu]
    if op == "quant":
        x = make.randn(130, 200)
        rows = [make.randn(3, width) for width in (200, *WIDTHS, *WIDE)]
        return [*m.quantize_tiles(x), *(y for row in rows for y in m.quantize_tokens(row))]
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
                m.int8_linear(*matrices, bias, make.dtype),
            ]
        return out + [
            *m.int8_linear_quantize(*quant.quantize_tiles(a), *quant.quantize_tiles(b), bias, make.dtype, True)
        ]
    if op == "sage":
        # four heads, as many as a program takes in turn
        return [m.sage_attention(*_heads(make), **loop), m.normed_sage_attention_(*_projections(make, 4), **loop)]
    # both branches alike in size, and no large bias: else one could be wrong by half and nobody would see it
    more = (make.randn(128, 128, seed=2) / 6, make.randn(128, seed=3) / 64, 0.5, op == "sagesla")
    whole = m.normed_sla_attention_(*_projections(make), *more, **loop)
    return [m.sla_attention(*_heads(make), *more, **loop), whole]


KINDS = ("kernel", "reference")


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
    check, make = CHECKS[HOPPER.get(op, op)], Inputs(device, dtype)
    modules = [import_module(f"turbodiff_kernels.{check.folder}.{kind}") for kind in KINDS]
    # freed at once, so that what a kernel is given next and forgets to write is NaN
    [torch.full((size // 4,), float("nan"), device=device) for size in POISON_BYTES].clear()
    got, expected = (results(op, module, make) for module in modules)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        distance = ((g.double() - e.double()).norm() / e.double().norm()).item()
        if not distance <= check.bound:
            return f"result {i} is off by {distance:.2g}, allowed {check.bound:.2g}"
    return ""


@torch.no_grad()
def slowness(op: str, device: torch.device) -> str:
    """What computes the same as the kernel of `op` on `device` in less time; "" where the kernel is the fastest there.

    Only a GPU is timed, and only where it has the room; a second loop must be timed, and be the faster one.

    Raises:
        torch.OutOfMemoryError: there was no room to time a second loop.
    """
    if device.type != "cuda":
        return ""
    second = op in HOPPER
    try:
        calls = contenders(op, Inputs(device, torch.bfloat16), TIMED_TOKENS, TIMED_HEADS)
        return faster(calls, milliseconds, 1.0, ()) if second else faster(calls, milliseconds)
    except torch.OutOfMemoryError:
        if second:
            raise
        return ""


def apart(op: str, device: torch.device, code: str = APART, limit_s: float = APART_S) -> str:
    """`difference` and `slowness` of `op`, found by a process of its own; or that a kernel took it down or hung.

    Raises:
        RuntimeError: it did not come to a verdict for another reason: somebody ended it, or it could not begin.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", code, op, str(device)]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"its check did not end in {limit_s:.0f} s"
    told = done.stdout.splitlines()
    if done.returncode == 0 and told:
        return str(json.loads(told[-1]))
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if -done.returncode in CRASHES:
        return f"its check ended its process by {CRASHES[-done.returncode]}"
    raise RuntimeError(f"exit status {done.returncode}: {last}")


def verdict_apart(op: str, device: torch.device) -> str:
    """What `apart` runs in the other process, which a lost card ends."""
    try:
        return difference(op, device) or slowness(op, device)
    except Exception:
        if is_lost(device):
            os.abort()
        raise


def is_lost(device: torch.device) -> bool:
    """Whether a kernel broke what this process has of the card, as an access outside of its memory does."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def faster(
    calls: Mapping[str, Callable[[], object]], time_ms: Callable[[Callable[[], object]], float],
    margin: float = MARGIN, absent: tuple[type[Exception], ...] = (RuntimeError,),
) -> str:  # fmt: skip
    """The contender that beats the first call by more than the margin, in words; "" where none does. `absent`: what a
    contender raises that this card has not got, or has no room for."""
    (_, own), *others = calls.items()
    own_ms = time_ms(own)
    for name, call in others:
        try:
            other_ms = time_ms(call)
        except absent:
            continue
        if own_ms > margin * other_ms:
            return f"{SLOWER}{name}: {own_ms:.2f} ms against {other_ms:.2f} ms"
    return ""


def contenders(op: str, make: Inputs, tokens: int, heads: int) -> dict[str, Callable[[], object]]:
    """The kernel of `op`, and what would run in its place, on tensors as of a short clip.

    That is its reference; where a whole attention makes room for a plainer one, that one: torch's dense attention for
    `sage`, `sla` for `sagesla`. For `sla` it would be a reference that never wins; for Hopper's loop it is the
    plain one.
    """
    folder = CHECKS[HOPPER.get(op, op)].folder
    modules = {kind: import_module(f"turbodiff_kernels.{folder}.{kind}") for kind in KINDS}
    kernel, dim = modules["kernel"], 128 * heads
    q, k, v = (make.randn(1, tokens, heads, 128, seed=seed) for seed in range(3))
    x, weight, table = q.flatten(2), make.randn(dim, seed=3), make.randn(tokens, 64, seed=4, dtype=torch.float32)
    if op == "norm":
        return {kind: partial(m.rms_norm_rope_, x, weight, table, table, EPS) for kind, m in modules.items()}
    if op == "quant":
        return {kind: partial(m.quantize_tiles, x[0]) for kind, m in modules.items()}
    if op == "gemm":
        quantize = import_module("turbodiff_kernels.quant.reference").quantize_tiles
        matrices = *quantize(x[0]), *quantize(make.randn(dim, dim, seed=5))
        return {kind: partial(m.int8_linear, *matrices, weight, make.dtype) for kind, m in modules.items()}
    more = make.randn(128, 128, seed=5), make.randn(128, seed=6), 0.1
    if op in HOPPER:
        if HOPPER[op] == "sage":
            call = partial(kernel.sage_attention, q, k, v)
        else:
            call = partial(kernel.sla_attention, q, k, v, *more, True)
        return {op: partial(call, hopper=True), "the plain loop": partial(call, hopper=False)}
    if op == "sage":
        own = partial(kernel.sage_attention, q, k, v, hopper=False)
        return {op: own} | _dense(*(t.transpose(1, 2) for t in (q, k, v)))
    names = (op,) if op == "sla" else (op, "sla")
    return {name: partial(kernel.sla_attention, q, k, v, *more, name == "sagesla", hopper=False) for name in names}


def _dense(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """torch's dense attention, as it comes and by cuDNN."""

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return {"torch's attention": lambda: F.scaled_dot_product_attention(q, k, v), "cuDNN's attention": cudnn}


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the current GPU, warmed up; several calls at a time, so that the host is ahead."""
    times = []
    for _ in range(1 + TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times[1:])
