"""Which network a checkpoint holds and in whose layout: told by its keys and shapes, never by its file name.

Layouts of the DiT: `wan` (original, 5-D patch embedding), `turbowan` (2-D), `diffusers`, `fastvideo`; behind it
`-quant` for INT8 tiles, `-fp8` for ComfyUI's scaled fp8, `-gguf` for GGUF blocks. Of the VAE: `wan`, `diffusers`.
Of the text encoder: `wan`, `transformers`, `llama.cpp`.
Prefixes of exports are stripped. No torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from turbodiff.spec import shapes
from turbodiff.spec.errors import FileError
from turbodiff.weights import keymaps
from turbodiff.weights.headers import Header, TensorInfo, bad_file, read_header

Part = Literal["dit", "vae", "text_encoder"]
COMPONENT_NAMES = {"dit": "a Wan DiT", "vae": "the Wan2.1 VAE", "text_encoder": "the UMT5 encoder"}

FP8_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's two spellings
IGNORED = ("scaled_fp8", "spiece_model")
IGNORED_LEAVES = ("scale_input", "input_scale", "comfy_quant")
PATCH_AREA = shapes.PATCH**2

# What other files betray themselves by: (a piece of some key, what it is)
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


class Source(NamedTuple):
    """Where one of our parameters comes from: the stored tensor, and the tensor that scales it or ""."""

    stored: str
    scale: str = ""


class Kind(NamedTuple):
    """A component in one dialect: the modules that give it away, and the table of its names."""

    component: Part
    dialect: str
    marks: tuple[str, ...]
    table: Callable[[], Mapping[str, str]]


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint: what it holds and where each of our parameters comes from.

    `numbers` of a DiT: dim, ffn_dim, num_layers, in_dim, out_dim, text_dim, freq_dim, head_dim (0 where the file does
    not tell); of a text encoder those of spec.models.TextFacts; of a VAE base_dim, z_dim. `unknown`: stored names that
    have no place in the network.
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


KINDS = (
    Kind("dit", "wan", ("patch_embedding", "blocks.0.self_attn.q", "head.head"), dict),
    Kind("dit", "diffusers", ("patch_embedding", "blocks.0.attn1.to_q", "proj_out"), keymaps.dit_from_diffusers),
    Kind("dit", "fastvideo", ("patch_embedding", "blocks.0.to_q", "proj_out"), keymaps.dit_from_fastvideo),
    Kind("vae", "wan", ("encoder.conv1", "decoder.conv1", "conv2"), keymaps.vae_from_original),
    Kind("vae", "diffusers", ("encoder.conv_in", "decoder.conv_in", "post_quant_conv"), dict),
    Kind("text_encoder", "wan", ("token_embedding", "blocks.0.attn.q", "norm"), keymaps.umt5_from_original),
    Kind("text_encoder", "llama.cpp", ("token_embd", "enc.blk.0.attn_q"), keymaps.umt5_from_gguf),
    Kind("text_encoder", "transformers", ("encoder.block.0.layer.0.SelfAttention.q", "encoder.final_layer_norm"), dict),
)


def open_checkpoint(path: Path | str, component: Part | None = None) -> Checkpoint:
    """The checkpoint at `path`; with `component` it must hold that one.

    Raises:
        FileError: see read_header; or a file of something else.
    """
    checkpoint = recognise(read_header(path))
    if component not in (None, checkpoint.component):
        raise bad_file(
            Path(path), "this file holds another part of the model", code="file_foreign",
            got=COMPONENT_NAMES[checkpoint.component], expected=COMPONENT_NAMES[component],
        )  # fmt: skip
    return checkpoint


def recognise(header: Header) -> Checkpoint:
    """What the header describes.

    Raises:
        FileError: none of ours; says what it looks like.
    """
    for prefix in keymaps.PREFIXES:
        names = _plain_names(header, prefix)
        modules = {name.rpartition(".")[0] for name in names}
        for kind in KINDS:
            if modules.issuperset(kind.marks):
                return _checkpoint(header, kind, names)
    raise _foreign(header)


def other_kind(names: object) -> str:
    """What a file with keys such as `names` is, or "" where nothing gives it away."""
    text = str(names)
    return next((what for piece, what in OTHERS if piece in text), "")


def _plain_names(header: Header, prefix: str) -> dict[str, str]:
    """Stored names under `prefix`, by their names without it."""
    names = {}
    for stored in header.tensors:
        plain = stored
        for infix in keymaps.INFIXES:
            plain = plain.replace(infix, "")
        if plain.startswith(prefix):
            names[plain[len(prefix) :]] = stored
    return names


def expected_names(checkpoint: Checkpoint) -> set[str]:
    """Every parameter that a network of this kind and depth has, in our names; of a VAE, whatever is there."""
    if checkpoint.component == "vae":
        return set(checkpoint.sources)
    layers = min(checkpoint.numbers["num_layers"], keymaps.MAX_LAYERS)
    if checkpoint.component == "text_encoder":
        return keymaps.umt5_names(layers)
    return keymaps.dit_names(layers, quant=checkpoint.quant, sla=checkpoint.sla)


def _checkpoint(header: Header, kind: Kind, names: Mapping[str, str]) -> Checkpoint:
    sources, unknown = _sources(header, kind, names)
    quant = any(name.endswith(".int8_weight") for name in sources)
    checkpoint = Checkpoint(
        header,
        kind.component,
        _layout(header, kind, sources, quant),
        sources,
        (),
        _NUMBERS[kind.component](_Shapes(header, sources)),
        quant,
        sla=any(".proj_l." in name for name in sources),
    )
    expected = expected_names(checkpoint)
    unknown += [source.stored for name, source in sources.items() if name not in expected]
    known = {name: source for name, source in sources.items() if name in expected}
    return replace(checkpoint, sources=known, unknown=tuple(sorted(unknown)))


def _layout(header: Header, kind: Kind, sources: Mapping[str, Source], quant: bool) -> str:
    name = kind.dialect
    patch = sources.get("patch_embedding.weight")
    if (kind.component, name) == ("dit", "wan") and patch and len(header.tensors[patch.stored].shape) == 2:
        name = "turbowan"
    scaled = any(source.scale for source in sources.values())
    blocks = any(info.dtype.startswith("GGUF_") for info in header.tensors.values())
    return name + ("-quant" if quant else "") + ("-fp8" if scaled else "") + ("-gguf" if blocks else "")


def _sources(header: Header, kind: Kind, names: Mapping[str, str]) -> tuple[dict[str, Source], list[str]]:
    table = kind.table()
    scales = {plain: stored for plain, stored in names.items() if plain.rpartition(".")[2] in FP8_SCALES}
    sources: dict[str, Source] = {}
    unknown = []
    for plain, stored in names.items():
        module, _, leaf = plain.rpartition(".")
        if plain in scales or plain in IGNORED or leaf in IGNORED_LEAVES:
            continue
        ours = keymaps.renamed(_quant_leaf(module, leaf, header.tensors[stored]), table)
        scale = next((scales[f"{module}.{end}"] for end in FP8_SCALES if f"{module}.{end}" in scales), "")
        if ours is None or ours in sources:
            unknown.append(stored)
        else:
            sources[ours] = Source(stored, scale if leaf == "weight" else "")
    if kind.component == "text_encoder":
        _tie(sources)
    return sources, unknown


def _quant_leaf(module: str, leaf: str, info: TensorInfo) -> str:
    """INT8 exports in diffusers' layout say `weight` (INT8) and `weight_scale_inv`."""
    if leaf == "weight" and info.dtype == "I8":
        leaf = "int8_weight"
    return f"{module}.{'scale' if leaf == 'weight_scale_inv' else leaf}".lstrip(".")


def _tie(sources: dict[str, Source]) -> None:
    found = next((sources[name] for name in keymaps.UMT5_TIED if name in sources), None)
    if found:
        sources.update(dict.fromkeys(keymaps.UMT5_TIED, found))


class _Shapes:
    """Shapes of our parameters as the file has them."""

    def __init__(self, header: Header, sources: Mapping[str, Source]) -> None:
        self.header, self.sources = header, sources

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of `name`, at least `rank` axes.

        Raises:
            FileError: not in the file, or of fewer axes.
        """
        quant = name.removesuffix("weight") + "int8_weight"
        source = self.sources.get(name) or self.sources.get(quant)
        if source is None:
            raise bad_file(self.header.path, "a tensor is missing", code="key_missing", key=name, expected=name)
        shape = self.header.tensors[source.stored].shape
        if len(shape) < rank:
            raise bad_file(
                self.header.path, "a tensor of another shape", code="key_shape", key=source.stored, got=list(shape),
                expected=f"{rank} axes",
            )  # fmt: skip
        return shape

    def count(self, start: str) -> int:
        """How many `start<i>.` there are, counted from the highest i."""
        found = (name.removeprefix(start).partition(".")[0] for name in self.sources if name.startswith(start))
        return 1 + max((int(index) for index in found if index.isdecimal()), default=-1)


def _dit_numbers(shape: _Shapes) -> dict[str, int]:
    patch = shape("patch_embedding.weight", 2)
    proj_l = "blocks.0.self_attn.attn_op.local_attn.proj_l.weight"
    return {
        "dim": patch[0],
        "in_dim": patch[1] // PATCH_AREA if len(patch) == 2 else patch[1],
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "num_layers": shape.count("blocks."),
        "out_dim": shape("head.head.weight", 2)[0] // PATCH_AREA,
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "head_dim": shape(proj_l, 2)[0] if proj_l in shape.sources else 0,
    }


def _vae_numbers(shape: _Shapes) -> dict[str, int]:
    return {"base_dim": shape("decoder.norm_out.gamma", 1)[0], "z_dim": shape("post_quant_conv.weight", 2)[0]}


def _text_numbers(shape: _Shapes) -> dict[str, int]:
    layer = "encoder.block.0.layer"
    vocab, dim = shape("shared.weight", 2)
    buckets, heads = shape(f"{layer}.0.SelfAttention.relative_attention_bias.weight", 2)
    return {
        "vocab": vocab,
        "dim": dim,
        "dim_attn": shape(f"{layer}.0.SelfAttention.q.weight", 2)[0],
        "dim_ffn": shape(f"{layer}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_heads": heads,
        "num_buckets": buckets,
        "num_layers": shape.count("encoder.block."),
    }


_NUMBERS: Mapping[str, Callable[[_Shapes], dict[str, int]]] = {
    "dit": _dit_numbers,
    "vae": _vae_numbers,
    "text_encoder": _text_numbers,
}


def _foreign(header: Header) -> FileError:
    names = sorted(header.tensors)
    looks = other_kind(names)
    return bad_file(
        header.path, "these weights are not of Wan2.1, Wan2.2 A14B, their VAE or UMT5", code="file_foreign",
        got=looks or f"{len(names)} tensors: {', '.join(names[:3])[:120]}",
        expected="Wan DiT, Wan2.1 VAE or UMT5 encoder",
    )  # fmt: skip
