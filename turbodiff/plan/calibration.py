"""What measured runs teach the plan: one bounded factor on work memory (activations and scratch), never on weights.

A sample is one phase of a finished or failed attempt: what the formula said that tensors would need beside the weights,
and what they needed. Only samples taken while the neighbours stayed still count. The factor follows an underestimate at
once and an overestimate slowly, stays within [0.9, 1.25], looks at the last 50 samples only, and what one of them asks
for fades with each good run that follows. An out-of-memory says only that the need was at least so much: it makes plans
careful, never makes one refuse (`measured` is the factor without it), and three good runs after it overrule it.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter

from turbodiff.plan.hardware import WORKSPACE_BYTES, GpuFacts, Machine
from turbodiff.spec.models import Frozen
from turbodiff.spec.numbers import MIB
from turbodiff.spec.plan import Calibration, Levers, Phase, Plan
from turbodiff.spec.request import Request

LOWEST, HIGHEST = 0.9, 1.25
STILL_BYTES = 256 * MIB  # vLLM's bound for how much a neighbour may move during a measurement
LAST = 50  # samples of one kind that are looked at
DOUBT = 3  # samples' worth of belief in the formula itself
OVERRULED_BY = 3  # good runs after an out-of-memory
FADES = 0.98  # of what an underestimate asks for, with each run that did not fail after it
LEAST_BYTES = 128 * MIB  # a smaller phase decides nothing, and library scratch outweighs its tensors
ESTIMATOR = 3  # raise it when the formulas change: older samples then teach nothing


class Kind(Frozen):
    """What a sample is about; two samples of unlike torch or cuDNN never mix (pytorch issues 166643, 177406)."""

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


# a kind itself, then without frames, without size, without model: what may stand in for it
_ANY_MODEL = ("gpu", "total_bytes", "torch", "cudnn", "driver", "attention")
_ANY_SIZE = (*_ANY_MODEL, "model", "int8", "vae")
_ANY_LENGTH = (*_ANY_SIZE, "width", "height")
_COARSER = tuple(attrgetter(*names) for names in ((*_ANY_LENGTH, "num_frames"), _ANY_LENGTH, _ANY_SIZE, _ANY_MODEL))


class Sample(Frozen):
    """One phase of one attempt: predicted and measured bytes of tensors beside the weights.

    Args:
        reserved_bytes: most that torch's allocator held in the phase, weights included; nvml_bytes: most that the
            driver showed for the process, context included. For the record; None where unknown.
    """

    kind: Kind
    phase: str
    predicted_bytes: int
    measured_bytes: int
    neighbours_moved_bytes: int = 0
    out_of_memory: bool = False
    reserved_bytes: int | None = None
    nvml_bytes: int | None = None
    estimator: int = ESTIMATOR


class History:
    """Measured runs, oldest first, that plans learn from; two of them are equal only if they are the same object."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        # only what was measured while the neighbours stayed still, by this formula, in a phase that decides something
        self._usable = [
            sample
            for sample in samples
            if abs(sample.neighbours_moved_bytes) < STILL_BYTES
            and sample.measured_bytes > (sample.predicted_bytes if sample.out_of_memory else 0)
            and sample.estimator == ESTIMATOR
            and sample.predicted_bytes >= LEAST_BYTES
        ]

    def calibration(self, kind: Kind) -> Calibration:
        """The factor for a kind of job, from its own samples, else from the nearest coarser kind that has any."""
        for fields in _COARSER:
            wanted = fields(kind)
            group = [sample for sample in self._usable if fields(sample.kind) == wanted][-LAST:]
            if group:
                measured = [sample for sample in group if not sample.out_of_memory]
                return Calibration(_factor(group), len(group), _factor(measured))
        return Calibration()


def kind_of(gpu: GpuFacts, machine: Machine, request: Request, levers: Levers) -> Kind:
    """What measurements of a request as it runs on a card are filed under."""
    return Kind(
        gpu=gpu.name, total_bytes=gpu.total_bytes or 0, torch=machine.torch or "", cudnn=machine.cudnn or "",
        driver=machine.driver or "", attention=request.attention, model=request.model,
        int8=request.quant_linear == "on", vae=levers.vae, width=request.width, height=request.height,
        num_frames=request.num_frames,
    )  # fmt: skip


def work_bytes(plan: Plan, phase: Phase) -> int:
    """Bytes of tensors beside the weights that the formula itself says, before any calibration.

    Context and the allocator's slack are none of torch's tensors. `write` has nothing but context and scratch.
    """
    told = float(str(next((reason.numbers["factor"] for reason in plan.reasons if reason.key == "calibrated"), 1.0)))
    context = next(other.workspace_bytes for other in plan.phases if other.name == "write") - WORKSPACE_BYTES
    beside = phase.slack_bytes + (told - 1) * phase.activations_bytes
    return round(phase.activations_bytes + phase.workspace_bytes - max(0, context) - beside)


def _factor(group: Sequence[Sample]) -> float:
    """The 95th percentile of measured / predicted; an overestimate is drawn towards 1 while samples are few.

    Excesses are faded by the good runs after them; an out-of-memory is left out after enough of those.
    """
    ratios: list[float] = []
    good_after = 0
    for sample in reversed(group):
        if sample.out_of_memory and good_after >= OVERRULED_BY:
            continue
        ratio = sample.measured_bytes / sample.predicted_bytes
        ratios.append(ratio if ratio <= 1 else 1 + (min(ratio, HIGHEST) - 1) * FADES**good_after)
        good_after += not sample.out_of_memory
    if not ratios:
        return 1.0
    ratios.sort()
    high = ratios[min(len(ratios) - 1, int(0.95 * len(ratios)))]
    drawn = 1 + (high - 1) * len(ratios) / (len(ratios) + DOUBT)
    return min(max(high if high > 1 else drawn, LOWEST), HIGHEST)
