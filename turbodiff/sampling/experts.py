"""Which of Wan2.2's two experts runs: the high-noise one first, the low-noise one below the boundary."""

from collections.abc import Iterable
from typing import Literal

Expert = Literal["high", "low"]


def expert_at(t: float, boundary: float) -> Expert:
    """The expert for time t in [0, 1]: low where t < boundary (Wan2.2: 0.9)."""
    return "low" if t < boundary else "high"


def experts_for(timesteps: Iterable[float], boundary: float) -> list[Expert]:
    """The expert of every step of a schedule [steps + 1]; its last time is the clip, where nothing runs."""
    return [expert_at(float(t), boundary) for t in list(timesteps)[:-1]]
