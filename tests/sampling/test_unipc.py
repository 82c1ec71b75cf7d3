"""UniPC: the loop of diffusers, wrapped; guidance does what its formula says."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from turbodiff.sampling.conditioning import Noise
from turbodiff.sampling.unipc import guided, sample
from turbodiff.spec.experts import unipc_times

SHAPE = (1, 16, 2, 4, 6)
TARGET = Noise(1, SHAPE)()


def curved(x, t):
    """A velocity that no solver of low order follows exactly."""
    return (x - TARGET * torch.cos(torch.tensor(3 * t))).sin() + 0.1 * x


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_it_is_the_loop_of_diffusers(steps, shift):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    x = Noise(7, SHAPE)()
    for t in scheduler.timesteps:
        x = scheduler.step(curved(x, t.item() / 1000), t, x).prev_sample
    ours = list(sample(curved, Noise(7, SHAPE), steps, shift))
    assert torch.equal(ours[-1].latents, x)
    assert [step.index for step in ours] == list(range(steps))


def test_a_straight_velocity_reaches_its_clip_and_every_estimate_is_that_clip():
    noise = Noise(7, SHAPE)()
    steps = list(sample(lambda x, t: noise - TARGET, Noise(7, SHAPE), 12, 5.0))
    assert torch.allclose(steps[-1].latents, TARGET, atol=1e-4)
    assert all(torch.allclose(step.clean, TARGET, atol=1e-4) for step in steps)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_network_is_asked_at_whole_timesteps_and_they_are_the_planned_ones(shift):
    asked = []
    list(sample(lambda x, t: asked.append(t) or torch.zeros_like(x), Noise(7, SHAPE), 20, shift))
    assert all(abs(1000 * t - round(1000 * t)) < 1e-9 for t in asked)
    assert asked == list(unipc_times(20, shift))


def test_guidance_of_one_is_the_prompt_alone_and_more_moves_away_from_the_negative():
    positive, negative = torch.tensor([3.0]), torch.tensor([1.0])
    assert guided(positive, negative, 1.0).item() == 3.0
    assert guided(positive, negative, 5.0).item() == 11.0
