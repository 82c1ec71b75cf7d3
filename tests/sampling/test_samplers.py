"""Euler, LCM and DMD against diffusers' schedulers, step by step, and the times that each asks the network at."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from tests.sampling.test_unipc import SHAPE, curved
from turbodiff.sampling import rcm, samplers
from turbodiff.sampling.conditioning import Noise
from turbodiff.spec.experts import flow_times, sampler_times


def ours(sampler, steps, shift):
    return list(samplers.sample(curved, Noise(7, SHAPE), sampler, steps, 80.0, shift))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 8, 20])
def test_every_euler_step_is_that_of_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert torch.allclose(scheduler.sigmas[:-1].double(), torch.tensor(flow_times(steps, shift)).double(), atol=1e-6)
    x = Noise(7, SHAPE)()
    for step, t in zip(ours("euler", steps, shift), scheduler.timesteps, strict=True):
        assert step.t == pytest.approx(t.item() / 1000, abs=1e-6)
        x = scheduler.step(curved(x, step.t), t, x).prev_sample
        assert torch.allclose(step.latents.float(), x, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_every_lcm_step_is_that_of_diffusers_with_the_same_noise(steps, shift):
    scheduler = FlowMatchLCMScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    noise = torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=noise)
    for step, t in zip(ours("lcm", steps, shift), scheduler.timesteps, strict=True):
        x = scheduler.step(curved(x, step.t), t, x, generator=noise).prev_sample
        assert torch.allclose(step.latents.float(), x, atol=2e-5)


def test_four_steps_of_shift_five_are_the_published_list_of_lightx2v_warped():
    assert [round(1000 * t, 1) for t in flow_times(4, 5.0)] == [1000.0, 937.5, 833.3, 625.0]


@pytest.mark.parametrize(("steps", "asked"), [(1, [1000]), (2, [1000, 757]), (3, [1000, 757, 522])])
def test_dmd_asks_at_the_published_times_and_renoises(steps, asked):
    made = ours("dmd", steps, 8.0)
    assert [round(1000 * step.t) for step in made] == asked
    noise = Noise(7, SHAPE)
    x = noise().double()
    for t, t_next in zip(asked, [*asked[1:], 0], strict=True):
        clean = x - t / 1000 * curved(x, t / 1000)
        x = (1 - t_next / 1000) * clean + t_next / 1000 * noise()
    assert torch.allclose(made[-1].latents, x)


@pytest.mark.parametrize("sampler", ["sde", "ode", "unipc", "euler", "lcm", "dmd"])
def test_every_sampler_asks_at_the_times_that_are_planned(sampler):
    steps = 3
    asked = []
    list(
        samplers.sample(lambda x, t: asked.append(t) or torch.zeros_like(x), Noise(1, SHAPE), sampler, steps, 80.0, 5.0)
    )
    assert asked == pytest.approx(list(sampler_times(sampler, steps, 80.0, 5.0)))


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_rcm_through_the_one_call_is_rcm(sampler):
    direct = list(rcm.sample(curved, Noise(7, SHAPE), samplers.timesteps(sampler, 4, 80.0), sampler))
    assert torch.equal(ours(sampler, 4, 5.0)[-1].latents, direct[-1].latents)
