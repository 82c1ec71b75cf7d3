"""What the attention kernels allocate: their own code on meta tensors, with launches that do nothing."""

import os
from functools import cache
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from turbodiff_kernels.sage import kernel as sage
from turbodiff_kernels.sage import reference as sage_reference
from turbodiff_kernels.sla import kernel as sla
from turbodiff_kernels.sla import reference as sla_reference

from turbodiff.memory_lab.dry_run import Ledger


def _launch_nothing(self, grid):
    return lambda *args, **kwargs: None


@cache
def inside_kernel(kind: str, tokens: int, heads: int, head_dim: int, topk: float, capability: int) -> int:
    """Bytes beside q, k, v and the result of one attention on a card of that capability (90 for sm_90)."""
    with (
        mock.patch.object(sage, "arch", lambda device: capability),
        mock.patch.object(InterpretedFunction, "__getitem__", _launch_nothing),
        mock.patch.object(JITFunction, "__getitem__", _launch_nothing),
        torch.device("meta"),
    ):
        return _peak(kind, sage, sla, tokens, heads, head_dim, topk, torch.bfloat16)


@cache
def inside_reference(kind: str, tokens: int, heads: int, head_dim: int, topk: float) -> int:
    """The same of the plain implementation that a CPU runs, in float32."""
    with torch.device("meta"):
        return _peak(kind, sage_reference, sla_reference, tokens, heads, head_dim, topk, torch.float32)


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
            sage_module.normed_sage_attention(*qkv, gain, gain, table, table, 1e-6)
        else:
            more = (weight, bias, topk, kind == "sagesla")
            sla_module.normed_sla_attention(*qkv, gain, gain, table, table, 1e-6, *more)
    return ledger.peak_bytes - before - qkv[0].nbytes
