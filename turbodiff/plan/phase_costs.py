"""What every phase of a clip needs: bytes on the device, bytes of host memory, seconds. Pure arithmetic, no device.

Phases run one after the other and each frees its networks, so a job needs the largest phase, never the sum. Activations
are in units of N = 2 L d bytes (L tokens, d channels, bf16) for the DiT and of one full-size frame of the VAE's base
width for the VAE; the coefficients are read off dry runs of the real modules on turbodiff/memory_lab/ledger.py, and a
test
holds them to it within 5 %.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from turbodiff.plan import roofline
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.plan.vae_memory import decode_bytes, encode_bytes, tile_work
from turbodiff.plan.weight_sizes import TILE, Weights, encoder_bytes
from turbodiff.spec.experts import Expert
from turbodiff.spec.models import ModelSpec
from turbodiff.spec.numbers import GIB, MIB
from turbodiff.spec.plan import PhaseName
from turbodiff.spec.request import SPARSE_ATTENTION
from turbodiff.spec.shapes import (
    CONDITION_CHANNELS,
    DECODER_MARGINS,
    ENCODER_MARGIN,
    HEAD_TOKENS,
    PATCH,
    LatentShape,
    VideoShape,
)

CONTEXT_BYTES = 600 * MIB  # a CUDA context with its modules and cuBLAS, 0.5-0.8 GiB on the cards that were measured
WORKSPACE_BYTES = 100 * MIB  # cuBLAS and cuDNN scratch outside our tensors
SLACK = 0.05  # share of activations that the caching allocator loses to blocks of unlike size
RESERVE_BYTES = {"headless": 512 * MIB, "display": 800 * MIB, "wsl": 1 * GIB}  # others use 400 to 1024 MiB
CPU_PROCESS_BYTES = 600 * MIB  # Python with torch loaded, measured on Linux
HOST_RESERVE_BYTES = 1 * GIB
PROCESS_BYTES = int(1.5 * GIB)  # the worker with torch and CUDA loaded, before any weights
CONV_SCRATCH = 0.06  # share of the VAE's activations that cuDNN's convolutions ask for as scratch
ATTENTION_UNITS = 5.0  # copies of N alive at the widest point of self-attention: the stream, its norm, q, k, v
# inside the attention kernels (kernels/README.md): INT8 rows of q and k, and on cards that multiply FP8 values of v
KERNEL_UNITS = {"dense": 0.0, "sage": 1.0, "sla": 0.0, "sagesla": 1.0}
FP8_UNITS = 0.5
BLOCK_Q, BLOCK_K = 128, 64  # queries and keys of a block in sparse attention
MEANS_UNITS = 3 / 64  # float32 means of those blocks
STATES = 512  # partial states of SLA's linear branch, D x D float32 each; fewer where there are fewer blocks
REFERENCE_ROWS = 140  # what SLA's reference pads
BRANCH_TOKENS = 8192  # rows that a LoRA's side branch turns back into floats at a time (models/linear.py)
STREAM_BUFFERS = 2  # blocks in flight beside the resident ones: one computing, one arriving

TextLever = Literal["cached", "resident", "streamed", "cpu"]
TextDtype = Literal["bf16", "int8", "nf4"]
ExpertLever = Literal["resident", "swapped", "streamed"]


class PhaseCost(NamedTuple):
    """What one phase needs. `workspace` holds the context, library scratch and the allocator's slack."""

    name: PhaseName
    weights: int
    activations: int
    workspace: int
    host: int
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment of the phase."""
        return self.weights + self.activations + self.workspace


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate: what it computes and on what, with everything the formulas need worked out once."""

    spec: ModelSpec
    shape: VideoShape
    latent: LatentShape
    tokens: int  # L
    unit: int  # N = L d element_bytes, bytes of one copy of the residual stream
    int8: bool
    attention: str
    topk: float
    forwards: int  # passes per step: 2 with guidance
    experts: tuple[Expert, ...]  # one for every step
    weights: Weights
    speed: roofline.Speed
    on_cpu: bool
    element_bytes: int
    context_bytes: int
    loaded: frozenset[str] = frozenset()  # components that need no reading from disk
    made: int = 0  # bytes of an expert that are made at load time, and so lie in no file that host memory maps
    lora: int = 0  # bytes of low-rank factors beside an expert's INT8 weights; merged into plain ones they cost nothing
    fp8: bool = True  # the card multiplies FP8, from sm_89 on
    conv2d: bool = False  # 3-D convolutions as sums of 2-D ones: on a CPU, and around the conv3d trap
    correction: float = 1.0  # measured / predicted work memory on this machine (plan/calibration.py)


def _need(
    job: Job, name: PhaseName, weights: int, activations: int, extra: int, host: int, seconds: float
) -> PhaseCost:
    """A phase; on a CPU the device is the host, and its peak is what the host must give."""
    host = weights + activations + extra if job.on_cpu else host
    return PhaseCost(name, weights, activations, extra, host, seconds)


def workspace(job: Job, activations: int, library: int = WORKSPACE_BYTES) -> int:
    """Context, library scratch, slack, and what measured runs taught; on a CPU the process instead of a context."""
    fixed = CPU_PROCESS_BYTES if job.on_cpu else job.context_bytes + (library if job.context_bytes else 0)
    return fixed + math.ceil((SLACK + job.correction - 1) * activations)


def reading_s(job: Job, component: str, n_bytes: int) -> float:
    """Seconds to read weights from disk, none where they are in memory already."""
    return 0.0 if component in job.loaded else n_bytes / roofline.DISK_BYTES_S


def text_encode(job: Job, lever: TextLever, dtype: TextDtype = "bf16") -> PhaseCost:
    """UMT5 over one prompt of 512 tokens (two with a negative prompt and guidance, one after the other).

    streamed: one linear at a time is on the device, token table and rows stay in host memory; int8 and nf4 are small
    enough to be resident, beside full weights in host memory.
    """
    text, w = job.spec.text_encoder, job.weights
    reading = reading_s(job, "text_encoder", w.text)
    share = w.text / 11.4e9
    if lever == "cached":
        return _need(job, "text_encode", 0, 0, workspace(job, 0), PROCESS_BYTES, 0.01)
    if lever == "cpu":
        seconds = reading + roofline.TEXT_SECONDS_CPU * share
        return _need(job, "text_encode", 0, 0, workspace(job, 0), PROCESS_BYTES + w.text, seconds)
    rows, activations = text.text_len, text_activations(job)
    streamed = lever == "streamed" and dtype == "bf16"
    on_device = w.text_linear if streamed else encoder_bytes(text, dtype, job.element_bytes)
    in_host = w.text_rest + 2 * w.text_block if streamed else 2 * w.text_block if dtype == "bf16" else w.text
    copying = 0.0 if job.on_cpu else w.text / job.speed.pcie_bytes_s
    seconds = reading + copying + 2 * rows * w.text / 2 / job.speed.bf16_flops * job.forwards
    host = PROCESS_BYTES + in_host
    return _need(job, "text_encode", on_device, activations, workspace(job, activations), host, seconds)


def text_activations(job: Job) -> int:
    """The largest of three moments of UMT5's first layer: its distances (six int64, a float32, a mask) beside the
    stream; the position bias twice beside stream, q, k, v; the gated feed-forward."""
    text, size, rows = job.spec.text_encoder, job.element_bytes, job.spec.text_encoder.text_len
    distances = 53 * rows**2 + 6 * size * rows * text.dim
    scores = 2 * size * text.num_heads * rows**2 + 8 * size * rows * max(text.dim, text.dim_attn)
    feed_forward = 4 * size * rows * (text.dim + text.dim_ffn)
    return max(distances, scores, feed_forward)


class StepWork(NamedTuple):
    """What one forward pass needs beside weights, and its seconds where all weights are on the device."""

    activations: int
    workspace: int
    seconds: float


def step_work(job: Job, chunks: int) -> StepWork:
    """A forward pass whose feed-forward runs in so many chunks."""
    activations = denoise_activations(job, chunks)
    extra = workspace(job, activations) + kernel_temporaries(job, activations)
    return StepWork(activations, extra, dit_step(job) * (1 + 0.01 * (chunks - 1)))


def denoise(job: Job, expert: Expert, lever: ExpertLever, resident: int, work: StepWork) -> PhaseCost:
    """All steps of one expert. `resident` blocks stay on the device when streamed."""
    w = job.weights
    steps = job.experts.count(expert) * job.forwards
    experts_here = len(set(job.experts)) if lever == "resident" else 1
    on_device: float = experts_here * w.dit if lever != "streamed" else w.rest + (resident + STREAM_BUFFERS) * w.block
    on_device += job.lora * (experts_here if lever != "streamed" else (resident + STREAM_BUFFERS) / w.blocks)
    seconds = reading_s(job, expert.component, w.dit) + steps * work.seconds
    host = PROCESS_BYTES + 2 * w.block + job.made * (1 if expert is Expert.HIGH else len(set(job.experts)))
    if not job.on_cpu:
        seconds += w.dit / job.speed.pcie_bytes_s
    if lever == "streamed":
        copy, compute = w.block / job.speed.pcie_bytes_s, work.seconds / w.blocks
        seconds += steps * ((w.blocks - resident) * max(0.0, copy - compute) + copy)
        host += 0 if job.made else (w.blocks - resident - 2) * w.block  # pinned; another expert's are gone by now
    host += job.lora
    return _need(job, expert.phase, math.ceil(on_device), work.activations, work.workspace, host, seconds)


def dit_step(job: Job) -> float:
    """Seconds of one forward with all weights on the device."""
    facts = job.spec.dit
    sparse = job.attention in SPARSE_ATTENTION
    return roofline.dit_seconds(
        job.speed,
        tokens=job.tokens,
        dim=facts.dim,
        ffn_dim=facts.ffn_dim,
        blocks=facts.num_layers,
        topk=job.topk if sparse else None,
        int8=job.int8,
        text_rows=job.spec.text_encoder.text_len,
    )


def denoise_activations(job: Job, chunks: int) -> int:
    """The largest of embedding, attention, feed-forward and head, beside what lives through all steps.

    Attention holds the stream, its norm, q, k and v: 5 N; to the text as much. The feed-forward holds the stream, the
    hidden rows, and their input or result: 2 N and the hidden width; with INT8 layers the wide rows exist at half size
    only, beside the normed input or its INT8 copy. The float32 copies of the time projection (24 d^2 bytes) and of the
    head's 8192 rows bind for short clips only.
    """
    facts, n = job.spec.dit, job.unit
    rho = facts.ffn_dim / facts.dim
    wide = max(1.5, 0.5 + 0.5 * rho) if job.int8 else 1 + rho
    tokens = job.tokens if chunks == 1 else _chunk_tokens(job.tokens, chunks)
    part = tokens * n // job.tokens
    attention, feed_forward = n * ATTENTION_UNITS, n + wide * part
    if job.lora:
        beside = _beside_lora(job, tokens, part, rho)
        attention, feed_forward = max(attention, n + beside[0]), max(feed_forward, n + beside[1])
    single = job.element_bytes != 4
    patches = job.element_bytes * facts.in_dim * PATCH * PATCH * job.tokens
    embedding = n + patches + (24 * facts.dim * (facts.dim + 1) if single else 0)
    head = n + 4 * (1 + single) * min(job.tokens, HEAD_TOKENS) * facts.dim + 256 * job.tokens
    return math.ceil(max(attention, feed_forward, embedding, head)) + _denoise_state(job)


def _beside_lora(job: Job, tokens: int, part: int, rho: float) -> tuple[float, float]:
    """What attention and feed-forward hold beside the stream where INT8 layers wear a LoRA (models/linear.py): its
    change at full width beside the product, and two float32 copies of some of the rows that it reads."""
    facts, n = job.spec.dit, job.unit
    floats = 8 * min(job.tokens, BRANCH_TOKENS) * facts.dim
    wide_floats = 8 * min(tokens, BRANCH_TOKENS) * facts.ffn_dim
    attention = max(4.5 * n, 3.5 * n + floats)
    return attention, max((0.5 + 2 * rho) * part, 1.5 * rho * part + wide_floats)


def kernel_temporaries(job: Job, activations: int) -> int:
    """What attention allocates inside, where that goes beyond the widest point outside it."""
    widest = ATTENTION_UNITS * job.unit + attention_inside(job) + _denoise_state(job)
    return max(0, math.ceil(widest) - activations)


def attention_inside(job: Job) -> int:
    """Bytes that an attention kernel holds beside q, k, v and its result: INT8 rows, FP8 values; for the sparse kinds
    the means of blocks, the indices of those kept (int64, and int32 for the kernel), and the linear branch's state,
    whose partial states are there before the result is."""
    if job.on_cpu:
        return _reference_inside(job)
    rows = KERNEL_UNITS[job.attention]
    values = FP8_UNITS * rows * job.fp8
    if job.attention not in SPARSE_ATTENTION:
        return math.ceil((rows + values) * job.unit)
    (_, keys, kept), heads = _blocks(job), job.spec.dit.num_heads
    square = job.spec.dit.head_dim**2
    partial = (1 + min(keys, -(-STATES // heads))) * heads
    state = max(4 * square * partial - (1 + values) * job.unit, 2 * square * heads)
    indices = 12 * heads * -(-job.tokens // BLOCK_Q) * kept
    return math.ceil((rows + values + MEANS_UNITS) * job.unit + state) + indices


def _reference_inside(job: Job) -> int:
    """The same of the plain implementations that a CPU runs, counted on them (tests/plan/kernel_bytes.py)."""
    padded, keys, kept = _blocks(job)
    units = {
        "dense": 0.0,
        "sage": max(5.0, 4 * padded),
        "sla": 4 + REFERENCE_ROWS / job.tokens,
        "sagesla": max(5 + 2 * kept / keys, 4 * padded),
    }
    return math.ceil(units[job.attention] * job.unit)


def _blocks(job: Job) -> tuple[float, int, int]:
    """(tokens in whole blocks of queries / tokens, blocks of keys, how many of them are kept)."""
    keys = -(-job.tokens // BLOCK_K)
    return -(-job.tokens // BLOCK_Q) * BLOCK_Q / job.tokens, keys, max(1, int(job.topk * keys))


def _chunk_tokens(tokens: int, chunks: int) -> int:
    """Tokens of one chunk of the feed-forward: whole INT8 tiles (models/wan_dit.py)."""
    return -(-tokens // (chunks * TILE)) * TILE


def _denoise_state(job: Job) -> int:
    """Rotary tables; the text, and the keys and values that each block made of it; the condition; and the sampler's
    state: three float64 copies of the latents, one float32."""
    facts, latent = job.spec.dit, job.latent
    rope = 4 * job.tokens * facts.head_dim
    rows = job.element_bytes * job.spec.text_encoder.text_len * facts.dim
    text = (1 + 2 * facts.num_layers) * rows * job.forwards
    plane = latent.frames * latent.height * latent.width
    condition = 4 * CONDITION_CHANNELS * plane if job.spec.kind == "i2v" else 0
    return rope + text + condition + 28 * latent.elements


def vae_decode(job: Job, tiled: bool) -> PhaseCost:
    """Latents to frames, one latent frame at a time; tiled: one tile at a time into a canvas of the whole clip."""
    latent, base = job.latent, job.spec.vae.base_dim
    activations = decode_bytes(latent, base, job.element_bytes, tiled=tiled, conv2d=job.conv2d)
    return _vae("vae_decode", job, activations, tile_work(latent, DECODER_MARGINS[0]) if tiled else 1.0)


def image_encode(job: Job, tiled: bool) -> PhaseCost:
    """The picture and empty frames after it to the I2V condition."""
    latent, base = job.latent, job.spec.vae.base_dim
    activations = encode_bytes(latent, base, job.element_bytes, tiled=tiled, conv2d=job.conv2d)
    return _vae("image_encode", job, activations, tile_work(latent, ENCODER_MARGIN) if tiled else 1.0)


def _vae(name: PhaseName, job: Job, activations: int, extra_work: float) -> PhaseCost:
    scratch = 0 if job.on_cpu or not job.context_bytes else math.ceil(CONV_SCRATCH * activations)
    seconds = reading_s(job, "vae", job.weights.vae)
    width_factor = (job.spec.vae.base_dim / 96) ** 2
    seconds += extra_work * width_factor * roofline.VAE_FLOPS_PER_PIXEL * _pixels(job) / job.speed.conv_flops
    extra = workspace(job, activations) + scratch
    host = PROCESS_BYTES + 3 * _pixels(job)
    if name == "vae_decode":
        host += job.made * len(set(job.experts))
    return _need(job, name, job.weights.vae, activations, extra, host, seconds)


def write(job: Job) -> PhaseCost:
    """Frames to an mp4, on the CPU: about 60 frames of 832x480 a second for two cores."""
    host = PROCESS_BYTES + 3 * _pixels(job) + job.made * len(set(job.experts))
    return _need(job, "write", 0, 0, workspace(job, 0), host, _pixels(job) / 25e6)


def _pixels(job: Job) -> int:
    return math.prod(job.shape)


def device_budget(gpu: GpuFacts, machine: Machine) -> int:
    """Bytes that a job may use on a card: what is free or becomes free, less a reserve for others.

    Our own worker's memory, its context included, counts as free: the plan's peak carries the context once.
    """
    total = gpu.total_bytes
    if total is None:
        return host_budget(machine) or 8 * GIB
    free = free_bytes(gpu)
    available = total if free is None else min(free + gpu.reclaimable_bytes, total)
    return available - reserve_bytes(gpu, machine)


def free_bytes(gpu: GpuFacts) -> int | None:
    """Free memory if it can be believed: 0 free while nothing is used is a bogus reading, not a full card."""
    if gpu.free_bytes == 0 and (gpu.used_bytes or 0) < (gpu.total_bytes or 0):
        return None if gpu.used_bytes is None else (gpu.total_bytes or 0) - gpu.used_bytes
    return gpu.free_bytes


def reserve_bytes(gpu: GpuFacts, machine: Machine) -> int:
    """Memory left alone for the desktop and for other programs' growth."""
    if gpu.reserve_bytes is not None:
        return gpu.reserve_bytes
    return RESERVE_BYTES["wsl" if machine.wsl else "display" if gpu.display else "headless"]


def host_budget(machine: Machine) -> int | None:
    """Bytes of host memory that a job may use, None when unknown."""
    if machine.ram_available_bytes is None:
        return None
    return max(0, machine.ram_available_bytes + machine.ram_reclaimable_bytes - HOST_RESERVE_BYTES)
