"""Opens a checkpoint and says which network it holds in whose layout, from its keys and shapes, never from its name.

A checkpoint is a file (safetensors, torch's zip, GGUF), an index of shards, or a folder with one or the other.
Layouts of the DiT: `wan` (original, 5-D patch embedding), `turbowan` (2-D), `diffusers`, `fastvideo`; behind it
`-quant` for INT8 tiles, `-fp8` for ComfyUI's scaled fp8, `-gguf` for GGUF blocks. Of the VAE: `wan`, `diffusers`.
Of the text encoder: `wan`, `transformers`, `llama.cpp`. Prefixes of exports are stripped. No torch.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Literal, NamedTuple

from turbodiff.spec import shapes
from turbodiff.weights import gguf, keymaps, pth
from turbodiff.weights.headers import Header, TensorInfo, bad_file, parse_json, read_safetensors

Part = Literal["dit", "vae", "text_encoder"]
COMPONENT_NAMES = {"dit": "a Wan DiT", "vae": "the Wan2.1 VAE", "text_encoder": "the UMT5 encoder"}
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")

FP8_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's two spellings
IGNORED = ("scaled_fp8", "spiece_model")
IGNORED_LEAVES = ("scale_input", "input_scale", "comfy_quant")
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
}

# Sizes of a network: (one of our parameters, the axis to read); without an axis, how many `<prefix><i>.` there are
_UMT5_LAYER = "encoder.block.0.layer"
_UMT5_BIAS = f"{_UMT5_LAYER}.0.SelfAttention.relative_attention_bias.weight"
_PROJ_L = "blocks.0.self_attn.attn_op.local_attn.proj_l.weight"
SIZES: Mapping[Part, Mapping[str, tuple[str, int | None]]] = {
    "dit": {
        "dim": ("patch_embedding.weight", 0),
        "in_dim": ("patch_embedding.weight", 1),
        "ffn_dim": ("blocks.0.ffn.0.weight", 0),
        "num_layers": ("blocks.", None),
        "out_dim": ("head.head.weight", 0),
        "text_dim": ("text_embedding.0.weight", 1),
        "freq_dim": ("time_embedding.0.weight", 1),
        "head_dim": (_PROJ_L, 0),
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
}

# Files of other networks: (a piece of some key, what it is)
OTHERS = (
    ("lora_", "a LoRA: use it with --lora"),
    ("img_emb", "Wan2.1 I2V with a CLIP picture encoder"),
    ("k_img", "Wan2.1 I2V with a CLIP picture encoder"),
    ("image_embedder", "Wan2.1 I2V with a CLIP picture encoder"),
    ("vace", "Wan VACE"),
    ("audio", "Wan-S2V"),
    ("motion_encoder", "Wan-Animate"),
    ("double_blocks", "a FLUX or Hunyuan network"),
    ("input_blocks", "a Stable Diffusion network"),
    ("model.layers.", "a language model"),
)
# What files that are no weights begin with, in lower case and without spaces
NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"<!doctype", "a web page"), (b"<html", "a web page"), (b"<?xml", "a web page"),
    *((bytes((0x80, protocol)), "a bare pickle (torch's format before 1.6)") for protocol in range(2, 6)),
)  # fmt: skip


class Source(NamedTuple):
    """Where one of our parameters comes from: the stored tensor, and the tensor that scales it or ""."""

    stored: str
    scale: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of ours: its header, and where each of our parameters comes from.

    `numbers`: the sizes of the network by the names in SIZES; `head_dim` is 0 where the file does not tell. `unknown`:
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


def read_header(path: Path | str) -> Header:
    """The header of a checkpoint: a file, an index of shards, or a folder that holds one or the other.

    Raises:
        FileError: missing, truncated, damaged, of an unknown kind, or a pickle that does more than hold tensors.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(path.glob("*.index.json")) or [
                file for file in path.iterdir() if file.name.endswith(ENDINGS)
            ]
            if not files:
                expected = "*.safetensors or *.index.json"
                raise bad_file(path, "no weights in this folder", code="file_missing", expected=expected)
            # safetensors before others, and `model.safetensors` before the variant `model.fp16.safetensors`
            path = min(files, key=lambda file: (file.suffix == ".bin", file.name.count("."), len(file.name), file.name))
        return _read_index(path) if path.name.endswith(".index.json") else _read_file(path)
    except FileNotFoundError:
        raise bad_file(path, "there is no such file", code="file_missing") from None
    except OSError as error:
        raise bad_file(path, "the file cannot be read", code="file_unreadable", got=error.strerror) from None


def _read_file(path: Path) -> Header:
    with path.open("rb") as file:
        start, size = file.read(64), path.stat().st_size
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
                raise bad_file(path, f"this is {known}, not weights", code="file_foreign")
        return read_safetensors(path, file, size)


def _read_index(path: Path) -> Header:
    where = parse_json(path, path.read_bytes()).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and name.endswith(ENDINGS) and Path(name).name == name for name in where.values()
    ):
        raise bad_file(path, "not an index of shards", code="file_damaged", expected='{"weight_map": {tensor: file}}')
    names = sorted(set(where.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        found = f"{len(names) - len(missing)} of {len(names)}"
        raise bad_file(path, "shards are missing", code="file_missing", got=found, expected=", ".join(missing))
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        tensors |= _read_file(path.parent / name).tensors
    lost = sorted(set(where) - set(tensors))
    if lost:
        raise bad_file(path, "a tensor of the index is in no shard", code="key_missing", key=lost[0])
    return Header(path, tensors)


def open_checkpoint(path: Path | str, component: Part | None = None) -> Checkpoint:
    """The checkpoint at `path`; with `component` it must hold that one. A file that did not change is not read again.

    Raises:
        FileError: see read_header; or a file of something else.
    """
    path = Path(path)
    state = None  # of a single file; a folder or an index does not tell when a shard changes
    with contextlib.suppress(OSError):  # read_header says why
        stat = path.stat()
        if S_ISREG(stat.st_mode) and not path.name.endswith(".index.json"):
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
        FileError: none of ours; says what it looks like.
    """
    for prefix in keymaps.PREFIXES:
        names = {}  # stored names under the prefix, by their names without it
        for stored in header.tensors:
            plain = stored
            for infix in keymaps.INFIXES:
                plain = plain.replace(infix, "")
            if plain.startswith(prefix):
                names[plain[len(prefix) :]] = stored
        modules = {name.rpartition(".")[0] for name in names}
        for (component, dialect), signature in SIGNATURES.items():
            if modules.issuperset(signature):
                return _checkpoint(header, component, dialect, names)
    stored_names = sorted(header.tensors)
    raise bad_file(
        header.path, "these weights are not of Wan2.1, Wan2.2 A14B, their VAE or UMT5", code="file_foreign",
        got=other_kind(stored_names) or f"{len(stored_names)} tensors: {', '.join(stored_names[:3])[:120]}",
        expected="Wan DiT, Wan2.1 VAE or UMT5 encoder",
    )  # fmt: skip


def _checkpoint(header: Header, component: Part, dialect: str, names: Mapping[str, str]) -> Checkpoint:
    sources, unknown = _sources(header, component, dialect, names)
    quant = any(name.endswith(".int8_weight") for name in sources)
    layout, patch = dialect, sources.get("patch_embedding.weight")
    if (component, dialect) == ("dit", "wan") and patch and len(header.tensors[patch.stored].shape) == 2:
        layout = "turbowan"
    layout += "-quant" if quant else ""
    layout += "-fp8" if any(source.scale for source in sources.values()) else ""
    layout += "-gguf" if any(info.dtype.startswith(gguf.PREFIX) for info in header.tensors.values()) else ""
    sla = any(".proj_l." in name for name in sources)
    checkpoint = Checkpoint(header, component, layout, sources, (), _numbers(header, component, sources), quant, sla)
    expected = expected_names(checkpoint)
    unknown += [source.stored for name, source in sources.items() if name not in expected]
    known = {name: source for name, source in sources.items() if name in expected}
    return replace(checkpoint, sources=known, unknown=tuple(sorted(unknown)))


def _sources(
    header: Header, component: Part, dialect: str, names: Mapping[str, str]
) -> tuple[dict[str, Source], list[str]]:
    """Where each of our parameters comes from, and the stored names that have no place."""
    table = keymaps.names_from(component, dialect)
    scales = {plain: stored for plain, stored in names.items() if plain.rpartition(".")[2] in FP8_SCALES}
    sources: dict[str, Source] = {}
    unknown = []
    for plain, stored in names.items():
        module, _, leaf = plain.rpartition(".")
        if plain in scales or plain in IGNORED or leaf in IGNORED_LEAVES:
            continue
        # INT8 exports in diffusers' layout say `weight` (INT8) and `weight_scale_inv`
        is_int8 = leaf == "weight" and header.tensors[stored].dtype == "I8"
        our_leaf = "int8_weight" if is_int8 else {"weight_scale_inv": "scale"}.get(leaf, leaf)
        ours = keymaps.rename(f"{module}.{our_leaf}".lstrip("."), table)
        scale = next((scales[f"{module}.{end}"] for end in FP8_SCALES if f"{module}.{end}" in scales), "")
        if ours is None or ours in sources:
            unknown.append(stored)
        else:
            sources[ours] = Source(stored, scale if leaf == "weight" else "")
    tied = next((sources[name] for name in keymaps.UMT5_TIED if name in sources), None)
    if component == "text_encoder" and tied:
        sources.update(dict.fromkeys(keymaps.UMT5_TIED, tied))
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
            numbers[size] = 1 + max((int(index) for index in found if index.isdecimal()), default=-1)
            continue
        source = sources.get(name) or sources.get(name.removesuffix("weight") + "int8_weight")
        if source is None and name == _PROJ_L:
            numbers[size] = 0
            continue
        if source is None:
            raise bad_file(header.path, "a tensor is missing", code="key_missing", key=name, expected=name)
        shape, rank = header.tensors[source.stored].shape, 1 if name.endswith("gamma") else 2
        if len(shape) < rank:
            raise bad_file(
                header.path, "a tensor of another shape", code="key_shape", key=source.stored, got=list(shape),
                expected=f"{rank} axes",
            )  # fmt: skip
        flat = size == "out_dim" or (size == "in_dim" and len(shape) == 2)  # the patch lies flat in this axis
        numbers[size] = shape[axis] // (PATCH_AREA if flat else 1)
    return numbers


def expected_names(checkpoint: Checkpoint) -> set[str]:
    """Every parameter that a network of this kind and depth has, in our names; of a VAE, whatever is there."""
    if checkpoint.component == "vae":
        return set(checkpoint.sources)
    layers = min(checkpoint.numbers["num_layers"], keymaps.MAX_LAYERS)
    return keymaps.parameter_names(checkpoint.component, layers, quant=checkpoint.quant, sla=checkpoint.sla)


def other_kind(names: object) -> str:
    """What a file with keys such as `names` is, or "" where its keys do not tell."""
    text = str(names)
    return next((what for piece, what in OTHERS if piece in text), "")
