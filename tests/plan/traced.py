"""The plan's figures and those of dry runs of the real modules, side by side."""

from typing import Any, NamedTuple

import torch
from torch import nn

from tests.plan.kernel_bytes import inside_kernel, inside_reference, inside_references
from tests.plan.machines import ask, card, disk, machine
from turbodiff.memory_lab import dry_run
from turbodiff.memory_lab.dry_run import Ledger
from turbodiff.models.image_encoder import make_image_encoder, picture_features
from turbodiff.models.linear import Int8Linear
from turbodiff.models.text_encoder import encode, make_text_encoder
from turbodiff.plan import phase_costs
from turbodiff.plan.candidates import as_wished, candidates
from turbodiff.plan.context import plan_context
from turbodiff.plan.hardware import Kernels
from turbodiff.plan.offload_search import cost_inputs

UNDER, OVER = -0.02, 0.05
KERNELS = ("turbodiff::normed_sage_attention_", "turbodiff::normed_sla_attention_")


class Pair(NamedTuple):
    """Bytes beyond weights by formula and as traced."""

    formula: int
    traced: int

    @property
    def off(self) -> float:
        """Share by which the formula is above the trace."""
        return self.formula / self.traced - 1

    @property
    def close(self) -> bool:
        """Whether the formula is good enough to promise with."""
        return UNDER <= self.off <= OVER


def job(
    model: str,
    *,
    on_cpu: bool = False,
    kernels: Kernels | None = None,
    **fields: Any,
) -> phase_costs.CostInputs:
    """The job of a request as the planner builds it."""
    request = ask(model, **fields)
    context = plan_context(machine() if on_cpu else card(80, kernels=kernels), disk())
    first = next(candidates(request, context.machine, context.inventory, context.total_bytes, frozenset()))
    return cost_inputs(request, as_wished(request, first.int8), context)


def dtype_of(job: phase_costs.CostInputs) -> torch.dtype:
    """What the job computes in."""
    return torch.float32 if job.on_cpu else torch.bfloat16


def denoising(job: phase_costs.CostInputs, chunks: int = 1, text_keys: phase_costs.TextKeys = "kept") -> Pair:
    """All that a step holds, what the attention kernels take for themselves included."""
    facts = job.spec.dit
    size = (job.attention, job.tokens, facts.num_heads, facts.head_dim, job.topk)
    if job.on_cpu or not job.kernels.attention:
        inside = inside_reference(*size, dtype_of(job))
    else:
        inside = max(inside_kernel(*size, capability) for capability in (80, 90))
    others = (
        {}
        if job.on_cpu or job.kernels.norm
        else inside_references(job.tokens, facts.dim, facts.ffn_dim, facts.num_heads)
    )
    traced = dry_run.denoise_bytes(
        job.spec, job.shape, dtype_of(job), int8=job.int8, chunks=chunks, attention=job.attention,
        inside=others | dict.fromkeys(KERNELS, inside), forwards=job.forwards, keep_text=text_keys == "kept",
    )  # fmt: skip
    work = phase_costs.step_work(job, chunks, text_keys)
    inside_kernels = work.workspace - phase_costs.workspace(job)
    return Pair(work.activations + inside_kernels, traced)


def denoising_with_a_lora(job: phase_costs.CostInputs, rank: int) -> Pair:
    """A step of INT8 layers that all have a side branch."""

    def add_branches(dit: nn.Module) -> None:
        for module in list(dit.blocks.modules()):
            if isinstance(module, Int8Linear):
                module.add_low_rank(torch.empty(rank, module.in_features), torch.empty(module.out_features, rank))

    assert job.int8 and job.attention == "dense"
    traced = dry_run.denoise_bytes(job.spec, job.shape, dtype_of(job), int8=True, chunks=1, change=add_branches)
    return Pair(phase_costs.denoise_activations(job, 1), traced)


def vae(job: phase_costs.CostInputs, *, decode: bool, tile: int | None) -> Pair:
    """Decoding a clip, or encoding a picture and the empty frames after it."""
    traced = dry_run.vae_bytes(job.spec, job.shape, dtype_of(job), tile, decode=decode)
    return Pair(phase_costs.vae(job, "vae_decode" if decode else "image_encode", tile).activations_bytes, traced)


def looking(job: phase_costs.CostInputs) -> Pair:
    """The picture encoder over one picture of the clip's size."""
    facts = job.spec.image_encoder
    assert facts is not None
    with torch.device("meta"):
        encoder = make_image_encoder(facts).to(dtype_of(job))
        encoder.embeddings.position_ids = torch.arange(facts.tokens)[None]
    with dry_run.counted(encoder) as ledger:
        picture_features(encoder, torch.empty(1, 3, job.shape.height, job.shape.width), facts)
    return Pair(phase_costs.image_embed(job).activations_bytes, ledger.peak_bytes)


def reading(job: phase_costs.CostInputs) -> Pair:
    """A full prompt of 512 tokens through two layers of the text encoder."""
    encoder = meta_encoder(job)
    ledger = Ledger("meta")
    ledger.see_module(encoder)
    weights = ledger.live_bytes
    with torch.inference_mode(), ledger, torch.device("meta"):
        ids = torch.zeros(1, job.spec.text_encoder.text_len, dtype=torch.long)
        encode(encoder, ids, torch.ones_like(ids), ids.shape[1])
    return Pair(phase_costs.text_encode(job, "resident").activations_bytes, ledger.peak_bytes - weights)


def meta_encoder(job: phase_costs.CostInputs, layers: int = 2) -> nn.Module:
    """The text encoder without weights, cut to a few layers."""
    with torch.device("meta"):
        facts = job.spec.text_encoder.model_copy(update={"num_layers": layers})
        return make_text_encoder(facts).to(dtype_of(job))
