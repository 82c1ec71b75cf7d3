"""Undistilled sampling on the demo: UniPC, guidance and the negative prompt, through the code that runs Wan."""

import pytest
import torch

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


def test_experts_of_unipc_follow_its_own_times():
    fields = {"prompt": "x", "model": "Wan2.2-A14B", "image": "cat.jpg", "sampler": "unipc", "steps": 20}
    turns = make_request({**fields, "boundary": 0.9}).experts
    assert turns == ("high",) * turns.count("high") + ("low",) * turns.count("low")
    assert turns.count("high") == 8  # timesteps 999 989 978 965 952 937 921 902 are at or above 900
