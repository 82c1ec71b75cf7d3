"""Which expert runs at which step, so that the plan loads only what runs."""

import math
from functools import lru_cache

SECOND_ANGLES = (1.5, 1.4, 1.0)  # TrigFlow angles after the first, rCM (TurboDiffusion)
TRAIN_STEPS = 1000  # UniPC asks at whole timesteps out of so many, as Wan was trained (diffusers)
SHORT_OF_NOISE = 1e-6  # diffusers starts UniPC this much below pure noise, whose logarithm it cannot take


def timesteps(sampler: str, steps: int, sigma_max: float, shift: float) -> list[float]:
    """The times t at which the network runs, 1 = noise.

    rCM: t = sin / (sin + cos) of its angles (TurboDiffusion). UniPC: what diffusers' UniPCMultistepScheduler makes of
    Wan's shifted line, operation for operation, since cutting to whole timesteps forgives no rounding.
    """
    if sampler == "unipc":
        return [math.floor(TRAIN_STEPS * sigma) / TRAIN_STEPS for sigma in _unipc_sigmas(steps, shift)]
    angles = [math.atan(sigma_max), *SECOND_ANGLES[: steps - 1]]
    return [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]


def _unipc_sigmas(steps: int, shift: float) -> list[float]:
    """The line from 1 to 1 / 1000 without its end, shifted: s -> shift s / (1 + (shift - 1) s)."""
    step = (1 / TRAIN_STEPS - 1) / steps
    line = [i * step + 1 for i in range(steps)]
    shifted = [shift * s / (1 + (shift - 1) * s) for s in line]
    return [1 - SHORT_OF_NOISE if abs(s - 1) < SHORT_OF_NOISE else s for s in shifted[:1]] + shifted[1:]


def experts_by_step(times: list[float], boundary: float) -> str:
    """ "HHLL" for four steps of which two are at or above the boundary: high noise until t < boundary."""
    return "".join("L" if t < boundary else "H" for t in times)


@lru_cache(256)
def schedule_letters(sampler: str, steps: int, sigma_max: float, shift: float, boundary: float) -> str:
    """`experts_by_step` of a whole schedule, remembered: all candidates of a plan share it."""
    return experts_by_step(timesteps(sampler, steps, sigma_max, shift), boundary)
