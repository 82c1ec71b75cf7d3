"""The formulas against dry runs of the real modules on meta tensors: within 5 %, and never more than 2 % under.

A dry run takes two blocks (runtime/dry_run.py): what a block needs does not depend on how many follow.
"""

import pytest
import torch

from tests.plan.machines import ask, card, disk, machine
from turbodiff.models.text_encoder import encode, make_text_encoder
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.plan import budget
from turbodiff.plan.candidates import candidates
from turbodiff.plan.explain import choice_of
from turbodiff.plan.parameters import weights_of
from turbodiff.plan.planner import make_plan
from turbodiff.plan.setting import job_of, setting_of
from turbodiff.plan.vae_memory import TILE
from turbodiff.runtime import dry_run
from turbodiff.runtime.ledger import Ledger
from turbodiff.spec.models import all_models, find_model

UNDER, OVER = 0.98, 1.05
MODELS = [spec.name for spec in all_models()]


def job(model: str, on_cpu: bool = False, **fields) -> budget.Job:
    """The job of a request as the planner builds it."""
    request = ask(model, **fields)
    setting = setting_of(machine() if on_cpu else card(80), disk())
    first = candidates(request, setting.machine, setting.inventory, setting.total_bytes, frozenset())[0]
    return job_of(request, choice_of(request, first, setting), setting)


def close(formula: int, traced: int) -> bool:
    return UNDER * traced <= formula <= OVER * traced


def dtype_of(job: budget.Job) -> torch.dtype:
    return torch.float32 if job.on_cpu else torch.bfloat16


def trace_denoise(job: budget.Job, chunks: int) -> int:
    return dry_run.denoise_bytes(job.spec, job.shape, dtype_of(job), int8=job.int8, chunks=chunks)


def trace_vae(job: budget.Job, tile: int | None, *, decode: bool) -> int:
    run = dry_run.decode_bytes if decode else dry_run.encode_bytes
    return run(job.spec, job.shape, dtype_of(job), tile, "conv2d" if job.conv2d else "conv3d")


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("switch", ["off", "on"])
@pytest.mark.parametrize("frames", [17, 81])
@pytest.mark.parametrize("model", MODELS)
def test_denoising_needs_what_the_formula_says(model, frames, switch, chunks):
    frames = min(frames, find_model(model).limits.max_frames)
    sizes = ("480p", "720p") if "demo" not in model else ("128",)
    for size in sizes:
        here = job(model, resolution=size, num_frames=frames, quant_linear=switch)
        assert close(budget.denoise_activations(here, chunks), trace_denoise(here, chunks)), size


def test_denoising_on_a_cpu_needs_what_the_formula_says():
    for frames in (9, 17):
        here = job("demo", on_cpu=True, num_frames=frames)
        assert close(budget.denoise_activations(here, 1), trace_denoise(here, 1))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("decode", [True, False])
def test_the_vae_needs_what_the_formula_says(decode, on_cpu, tiled):
    """Three latent frames at toy width; the same counts hold at every width and size, see the slow test."""
    here = job("demo", on_cpu=on_cpu, num_frames=9)
    need = (budget.vae_decode if decode else budget.image_encode)(here, tiled)
    traced = trace_vae(here, TILE if tiled else None, decode=decode)
    assert close(need.activations, traced)


def test_a_plan_can_be_traced_phase_by_phase():
    plan = make_plan(ask("demo", num_frames=9), machine(), disk())
    traced = dry_run.dry_run(plan)
    assert set(traced) == {"denoise", "vae_decode"}
    for phase in plan.phases:
        if phase.name in traced:
            assert close(phase.activations_bytes, traced[phase.name])


@pytest.mark.slow
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("size", "frames"), [("480p", 9), ("480p", 17), ("720p", 9)])
@pytest.mark.parametrize("decode", [True, False])
def test_the_real_vae_needs_what_the_formula_says(decode, size, frames, tiled):
    here = job("wan2.2-a14b", resolution=size, num_frames=frames)
    need = (budget.vae_decode if decode else budget.image_encode)(here, tiled)
    assert close(need.activations, trace_vae(here, TILE if tiled else None, decode=decode))


@pytest.mark.parametrize("model", ["demo", "wan2.1-1.3b"])
def test_the_text_encoder_needs_no_more_than_the_formula_says(model, monkeypatch):
    """A full prompt of 512 tokens; the formula is an upper bound here, since prompts are shorter."""
    # transformers asks whether the mask is all ones, which a meta tensor cannot answer
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *mask: True)
    here = job(model)
    text = here.spec.text_encoder.model_copy(update={"num_layers": 2})
    with torch.device("meta"):
        encoder = make_text_encoder(text).to(torch.bfloat16)
    ledger = Ledger("meta")
    ledger.see_module(encoder)
    weights = ledger.live_bytes
    with torch.inference_mode(), ledger, torch.device("meta"):
        ids = torch.zeros(1, text.text_len, dtype=torch.long)
        encode(encoder, ids, torch.ones_like(ids), text.text_len)
    traced = ledger.peak_bytes - weights
    assert traced * UNDER <= budget.text_encode(here, "resident").activations <= 1.5 * traced


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("int8", [False, True])
def test_weights_are_counted_to_the_byte(model, int8):
    spec = find_model(model)
    facts = spec.dit
    with torch.device("meta"):
        config = WanConfig(
            facts.dim, facts.ffn_dim, facts.num_heads, 2, facts.in_dim,
            text_dim=spec.text_encoder.dim, sla=spec.turbo, quant_linear=int8,
        )  # fmt: skip
        dit = WanDiT(config)
    sizes = {True: 0, False: 0}
    for name, tensor in (*dit.named_parameters(), *dit.named_buffers()):
        as_is = name.endswith(("int8_weight", "scale"))
        sizes[name.startswith("blocks.")] += tensor.numel() * (tensor.element_size() if as_is else 2)
    weights = weights_of(spec, int8, 2)
    assert sizes[False] == weights.rest
    assert abs(sizes[True] / 2 - weights.block) <= 0.001 * weights.block
