"""UniPC for undistilled Wan: diffusers' multistep scheduler on Wan's shifted line, with classifier-free guidance.

Twenty to fifty steps, each one evaluation, or two where guidance is above 1 (arXiv 2302.04867; the shift and the
integer timesteps are those of Wan2.1). The state is float32, as in diffusers' own pipeline.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from turbodiff.sampling.rcm import Step
from turbodiff.spec.experts import TRAIN_STEPS


def guided(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Velocity pushed away from the negative prompt: `v- + guidance * (v+ - v-)` (arXiv 2207.12598)."""
    return negative + guidance * (positive - negative)


def sample(
    velocity: Callable[[Tensor, float], Tensor], draw_noise: Callable[[], Tensor], steps: int, shift: float
) -> Iterator[Step]:
    """Run the schedule, one `Step` at a time; the last step's latents are the clip.

    velocity: (x float32, t) -> v of the same shape, guidance included. draw_noise: asked once, for the start.
    """
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    x = draw_noise().float()
    for index, timestep in enumerate(scheduler.timesteps):
        t = timestep.item() / TRAIN_STEPS
        v = velocity(x, t).float()
        clean = x - sigmas[index] * v
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        yield Step(index, t, sigmas[index + 1], x, clean)
