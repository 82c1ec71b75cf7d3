"""When the network is asked: the times of rCM's few steps (arXiv 2510.08431; angles from TurboDiffusion)."""

import math

import torch
from torch import Tensor

MIDDLE_ANGLES = (1.5, 1.4, 1.0)  # TrigFlow angles between the first step and the clip, TurboDiffusion
MAX_STEPS = 1 + len(MIDDLE_ANGLES)


def rcm_timesteps(steps: int, sigma_max: float) -> Tensor:
    """Rectified-flow times, float64 [steps + 1], falling from sigma_max / (1 + sigma_max) to 0.

    An angle a stands for sigma = tan(a) and the time t = sin(a) / (sin(a) + cos(a)). steps is 1 to 4.
    """
    assert 1 <= steps <= MAX_STEPS, steps
    angles = torch.tensor([math.atan(sigma_max), *MIDDLE_ANGLES[: steps - 1], 0.0], dtype=torch.float64)
    return angles.sin() / (angles.sin() + angles.cos())


def network_timesteps(t: float, batch: int) -> Tensor:
    """Time t in [0, 1] as the network takes it: float32 [batch, 1], times 1000."""
    return torch.full((batch, 1), t, dtype=torch.float32) * 1000
