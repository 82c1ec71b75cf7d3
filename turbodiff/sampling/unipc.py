"""UniPC for undistilled Wan: diffusers' multistep scheduler on Wan's shifted line, with classifier-free guidance.

Twenty to fifty steps, each one evaluation, or two where guidance is above 1 (arXiv 2302.04867; the shift and the
integer timesteps are those of Wan2.1). The state is float32, as in diffusers' own pipeline.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from turbodiff.sampling.rcm import Step, clean_estimate

TRAIN_STEPS = 1000  # Wan's timesteps are t * 1000, cut to whole numbers


def guided(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Velocity pushed away from the negative prompt: `v- + guidance * (v+ - v-)` (arXiv 2207.12598)."""
    return negative + guidance * (positive - negative)


def unipc_timesteps(steps: int, shift: float) -> Tensor:
    """Times at which the network is asked, float64 [steps + 1], the last one 0: whole timesteps / 1000."""
    times = _scheduler(steps, shift).timesteps.double() / TRAIN_STEPS
    return torch.cat((times, times.new_zeros(1)))


def sample(
    velocity: Callable[[Tensor, float], Tensor], draw_noise: Callable[[], Tensor], steps: int, shift: float
) -> Iterator[Step]:
    """Run the schedule, one `Step` at a time; the last step's latents are the clip.

    velocity: (x float32, t) -> v of the same shape, guidance included. draw_noise: asked once, for the start.
    """
    scheduler = _scheduler(steps, shift)
    sigmas = scheduler.sigmas.tolist()
    x = draw_noise().float()
    for index, timestep in enumerate(scheduler.timesteps):
        t = timestep.item() / TRAIN_STEPS
        v = velocity(x, t).float()
        clean = clean_estimate(x, v, sigmas[index])
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        yield Step(index, t, sigmas[index + 1], x, clean)


def _scheduler(steps: int, shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler
