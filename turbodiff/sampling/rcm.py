"""The rCM sampler: from noise to a clip in one to four steps, at the times of spec/experts.py.

The state x is float64 throughout (TurboDiffusion); v is the velocity that the network predicts for x at time t. One
evaluation per step, no guidance: it is distilled into the weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One finished step: `latents` to go on with, and `clean`, where the clip would be if this were the last step."""

    index: int
    t: float
    t_next: float
    latents: Tensor
    clean: Tensor


def network_timesteps(t: float, batch: int) -> Tensor:
    """Time t in [0, 1] as the network takes it: float32 [batch, 1], times 1000."""
    return torch.full((batch, 1), t, dtype=torch.float32) * 1000


def sample(
    velocity: Callable[[Tensor, float], Tensor],
    draw_noise: Callable[[], Tensor],
    timesteps: Tensor,
    sampler: Literal["sde", "ode"] = "sde",
) -> Iterator[Step]:
    """Run the schedule, one `Step` at a time; the last step's latents are the clip.

    velocity: (x float64, t) -> v of the same shape, any float dtype. draw_noise: one float32 draw per call, on the
    device of the state; asked once at the start and, for `sde`, once per step including the last, where time 0
    discards it (TurboDiffusion draws it too, so the stream of a seed stays in step). timesteps: float64 [steps + 1].
    """
    times = timesteps.tolist()
    x = draw_noise().double() * times[0]
    for index, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t).to(torch.float64)
        clean = x - t * v
        # through the clean estimate and fresh noise, or along the velocity
        x = (1 - t_next) * clean + t_next * draw_noise() if sampler == "sde" else x - (t - t_next) * v
        yield Step(index, t, t_next, x, clean)
