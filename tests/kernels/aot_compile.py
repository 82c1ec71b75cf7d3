"""Compiles every launch of the kernels for one architecture and prints what it needs: run by test_aot.py.

    python -m tests.kernels.aot_compile 90

A launch is recorded, not run: the doors' kernel functions are called with meta tensors, and what they would launch
(kernel, argument types, constants, warps, stages) is compiled. So the test compiles what ships and no copy of it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from turbodiff_kernels.gemm import kernel as gemm
from turbodiff_kernels.norm import kernel as norm
from turbodiff_kernels.quant import kernel as quant
from turbodiff_kernels.quant.reference import tiles
from turbodiff_kernels.sage import kernel as sage
from turbodiff_kernels.sla import kernel as sla

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
INSTRUCTIONS = {
    "wgmma s8": r"wgmma\S*\.s32\.s8\.s8", "wgmma fp8": r"wgmma\S*\.e4m3\.e4m3", "wgmma bf16": r"wgmma\S*\.bf16\.bf16",
    "mma s8": r"mma\.sync\S*\.s8\.s8", "mma fp8": r"mma\.sync\S*\.e4m3\.e4m3", "mma bf16": r"mma\.sync\S*\.bf16\.bf16",
}  # fmt: skip


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(length: int, topk: float) -> dict[str, Callable[[], object]]:
    """Every launch that ships, at the shapes of Wan 14B (norms also at 1.3B's width), one clip of `length` tokens."""
    dim, heads = 5120, 40
    x, f32 = tokens(1, length, dim), torch.float32
    gate, weight = tokens(1, 1, dim, dtype=f32), tokens(dim)
    table = tokens(length, 64, dtype=f32)
    q, k, v = (t.unflatten(-1, (heads, 128)) for t in tokens(1, length, 3 * dim).chunk(3, dim=-1))
    q64 = tokens(1, length, heads, 64)
    a, b = tokens(length, dim, dtype=torch.int8), tokens(dim, dim, dtype=torch.int8)
    tiled = (a, tokens(tiles(length), 40, dtype=f32), b, tokens(40, 40, dtype=f32))
    rowwise = (a, tokens(length, dtype=f32), b, tokens(dim, dtype=f32))
    proj = (tokens(128, 128), tokens(128))
    projections = (*tokens(1, length, 3 * dim).chunk(3, dim=-1), weight, weight, table, table, 1e-6)
    small = (*tokens(1, length, 3 * 1536).chunk(3, dim=-1), weight[:1536], weight[:1536], table, table, 1e-6)
    return {
        "norm_modulate": lambda: norm.norm_modulate(x, gate, gate, 1e-6),
        "norm_modulate 1536": lambda: norm.norm_modulate(x[..., :1536], gate[..., :1536], gate[..., :1536], 1e-6),
        "norm_modulate_quantize": lambda: norm.norm_modulate_quantize(x, gate, gate, 1e-6),
        "layer_norm": lambda: norm.layer_norm(x, weight, weight, 1e-6),
        "rms_norm": lambda: norm.rms_norm_(x, weight, 1e-6),
        "rms_norm_rope": lambda: norm.rms_norm_rope_(x, weight, table, table, 1e-6),
        "rms_norm_rope 1536": lambda: norm.rms_norm_rope_(x[..., :1536], weight[:1536], table, table, 1e-6),
        "residual_add": lambda: norm.residual_add_(x, x, gate),
        "rms_norm_silu 96": lambda: norm.rms_norm_silu(tokens(4, 8, 8, 96).movedim(-1, 1), tokens(96)),
        "rms_norm_silu 384": lambda: norm.rms_norm_silu(tokens(4, 8, 8, 384).movedim(-1, 1), tokens(384)),
        "quantize_tiles": lambda: quant.quantize_tiles(x[0]),
        "quantize_tokens": lambda: quant.quantize_tokens(x[0]),
        "int8 tiles": lambda: gemm.int8_linear(*tiled, weight, torch.bfloat16),
        "int8 tiles gelu quant": lambda: gemm.int8_linear_quantize(*tiled, weight, torch.bfloat16, True),
        "int8 tiles gate add": lambda: gemm.int8_linear_add_(x, gate, *tiled, weight),
        "int8 tokens": lambda: gemm.int8_linear(*rowwise, weight, torch.bfloat16),
        "int8 tokens gelu": lambda: gemm.int8_linear(*rowwise, weight, torch.bfloat16, True),
        "int8 tokens gate add": lambda: gemm.int8_linear_add_(x, gate, *rowwise, weight),
        "dense": lambda: sage.attend(q, k, v),
        "sage": lambda: sage.sage_attention(q, k, v),
        "sage 64": lambda: sage.sage_attention(q64, q64, q64),
        "sla": lambda: sla.sla_attention(q, k, v, *proj, topk, False),
        "sagesla": lambda: sla.sla_attention(q, k, v, *proj, topk, True),
        "normed sage": lambda: sage.normed_sage_attention_(*projections),
        "normed sla": lambda: sla.normed_sla_attention_(*projections, *proj, topk, False),
        "normed sagesla": lambda: sla.normed_sla_attention_(*projections, *proj, topk, True),
        "normed sage 1536": lambda: sage.normed_sage_attention_(*small),
        "normed sagesla 1536": lambda: sla.normed_sla_attention_(*small, *proj, topk, True),
    }


def record(capability: int, length: int = 32760, topk: float = 0.1) -> dict[tuple, tuple[str, ASTSource, dict]]:
    """Distinct launches by what they compile to: (first name, source, options)."""
    found: dict[tuple, tuple[str, ASTSource, dict]] = {}
    name = ""

    def take(kernel: JITFunction, _grid: object) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
            source, key = source_of(kernel, args, kwargs)
            found.setdefault((*key, *options.items()), (f"{name}: {kernel.__name__}", source, options))

        return launch

    with (
        mock.patch.object(JITFunction, "__getitem__", take),
        mock.patch.object(gemm, "arch", lambda _: capability),
        mock.patch.object(sage, "arch", lambda _: capability),
    ):
        for name, call in launches(length, topk).items():  # noqa: B007
            call()
    return found


def source_of(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, tuple]:
    """Types, constants and divisibility as Triton's launcher would derive them."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, (kernel.__name__, *signature.values(), *(str(c) for c in constants.values()), str(attributes))


TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.int32: "i32", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def measure(source: ASTSource, options: dict, capability: int) -> dict[str, object]:
    """Registers, stack, spills, shared memory and matrix instructions of one compiled launch."""
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    used = [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)]
    return {**numbers, "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps, "matrix": used}


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    capability = int(sys.argv[1])
    found = record(capability)
    for name, source, options in found.values():
        try:
            print(json.dumps({"arch": capability, "name": name, **measure(source, options, capability)}), flush=True)
        except Exception as error:  # noqa: BLE001 - the table names what does not compile
            print(json.dumps({"arch": capability, "name": name, "error": str(error)[-2000:]}), flush=True)
    everywhere = set(found)
    for length, topk in ((75600, 0.15), (517, 0.3), (9600, 0.1)):
        everywhere |= set(record(capability, length, topk))
    print(json.dumps({"launches": len(found), "launches_at_all_lengths": len(everywhere)}))


if __name__ == "__main__":
    main()
