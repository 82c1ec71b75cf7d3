"""Bytes of weights: from the files' own sizes where they are on disk, from the model's facts where they are not."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from turbodiff.spec.experts import Expert
from turbodiff.spec.models import Inventory, ModelFile, ModelSpec, TextFacts
from turbodiff.spec.request import Lora
from turbodiff.spec.shapes import INT8_TILE, PATCH

LORA_RANK = 64  # larger than most
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a value, a scale in 8 bits for 64, one in float32 for 256 scales


class Weights(NamedTuple):
    """Bytes of one model's networks as they sit on the device; `dit` is one expert."""

    dit: int
    block: int
    blocks: int
    rest: int
    text: int
    text_block: int
    text_rest: int
    vae: int
    image: int = 0  # CLIP's picture encoder


@lru_cache(64)
def weights_of(spec: ModelSpec, int8: bool, element_bytes: int) -> Weights:
    """Every network of a model, `element_bytes` per parameter (2 bf16, 4 float32), blocks in INT8 when `int8`.

    Names of the parameters as in models/wan_dit.py. The VAE is diffusers' AutoencoderKLWan with dim_mult (1, 2, 4, 4)
    and two residual blocks: a quadratic in the base width b through counts of the real modules at 16, 48 and 96;
    126,892,531 at 96, as in Wan2.1_VAE.pth.
    """
    dit, text = spec.dit, spec.text_encoder
    d, f, patch = dit.dim, dit.ffn_dim, PATCH * PATCH
    picture, p = dit.image_dim > 0, dit.image_dim
    linear = (8 + 2 * picture) * d * d + 2 * d * f  # the ten linears of a block, two more beside a picture
    biases = (9 + 2 * picture) * d + f
    norms = 4 * d + 2 * d + 6 * d  # q and k norms of both attentions, norm3, modulation
    proj_l = dit.head_dim * (dit.head_dim + 1) if spec.turbo else 0
    other = biases + norms + proj_l + picture * d
    block = linear + 4 * (linear // INT8_TILE**2) + element_bytes * other if int8 else element_bytes * (linear + other)
    patches = dit.in_dim * patch * d + d
    text_embedding = text.dim * d + d + d * d + d
    time = dit.freq_dim * d + d + d * d + d + 6 * (d * d + d)
    head = d * dit.out_dim * patch + dit.out_dim * patch + 2 * d
    picture_embedding = picture * (p * p + d * p + 3 * p + 3 * d)  # two linears between two norms
    rest = element_bytes * (patches + text_embedding + time + head + picture_embedding)
    layer, table = text_parameters(text)
    b, image = spec.vae.base_dim, 0
    if clip := spec.image_encoder:  # per layer four and two linears with biases and two norms; one norm at each end
        w = clip.dim
        per_layer = 4 * (w * w + w) + 2 * w * clip.dim_ffn + clip.dim_ffn + w + 4 * w
        image = clip.num_layers * per_layer + w * (3 * clip.patch**2 + clip.tokens + 1 + 4)
    return Weights(
        dit=dit.num_layers * block + rest,
        block=block,
        blocks=dit.num_layers,
        rest=rest,
        text=element_bytes * (text.num_layers * layer + table),
        text_block=element_bytes * layer,
        text_rest=element_bytes * table,
        vae=element_bytes * (13_709 * b**2 + 5_719 * b + 1_363),
        image=element_bytes * image,
    )


def text_parameters(text: TextFacts) -> tuple[int, int]:
    """(one layer, embedding and last norm) of the UMT5 encoder; every layer has its own relative positions."""
    attention = 4 * text.dim * text.dim_attn + text.num_buckets * text.num_heads
    layer = attention + 3 * text.dim * text.dim_ffn + 2 * text.dim
    return layer, text.vocab * text.dim + text.dim


def encoder_bytes(text: TextFacts, dtype: str, element_bytes: int) -> int:
    """The UMT5 encoder on the device: bf16 means all of it at `element_bytes` per parameter; with int8 and nf4 the
    linears of the layers but each last one are smaller (runtime/text.py), int8 with a float32 scale a row."""
    layer, rest = text_parameters(text)
    full = element_bytes * (text.num_layers * layer + rest)
    if dtype == "bf16":
        return full
    linears = 4 * text.dim * text.dim_attn + 2 * text.dim * text.dim_ffn
    outputs = 3 * text.dim_attn + text.dim + 2 * text.dim_ffn
    small = linears + 4 * outputs if dtype == "int8" else linears * NF4_BYTES
    return full - int(text.num_layers * (element_bytes * linears - small))


def lora_bytes(loras: tuple[Lora, ...], spec: ModelSpec, inventory: Inventory, expert: Expert) -> int:
    """Low-rank factors beside an expert: in every block what the fullest has, as large as their files where that is not
    told; LORA_RANK on every linear where a file is not known."""
    blocks = spec.dit.num_layers
    sizes = {found.path: found.block_bytes * blocks or found.bytes for found in inventory.loras}
    d, f = spec.dit.dim, spec.dit.ffn_dim
    unknown = 2 * LORA_RANK * spec.dit.num_layers * (8 * 2 * d + 2 * (d + f))
    applied = [lora for lora in loras if lora.strength and lora.expert in ("both", expert)]
    return sum(sizes.get(lora.path, unknown) for lora in applied)


def needed_files(spec: ModelSpec, inventory: Inventory, int8: bool) -> tuple[ModelFile, ...]:
    """What must be downloaded before the model can run: a published file for each component that is not on disk, the
    networks in INT8 or plain as asked for, in the other form where they are published in that alone. Those that the
    plan counts on (plan/tiers.py, `counted_on`) go first."""
    of_model = [file for file in inventory.files if file.model == spec.name]
    found = {file.component for file in of_model if not file.to_fetch}
    counted = {(file.component, file.path) for file in of_model if file.to_fetch}
    wanted: dict[str, ModelFile] = {}

    def rank(file: ModelFile) -> tuple[bool, bool]:
        return (file.component, file.names[0]) not in counted, file.component.startswith("dit") and file.quant != int8

    for file in sorted(spec.files, key=rank):
        if file.component not in found and file.repo:
            wanted.setdefault(file.component, file)
    return tuple(wanted.values())


def missing_bytes(spec: ModelSpec, inventory: Inventory, int8: bool) -> int:
    """Bytes to download before the model can run; 0 when every component is on disk."""
    return sum(file.bytes for file in needed_files(spec, inventory, int8))


def missing_files(files: Sequence[ModelFile], spec: ModelSpec, found: Inventory) -> list[ModelFile]:
    """Those of `files`, one variant of a model, that no file on this disk can stand for."""
    missing = []
    for file in files:
        alike = [have for have in found.files if (have.model, have.component) == (spec.name, file.component)]
        if file.component.startswith("dit"):
            alike = [have for have in alike if (have.quant, have.sla) == (file.quant, spec.turbo)]
            alike = [have for have in alike if have.resolution in ("", file.resolution)]
        missing += [] if alike else [file]
    return missing
