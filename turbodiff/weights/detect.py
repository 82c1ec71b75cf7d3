"""Opens a checkpoint and says which network it holds in whose layout, from its keys and shapes, never from its name.

A checkpoint is a file (safetensors, torch's zip, GGUF), an index of shards, or a folder with one or the other.
Layouts of the DiT: `wan` (original, 5-D patch embedding), `turbowan` (2-D), `diffusers`, `fastvideo`; behind it
`-quant` for INT8 tiles, `-int8` and `-fp8` for other small numbers (weights/forms.py), `-gguf` for GGUF blocks. Of the
VAE: `wan`, `diffusers`. Of the text encoder: `wan`, `transformers`, `llama.cpp`; of the picture encoder: `wan`,
`transformers`. Prefixes of exports are stripped. No torch.
"""

import contextlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Literal, NamedTuple

from turbodiff.spec import shapes
from turbodiff.spec.files import NotAFileError, open_file
from turbodiff.weights import forms, gguf, keymaps, pth
from turbodiff.weights.headers import GGUF_PREFIX, Header, TensorInfo, bad_file, parse_json, read_safetensors, too_much
from turbodiff.weights.kinds import NOT_WEIGHTS, other_kind
from turbodiff.weights.limits import MAX_HEADER_BYTES

Part = Literal["dit", "vae", "text_encoder", "image_encoder", "tiny_vae"]
COMPONENT_NAMES = {
    "dit": "a Wan DiT", "vae": "the Wan2.1 VAE", "text_encoder": "the UMT5 encoder",
    "image_encoder": "a CLIP picture encoder", "tiny_vae": "a small decoder for previews (TAEHV)",
}  # fmt: skip
ENDINGS = (".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt", ".gguf")  # in either case
INDEX = re.compile(r"\.index(?:\.[\w-]+)?\.json$")  # of shards; diffusers' variants have a word in it: .index.fp16.json
# beside a file that is being downloaded
UNFINISHED = (".aria2", ".part", ".!qb", ".!qB", ".crdownload", ".download", ".incomplete", ".td", ".xltd")
# What is not used of a file, by the beginning of a name: UMT5's decoder as transformers and llama.cpp name it; of CLIP
# its text half and what follows the layers
UNUSED: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("decoder.", "lm_head.", "dec."),
    "tiny_vae": ("encoder.",),
    "image_encoder": ("head", "visual_projection.", "text_", "log", "embeddings.position_ids"),
}
MAX_SHARDS = 256
MAX_PREFIXES = 8  # of those that are not known
PATCH_AREA = shapes.PATCH**2

# A component in one dialect, by modules that no other has
SIGNATURES: Mapping[tuple[Part, str], tuple[str, ...]] = {
    ("dit", "wan"): ("patch_embedding", "blocks.0.self_attn.q", "head.head"),
    ("dit", "diffusers"): ("patch_embedding", "blocks.0.attn1.to_q", "proj_out"),
    ("dit", "fastvideo"): ("patch_embedding", "blocks.0.to_q", "proj_out"),
    ("vae", "wan"): ("encoder.conv1", "decoder.conv1", "conv2"),
    ("vae", "diffusers"): ("encoder.conv_in", "decoder.conv_in", "post_quant_conv"),
    ("text_encoder", "wan"): ("token_embedding", "blocks.0.attn.q", "norm"),
    ("text_encoder", "llama.cpp"): ("token_embd", "enc.blk.0.attn_q"),
    ("text_encoder", "transformers"): ("encoder.block.0.layer.0.SelfAttention.q", "encoder.final_layer_norm"),
    ("tiny_vae", "taehv"): ("decoder.1", "decoder.3.conv.0", "decoder.22"),
    ("image_encoder", "wan"): ("transformer.0.attn.to_qkv", "pre_norm", "patch_embedding"),
    ("image_encoder", "transformers"): ("encoder.layers.0.self_attn.k_proj", "pre_layrnorm"),
}

# Sizes of a network: (one of our parameters, the axis to read); without an axis, how many `<prefix><i>.` there are
_UMT5_LAYER = "encoder.block.0.layer"
_UMT5_BIAS = f"{_UMT5_LAYER}.0.SelfAttention.relative_attention_bias.weight"
_PROJ_L = "blocks.0.self_attn.attn_op.local_attn.proj_l.weight"
_PICTURE = "img_emb.proj.1.weight"
SIZES: Mapping[Part, Mapping[str, tuple[str, int | None]]] = {
    "dit": {
        "dim": ("patch_embedding.bias", 0),
        "in_dim": ("patch_embedding.weight", 1),
        "ffn_dim": ("blocks.0.ffn.0.weight", 0),
        "num_layers": ("blocks.", None),
        "out_dim": ("head.head.weight", 0),
        "text_dim": ("text_embedding.0.weight", 1),
        "freq_dim": ("time_embedding.0.weight", 1),
        "head_dim": (_PROJ_L, 0),
        "image_dim": (_PICTURE, 1),
    },
    "vae": {"base_dim": ("decoder.norm_out.gamma", 0), "z_dim": ("post_quant_conv.weight", 0)},
    "text_encoder": {
        "vocab": ("shared.weight", 0),
        "dim": ("shared.weight", 1),
        "dim_attn": (f"{_UMT5_LAYER}.0.SelfAttention.q.weight", 0),
        "dim_ffn": (f"{_UMT5_LAYER}.1.DenseReluDense.wi_0.weight", 0),
        "num_heads": (_UMT5_BIAS, 1),
        "num_buckets": (_UMT5_BIAS, 0),
        "num_layers": ("encoder.block.", None),
    },
    "tiny_vae": {"z_dim": ("decoder.1.weight", 1)},
    "image_encoder": {
        "dim": ("pre_layrnorm.bias", 0),
        "dim_ffn": ("encoder.layers.0.mlp.fc1.weight", 0),
        "num_layers": ("encoder.layers.", None),
    },
}


class Source(NamedTuple):
    """Where one of our parameters comes from: the stored tensor; that of its scale or "", and what that is multiplied
    by."""

    stored: str
    scale: str = ""
    times: float = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of ours: its header, and where each of our parameters comes from.

    `numbers`: the sizes of the network by the names in SIZES; `head_dim` is 0 where the file does not tell, `image_dim`
    where the network has no branch for a picture. `unknown`:
    stored names that have no place in the network.
    """

    header: Header
    component: Part
    layout: str
    sources: Mapping[str, Source]
    unknown: tuple[str, ...]
    numbers: Mapping[str, int]
    quant: bool = False
    sla: bool = False

    def info(self, name: str) -> TensorInfo:
        """Header entry of one of our parameters."""
        return self.header.tensors[self.sources[name].stored]


def is_weights(name: str) -> bool:
    """Whether a file of this name may hold weights."""
    return name.lower().endswith(ENDINGS)


def read_header(path: Path | str) -> Header:
    """The header of a checkpoint: a file, an index of shards, or a folder that holds one or the other.

    Raises:
        FileError: missing, truncated, damaged, of an unknown kind, or a pickle that does more than hold tensors.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(file for file in path.glob("*.json") if INDEX.search(file.name))
            files = files or [file for file in path.iterdir() if is_weights(file.name)]
            if not files:
                expected = "*.safetensors or *.index.json"
                raise bad_file(path, "no weights in this folder", code="file_missing", expected=expected)
            # safetensors before others, and `model.safetensors` before the variant `model.fp16.safetensors`
            path = min(files, key=lambda file: (file.suffix == ".bin", file.name.count("."), len(file.name), file.name))
        return _read_index(path) if INDEX.search(path.name) else _read_file(path)
    except FileNotFoundError:
        raise bad_file(path, "there is no such file", code="file_missing") from None
    except NotAFileError as error:
        raise bad_file(path, "not a regular file", code="file_foreign", got=error.strerror) from None
    except OSError as error:
        raise bad_file(path, "the file cannot be read", code="file_unreadable", got=error.strerror) from None


def _read_file(path: Path) -> Header:
    with open_file(path) as file:
        start, size = file.read(64), os.fstat(file.fileno()).st_size
        if size < 16:
            raise bad_file(path, "the file is empty or cut short", code="file_truncated", got=f"{size} bytes")
        file.seek(0)
        if start.startswith(b"PK\x03\x04"):
            return pth.read(path, file, size)
        if start.startswith(b"GGUF"):
            return gguf.read(path, file, size)
        is_json = start[4:9] == b"\0\0\0\0{"  # behind a length that could begin like a pickle, 640 bytes for one
        for mark, known in () if is_json else NOT_WEIGHTS:
            if start.lstrip().lower().startswith(mark):
                raise bad_file(path, f"this is {known}, not weights", code="file_foreign", got=known)
        return read_safetensors(path, file, size)


def _read_index(path: Path) -> Header:
    if path.stat().st_size > MAX_HEADER_BYTES or not path.is_file():
        raise bad_file(path, "not an index of shards", code="file_foreign", got=f"{path.stat().st_size} bytes")
    where = parse_json(path, path.read_bytes()).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and is_weights(name) and Path(name).name == name for name in where.values()
    ):
        raise bad_file(path, "not an index of shards", code="file_damaged", expected='{"weight_map": {tensor: file}}')
    names = sorted(set(where.values()))
    if len(names) > MAX_SHARDS:
        raise too_much(path, f"{len(names)} shards", f"{MAX_SHARDS}")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        found = f"{len(names) - len(missing)} of {len(names)}"
        raise bad_file(path, "shards are missing", code="file_missing", got=found, expected=", ".join(missing))
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for name in names:
        shard = _read_file(path.parent / name)
        tensors |= shard.tensors
        metadata |= shard.metadata
        inside = inside or shard.inside
    lost = sorted(set(where) - set(tensors))
    if lost:
        raise bad_file(path, "a tensor of the index is in no shard", code="key_missing", key=lost[0])
    return Header(path, tensors, metadata, inside)


def open_checkpoint(path: Path | str, component: Part | None = None) -> Checkpoint:
    """The checkpoint at `path`; with `component` it must hold that one. A file that did not change is not read again.

    Raises:
        FileError: see read_header; or a file of something else.
    """
    path = Path(path)
    if beside := next((mark for mark in UNFINISHED if os.path.exists(f"{path}{mark}")), ""):  # noqa: PTH110  no error
        # aria2 allocates the whole file first: behind a valid header there are zeros
        raise bad_file(
            path, "the download of this file is not finished", code="file_unfinished", got=path.name + beside,
            expected=f"no {path.name + beside} beside it",
        )  # fmt: skip
    state = None  # of a single file; a folder or an index does not tell when a shard changes
    with contextlib.suppress(OSError):  # read_header says why
        stat = path.stat()
        if S_ISREG(stat.st_mode) and not INDEX.search(path.name):
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    checkpoint = _read_once(path, state) if state else detect(read_header(path))
    if component not in (None, checkpoint.component):
        raise bad_file(
            path, "this file holds another part of the model", code="file_foreign",
            got=COMPONENT_NAMES[checkpoint.component], expected=COMPONENT_NAMES[component],
        )  # fmt: skip
    return checkpoint


@lru_cache(maxsize=16)  # about 1 MB each; the search, the check and the load of a model share them
def _read_once(path: Path, _state: tuple[int, int, int]) -> Checkpoint:
    return detect(read_header(path))


def detect(header: Header) -> Checkpoint:
    """What the header describes.

    Raises:
        FileError: none of ours, or in a form that is not read; says what it looks like.
    """
    plain_names = {}  # without what wrappers of modules add: stored names
    for stored in header.tensors:
        plain = stored
        for infix in keymaps.INFIXES:
            plain = plain.replace(infix, "")
        plain_names[plain] = stored
    for prefix in _prefixes(plain_names):
        names = {plain[len(prefix) :]: stored for plain, stored in plain_names.items() if plain.startswith(prefix)}
        modules = {forms.split(name)[0] for name in names}
        for (component, dialect), signature in SIGNATURES.items():
            if modules.issuperset(signature):
                return _checkpoint(header, component, dialect, names)
    stored_names = sorted(header.tensors)
    looks = other_kind(stored_names)
    if not looks:
        forms.check_names(header)
    raise bad_file(
        header.path, "these weights are not of Wan2.1, Wan2.2 A14B, their VAE or UMT5", code="file_foreign",
        got=looks or f"{len(stored_names)} tensors: {', '.join(stored_names[:3])[:120]}",
        expected="Wan DiT, Wan2.1 VAE or UMT5 encoder",
    )  # fmt: skip


def _prefixes(names: Mapping[str, str]) -> list[str]:
    """Prefixes under which a network may lie: the known ones, then whatever stands before the first module of one."""
    heads = {signature[0] for signature in SIGNATURES.values()}
    found = {
        name[: match.start()] for name in names for head in heads if (match := re.search(rf"(?<=\.){head}\.", name))
    }
    known = [prefix for prefix in keymaps.PREFIXES if prefix in found | {""}]
    # averaged weights before raw ones, what lies on top before what lies deep
    rest = sorted(found - set(known), key=lambda prefix: ("ema" not in prefix, prefix.count("."), prefix))
    return known + rest[:MAX_PREFIXES]


def _checkpoint(header: Header, component: Part, dialect: str, names: Mapping[str, str]) -> Checkpoint:
    forms.check_names(header)
    table = keymaps.names_from(component, dialect)
    if (component, dialect) == ("image_encoder", "wan"):
        # the rows of q, then those of k, then those of v
        tensors, parts = dict(header.tensors), dict(names)
        for plain, stored in names.items():
            info = tensors[stored]
            if ".attn.to_qkv." in plain and info.stride is None and info.shape and info.shape[0] % 3 == 0:
                del parts[plain]
                shape, nbytes = (info.shape[0] // 3, *info.shape[1:]), info.nbytes // 3
                for place, part in enumerate("qkv"):
                    piece = info._replace(shape=shape, nbytes=nbytes, offset=info.offset + place * nbytes)
                    parts[plain.replace("to_qkv", f"to_{part}")] = f"{stored}[{part}]"
                    tensors[f"{stored}[{part}]"] = piece
                del tensors[stored]
        header, names = header._replace(tensors=tensors), parts
    modules: dict[str, dict[str, str]] = {}
    for plain, stored in names.items():
        module, leaf = forms.split(plain)
        modules.setdefault(module, {})[leaf] = stored
    weights = {keymaps.rename(module, table) or module: one for module, one in forms.linears(header, modules)}
    blocks = [one for name, one in weights.items() if name.split(".", 2)[-1] in keymaps.DIT_LINEARS]
    quant = component == "dit" and bool(blocks) and all(forms.is_tiled(header, one) for one in blocks)
    sources, unknown = _sources(modules, weights, table, quant)
    tied = next((sources[name] for name in keymaps.UMT5_TIED if name in sources), None)
    if component == "text_encoder" and tied:
        sources.update(dict.fromkeys(keymaps.UMT5_TIED, tied))
    layout, patch = dialect, sources.get("patch_embedding.weight")
    if (component, dialect) == ("dit", "wan") and patch and len(header.tensors[patch.stored].shape) == 2:
        layout = "turbowan"
    kinds = {header.tensors[one.stored].dtype for one in weights.values()}
    layout += "-quant" if quant else "-int8" if "I8" in kinds else ""
    layout += "-fp8" if kinds & set(forms.FP8) else ""
    layout += "-gguf" if any(kind.startswith(GGUF_PREFIX) for kind in kinds) else ""
    sla = any(".proj_l." in name for name in sources)
    checkpoint = Checkpoint(header, component, layout, sources, (), _numbers(header, component, sources), quant, sla)
    expected = expected_names(checkpoint)
    unknown += [source.stored for name, source in sources.items() if name not in expected]
    if unused := UNUSED.get(component):
        left = {stored for plain, stored in names.items() if plain.startswith(unused)}
        unknown = [stored for stored in unknown if stored not in left]
    known = {name: source for name, source in sources.items() if name in expected}
    return replace(checkpoint, sources=known, unknown=tuple(sorted(unknown)))


def _sources(
    modules: Mapping[str, Mapping[str, str]], weights: Mapping[str, forms.Linear], table: Mapping[str, str], quant: bool
) -> tuple[dict[str, Source], list[str]]:
    """Where each of our parameters comes from, and the stored names that have no place."""
    sources: dict[str, Source] = {}
    unknown = []
    for module, leaves in modules.items():
        ours = keymaps.rename(module, table) or module
        weight = weights.get(ours)
        if weight and quant and ours.split(".", 2)[-1] in keymaps.DIT_LINEARS:
            sources |= {f"{ours}.int8_weight": Source(weight.stored), f"{ours}.scale": Source(weight.scale)}
        elif weight:
            sources[f"{ours}.weight"] = Source(*weight)
        used = (weight.stored, weight.scale) if weight else ()
        for leaf, stored in leaves.items():
            if stored in used or leaf in forms.IGNORED_LEAVES or (leaf in forms.IGNORED and not module):
                continue
            name = keymaps.rename(f"{module}.{leaf}".lstrip("."), table)
            if name is None or name in sources:
                unknown.append(stored)
            else:
                sources[name] = Source(stored)
    return sources, unknown


def _numbers(header: Header, component: Part, sources: Mapping[str, Source]) -> dict[str, int]:
    """The sizes of the network, read from the shapes of its parameters.

    Raises:
        FileError: a parameter is missing or has fewer axes than it should.
    """
    numbers: dict[str, int] = {}
    for size, (name, axis) in SIZES[component].items():
        if axis is None:
            found = (other.removeprefix(name).partition(".")[0] for other in sources if other.startswith(name))
            numbers[size] = 1 + max((int(index) for index in found if index.isdecimal() and len(index) < 4), default=-1)
            continue
        source = sources.get(name) or sources.get(name.removesuffix("weight") + "int8_weight")
        if source is None and name in (_PROJ_L, _PICTURE):
            numbers[size] = 0
            continue
        if source is None:
            raise bad_file(header.path, "a tensor is missing", code="key_missing", key=name, expected=name)
        shape, rank = header.tensors[source.stored].shape, 1 if name.endswith(("gamma", "bias")) else 2
        if len(shape) < rank:
            raise bad_file(
                header.path, "a tensor of another shape", code="key_shape", key=source.stored, got=list(shape),
                expected=f"{rank} axes",
            )  # fmt: skip
        numbers[size] = shape[axis]
        if size == "in_dim":  # the patch convolution in any of its shapes
            numbers[size] = math.prod(shape) // max(PATCH_AREA * numbers["dim"], 1)
        elif size == "out_dim":  # the patch lies flat in this axis
            numbers[size] //= PATCH_AREA
    return numbers


def expected_names(checkpoint: Checkpoint) -> set[str]:
    """Every parameter that a network of this kind and depth has, in our names; of a VAE, whatever is there."""
    if checkpoint.component in ("vae", "tiny_vae"):
        return {name for name in checkpoint.sources if checkpoint.component == "vae" or name.startswith("decoder.")}
    layers = min(checkpoint.numbers["num_layers"], keymaps.MAX_LAYERS)
    picture = checkpoint.numbers.get("image_dim", 0) > 0
    kinds = {"quant": checkpoint.quant, "sla": checkpoint.sla, "picture": picture}
    return keymaps.parameter_names(checkpoint.component, layers, **kinds)
