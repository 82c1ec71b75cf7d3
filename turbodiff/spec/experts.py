"""The denoising networks of a model, and which one runs at which step. No torch: plan, sampler and page share it."""

import math
from enum import StrEnum
from functools import lru_cache
from typing import Literal

RCM_ANGLES = (1.5, 1.4, 1.0)  # TrigFlow angles after the first step (TurboDiffusion; rCM, arXiv 2510.08431)
TRAIN_STEPS = 1000  # UniPC asks at whole timesteps out of so many, as Wan was trained (diffusers)
# FastVideo's DMD students are asked at these times (scripts/inference: --dmd-denoising-steps "1000,757,522")
DMD_TIMES = (1.0, 0.757, 0.522)
SHORT_OF_NOISE = 1e-6  # diffusers starts UniPC this much below pure noise, whose logarithm it cannot take


class Expert(StrEnum):
    """One denoising network; the value is the word in JSON, in sidecars and in a LoRA's `expert`."""

    SINGLE = "single"
    HIGH = "high"  # Wan2.2's network for high noise, at the beginning
    LOW = "low"  # Wan2.2's network for low noise, at the end

    @property
    def component(self) -> Literal["dit", "dit_high", "dit_low"]:
        """The component of the inventory that holds its weights."""
        return "dit" if self is Expert.SINGLE else "dit_high" if self is Expert.HIGH else "dit_low"

    @property
    def phase(self) -> Literal["denoise", "denoise_high", "denoise_low"]:
        """The phase of a plan in which it runs."""
        return "denoise" if self is Expert.SINGLE else "denoise_high" if self is Expert.HIGH else "denoise_low"

    @property
    def letter(self) -> str:
        """One step of it in a reason such as `experts_by_step`: "HHLL"."""
        return self.name[0]


def expert_at(t: float, boundary: float) -> Expert:
    """The expert for time t in [0, 1], 1 = noise: the low-noise one where t < boundary (Wan2.2: 0.9)."""
    return Expert.LOW if t < boundary else Expert.HIGH


def rcm_times(steps: int, sigma_max: float) -> tuple[float, ...]:
    """Times at which rCM asks the network, 1 to 4 of them: t = sin a / (sin a + cos a), where tan a = sigma."""
    assert 1 <= steps <= 1 + len(RCM_ANGLES), steps
    angles = (math.atan(sigma_max), *RCM_ANGLES[: steps - 1])
    return tuple(math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles)


def unipc_times(steps: int, shift: float) -> tuple[float, ...]:
    """What diffusers' UniPCMultistepScheduler makes of the line from 1 to 1 / 1000, shifted: s -> shift s / (1 +
    (shift - 1) s). Operation for operation, since cutting to whole timesteps forgives no rounding."""
    step = (1 / TRAIN_STEPS - 1) / steps
    line = [i * step + 1 for i in range(steps)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in line]
    if abs(sigmas[0] - 1) < SHORT_OF_NOISE:
        sigmas[0] = 1 - SHORT_OF_NOISE
    return tuple(math.floor(TRAIN_STEPS * sigma) / TRAIN_STEPS for sigma in sigmas)


def flow_times(steps: int, shift: float) -> tuple[float, ...]:
    """Wan's own line of times for Euler and LCM: 1 - i / steps, shifted as in `unipc_times` (Wan2.1's
    get_sampling_sigmas, wan/utils/fm_solvers.py); diffusers makes the same of sigmas 1 - i / steps."""
    line = [1 - i / steps for i in range(steps)]
    return tuple(shift * s / (1 + (shift - 1) * s) for s in line)


def sampler_times(sampler: str, steps: int, sigma_max: float, shift: float) -> tuple[float, ...]:
    """Times in (0, 1] at which a sampler asks the network, falling; "auto" stands for rCM until a plan settles it."""
    if sampler == "unipc":
        return unipc_times(steps, shift)
    if sampler in ("euler", "lcm"):
        return flow_times(steps, shift)
    return DMD_TIMES[:steps] if sampler == "dmd" else rcm_times(min(steps, 1 + len(RCM_ANGLES)), sigma_max)


@lru_cache(256)
def experts_by_step(sampler: str, steps: int, sigma_max: float, shift: float, boundary: float) -> tuple[Expert, ...]:
    """The expert of every step of a two-expert model's schedule."""
    times = sampler_times(sampler, steps, sigma_max, shift)
    return tuple(expert_at(t, boundary) for t in times)
