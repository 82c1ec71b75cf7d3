"""Every sampler of a request behind one call; Euler and LCM on Wan's flow line are rCM's two steps at other times.

Euler follows the velocity as rCM's ODE does (diffusers: FlowMatchEulerDiscreteScheduler); LCM and DMD go through the
clean estimate and fresh noise as its SDE does (diffusers: FlowMatchLCMScheduler; FastVideo's DMD). Their times are in
spec/experts.py.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from turbodiff.sampling import rcm, unipc
from turbodiff.sampling.rcm import Step
from turbodiff.spec.experts import sampler_times
from turbodiff.spec.schedules import Sampler

STEP_RULES: Mapping[str, Literal["sde", "ode"]] = {
    "sde": "sde",
    "ode": "ode",
    "euler": "ode",
    "lcm": "sde",
    "dmd": "sde",
    "auto": "sde",  # of a request that no plan settled: rCM's
}


def timesteps(sampler: str, steps: int, sigma_max: float, shift: float = 1.0) -> Tensor:
    """The times of a schedule, falling, and the 0 at which it ends; float64 [steps + 1]."""
    return torch.tensor((*sampler_times(sampler, steps, sigma_max, shift), 0.0), dtype=torch.float64)


def sample(
    velocity: Callable[[Tensor, float], Tensor],
    draw_noise: Callable[[], Tensor],
    sampler: Sampler,
    steps: int,
    sigma_max: float,
    shift: float,
) -> Iterator[Step]:
    """Run a sampler's schedule, one `Step` at a time; the last step's latents are the clip.

    velocity: (x, t) -> v of the same shape, guidance included; x is float64, under UniPC float32. draw_noise: one
    float32 draw per call; those that renoise ask once a step as well. sigma_max is read by rCM, shift by the others.
    """
    if sampler == "unipc":
        return unipc.sample(velocity, draw_noise, steps, shift)
    return rcm.sample(velocity, draw_noise, timesteps(sampler, steps, sigma_max, shift), STEP_RULES[sampler])
