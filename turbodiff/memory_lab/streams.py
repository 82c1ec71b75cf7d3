"""What phases ask torch's allocator for: every allocation of the real modules on meta tensors, with their weights.

A `Stream` is a recipe: what makes it and of what. Making one takes a second or more, so what is known of it can be kept
(memory_lab/replay.py) under its `digest`, which says of what and by which code it is made. Blocks of a network are
alike, so a few are run and the others repeat what the third one does; that they are alike is checked every time.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import textwrap
from array import array
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from itertools import count, pairwise
from typing import NamedTuple, cast

import torch
from torch import nn
from turbodiff_kernels.gemm import reference as gemm
from turbodiff_kernels.norm import reference as norm
from turbodiff_kernels.quant import reference as quant
from turbodiff_kernels.sage import reference as sage
from turbodiff_kernels.sla import reference as sla

from turbodiff.memory_lab import dry_run
from turbodiff.memory_lab.allocator_model import Allocation
from turbodiff.memory_lab.dry_run import META, Ledger, counted, denoise_ledger, vae_ledger
from turbodiff.models import attention, image_encoder, linear, patches, text_encoder, wan_dit
from turbodiff.models import vae as vae_driver
from turbodiff.models.image_encoder import make_image_encoder, picture_features
from turbodiff.models.linear import Int8Linear
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.models.wan_dit import WanDiT
from turbodiff.plan.kernel_costs import KernelsHere
from turbodiff.plan.weight_sizes import LORA_RANK
from turbodiff.runtime.model_cache import dit_config
from turbodiff.spec import shapes
from turbodiff.spec.attention import AttentionKind
from turbodiff.spec.models import ImageEncoderFacts, ModelSpec, TextFacts, VaeFacts
from turbodiff.spec.request import TextDtype
from turbodiff.spec.shapes import VideoShape

Events = tuple[Allocation, ...]
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
RECORDED_BLOCKS = 4  # two, one that the others repeat, and one that is compared with it
LIBRARIES = ("torch", "diffusers", "transformers")


class Stream(NamedTuple):
    """How the allocations of a phase are made."""

    make: Callable[..., Events]
    of: tuple[object, ...]

    def events(self) -> Events:
        """Everything that is allocated and freed, weights first."""
        return self.make(*self.of)

    def digest(self) -> str:
        """Of what and by which code this is made; another code may still make the same (`fingerprint`)."""
        return _short(repr((self.make.__name__, [_facts(x) for x in self.of], _code(self.make))))


class NetworkRun(NamedTuple):
    """A step of a network. `pieces`: what an attention kernel holds for itself. `blocks`: how many run; of the others
    weights and the text's keys are there. Weights: `passing` blocks that come and go, the `networks` that are there as
    a whole, and `resident` blocks of one that passes."""

    int8: bool
    lora: bool
    attention: str
    chunks: int
    keep_text: bool
    forwards: int
    pieces: tuple[int, ...]
    kernels: KernelsHere
    blocks: int
    passing: int
    networks: int
    resident: int


def fingerprint(events: Events) -> str:
    """Tells streams apart by what they allocate, whatever made them."""
    return _short(array("q", [number for event in events for number in event]).tobytes())


def network(spec: ModelSpec, shape: VideoShape, run: NetworkRun) -> Events:
    """Two steps of an expert."""
    block, rest = _dit_tensors(spec, run.int8, run.lora)
    if run.networks:
        weights = (rest + spec.dit.num_layers * block) * run.networks
    else:
        weights = run.passing * block + rest + run.resident * block
    rows = [spec.text_encoder.text_len, *([clip.tokens] if (clip := spec.image_encoder) else [])]
    left = (spec.dit.num_layers - run.blocks) * run.keep_text
    kept = [torch.bfloat16.itemsize * tokens * spec.dit.dim for tokens in rows for _ in range(2 * left)]
    return (
        *_placed((BLAS_BYTES, *weights, *kept)),
        *_steps(spec, shape, run._replace(passing=0, networks=0, resident=0)),
    )


def vae(facts: VaeFacts, shape: VideoShape, tile: int | None, decode: bool) -> Events:
    """Decoding a clip, or encoding a picture and the empty frames after it."""
    with META:
        module = vae_driver.make_vae(**facts.model_dump()).to(torch.bfloat16)
    ledger = vae_ledger(facts, shape, torch.bfloat16, tile, decode=decode)
    return (*_placed((BLAS_BYTES, *_sizes(module))), *ledger.events)


def text(facts: TextFacts, streamed: bool, dtype: TextDtype) -> Events:
    """The text encoder over a prompt of 512 tokens: all of it on the device, or a layer at a time."""
    layer, rest, moves = _text_moves(facts, streamed, dtype)
    weights = () if streamed else (*rest, *facts.num_layers * layer)
    return (*_placed((BLAS_BYTES, *weights)), *moves)


def picture(facts: ImageEncoderFacts, shape: VideoShape) -> Events:
    """CLIP's encoder over the picture of an I2V clip."""
    with META:
        encoder = make_image_encoder(facts).to(torch.bfloat16)
    encoder.get_submodule("embeddings").register_buffer("position_ids", torch.arange(facts.tokens)[None])
    with counted(encoder) as ledger:
        picture_features(encoder, torch.empty(1, 3, shape.height, shape.width), facts)
    return (*_placed((BLAS_BYTES, *_sizes(encoder))), *ledger.events)


def repeated(ledger: Ledger, blocks: int) -> Events:
    """A ledger's events as if so many blocks had run: later ones repeat the third. Deaths at the very end, which
    nothing follows, are left out.

    Raises:
        ValueError: the fourth block allocates otherwise than the third, or a tensor of an early block dies after all.
    """
    events = list(ledger.events)
    while events[-1].n_bytes < 0:
        events.pop()
    recorded = len(ledger.passes[0]) - 1
    if blocks == recorded:
        return tuple(events)
    where = [(-1, 0, index) for index in range(len(events))]  # (pass, block, offset) of each event; pass -1: outside
    for number, marks in enumerate(ledger.passes):
        for block, (start, end) in enumerate(pairwise(marks)):
            where[start:end] = [(number, block, offset) for offset in range(end - start)]
    born = {event.number: where[index] for index, event in enumerate(events) if event.n_bytes > 0}
    numbers, out = dict[tuple[int, int, int], int](), list[Allocation]()

    def moved(start: int, end: int, later: int) -> list[tuple[int, tuple[int, int, int]]]:
        """Bytes and origins of some events, as many blocks later."""
        origins = [(event.n_bytes, born[event.number]) for event in events[start:end]]
        return [(size, (at[0], at[1] + later * (at[0] >= 0), at[2])) for size, at in origins]

    def put(found: list[tuple[int, tuple[int, int, int]]]) -> None:
        out.extend(Allocation(numbers.setdefault(origin, len(numbers) + 1), size) for size, origin in found)

    def put_outside(start: int, end: int) -> None:
        last = {block for size, (number, block, _) in moved(start, end, 0) if number >= 0}
        if last - {recorded - 1}:
            raise ValueError(f"tensors of blocks {sorted(last)} of {recorded} die after all blocks")
        put(moved(start, end, blocks - recorded))

    done = 0
    for marks in ledger.passes:
        if moved(marks[2], marks[3], 1) != moved(marks[3], marks[4], 0):
            raise ValueError("the fourth block allocates otherwise than the third")
        put_outside(done, marks[0])
        for block in range(blocks):
            like = min(block, 2)
            put(moved(marks[like], marks[like + 1], block - like))
        done = marks[-1]
    put_outside(done, len(events))
    return tuple(out)


def _placed(sizes: Iterable[int]) -> Events:
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


@lru_cache(4)
def _steps(spec: ModelSpec, shape: VideoShape, run: NetworkRun) -> Events:
    """Two steps of so many forward passes through so many blocks, with the state of the sampler."""
    references = [call for name, fused in run.kernels._asdict().items() if not fused for call in REFERENCES[name]]
    within = {f"turbodiff::{call.__name__}": call for call in references}
    ledger = denoise_ledger(
        spec, shape, torch.bfloat16, int8=run.int8, chunks=run.chunks, attention=cast("AttentionKind", run.attention),
        inside={**dict.fromkeys(ATTENTION_KERNELS, run.pieces), **within},
        change=_add_branches if run.lora else None, blocks=min(run.blocks, RECORDED_BLOCKS), forwards=run.forwards,
        keep_text=run.keep_text,
    )  # fmt: skip
    return repeated(ledger, run.blocks)


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

    with counted(encoder) as ledger:
        if streamed:
            for block in blocks:
                block.register_forward_pre_hook(lambda *call: comes(*layer))
                block.register_forward_hook(goes)
        for child in small if dtype != "bf16" else ():
            held = _inside_linear(child, dtype, facts.text_len)
            child.register_forward_pre_hook(lambda *call, held=held: comes(*held))
            child.register_forward_hook(goes)
        ids = torch.zeros(1, facts.text_len, dtype=torch.long)
        encoder(ids, torch.ones_like(ids))
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


def _facts(value: object) -> object:
    """What a stream is made of, without what does not change it."""
    if isinstance(value, ModelSpec):
        return value.kind, value.turbo, value.dit, value.text_encoder, value.image_encoder
    return value


@cache
def _code(make: Callable[..., Events]) -> str:
    """The code that makes a stream, and the libraries that it runs on."""
    used: dict[Callable[..., Events], tuple[object, ...]] = {
        network: (
            wan_dit, attention, image_encoder, linear, patches, dit_config, norm, quant, gemm, sage, sla,
            NetworkRun, repeated, _placed, _sizes, _add_branches, _dit_tensors.__wrapped__, _steps.__wrapped__,
        ),
        vae: (vae_driver, attention, _placed, _sizes),
        text: (text_encoder, _placed, _sizes, _text_moves.__wrapped__, _fewer_bits, _inside_linear),
        picture: (image_encoder, _placed, _sizes),
    }  # fmt: skip
    versions = [importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES]
    return code_digest(make, dry_run, shapes, *used[make], versions, LORA_RANK, BLAS_BYTES)


def code_digest(*parts: object) -> str:
    """Of modules, classes and functions the code, without comments and docstrings; of anything else what it is."""
    code = []
    for part in parts:
        if not (inspect.ismodule(part) or inspect.isclass(part) or inspect.isfunction(part)):
            code.append(repr(part))
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(cast("type", part))))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    return _short("\n".join(code))


def _short(value: str | bytes) -> str:
    """A short name of a value."""
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:12]
