"""Undistilled sampling on the demo: UniPC, guidance and the negative prompt, through the code that runs Wan."""

import pytest
import torch
from PIL import Image

from turbodiff.models.wan_dit import WanDiT
from turbodiff.runtime.denoise import denoise
from turbodiff.runtime.pipeline import encode_text, generate, make_latents
from turbodiff.spec.request import make_request


def test_unipc_makes_a_clip_of_twenty_steps(attempt_of):
    attempt = attempt_of(sampler="unipc", steps=20)
    assert generate(attempt).frames == 5
    assert [(event.i, event.n) for event in attempt.send.of("step")] == [(i, 20) for i in range(1, 21)]


@pytest.mark.parametrize(("guidance", "evaluations"), [(1.0, 1), (3.0, 2)])
def test_only_guidance_costs_a_second_evaluation(attempt_of, monkeypatch, guidance, evaluations):
    attempt = attempt_of(sampler="unipc", steps=1, guidance=guidance)
    asked, finish = [], WanDiT.finish
    monkeypatch.setattr(WanDiT, "finish", lambda self, *given: asked.append(1) or finish(self, *given))
    make_latents(attempt)
    assert len(asked) == evaluations


def test_the_same_words_as_prompt_and_negative_prompt_cancel_out(attempt_of):
    words = "a red circle moves right"
    plain = make_latents(attempt_of(sampler="unipc", steps=2))
    same = make_latents(attempt_of(sampler="unipc", steps=2, guidance=4.0, negative_prompt=words))
    other = make_latents(attempt_of(sampler="unipc", steps=2, guidance=4.0, negative_prompt="a blue square"))
    assert torch.allclose(plain, same, atol=1e-4)
    assert not torch.allclose(plain, other, atol=1e-2)


def test_rcm_reads_no_negative_prompt(attempt_of):
    attempt = attempt_of(guidance=3.0, negative_prompt="a blue square")
    text, negative = encode_text(attempt)
    assert negative is None
    denoise(attempt, text, None, negative)


def test_a_prompt_and_its_negative_come_from_the_cache_the_second_time(attempt_of, monkeypatch):
    fields = {"sampler": "unipc", "guidance": 3.0, "negative_prompt": "grey"}
    first = encode_text(attempt_of(**fields))
    attempt = attempt_of(**fields)
    monkeypatch.setattr(attempt.models, "text_encoder", lambda plan: pytest.fail("the encoder was loaded again"))
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(first, encode_text(attempt), strict=True))


@pytest.mark.parametrize(("low", "evaluations"), [(1.0, 3), (3.0, 4)])
def test_each_expert_has_its_own_guidance(attempt_of, monkeypatch, tmp_path, low, evaluations):
    Image.new("RGB", (128, 128), "navy").save(tmp_path / "start.png")
    fields = {"model": "demo-i2v", "image": str(tmp_path / "start.png"), "sampler": "euler", "steps": 2, "shift": 1.0}
    attempt = attempt_of(**fields, guidance=3.0, guidance_low=low)
    assert [expert.value for expert in attempt.request.experts] == ["high", "low"]
    asked, finish = [], WanDiT.finish
    monkeypatch.setattr(WanDiT, "finish", lambda self, *given: asked.append(1) or finish(self, *given))
    make_latents(attempt)
    assert len(asked) == evaluations


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 3), ("lcm", 3), ("dmd", 3)])
def test_every_sampler_of_a_step_distillation_makes_finite_latents(attempt_of, sampler, steps):
    attempt = attempt_of(sampler=sampler, steps=steps)
    assert bool(torch.isfinite(make_latents(attempt)).all())
    assert [event.i for event in attempt.send.of("step")] == list(range(1, steps + 1))


def test_experts_of_unipc_follow_its_own_times():
    fields = {"prompt": "x", "model": "Wan2.2-A14B", "image": "cat.jpg", "sampler": "unipc", "steps": 20}
    turns = make_request({**fields, "boundary": 0.9}).experts
    assert turns == ("high",) * turns.count("high") + ("low",) * turns.count("low")
    assert turns.count("high") == 8  # timesteps 999 989 978 965 952 937 921 902 are at or above 900
