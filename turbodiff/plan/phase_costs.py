"""What every phase of a clip needs: bytes on the device, bytes of host memory, seconds. Pure arithmetic, no device.

Phases run one after the other and each frees its networks, so a job needs the largest phase, never the sum. Activations
are in units of N = 2 L d bytes (L tokens, d channels, bf16) for the DiT and of one full-size frame of the VAE's base
width for the VAE; the coefficients are read off dry runs of the real modules on turbodiff/memory_lab/dry_run.py, and a
test holds them to it within 5 %.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from turbodiff.plan import kernel_costs, roofline
from turbodiff.plan.allocator_slack import Kind, slack_bytes
from turbodiff.plan.hardware import WORKSPACE_BYTES, Allocator
from turbodiff.plan.streaming import STAGED_BLOCKS, streamed
from turbodiff.plan.vae_costs import RGB, decode_bytes, encode_bytes, strip_factor, tile_work
from turbodiff.plan.weight_sizes import Weights, encoder_bytes
from turbodiff.spec.attention import SPARSE_ATTENTION
from turbodiff.spec.experts import Expert
from turbodiff.spec.models import ModelSpec
from turbodiff.spec.numbers import GIB, MIB
from turbodiff.spec.plan import FinishCost, Lesson, PhaseName, learned_factor
from turbodiff.spec.request import Exchange, TextDtype
from turbodiff.spec.shapes import (
    CONDITION_CHANNELS,
    DECODER_MARGINS,
    ENCODER_MARGIN,
    FLOAT32_ELEMENTS,
    HEAD_TOKENS,
    INT8_PART_TOKENS,
    PATCH,
    LatentShape,
    VideoShape,
    ffn_chunk_tokens,
    token_shares,
)

CPU_PROCESS_BYTES = 600 * MIB  # Python with torch loaded, measured on Linux
PROCESS_BYTES = int(1.5 * GIB)  # the worker with torch and CUDA loaded, before any weights
LORA_SLACK = 0.03  # share of the activations that the allocator loses more where INT8 layers have a LoRA (replayed)
NVENC_BYTES = 400 * MIB  # of the card, for ffmpeg's CUDA context and the encoder's frames at 720p: assumed
CONV_SCRATCH = 0.06  # share of the VAE's activations that cuDNN's convolutions ask for as scratch
ATTENTION_UNITS = 5.0  # copies of N alive while q, k and v are made: the stream, its norm, q, k, v
QUANTISED_UNITS = 4.5  # the same where INT8 layers read the norm; dense attention needs the other half for its result
ATTENDING_UNITS = 4.0  # while self-attention runs: the stream, q, k, v
EXCHANGING_UNITS, RECEIVED_UNITS = 10.0, 3.0  # q, k, v twice more while they travel, once what came (parallel.py)
PACKED_UNITS = 9.0  # of bytes as they travel in INT8, beside stream, q, k, v: packed, on their way, and come

TextLever = Literal["cached", "resident", "streamed", "cpu"]
TextKeys = Literal["kept", "recomputed"]
ExpertLever = Literal["resident", "swapped", "streamed"]


class PhaseCost(NamedTuple):
    """What one phase needs, as a plan's Phase says it. `workspace_bytes` hold the context, library scratch, the
    allocator's slack and what measured runs taught, which `slack_bytes` and `learned_bytes` tell apart; `peak_bytes` is
    the sum of the three before it, what is on the device at the worst moment. `seconds` are the formula's."""

    name: PhaseName
    weights_bytes: int
    activations_bytes: int
    workspace_bytes: int
    peak_bytes: int
    host_ram_bytes: int
    seconds: float
    slack_bytes: int = 0
    learned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CostInputs:
    """One candidate: what it computes and on what, with everything the formulas need worked out once."""

    spec: ModelSpec
    shape: VideoShape
    latent: LatentShape
    tokens: int  # L
    unit: int  # N = L d element_bytes, bytes of one copy of the residual stream
    pixels: int  # of all frames
    int8: bool
    attention: str
    topk: float
    forwards: int  # passes per step: 2 with guidance
    experts: tuple[Expert, ...]  # the network of every step
    weights: Weights
    speed: roofline.Speed
    on_cpu: bool
    element_bytes: int
    context_bytes: int
    loaded: frozenset[str] = frozenset()  # components that need no reading from disk
    made: int = 0  # bytes of an expert that are made at load time, and so lie in no file that host memory maps
    drops: bool = False  # those of one expert leave host memory before the next is made
    merged: int = 0  # of them those that LoRAs make
    text_made: int = 0  # the same of the text encoder, which leaves host memory before a phase that lacks it
    copied: frozenset[str] = frozenset()  # components whose weights are made into a copy on disk, and mapped from there
    lora: int = 0  # bytes of low-rank factors beside an expert's INT8 weights; merged into plain ones they cost nothing
    kernels: kernel_costs.KernelsHere = kernel_costs.FUSED  # which operations are fused here
    allocator: Allocator = "expandable"
    host_bytes: int | None = None  # of host memory that a job may use; None: unknown, not limited
    page_lock_bytes: int | None = None  # of it that may be page-locked; None: no limit known
    finishing: tuple[FinishCost, ...] = ()
    file_pixels: int = 0  # of all frames of the file
    lessons: tuple[Lesson, ...] = ()  # what runs of this model taught here (plan/calibration.py)
    ranks: int = 1  # processes that share the clip; what follows is what one of them needs
    link_bytes_s: float = 1.0  # that each of them sends in an all-to-all
    nvenc_bytes: int = 0  # of the card, where it encodes the file, in a process of its own
    exchange: Exchange = "full"
    own_tokens: int = field(init=False)  # of one process
    own_unit: int = field(init=False)
    state_bytes: int = field(init=False)  # lives through all steps
    attention_bytes: int = field(init=False)  # while self-attention runs, its kernel included
    exchange_s: float = field(init=False)  # of one forward pass, between the processes
    forward_s: float = field(init=False)  # one forward pass with all weights on the device and the text's keys kept

    def __post_init__(self) -> None:
        text_rows = self.spec.text_encoder.text_len
        state_bytes, dit, ranks = _denoise_state(self), self.spec.dit, self.ranks
        own_tokens = self.tokens if ranks == 1 else max(token_shares(self.tokens, ranks))
        own_unit = self.unit * own_tokens // self.tokens
        heads = dit.model_copy(update={"dim": dit.dim // ranks, "num_heads": dit.num_heads // ranks})
        inside = kernel_costs.attention_inside(
            self.attention, dit if ranks == 1 else heads, self.tokens, self.unit // ranks, self.topk,
            on_cpu=self.on_cpu, fused=self.kernels.attention,
        )  # fmt: skip
        widest = math.ceil(ATTENDING_UNITS * own_unit + inside + state_bytes)
        if ranks > 1:
            packed = PACKED_UNITS * roofline.INT8_SENT_BYTES / self.element_bytes
            units = EXCHANGING_UNITS if self.exchange == "full" else ATTENDING_UNITS + packed
            exchanging = math.ceil(units * own_unit) + state_bytes
            widest = max(exchanging, widest + math.ceil(RECEIVED_UNITS * own_unit))
        topk = self.topk if self.attention in SPARSE_ATTENTION else None
        forward_s = roofline.dit_seconds(
            dit, self.speed, self.tokens, topk, self.int8, text_rows, None if self.on_cpu else self.kernels
        )
        exchange_s = roofline.exchange_seconds(
            dit, self.tokens, ranks, self.link_bytes_s, self.speed.memory_bytes_s, self.exchange, self.element_bytes
        )
        if ranks > 1:  # processes on one CPU share its cores
            forward_s = forward_s * (1 if self.on_cpu else own_tokens / self.tokens) + exchange_s
        worked_out = {
            "own_tokens": own_tokens, "own_unit": own_unit, "state_bytes": state_bytes, "attention_bytes": widest,
            "exchange_s": exchange_s, "forward_s": forward_s,
        }  # fmt: skip
        for name, value in worked_out.items():
            object.__setattr__(self, name, value)


def _phase(
    inputs: CostInputs, name: PhaseName, weights: int, activations: int, extra: int, host: int, seconds: float,
    kind: Kind = "denoise", vae: str = "",
) -> PhaseCost:  # fmt: skip
    """A phase, `extra` being its workspace but for the allocator's slack and for what measured runs taught; on a CPU
    the device is the host, and its peak is what the host must give. `vae`: how the VAE runs, where it does."""
    slack, learned = slack_bytes(inputs.allocator, kind, activations, weights), 0
    if inputs.lessons:
        held = activations + extra - inputs.context_bytes + slack
        learned = math.ceil((learned_factor(inputs.lessons, name, vae, held) - 1) * held)
    beside = extra + slack + learned
    peak = weights + activations + beside
    return PhaseCost(name, weights, activations, beside, peak, peak if inputs.on_cpu else host, seconds, slack, learned)


def workspace(inputs: CostInputs) -> int:
    """Context and library scratch; on a CPU the process instead of a context."""
    library = inputs.context_bytes + (WORKSPACE_BYTES if inputs.context_bytes else 0)
    return CPU_PROCESS_BYTES if inputs.on_cpu else library


def _reading_s(inputs: CostInputs, component: str, n_bytes: int) -> float:
    """Seconds to read weights from disk, none where they are in memory already; to write a copy takes as long again,
    which is told of every clip, though later ones find it there."""
    writing = 2 if component in inputs.copied else 1
    return 0.0 if component in inputs.loaded else writing * n_bytes / roofline.DISK_BYTES_S


def reading_s(inputs: CostInputs) -> float:
    """Seconds of a job that go to reading its experts from disk: paid once, by the first clip of many."""
    return sum([_reading_s(inputs, expert.component, inputs.weights.dit) for expert in set(inputs.experts)])


def text_encode(inputs: CostInputs, lever: TextLever, dtype: TextDtype = "bf16") -> PhaseCost:
    """UMT5 over one prompt of 512 tokens (two with a negative prompt and guidance, one after the other).

    streamed: one layer at a time is on the device, token table and rows stay in host memory; int8 and nf4 are small
    enough to be resident, and are made on the device from a mapped file, a linear at a time (runtime/text.py).

    Activations are the largest of three moments of UMT5: the distances of its tokens (six int64, a float32) beside the
    stream; the position bias twice beside stream, q, k, v; the gated feed-forward.
    """
    text, w, size = inputs.spec.text_encoder, inputs.weights, inputs.element_bytes
    reading = _reading_s(inputs, "text_encoder", w.text)
    if lever == "cached":
        return _phase(inputs, "text_encode", 0, 0, workspace(inputs), PROCESS_BYTES, 0.01)
    if lever == "cpu":
        seconds = reading + roofline.TEXT_SECONDS_CPU * (w.text / 11.4e9)
        return _phase(inputs, "text_encode", 0, 0, workspace(inputs), PROCESS_BYTES + w.text, seconds)
    rows = text.text_len
    distances = 52 * rows**2 + size * rows * text.dim
    scores = 2 * size * text.num_heads * rows**2 + 8 * size * rows * max(text.dim, text.dim_attn)
    feed_forward = 4 * size * rows * (text.dim + text.dim_ffn)
    activations = max(distances, scores, feed_forward)
    layers = lever == "streamed" and dtype == "bf16"
    on_device = w.text_block if layers else encoder_bytes(text, dtype, size)
    in_host = w.text_rest + 2 * w.text_block if layers else 2 * w.text_block
    in_host = max(in_host, inputs.text_made)
    copying = 0.0 if inputs.on_cpu else w.text / inputs.speed.pcie_bytes_s
    seconds = reading + copying + 2 * rows * w.text / 2 / inputs.speed.bf16_flops * inputs.forwards
    extra = workspace(inputs)
    return _phase(inputs, "text_encode", on_device, activations, extra, PROCESS_BYTES + in_host, seconds, "text")


def image_embed(inputs: CostInputs) -> PhaseCost:
    """CLIP's picture encoder over one picture, on the device: it is smaller than what follows.

    Activations: the rows that come out of each layer, which are kept, beside the widest moment of a layer, its
    feed-forward; and the picture in float32, as it came and small, and as the encoder takes it.
    """
    clip, size, w = inputs.spec.image_encoder, inputs.element_bytes, inputs.weights.image
    assert clip is not None
    row = size * clip.tokens
    layers = row * ((clip.num_layers + 2) * clip.dim + 2 * clip.dim_ffn)
    activations = layers + RGB * (4 * inputs.shape.height * inputs.shape.width + (4 + size) * clip.image_side**2)
    copying = 0.0 if inputs.on_cpu else w / inputs.speed.pcie_bytes_s
    seconds = _reading_s(inputs, "image_encoder", w) + copying + clip.tokens * w / inputs.speed.bf16_flops
    extra = workspace(inputs)
    return _phase(inputs, "image_embed", w, activations, extra, PROCESS_BYTES + w, seconds, "picture")


class StepWork(NamedTuple):
    """What one forward pass needs beside weights, and its seconds where all weights are on the device; `once_s` are
    those before the first."""

    chunks: int
    text_keys: TextKeys
    activations: int
    workspace: int
    seconds: float
    once_s: float


def step_work(inputs: CostInputs, chunks: int, text_keys: TextKeys = "kept") -> StepWork:
    """A forward pass whose feed-forward runs in so many chunks, and whose blocks keep the keys and values of the text
    or make them anew; its workspace holds what attention allocates inside, where that goes beyond the widest point
    outside it."""
    again = text_keys == "recomputed"
    saved = text_keys_bytes(inputs) if again else 0
    activations = denoise_activations(inputs, chunks) - saved
    extra = workspace(inputs) + max(0, inputs.attention_bytes - saved - activations)
    extra += math.ceil(LORA_SLACK * activations) if inputs.lora else 0
    keys_s, seconds = text_keys_s(inputs), inputs.forward_s * (1 + 0.01 * (chunks - 1))
    once_s = 0.0 if again else keys_s * inputs.forwards
    return StepWork(chunks, text_keys, activations, extra, seconds + again * keys_s, once_s)


def text_keys_bytes(inputs: CostInputs) -> int:
    """What is saved where a block makes keys and values of the text and of a picture anew in every pass: those of all
    blocks, of the texts of both passes. The block at work holds its own while it attends to them, which is not when it
    holds the most."""
    facts, clip = inputs.spec.dit, inputs.spec.image_encoder
    row_bytes, rows = 2 * inputs.element_bytes * facts.dim, inputs.spec.text_encoder.text_len
    picture = clip.tokens if clip else 0
    return row_bytes * facts.num_layers * (inputs.forwards * rows + picture)


def text_keys_s(inputs: CostInputs) -> float:
    """Seconds of one pass over all blocks that makes them."""
    clip = inputs.spec.image_encoder
    rows = inputs.spec.text_encoder.text_len + (clip.tokens if clip else 0)
    here = None if inputs.on_cpu else inputs.kernels
    return roofline.text_keys_seconds(inputs.spec.dit, inputs.speed, rows, inputs.int8, here)


def denoise(
    inputs: CostInputs, expert: Expert, lever: ExpertLever, resident: int, work: StepWork, locked: int | None = None,
    shared: int | None = None,
) -> PhaseCost:  # fmt: skip
    """All steps of one expert.

    Args:
        resident: blocks that stay on the device when streamed.
        locked, shared: of the others, see `streaming.streamed`.
    """
    w = inputs.weights
    steps = inputs.experts.count(expert) * inputs.forwards
    experts_here = len(set(inputs.experts)) if lever == "resident" else 1
    seconds = _reading_s(inputs, expert.component, w.dit) + steps * work.seconds + work.once_s
    made = inputs.made if expert is Expert.HIGH else made_bytes(inputs)
    host = PROCESS_BYTES + STAGED_BLOCKS * w.block + made + inputs.lora
    if not inputs.on_cpu:
        seconds += w.dit / inputs.speed.pcie_bytes_s
    if lever == "streamed":  # page-locked copies of another expert are gone by now
        passing = streamed(inputs, resident, work.seconds, locked=locked, shared=shared, host_bytes=host)
        seconds += steps * (passing.seconds + passing.disk_bytes / roofline.DISK_BYTES_S)
        host += passing.locked_bytes
        on_device = w.rest + passing.on_card * w.block + inputs.lora * passing.on_card / w.blocks
    else:
        on_device = experts_here * (w.dit + inputs.lora)
    return _phase(inputs, expert.phase, math.ceil(on_device), work.activations, work.workspace, host, seconds)


def made_bytes(inputs: CostInputs) -> int:
    """Bytes of the experts' weights that were made at load time, in host memory once all of them ran."""
    return inputs.made * (1 if inputs.drops else len(set(inputs.experts)))


def on_disk(inputs: CostInputs) -> CostInputs:
    """The same with what is made of files written to disk, a layer at a time, and mapped from there; what LoRAs make
    of plain weights stays in memory. A CPU's networks are in memory anyway."""
    if inputs.on_cpu:
        return inputs
    copied: list[str] = [expert.component for expert in inputs.experts if inputs.made > inputs.merged]
    copied += ["text_encoder"] if inputs.text_made else []
    return replace(inputs, made=inputs.merged, text_made=0, copied=frozenset(copied))


def copies_bytes(inputs: CostInputs) -> int:
    """Bytes on disk of the weights that are made into copies."""
    return sum([inputs.weights.text if name == "text_encoder" else inputs.weights.dit for name in inputs.copied])


def denoise_activations(inputs: CostInputs, chunks: int) -> int:
    """The largest of embedding, attention, feed-forward and head, beside what lives through all steps.

    Before attention there are the stream, its norm, q, k and v: 5 N, with INT8 rows of the norm 4.5 N; dense attention
    holds its result beside the stream, q, k and v; attention to the text holds less. The feed-forward holds the stream,
    the hidden rows, and their input or result: 2 N and the hidden width; with INT8 layers the wide rows exist at half
    size only, beside the normed input or its INT8 copy. The float32 copies of parts of the time projection and of the
    head's 8192 rows bind for short clips only.

    INT8 layers with a LoRA (models/linear.py) hold its change at full width beside the product, and two float32 copies
    of some of the rows that it reads.
    """
    facts, n, tokens = inputs.spec.dit, inputs.own_unit, inputs.own_tokens
    rho = facts.ffn_dim / facts.dim
    wide = max(1.5, 0.5 + 0.5 * rho) if inputs.int8 else 1 + rho
    if chunks > 1:  # whole INT8 tiles (models/wan_dit.py)
        tokens = ffn_chunk_tokens(tokens, chunks)
    part = tokens * n // inputs.own_tokens
    rows = QUANTISED_UNITS if inputs.int8 and inputs.attention != "dense" else ATTENTION_UNITS
    attention, feed_forward = n * rows, n + wide * part
    if inputs.lora:
        floats = 8 * min(inputs.own_tokens, INT8_PART_TOKENS) * facts.dim
        wide_floats = 8 * min(tokens, INT8_PART_TOKENS) * facts.ffn_dim
        attention = max(attention, n + max(4.5 * n, 3.5 * n + floats))
        feed_forward = max(feed_forward, n + max((0.5 + 2 * rho) * part, 1.5 * rho * part + wide_floats))
    single = inputs.element_bytes != 4
    patches = inputs.element_bytes * facts.in_dim * PATCH * PATCH * inputs.tokens
    embedding = n + patches + (4 * min(6 * facts.dim**2, FLOAT32_ELEMENTS) + 24 * facts.dim if single else 0)
    head = n + 4 * (1 + single) * min(inputs.own_tokens, HEAD_TOKENS) * facts.dim + 256 * inputs.tokens
    reference = 0
    if not inputs.on_cpu:
        reference = kernel_costs.widest_reference(facts, inputs.own_tokens, tokens, inputs.int8, inputs.kernels)
    return math.ceil(max(attention, feed_forward, embedding, head, reference)) + inputs.state_bytes


def _denoise_state(inputs: CostInputs) -> int:
    """Rotary tables; the text with the keys and values that each block made of it, and a picture's, which both passes
    share; the condition; and the sampler's state: three float64 copies of the latents, one float32."""
    facts, latent = inputs.spec.dit, inputs.latent
    rope = 4 * inputs.tokens * facts.head_dim
    rows = inputs.element_bytes * inputs.spec.text_encoder.text_len * facts.dim
    text = (1 + 2 * facts.num_layers) * rows * inputs.forwards
    if clip := inputs.spec.image_encoder:
        text += (1 + 2 * facts.num_layers) * inputs.element_bytes * clip.tokens * facts.dim
    plane = latent.frames * latent.height * latent.width
    condition = 4 * CONDITION_CHANNELS * plane if inputs.spec.kind == "i2v" else 0
    return rope + text + condition + 28 * latent.channels * plane


def vae(inputs: CostInputs, name: Literal["vae_decode", "image_encode"], tile: int | None) -> PhaseCost:
    """vae_decode: latents to frames, one latent frame at a time; with the side of a tile in latent pixels one tile at a
    time into a canvas of the whole clip. image_encode: the picture and empty frames after it to the I2V condition."""
    latent, base = inputs.latent, inputs.spec.vae.base_dim
    decodes = name == "vae_decode"
    extra_work = tile_work(latent, DECODER_MARGINS[0] if decodes else ENCODER_MARGIN, tile) if tile else 1.0
    given = latent, base, inputs.element_bytes, tile
    activations = (decode_bytes if decodes else encode_bytes)(*given, ranks=inputs.ranks)
    extra_work *= strip_factor(latent.width, inputs.ranks, DECODER_MARGINS[1] if decodes else 2 * ENCODER_MARGIN)
    scratch = 0 if inputs.on_cpu or not inputs.context_bytes else math.ceil(CONV_SCRATCH * activations)
    seconds = _reading_s(inputs, "vae", inputs.weights.vae)
    seconds += extra_work * roofline.vae_seconds(inputs.speed, inputs.pixels, base, inputs.element_bytes)
    extra = workspace(inputs) + scratch + (inputs.nvenc_bytes if decodes else 0)
    host = PROCESS_BYTES + 3 * inputs.pixels
    if decodes:
        host += made_bytes(inputs)
    return _phase(
        inputs, name, inputs.weights.vae, activations, extra, host, seconds, "vae", "tiled" if tile else "whole"
    )


def after_decode(inputs: CostInputs) -> tuple[PhaseCost, ...]:
    """What is made of the frames, then the mp4, on the CPU: about 60 frames of 832x480 a second for two cores."""
    found, bare = list[PhaseCost](), PROCESS_BYTES + made_bytes(inputs)
    for name, weights, activations, host_bytes, seconds in inputs.finishing:
        host = bare + host_bytes
        extra = workspace(inputs) + (host_bytes if inputs.on_cpu else inputs.nvenc_bytes)
        found.append(_phase(inputs, name, weights, activations, extra, host, seconds, "vae"))
    write = _phase(inputs, "write", 0, 0, workspace(inputs), bare + 3 * inputs.pixels, inputs.file_pixels / 25e6)
    return (*found, write)
