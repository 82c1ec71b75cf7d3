"""How a linear layer is stored: plain, or as small numbers with scales; from names, dtypes and shapes alone. No torch.

Loaded are all forms that are one product: `number * scale`, with one scale for the tensor, for a row, for a column or
for a tile. fp8 of ComfyUI (`scale_weight`, `weight_scale`), of LightX2V (`weight_scale` [o, 1]) and in blocks
(DeepSeek's `weight_scale_inv`); INT8 of LightX2V, of ComfyUI (`int8_tensorwise`), of optimum-quanto (`weight._data`,
`weight._scale`) and of bitsandbytes (`SCB`: the greatest of a row, 127 steps to it), and TurboDiffusion's tiles.
Of all others the name is told.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.shapes import INT8_TILE
from turbodiff.weights.headers import GGUF_PREFIX, Header, TensorInfo, bad_file

GGUF_COMMAND = "pip install 'turbodiff[gguf]'"
SUPPORTED = "bf16, fp16, fp32, fp8 (plain or scaled), int8 (scaled), GGUF, TurboWan -quant"
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
FP8 = ("F8_E4M3", "F8_E5M2")
WEIGHTS = ("weight", "int8_weight", "weight._data")
# Leaf of a scale, and what its numbers are multiplied by
SCALES = {
    "scale_weight": 1.0, "weight_scale": 1.0, "weight_scale_inv": 1.0, "weight._scale": 1.0, "scale": 1.0,
    "SCB": 1 / 127,
}  # fmt: skip
# About activations, what the header tells already, the state of Transformer Engine, and diffusers' tables of RoPE
IGNORED_LEAVES = (
    "scale_input", "input_scale", "output_scale", "comfy_quant", "weight_format", "input_quantizer._amax",
    "output_quantizer._amax", "_extra_state", "freqs_cos", "freqs_sin",
)  # fmt: skip
TOKENIZER_TENSOR = "spiece_model"  # of ComfyUI's UMT5: the SentencePiece model, uint8
IGNORED = ("scaled_fp8", TOKENIZER_TENSOR)
TILES = (256, 128, 64, 32, 16)  # sides of tiles in use
# Forms that are told by their name: (end of a stored name, what it is)
NAMED = (
    ("weight_scale_2", "nvfp4"), ("weight_global_scale", "nvfp4"), ("input_global_scale", "nvfp4"),
    ("bitsandbytes__nf4", "bitsandbytes nf4"), ("bitsandbytes__fp4", "bitsandbytes fp4"),
    ("weight.absmax", "bitsandbytes 4-bit"), (".wscales", "Nunchaku int4"), (".smooth_factor", "Nunchaku int4"),
    (".smooth", "Nunchaku int4"), (".qzeros", "GPTQ or AWQ int4"), (".qweight", "packed int4"),
    (".weight_packed", "packed int4 (compressed-tensors)"), ("_packed_params", "a quantised module of torch"),
    ("weight._shift", "quanto int4"), ("weight._data._data", "quanto int4"), (".weight_scalar", "mxfp8"),
    ("_qdata", "torchao"), (".weight:scale", "torchao"), (".W_q", "HQQ"), ("zero_point", "integers with zero points"),
)  # fmt: skip
# `format` of ComfyUI's markers that are one product
COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")
MAX_MARKER_BYTES = 1 << 12


class Linear(NamedTuple):
    """The stored weight of a module, its scale or "", and what that is multiplied by."""

    stored: str
    scale: str = ""
    times: float = 1.0


def split(plain: str) -> tuple[str, str]:
    """Module and leaf of a name: what lies below a weight belongs to its leaf."""
    module, found, below = plain.partition(".weight.")
    if found:
        return module, f"weight.{below}"
    module, _, leaf = plain.rpartition(".")
    return module, leaf


def linears(header: Header, modules: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, Linear]]:
    """The weight of each module that has one. `modules`: stored names by leaf, by module.

    Raises:
        FileError: stored in a form that is not read; says its name.
    """
    for module, leaves in modules.items():
        leaf = next((leaf for leaf in WEIGHTS if leaf in leaves), "")
        if not leaf:
            continue
        stored = leaves[leaf]
        scale = next((name for name in SCALES if name in leaves), "")
        info = header.tensors[stored]
        kind = _unread(info, header.tensors[leaves[scale]] if scale else None)
        if kind:
            raise unsupported(header, kind, stored)
        yield module, Linear(stored, leaves[scale], SCALES[scale]) if scale else Linear(stored)


def _unread(info: TensorInfo, scale: TensorInfo | None) -> str:
    """What form a weight is in, if it is none of those that are read; else ""."""
    whole = "x".join(map(str, info.shape))
    if scale is None:
        packed = {"U8": "numbers packed into bytes", "I8": "int8 without a scale"}
        known = info.dtype in FLOATS or info.dtype.startswith(GGUF_PREFIX)
        return "" if known else packed.get(info.dtype, f"weights in {info.dtype}")
    if scale.dtype in ("U8", "F8_E8M0"):
        return {"U8": "mxfp4 or mxfp6", "I8": "mxint8"}.get(info.dtype, "mxfp8")
    if info.dtype == "U8":
        return "nvfp4" if scale.dtype in FP8 else "numbers packed into bytes"
    if info.dtype not in (*FLOATS, "I8") or scale.dtype not in FLOATS:
        return f"weights in {info.dtype} with scales in {scale.dtype}"
    if tile_of(info.shape, scale.shape) is None:
        return f"{info.dtype} [{whole}] with scales [{'x'.join(map(str, scale.shape))}]"
    return ""


def tile_of(shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale: shape [o, i] or [o, ...], scales [], [1], [o], [o, 1, ...],
    [1, i] or a grid of tiles; None where they do not fit."""
    rows, columns = (shape[0] if shape else 1), 1
    for size in shape[1:]:
        columns *= size
    count = 1
    for size in scale:
        count *= size
    if count == 1:
        return rows, columns
    if count == rows and scale[0] == rows:
        return 1, columns
    while len(scale) > 2 and scale[-1] == 1:  # [o, groups, 1], as musubi-tuner has them
        scale = scale[:-1]
    if len(shape) != 2 or len(scale) != 2:
        return None
    sides = [_side(size, parts) for size, parts in zip(shape, scale, strict=True)]
    return (sides[0], sides[1]) if all(sides) else None


def _side(size: int, parts: int) -> int:
    """The side of a tile where `size` values have `parts` scales; 0 where none fits."""
    if parts in (1, size):
        return size // max(parts, 1)
    return next((side for side in TILES if -(-size // side) == parts), 0)


def is_tiled(header: Header, linear: Linear) -> bool:
    """Whether a weight is in TurboDiffusion's form: INT8 in tiles of 128 x 128."""
    info = header.tensors[linear.stored]
    if info.dtype != "I8" or not linear.scale or linear.times != 1 or len(info.shape) != 2:
        return False
    return header.tensors[linear.scale].shape == tuple(-(-size // INT8_TILE) for size in info.shape)


def check_names(header: Header) -> None:
    """Refuse a file whose names or markers tell a form that is not one product.

    Raises:
        FileError: says the name of the form.
    """
    for end, kind in NAMED:
        if stored := next((stored for stored in header.tensors if stored.endswith(end)), ""):
            raise unsupported(header, kind, stored)
    for stored, info in header.tensors.items():
        if stored.endswith("comfy_quant"):
            with info.file.open("rb") as file:
                marker = os.pread(file.fileno(), min(info.nbytes, MAX_MARKER_BYTES), info.offset)
            if kind := _marked(_json(marker.decode("utf-8", "replace"))):
                raise unsupported(header, kind, stored)
    layers = _json(header.metadata.get("_quantization_metadata", "")).get("layers")
    for name, told in layers.items() if isinstance(layers, dict) else ():
        if kind := _marked(told if isinstance(told, dict) else {}):
            raise unsupported(header, kind, str(name))


def _json(text: str) -> dict[str, object]:
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _marked(marker: Mapping[str, object]) -> str:
    """The form that ComfyUI's marker of a layer tells, if it is none of those that are read; else ""."""
    form = str(marker.get("format", ""))[:40]
    if marker.get("convrot") or "convrot" in form:
        return "rotated integers (ConvRot)"
    return form if form and form not in COMFY_FORMATS else ""


def unsupported(header: Header, kind: str, key: str) -> FileError:
    """The error of a file in a form that is not read."""
    return bad_file(
        header.path, f"these weights are {kind}, which turbodiff does not read", code="format_unsupported", key=key,
        got=kind, expected=SUPPORTED,
    )  # fmt: skip
