"""Bytes of weights: from the files' own sizes where they are on disk, from the model's facts where they are not."""

from collections.abc import Iterable
from typing import NamedTuple

from turbodiff.spec.inventory import Inventory
from turbodiff.spec.models import DitFacts, ModelSpec, TextFacts, VaeFacts
from turbodiff.spec.request import Lora
from turbodiff.spec.shapes import PATCH

TILE = 128  # INT8 weights carry one float32 scale per 128 x 128 tile (TurboDiffusion's quant_linear files)
LORA_RANK = 64  # larger than most
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a value, a scale in 8 bits for 64, one in float32 for 256 scales


class Weights(NamedTuple):
    """Bytes of one model's networks as they sit on the device; `dit` is one expert, `text_linear` the largest layer."""

    dit: int
    block: int
    blocks: int
    rest: int
    text: int
    text_block: int
    text_rest: int
    text_linear: int
    vae: int


def weights_of(spec: ModelSpec, int8: bool, element_bytes: int) -> Weights:
    """Every network of a model, `element_bytes` per parameter (2 bf16, 4 float32), blocks in INT8 when `int8`."""
    linear, other = _block_parameters(spec.dit, sla=spec.turbo)
    tiles = linear // TILE**2
    block = linear + 4 * tiles + element_bytes * other if int8 else element_bytes * (linear + other)
    rest = element_bytes * _rest_parameters(spec.dit, spec.text_encoder.dim)
    text_block, text_rest = (element_bytes * n for n in _text_parameters(spec.text_encoder))
    layers = spec.text_encoder.num_layers
    return Weights(
        dit=spec.dit.num_layers * block + rest,
        block=block,
        blocks=spec.dit.num_layers,
        rest=rest,
        text=layers * text_block + text_rest,
        text_block=text_block,
        text_rest=text_rest,
        text_linear=element_bytes * spec.text_encoder.dim * max(spec.text_encoder.dim_attn, spec.text_encoder.dim_ffn),
        vae=element_bytes * _vae_parameters(spec.vae),
    )


def _block_parameters(dit: DitFacts, *, sla: bool) -> tuple[int, int]:
    """(weights of the ten linears, everything else) of one block, names as in models/wan_dit.py."""
    d, f = dit.dim, dit.ffn_dim
    linear = 8 * d * d + 2 * d * f
    biases = 9 * d + f
    norms = 4 * d + 2 * d + 6 * d  # q and k norms of both attentions, norm3, modulation
    proj_l = dit.head_dim * (dit.head_dim + 1) if sla else 0
    return linear, biases + norms + proj_l


def _rest_parameters(dit: DitFacts, text_dim: int) -> int:
    """Embeddings of patches, text and time, and the head."""
    d, patch = dit.dim, PATCH * PATCH
    patches = dit.in_dim * patch * d + d
    text = text_dim * d + d + d * d + d
    time = dit.freq_dim * d + d + d * d + d + 6 * (d * d + d)
    head = d * dit.out_dim * patch + dit.out_dim * patch + 2 * d
    return patches + text + time + head


def _text_parameters(text: TextFacts) -> tuple[int, int]:
    """(one layer, embedding and last norm) of the UMT5 encoder; every layer has its own relative positions."""
    attention = 4 * text.dim * text.dim_attn + text.num_buckets * text.num_heads
    layer = attention + 3 * text.dim * text.dim_ffn + 2 * text.dim
    return layer, text.vocab * text.dim + text.dim


def encoder_bytes(text: TextFacts, dtype: str, element_bytes: int) -> int:
    """The UMT5 encoder on the device: bf16 means all of it at `element_bytes` per parameter; with int8 and nf4 the
    linears of the layers but each last one are smaller (runtime/text.py), int8 with a float32 scale a row."""
    layer, rest = _text_parameters(text)
    full = element_bytes * (text.num_layers * layer + rest)
    if dtype == "bf16":
        return full
    linears = 4 * text.dim * text.dim_attn + 2 * text.dim * text.dim_ffn
    outputs = 3 * text.dim_attn + text.dim + 2 * text.dim_ffn
    small = linears + 4 * outputs if dtype == "int8" else linears * NF4_BYTES
    return full - int(text.num_layers * (element_bytes * linears - small))


def _vae_parameters(vae: VaeFacts) -> int:
    """diffusers' AutoencoderKLWan with dim_mult (1, 2, 4, 4) and two residual blocks: a quadratic in the base width,
    through counts of the real modules at 16, 48 and 96; 126,892,531 at 96, as in Wan2.1_VAE.pth."""
    return 13_709 * vae.base_dim**2 + 5_719 * vae.base_dim + 1_363


def lora_bytes(loras: Iterable[Lora], spec: ModelSpec, inventory: Inventory, expert: str) -> int:
    """Factors of the LoRAs that an expert wears, as large as their files; LORA_RANK on every linear where a file's size
    is not known."""
    sizes = {found.path: found.bytes for found in inventory.loras}
    d, f = spec.dit.dim, spec.dit.ffn_dim
    unknown = 2 * LORA_RANK * spec.dit.num_layers * (8 * 2 * d + 2 * (d + f))
    worn = (lora for lora in loras if lora.strength and lora.expert in ("both", expert))
    return sum(sizes.get(lora.path, unknown) for lora in worn)


def missing_bytes(spec: ModelSpec, inventory: Inventory, int8: bool) -> int:
    """Bytes to download before the model can run; 0 when every component is on disk."""
    found = {file.component for file in inventory.files if file.model == spec.name}
    wanted: dict[str, int] = {}
    for file in spec.files:
        if file.component not in found and (not file.component.startswith("dit") or file.quant == int8):
            wanted.setdefault(file.component, file.bytes)
    return sum(wanted.values())
