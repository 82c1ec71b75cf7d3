"""What measured runs teach the plan: one bounded factor on work memory (activations and scratch), never on weights.

A sample is one phase of a finished or failed attempt. Only samples taken while the neighbours stayed still count. The
factor follows an underestimate at once and an overestimate slowly, stays within [0.9, 1.25], and looks at the last 50
samples only: a wrong one can make plans a little too careful for a while, it can never make every later plan refuse. An
out-of-memory says only that the need was at least so much; three good runs of the same kind after it overrule it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from turbodiff.spec.numbers import MIB

LOWEST, HIGHEST = 0.9, 1.25
STILL_BYTES = 256 * MIB  # vLLM's bound for how much a neighbour may move during a measurement
LAST = 50  # samples of one kind that are looked at
DOUBT = 3  # samples' worth of belief in the formula itself
OVERRULED_BY = 3  # good runs after an out-of-memory
ESTIMATOR = 1  # raise it when the formulas change: older samples then teach nothing


class Kind(BaseModel):
    """What a sample is about; two samples of unlike torch or cuDNN never mix (pytorch issues 166643, 177406)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gpu: str
    total_bytes: int
    torch: str
    cudnn: str = ""
    driver: str = ""
    attention: str
    model: str
    int8: bool
    vae: str = "whole"
    width: int = 0
    height: int = 0
    num_frames: int = 0

    def coarser(self) -> "tuple[Kind, ...]":
        """Itself, then without frames, without size, without model: what may stand in for it."""
        without_frames = self.model_copy(update={"num_frames": 0})
        without_size = without_frames.model_copy(update={"width": 0, "height": 0})
        any_model = without_size.model_copy(update={"model": "", "int8": False, "vae": ""})
        return self, without_frames, without_size, any_model


class Sample(BaseModel):
    """One phase of one attempt: predicted and measured bytes beyond weights and context."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    phase: str
    predicted_bytes: int
    measured_bytes: int
    neighbours_moved_bytes: int = 0
    out_of_memory: bool = False
    estimator: int = ESTIMATOR


class Calibration(NamedTuple):
    """The factor on work memory, and from how many samples it comes."""

    factor: float = 1.0
    samples: int = 0


def calibrate(samples: Sequence[Sample], kind: Kind) -> Calibration:
    """The factor for a kind of job, from its own samples, else from the nearest coarser kind that has any."""
    usable = [sample for sample in samples if _usable(sample)]
    for level, coarse in enumerate(kind.coarser()):
        group = [sample for sample in usable if sample.kind.coarser()[level] == coarse][-LAST:]
        if group:
            return Calibration(_factor(group), len(group))
    return Calibration()


def _usable(sample: Sample) -> bool:
    still = abs(sample.neighbours_moved_bytes) < STILL_BYTES
    return still and sample.estimator == ESTIMATOR and sample.predicted_bytes > 0 and sample.measured_bytes > 0


def _factor(group: Sequence[Sample]) -> float:
    """The 95th percentile of measured / predicted; an overestimate is drawn towards 1 while samples are few."""
    ratios = sorted(_believed(group))
    if not ratios:
        return 1.0
    high = ratios[min(len(ratios) - 1, int(0.95 * len(ratios)))]
    drawn = 1 + (high - 1) * len(ratios) / (len(ratios) + DOUBT)
    return min(max(high if high > 1 else drawn, LOWEST), HIGHEST)


def _believed(group: Sequence[Sample]) -> Iterable[float]:
    """Ratios; an out-of-memory is left out once enough good runs came after it."""
    good_after = 0
    for sample in reversed(group):
        if not sample.out_of_memory:
            good_after += 1
        elif good_after >= OVERRULED_BY:
            continue
        yield sample.measured_bytes / sample.predicted_bytes


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, one JSON object a line; lines that cannot be read are left out."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return []
    samples = []
    for line in lines:
        try:
            samples.append(Sample.model_validate(json.loads(line)))
        except (ValueError, ValidationError):  # a line cut short by a crash
            continue
    return samples


def append_sample(path: Path, sample: Sample) -> None:
    """Add one line to the file of samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(sample.model_dump_json() + "\n")
