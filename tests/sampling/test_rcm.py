"""rCM: the published times, and steps that do what their formulas say."""

import math

import pytest
import torch

from turbodiff.sampling.conditioning import Noise
from turbodiff.sampling.rcm import network_timesteps, sample
from turbodiff.sampling.samplers import timesteps as schedule

SHAPE = (1, 16, 2, 4, 6)


@pytest.mark.parametrize(
    ("sigma_max", "first"), [(80, 0.987654321), (120, 0.9917355372), (200, 0.9950248756), (1600, 0.9993753904)]
)
def test_times_are_the_published_ones(sigma_max, first):
    expected = torch.tensor([first, 0.9337810614, 0.8528953948, 0.6089790492, 0.0], dtype=torch.float64)
    assert torch.allclose(schedule("sde", 4, sigma_max), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_fewer_steps_drop_the_latest_middle_times(steps):
    times = schedule("sde", steps, 80.0)
    assert len(times) == steps + 1 and times[-1] == 0
    assert torch.equal(times[:-1], schedule("sde", 4, 80.0)[:steps])


@pytest.mark.parametrize(("sigma_max", "seen"), [(80, 988), (120, 992), (200, 996), (1600, 1000)])
def test_a_bf16_network_sees_the_published_timesteps(sigma_max, seen):
    times = schedule("sde", 4, sigma_max).tolist()[:-1]
    rounded = [network_timesteps(t, 1).bfloat16().item() for t in times]
    assert rounded == [seen, 932, 852, 608]


def test_timesteps_reach_the_network_per_sample():
    assert network_timesteps(0.5, 3).tolist() == [[500.0]] * 3


@pytest.mark.parametrize("sampler", ["sde", "ode"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_perfect_network_reaches_the_clip(sampler, steps):
    clip = torch.randn(SHAPE, dtype=torch.float64)
    last = list(sample(lambda x, t: (x - clip) / t, Noise(3, SHAPE), schedule("sde", steps, 80.0), sampler))[-1]
    assert torch.allclose(last.latents, clip, atol=1e-10)
    assert torch.allclose(last.clean, clip, atol=1e-10)


def test_sde_and_ode_agree_where_the_noise_is_the_one_implied():
    start, v = torch.randn(2, *SHAPE, dtype=torch.float64)
    t, times = 0.9, torch.tensor([0.9, 0.4], dtype=torch.float64)
    implied = t * start + (1 - t) * v
    (sde,), (ode,) = (
        list(sample(lambda x, t: v, iter((start, implied)).__next__, times, sampler)) for sampler in ("sde", "ode")
    )
    assert torch.allclose(sde.latents, ode.latents)
    assert torch.allclose(ode.latents, t * start - (0.9 - 0.4) * v)


def test_state_is_float64_whatever_the_network_returns():
    seen = []

    def velocity(x, t):
        seen.append(x.dtype)
        return torch.zeros_like(x, dtype=torch.bfloat16)

    steps = list(sample(velocity, Noise(0, SHAPE), schedule("sde", 3, 80.0)))
    assert seen == [torch.float64] * 3
    assert all(step.latents.dtype == step.clean.dtype == torch.float64 for step in steps)


def test_sde_draws_once_per_step_and_ode_only_at_the_start():
    for sampler, draws in (("sde", 5), ("ode", 1)):
        noise, count = Noise(1, SHAPE), []
        draw = lambda noise=noise, count=count: (count.append(1), noise())[1]  # noqa: E731
        list(sample(lambda x, t: torch.zeros_like(x), draw, schedule("sde", 4, 80.0), sampler))
        assert len(count) == draws, sampler


def test_a_seed_is_one_stream_and_seeds_differ():
    one, same, other = Noise(7, SHAPE), Noise(7, SHAPE), Noise(8, SHAPE)
    first, second = one(), one()
    assert torch.equal(first, same()) and torch.equal(second, same())
    assert not torch.equal(first, second) and not torch.equal(first, other())
    assert first.dtype == torch.float32


def test_the_largest_seed_is_accepted():
    assert math.isfinite(Noise(2**53 - 1, SHAPE)().sum().item())
