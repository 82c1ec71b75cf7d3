"""What the kernels would launch at Wan's shapes: recorded on meta tensors, compiled ahead of time, never run.

The doors' kernel functions are called with meta tensors, and what they would launch (kernel, argument types, constants,
warps, stages, grid) is written down. So what is compiled is what ships, and no copy of it.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import count
from math import prod
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from turbodiff_kernels import backend, selfcheck
from turbodiff_kernels.gemm import kernel as gemm
from turbodiff_kernels.norm import kernel as norm
from turbodiff_kernels.quant import kernel as quant
from turbodiff_kernels.quant.reference import tiles
from turbodiff_kernels.sage import kernel as sage
from turbodiff_kernels.sla import kernel as sla

from scripts.sass import Code, read_code

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.int32: "i32",
    torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
NOT_OF_WAN = ("dense:", "sage 64")  # its heads have 128 channels, and torch computes its dense attention
OVERWRITTEN = {  # by kernel: the argument that is read and written, and the constant that says so
    "_rms_norm_rope_kernel": ("x", "WRITE"),
    "_residual_add_kernel": ("x", None),
    "_rms_norm_silu_kernel": ("x", "ADD"),
    "_int8_linear_kernel": ("out", "GATE"),
}


class Launch(NamedTuple):
    """One launch: `name` is "operation: kernel"; `programs` and `traffic_bytes` are those of the whole launch."""

    name: str
    source: ASTSource
    options: dict
    constants: dict[str, object]
    programs: int
    traffic_bytes: int


class Measured(NamedTuple):
    """What the compiler made of a launch, in a form that can be kept as JSON."""

    name: str
    error: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    constants: dict[str, object]
    programs: int
    traffic_bytes: int
    code: Code


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def picture(height: int, width: int, channels: int) -> tuple[torch.Tensor, ...]:
    """A frame of the VAE that becomes one of three in a wider picture, what is added to it and its weights."""
    wide, x, y = (tokens(1, height, width, size).movedim(-1, 1) for size in (3 * channels, channels, channels))
    return wide[:, :channels], x, tokens(channels), y, tokens(channels)


def calls(capability: int, length: int, topk: float) -> dict[str, Callable[[], object]]:
    """Every launch that ships for an architecture: at the shapes of Wan 14B (norms also at 1.3B's width), one clip of
    `length` tokens."""
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
    own = [tokens(1, length, dim) for _ in range(3)]
    projections, small = (*own, weight, weight, table, table, 1e-6), [tokens(1, length, 1536) for _ in range(3)]
    x15, gate15, weight15 = tokens(1, length, 1536), gate[..., :1536], weight[:1536]
    narrow = (*small, weight15, weight15, table, table, 1e-6)
    of_hopper = {
        "hopper sage": lambda: sage.sage_attention(q, k, v, hopper=True),
        "hopper sagesla": lambda: sla.sla_attention(q, k, v, *proj, topk, True, hopper=True),
    }
    of_all = {
        "norm_modulate": lambda: norm.norm_modulate(x, gate, gate, 1e-6),
        "norm_modulate 1536": lambda: norm.norm_modulate(x15, gate15, gate15, 1e-6),
        "norm_modulate_quantize": lambda: norm.norm_modulate_quantize(x, gate, gate, 1e-6),
        "norm_modulate_quantize 1536": lambda: norm.norm_modulate_quantize(x15, gate15, gate15, 1e-6),
        "layer_norm": lambda: norm.layer_norm(x, weight, weight, 1e-6),
        "layer_norm 1536": lambda: norm.layer_norm(x15, weight15, weight15, 1e-6),
        "rms_norm": lambda: norm.rms_norm_(x, weight, 1e-6),
        "rms_norm_rope": lambda: norm.rms_norm_rope_(x, weight, table, table, 1e-6),
        "rms_norm_rope 1536": lambda: norm.rms_norm_rope_(x15, weight15, table, table, 1e-6),
        "residual_add": lambda: norm.residual_add_(x, x, gate),
        "rms_norm_silu 96": lambda: norm.rms_norm_silu_(*picture(480, 832, 96)),
        "rms_norm_silu 384": lambda: norm.rms_norm_silu_(*picture(120, 208, 384)),
        "quantize_tiles": lambda: quant.quantize_tiles(x[0]),
        "quantize_tokens": lambda: quant.quantize_tokens(x[0]),
        "quantize_tokens 13824": lambda: quant.quantize_tokens(tokens(length, 13824)),
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
        "normed sage 1536": lambda: sage.normed_sage_attention_(*narrow),
        "normed sagesla 1536": lambda: sla.normed_sla_attention_(*narrow, *proj, topk, True),
    }
    return of_all | (of_hopper if has_hopper_loop(capability) else {})


def has_hopper_loop(capability: int) -> bool:
    """Whether the second loop of attention may run on such a card."""
    return capability == backend.HOPPER and backend.triton_version() >= backend.HOPPER_TRITON


def record(capability: int, length: int = 32760, topk: float = 0.1) -> dict[tuple, Launch]:
    """Distinct launches that ship, by what they compile to."""
    return record_calls(capability, calls(capability, length, topk))


def record_calls(
    capability: int,
    named_calls: dict[str, Callable[[], object]],
    run: Callable[[str, Callable[[], object]], object] | None = None,
) -> dict[tuple, Launch]:
    """Distinct launches of some calls on meta tensors, by what they compile to.

    Args:
        run: is given the name of every launch and what launches it, for tensors that lie on a card.
    """
    found: dict[tuple, Launch] = {}
    name = ""

    def take(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            start = partial(kernel.run, *args, grid=grid, warmup=False, **kwargs)
            options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
            source, key = source_of(kernel, args, kwargs)
            values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
            taken = {other.name for other in found.values()}
            number = next(n for n in count(1) if f"{named(name, n)}: {kernel.__name__}" not in taken)
            full, traffic = f"{named(name, number)}: {kernel.__name__}", traffic_bytes(kernel.__name__, values)
            made = Launch(full, source, options, constants, prod(grid), traffic)
            made = found.setdefault((*key, *options.items()), made)
            if run is not None:
                run(made.name, start)

        return launch

    with (
        mock.patch.object(JITFunction, "__getitem__", take),
        mock.patch.object(norm, "arch", lambda _: capability),
        mock.patch.object(gemm, "arch", lambda _: capability),
        mock.patch.object(sage, "arch", lambda _: capability),
    ):
        for name, call in named_calls.items():  # noqa: B007
            call()
    return found


def unchecked(capability: int) -> set[str]:
    """Launches of Wan's models in a form which the kernels' self-check does not run."""
    make, checks = selfcheck.Inputs(torch.device("meta"), torch.bfloat16), {}
    hopper = selfcheck.HOPPER if has_hopper_loop(capability) else {}
    for op in (*selfcheck.CHECKS, *hopper):
        module = import_module(f"turbodiff_kernels.{selfcheck.CHECKS[hopper.get(op, op)].folder}.kernel")
        checks[op] = partial(selfcheck.results, op, module, make)
    checked = {form(launch) for launch in record_calls(capability, checks).values()}
    of_wan = [launch for launch in record(capability).values() if not launch.name.startswith(NOT_OF_WAN)]
    return {launch.name for launch in of_wan if form(launch) not in checked}


def form(launch: Launch) -> tuple[object, ...]:
    """What Triton compiles a kernel anew for, but for the alignment of its arguments and strides of one element."""
    tensors = tuple(kind for kind in launch.source.signature.values() if kind.startswith(("*", "tensordesc")))
    return launch.source.fn.__name__, tensors, str(launch.constants), str(launch.options)


def named(name: str, number: int) -> str:
    """An operation may launch a kernel in several forms."""
    return name if number == 1 else f"{name} #{number}"


def traffic_bytes(kernel: str, values: dict[str, object]) -> int:
    """Every tensor once, what is read and overwritten twice."""
    total = sum(t.numel() * t.element_size() for t in values.values() if isinstance(t, torch.Tensor))
    name, switch = OVERWRITTEN.get(kernel, ("", None))
    twice = values.get(name)
    if isinstance(twice, torch.Tensor) and (switch is None or values[switch]):
        total += twice.numel() * twice.element_size()
    return total


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
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, (kernel.__name__, *signature.values(), *(str(c) for c in constants.values()), str(attributes))


def measure(launch: Launch, capability: int) -> Measured:
    """Registers, spills, shared memory and machine code of one launch, compiled for sm_`capability`."""
    constants = {name: str(value) if isinstance(value, tl_dtype) else value for name, value in launch.constants.items()}
    about = {"constants": constants, "programs": launch.programs, "traffic_bytes": launch.traffic_bytes}
    try:
        made = triton.compile(launch.source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    except Exception as error:  # noqa: BLE001 - the table names what does not compile
        return Measured(launch.name, str(error)[-2000:], 0, 0, 0, 0, code=Code.nothing(), **about)
    code = read_code(_disassembled(made.asm["cubin"]))
    usage = _run("cuobjdump", "--dump-resource-usage", made.asm["cubin"])
    numbers = dict.fromkeys(("REG", "STACK", "LOCAL"), 0)
    for word in usage.split():
        key, _, value = word.partition(":")
        if key in numbers and value.isdecimal():
            numbers[key] = max(numbers[key], int(value))
    spilled, shared, warps = numbers["STACK"] + numbers["LOCAL"], made.metadata.shared, made.metadata.num_warps
    return Measured(launch.name, "", numbers["REG"], spilled, shared, warps, code=code, **about)


tl_dtype = type(triton.language.float32)


def _disassembled(cubin: bytes) -> str:
    """nvdisasm's text; kept beside Triton's own cache, because big kernels cost a second."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / "sass"
    file = folder / f"{hashlib.sha256(cubin).hexdigest()[:24]}.txt"
    if file.exists():
        return file.read_text("utf-8")
    text = _run("nvdisasm", "-c", cubin)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return text


def _run(tool: str, flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([BIN / tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def as_json(row: Measured) -> str:
    return json.dumps({**row._asdict(), "code": row.code._asdict()})


def from_json(line: str) -> Measured:
    fields = json.loads(line)
    return Measured(**{**fields, "code": Code(**fields["code"])})
