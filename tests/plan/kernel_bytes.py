"""What the attention kernels allocate: their own code on meta tensors, with launches that do nothing."""

import os
from functools import cache
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from turbodiff_kernels.gemm import reference as gemm
from turbodiff_kernels.norm import reference as norm
from turbodiff_kernels.quant import reference as quant
from turbodiff_kernels.sage import kernel as sage
from turbodiff_kernels.sage import reference as sage_reference
from turbodiff_kernels.sla import kernel as sla
from turbodiff_kernels.sla import reference as sla_reference

from turbodiff.memory_lab.dry_run import Ledger


def _launch_nothing(self, grid):
    return lambda *args, **kwargs: None


@cache
def inside_kernel(kind: str, tokens: int, heads: int, head_dim: int, topk: float, capability: int) -> int:
    """Bytes beside q, k and v of one attention on a card of that capability (90 for sm_90); its result takes q."""
    with (
        mock.patch.object(sage, "arch", lambda device: capability),
        mock.patch.object(InterpretedFunction, "__getitem__", _launch_nothing),
        mock.patch.object(JITFunction, "__getitem__", _launch_nothing),
        torch.device("meta"),
    ):
        return _peak(kind, sage, sla, tokens, heads, head_dim, topk, torch.bfloat16)


@cache
def inside_reference(
    kind: str, tokens: int, heads: int, head_dim: int, topk: float, dtype: torch.dtype = torch.float32
) -> int:
    """The same of the plain implementation, that of a CPU or of a card."""
    with torch.device("meta"):
        return _peak(kind, sage_reference, sla_reference, tokens, heads, head_dim, topk, dtype)


@cache
def inside_references(tokens: int, dim: int, ffn_dim: int, heads: int) -> dict[str, int]:
    """Bytes that the references of all operators but attention hold beside arguments and results, by operator, bf16."""
    with torch.device("meta"), torch.inference_mode():
        x = torch.empty(1, tokens, dim, dtype=torch.bfloat16)
        gate, gain, angle = torch.empty(1, 1, dim), torch.empty(dim), torch.empty(tokens, dim // heads // 2)
        rows, steps = quant.quantize_tiles(x[0])
        small, small_steps = quant.quantize_tiles(torch.empty(dim, dim))
        wide, wide_steps = quant.quantize_tiles(torch.empty(ffn_dim, dim))
        hidden, hidden_steps = quant.quantize_tiles(torch.empty(tokens, ffn_dim))
        back, back_steps = quant.quantize_tiles(torch.empty(dim, ffn_dim))
        bias, wide_bias = torch.empty(dim), torch.empty(ffn_dim)
        calls = {
            "norm_modulate": (norm.norm_modulate, (x, gate, gate, 1e-6)),
            "layer_norm": (norm.layer_norm, (x, gain, gain, 1e-6)),
            "rms_norm_": (norm.rms_norm_, (x, gain, 1e-6)),
            "rms_norm_rope_": (norm.rms_norm_rope_, (x, gain, angle, angle, 1e-6)),
            "quantize_tiles": (quant.quantize_tiles, (x[0],)),
            "int8_linear": (gemm.int8_linear, (rows, steps, small, small_steps, bias, x.dtype)),
            "int8_linear_quantize": (
                gemm.int8_linear_quantize, (rows, steps, wide, wide_steps, wide_bias, x.dtype, True),
            ),
            "int8_linear_add_": (gemm.int8_linear_add_, (x, gate, hidden, hidden_steps, back, back_steps, bias)),
        }  # fmt: skip
        return {f"turbodiff::{name}": beside(call, args, name) for name, (call, args) in calls.items()}


def beside(call, args, name: str) -> int:
    """Bytes that an operator holds at its peak beside its arguments and its result."""
    ledger = Ledger("meta")
    for tensor in args:
        if isinstance(tensor, torch.Tensor):
            ledger.see(tensor)
    before = ledger.live_bytes
    with ledger:
        found = call(*args)
    results = found if isinstance(found, tuple) else (found,)
    return ledger.peak_bytes - before - (0 if name.endswith("_") else sum(t.nbytes for t in results))


def _peak(kind, sage_module, sla_module, tokens, heads, head_dim, topk, dtype) -> int:
    if kind == "dense":
        return 0
    dim = heads * head_dim
    qkv = [torch.empty(1, tokens, dim, dtype=dtype) for _ in range(3)]
    gain, table = torch.empty(dim), torch.empty(tokens, head_dim // 2)
    weight, bias = torch.empty(head_dim, head_dim, dtype=dtype), torch.empty(head_dim, dtype=dtype)
    ledger = Ledger("meta")
    for tensor in (*qkv, gain, table, weight, bias):
        ledger.see(tensor)
    before = ledger.live_bytes
    with torch.inference_mode(), ledger:
        if kind == "sage":
            sage_module.normed_sage_attention_(*qkv, gain, gain, table, table, 1e-6)
        else:
            more = (weight, bias, topk, kind == "sagesla")
            sla_module.normed_sla_attention_(*qkv, gain, gain, table, table, 1e-6, *more)
    return ledger.peak_bytes - before
