"""Which expert runs at which step, so that the plan loads only what runs."""

import math

SECOND_ANGLES = (1.5, 1.4, 1.0)  # TrigFlow angles after the first, rCM (TurboDiffusion)


def timesteps(sampler: str, steps: int, sigma_max: float, shift: float) -> list[float]:
    """The times t at which the network runs, 1 = noise.

    rCM: t = sin / (sin + cos) of its angles (TurboDiffusion). UniPC: Wan's shifted line.
    """
    if sampler == "unipc":
        line = [1 - i / steps for i in range(steps)]
        return [shift * t / (1 + (shift - 1) * t) for t in line]
    angles = [math.atan(sigma_max), *SECOND_ANGLES[: steps - 1]]
    return [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]


def experts_by_step(times: list[float], boundary: float) -> str:
    """ "HHLL" for four steps of which two are at or above the boundary: high noise until t < boundary."""
    return "".join("L" if t < boundary else "H" for t in times)
