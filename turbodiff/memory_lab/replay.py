"""Does a plan's memory suffice for torch's allocator? Each phase's allocations, replayed under the cap that it gives.

The allocations are those of the real modules on meta tensors, weights placed as the levers say. Every phase begins with
an empty allocator, as runtime/offload.py leaves it. cuDNN's scratch is not in a stream: its share of a phase's
workspace is taken off the cap, so that it remains for cuDNN.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count
from typing import Literal, NamedTuple, cast

import torch
from torch import nn
from turbodiff_kernels.gemm import reference as gemm
from turbodiff_kernels.norm import reference as norm
from turbodiff_kernels.quant import reference as quant
from turbodiff_kernels.sage import reference as sage
from turbodiff_kernels.sla import reference as sla

from turbodiff.memory_lab.allocator_model import Allocation, smallest_cap, works
from turbodiff.memory_lab.dry_run import META, counted, denoise_ledger, unmasked, vae_ledger
from turbodiff.models import vae as vae_driver
from turbodiff.models.image_encoder import make_image_encoder, picture_features
from turbodiff.models.linear import Int8Linear
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.models.wan_dit import WanDiT
from turbodiff.plan import phase_costs
from turbodiff.plan.hardware import Allocator
from turbodiff.plan.kernel_costs import KernelsHere
from turbodiff.plan.phase_costs import CostInputs, PhaseCost
from turbodiff.plan.weight_sizes import LORA_RANK
from turbodiff.runtime.model_cache import dit_config
from turbodiff.spec.attention import AttentionKind
from turbodiff.spec.models import ImageEncoderFacts, ModelSpec, TextFacts, VaeFacts
from turbodiff.spec.plan import Levers
from turbodiff.spec.request import TextDtype
from turbodiff.spec.shapes import VAE_TILES, VideoShape

ATTENTION_KERNELS = ("turbodiff::normed_sage_attention_", "turbodiff::normed_sla_attention_")
REFERENCES: dict[
    str, tuple[Callable[..., object], ...]
] = {  # what runs where a kernel does not, by KernelsHere's names
    "norm": (norm.norm_modulate, norm.layer_norm, norm.rms_norm_, norm.rms_norm_rope_, norm.residual_add_),
    "quant": (quant.quantize_tiles,),
    "gemm": (gemm.int8_linear, gemm.int8_linear_quantize, gemm.int8_linear_add_),
    "attention": (sage.normed_sage_attention_, sla.normed_sla_attention_),
}
BLAS_BYTES = 32 << 20  # cuBLAS's workspace on Hopper, in the allocator from the first product on; 8 MiB elsewhere
Events = tuple[Allocation, ...]


class Cell(NamedTuple):
    """One phase with its levers: what the plan says, what it leaves for the allocator, and the allocations."""

    levers: str
    cost: PhaseCost
    cap_bytes: int
    events: Events

    mode: Allocator

    @property
    def works(self) -> bool:
        """Whether the allocations find a place under what was planned."""
        return works(self.events, self.mode, self.cap_bytes)

    @property
    def margin_bytes(self) -> int:
        """What was planned beyond the smallest cap that works; negative where it is too low."""
        return self.cap_bytes - smallest_cap(self.events, self.mode, self.cap_bytes)


def denoise_cell(inputs: CostInputs, levers: Levers, blocks: int | None = None) -> Cell:
    """All steps of one expert; `blocks` of its blocks run (None: all), of the others text and weights are there."""
    expert, facts = inputs.experts[0], inputs.spec.dit
    run = min(facts.num_layers, blocks or facts.num_layers)
    work, keep_text = phase_costs.step_work(inputs, levers.ffn_chunks, levers.text_keys), levers.text_keys == "kept"
    block, rest = _dit_tensors(inputs.spec, inputs.int8, inputs.lora > 0)
    cost = phase_costs.denoise(inputs, expert, levers.experts, levers.blocks_resident, work)
    if levers.experts == "streamed":
        weights = phase_costs.STREAM_BUFFERS * block + rest + levers.blocks_resident * block
    else:
        weights = (rest + facts.num_layers * block) * (len(set(inputs.experts)) if levers.experts == "resident" else 1)
    rows = [inputs.spec.text_encoder.text_len, *([clip.tokens] if (clip := inputs.spec.image_encoder) else [])]
    left = (facts.num_layers - run) * keep_text
    kept = [inputs.element_bytes * count * facts.dim for count in rows for _ in range(2 * left)]
    inside = inputs.attention_bytes - math.ceil(phase_costs.ATTENDING_UNITS * inputs.unit) - inputs.state_bytes
    half = inputs.unit // 2  # INT8 rows of q and of k: half a copy of the stream each
    pieces = (*(inside // half * (half,)), inside % half)
    steps = _steps(
        inputs.spec, inputs.shape, inputs.int8, levers.ffn_chunks, inputs.attention, pieces, run, inputs.forwards,
        keep_text, inputs.lora > 0, inputs.kernels,
    )  # fmt: skip
    events = (*_placed((BLAS_BYTES, *weights, *kept)), *steps)
    said = f"{levers.experts} {levers.blocks_resident}" if levers.experts == "streamed" else levers.experts
    said = f"{said}, chunks {levers.ffn_chunks}, text keys {levers.text_keys}"
    said = f"{said}, {inputs.attention}, {'int8' if inputs.int8 else 'bf16'}{', LoRA' if inputs.lora else ''}"
    return Cell(said, cost, cost.peak_bytes - inputs.context_bytes, events, inputs.allocator)


def vae_cell(inputs: CostInputs, name: Literal["vae_decode", "image_encode"], tile: int | None) -> Cell:
    """Decoding a clip, or encoding a picture and the empty frames after it."""
    cost = phase_costs.vae(inputs, name, tile)
    scratch = cost.workspace_bytes - cost.slack_bytes - phase_costs.workspace(inputs)
    sizes, moves = _vae_moves(inputs.spec.vae, inputs.shape, tile, name == "vae_decode", inputs.conv2d)
    return Cell(
        f"tiles of {tile}" if tile else "whole", cost, cost.peak_bytes - inputs.context_bytes - scratch,
        (*_placed((BLAS_BYTES, *sizes)), *moves), inputs.allocator,
    )  # fmt: skip


def text_cell(inputs: CostInputs, lever: Literal["resident", "streamed"], dtype: TextDtype = "bf16") -> Cell:
    """The text encoder over a prompt of 512 tokens: all of it on the device, or a layer at a time."""
    cost = phase_costs.text_encode(inputs, lever, dtype)
    layer, rest, moves = _text_moves(inputs.spec.text_encoder, lever == "streamed", dtype)
    weights = (*rest, *inputs.spec.text_encoder.num_layers * layer) if lever == "resident" else ()
    events = (*_placed((BLAS_BYTES, *weights)), *moves)
    said = lever if dtype == "bf16" else dtype
    return Cell(said, cost, cost.peak_bytes - inputs.context_bytes, events, inputs.allocator)


def picture_cell(inputs: CostInputs) -> Cell:
    """CLIP's encoder over the picture of an I2V clip."""
    assert inputs.spec.image_encoder is not None
    cost = phase_costs.image_embed(inputs)
    sizes, moves = _picture_moves(inputs.spec.image_encoder, inputs.shape)
    events = (*_placed((BLAS_BYTES, *sizes)), *moves)
    return Cell("resident", cost, cost.peak_bytes - inputs.context_bytes, events, inputs.allocator)


def vae_cells(inputs: CostInputs) -> Iterator[Cell]:
    """The VAE as a whole and in tiles, decoding and, of an I2V clip, encoding."""
    for tile in (None, *VAE_TILES):
        yield vae_cell(inputs, "vae_decode", tile)
        if inputs.spec.kind == "i2v":
            yield vae_cell(inputs, "image_encode", tile)


def network_cells(inputs: CostInputs, blocks: int | None = None) -> Iterator[Cell]:
    """Placements of the blocks and chunks of the feed-forward."""
    both, many = len(set(inputs.experts)) > 1, inputs.spec.dit.num_layers - phase_costs.STREAM_BUFFERS
    yield denoise_cell(inputs, Levers(experts="streamed", text_keys="recomputed"), blocks)
    for chunks in (1, 4):
        for experts, resident in (("resident", 0), *((("swapped", 0),) if both else ()), ("streamed", 0),
                                  ("streamed", many // 2)):  # fmt: skip
            yield denoise_cell(inputs, Levers(experts=experts, blocks_resident=resident, ffn_chunks=chunks), blocks)


def words_cells(inputs: CostInputs) -> Iterator[Cell]:
    """The text encoder with each of its levers, and the picture's where there is one."""
    yield text_cell(inputs, "resident")
    yield text_cell(inputs, "streamed")
    yield text_cell(inputs, "resident", "int8")
    yield text_cell(inputs, "resident", "nf4")
    if inputs.spec.image_encoder:
        yield picture_cell(inputs)


def _placed(sizes: tuple[int, ...]) -> Events:
    """Tensors that come first and stay, under numbers that no ledger gives."""
    return tuple(Allocation(-number, size) for number, size in zip(count(1), sizes, strict=False))


def _sizes(module: nn.Module) -> tuple[int, ...]:
    """Bytes of parameters and buffers, in the order in which they are copied."""
    return tuple(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def _add_branches(dit: nn.Module) -> None:
    """Give every INT8 linear the branch of a LoRA."""
    with META:
        for layer in [layer for layer in dit.modules() if isinstance(layer, Int8Linear)]:
            layer.add_low_rank(torch.empty(LORA_RANK, layer.in_features), torch.empty(layer.out_features, LORA_RANK))


@lru_cache(16)
def _dit_tensors(spec: ModelSpec, int8: bool, lora: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of the tensors of one block, and of those outside the blocks."""
    with META:
        dit = WanDiT(dit_config(spec.model_copy(update={"dit": spec.dit.model_copy(update={"num_layers": 1})}),
                                quant_linear=int8, sla=spec.turbo)).to(torch.bfloat16)  # fmt: skip
    if lora:
        _add_branches(dit)
    rest = [child for name, child in dit.named_children() if name != "blocks"]
    return _sizes(dit.blocks[0]), _sizes(nn.ModuleList(rest))


@lru_cache(16)
def _steps(
    spec: ModelSpec, shape: VideoShape, int8: bool, chunks: int, attention: str, inside: tuple[int, ...], blocks: int,
    forwards: int, keep_text: bool, lora: bool, kernels: KernelsHere,
) -> Events:  # fmt: skip
    """Two steps of so many forward passes through so many blocks, with the state of the sampler."""
    references = [call for name, fused in kernels._asdict().items() if not fused for call in REFERENCES[name]]
    within = {f"turbodiff::{call.__name__}": call for call in references}
    ledger = denoise_ledger(
        spec, shape, torch.bfloat16, int8=int8, chunks=chunks, attention=cast("AttentionKind", attention),
        inside={**dict.fromkeys(ATTENTION_KERNELS, inside), **within}, change=_add_branches if lora else None,
        blocks=blocks, forwards=forwards, keep_text=keep_text,
    )  # fmt: skip
    return tuple(ledger.events)


@lru_cache(8)
def _text_moves(facts: TextFacts, streamed: bool, dtype: TextDtype) -> tuple[tuple[int, ...], tuple[int, ...], Events]:
    """(bytes of the tensors of one layer, of those outside the layers, what reading a prompt allocates).

    Streamed, a layer comes before its turn and leaves after it, as runtime/text.py has it; two layers stand for all.
    bitsandbytes 0.50 runs on a card alone, so what its linears hold beside their results is put in by hand.
    """
    with META:
        encoder = make_text_encoder(facts.model_copy(update={"num_layers": 2})).bfloat16()
    blocks, visits = encoder.encoder.block, list[tuple[int, int]]()
    layer = _sizes(blocks[0])
    small = [child for name, child in blocks.named_modules() if isinstance(child, nn.Linear) and name[-2:] != "wo"]
    if dtype != "bf16":
        of_one = {id(child.weight): child for child in small[: len(small) // 2]}
        layer = tuple(
            size for x in blocks[0].parameters()
            for size in (_fewer_bits(of_one[id(x)], dtype) if id(x) in of_one else (x.numel() * x.element_size(),))
        )  # fmt: skip

    def comes(*sizes: int) -> None:
        visits.extend((ledger.take(size), size) for size in sizes)

    def goes(*call: object) -> None:
        while visits:
            ledger.give_back(*visits.pop())

    with unmasked(), counted(encoder) as ledger:
        if streamed:
            for block in blocks:
                block.register_forward_pre_hook(lambda *call: comes(*layer))
                block.register_forward_hook(goes)
        for child in small if dtype != "bf16" else ():
            held = _inside_linear(child, dtype, facts.text_len)
            child.register_forward_pre_hook(lambda *call, held=held: comes(*held))
            child.register_forward_hook(goes)
        ids = torch.zeros(1, facts.text_len, dtype=torch.long)
        encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    return layer, _sizes(nn.ModuleList([encoder.shared, encoder.encoder.final_layer_norm])), tuple(ledger.events)


def _fewer_bits(linear: nn.Linear, dtype: TextDtype) -> tuple[int, ...]:
    """Bytes of a linear's tensors in int8 or NF4: values and scales, of NF4 those of the scales, too."""
    count = linear.weight.numel()
    return (count, 4 * linear.out_features) if dtype == "int8" else (count // 2, count // 64, 4 * count // (64 * 256))


def _inside_linear(linear: nn.Linear, dtype: TextDtype, rows: int) -> tuple[int, ...]:
    """What a product of that many rows holds: in int8 the rows as float16 and as integers, their scales, the int32
    sums; in NF4 the weight in 16 bits."""
    inputs, sums = rows * linear.in_features, rows * linear.out_features
    return (2 * inputs, inputs, 4 * rows, 4 * sums) if dtype == "int8" else (2 * linear.weight.numel(),)


@lru_cache(8)
def _picture_moves(facts: ImageEncoderFacts, shape: VideoShape) -> tuple[tuple[int, ...], Events]:
    """(bytes of the tensors of the picture's encoder, what looking at a picture allocates)."""
    with META:
        encoder = make_image_encoder(facts).to(torch.bfloat16)
    encoder.get_submodule("embeddings").register_buffer("position_ids", torch.arange(facts.tokens)[None])
    with counted(encoder) as ledger:
        picture_features(encoder, torch.empty(1, 3, shape.height, shape.width), facts)
    return _sizes(encoder), tuple(ledger.events)


@lru_cache(16)
def _vae_moves(
    facts: VaeFacts, shape: VideoShape, tile: int | None, decode: bool, conv2d: bool
) -> tuple[tuple[int, ...], Events]:
    """(bytes of the VAE's tensors, what it allocates)."""
    with META:
        vae = vae_driver.make_vae(**facts.model_dump()).to(torch.bfloat16)
    method = "conv2d" if conv2d else "conv3d"
    ledger = vae_ledger(facts, shape, torch.bfloat16, tile, cast("vae_driver.ConvMethod", method), decode=decode)
    return _sizes(vae), tuple(ledger.events)
