"""When the network is asked, as tensors; the times themselves are facts of spec/experts.py."""

import torch
from torch import Tensor

from turbodiff.spec.experts import rcm_times


def rcm_timesteps(steps: int, sigma_max: float) -> Tensor:
    """Rectified-flow times, float64 [steps + 1], falling from sigma_max / (1 + sigma_max) to 0. steps is 1 to 4."""
    return torch.tensor((*rcm_times(steps, sigma_max), 0.0), dtype=torch.float64)


def network_timesteps(t: float, batch: int) -> Tensor:
    """Time t in [0, 1] as the network takes it: float32 [batch, 1], times 1000."""
    return torch.full((batch, 1), t, dtype=torch.float32) * 1000
