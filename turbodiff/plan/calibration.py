"""What measured runs teach the plan, phase by phase: a bounded factor on what the allocator holds beside the weights,
and one on the seconds.

A sample is one phase of one attempt: what the formulas said and what was measured. A job is held to what torch's
allocator takes from the driver, not to what tensors need. The true need lies between the two, since the
allocator keeps what it may have to give again; so tensors beyond the prediction raise it, and only an allocator that
stayed below it lowers it. Samples of another card, driver, torch, cuDNN, allocator or set of kernels teach nothing, nor
do those taken while neighbours moved.

Nothing is said beyond what was measured: a clip teaches upwards about smaller ones, never about larger ones, and
downwards only about itself, never below the most that one of its runs took. An underestimate counts at once, an
overestimate slowly; the factor stays within [0.9, 1.25] and looks at the last 50 samples. An out-of-memory says only
that the need was at least so much: it makes plans careful, never makes one refuse (`measured` is the factor without
it), and three good runs after it overrule it.

Seconds change what is shown, never what is chosen: where one of two ways was measured and the other was not, the second
would look better than it is.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter
from statistics import median
from typing import get_args

from turbodiff.plan.hardware import WORKSPACE_BYTES, GpuFacts, KernelName, Machine
from turbodiff.spec.models import Frozen
from turbodiff.spec.numbers import MIB
from turbodiff.spec.plan import Calibration, Lesson, Levers, Phase, Plan
from turbodiff.spec.request import Request

LOWEST, HIGHEST = 0.9, 1.25
FASTEST, SLOWEST = 0.01, 100.0  # of seconds: a formula is no further off than a wrong disk or a wrong card makes it
STILL_BYTES = 256 * MIB  # vLLM's bound for how much a neighbour may move during a measurement
LAST = 50  # samples of one kind that are looked at
LAST_TIMED = 9  # a card's clocks and a disk's cache change from day to day: the newest count
DOUBT = 3  # samples' worth of belief in the formula itself
OVERRULED_BY = 3  # good runs after an out-of-memory
FADES = 0.98  # of what an underestimate asks for, with each run that did not fail after it
LEAST_BYTES = 128 * MIB  # a smaller phase decides nothing, and library scratch outweighs its tensors
KNOWN_TEXT_S = 0.1  # a text encoder that was done sooner read nothing: the text was known
ESTIMATOR = 4  # raise it when the formulas change: older samples then teach nothing


class Kind(Frozen):
    """What a sample is about; two samples of unlike provenance never mix (pytorch issues 166643, 177406).

    Args:
        gpu: name of the card, or "CPU x 8". kernels: the operations that ran fused. rates: as measured on the card by
            `turbodiff calibrate --quick`, which the formula's seconds go by.
    """

    gpu: str
    total_bytes: int
    torch: str
    cudnn: str = ""
    driver: str = ""
    allocator: str = ""
    kernels: str = ""
    rates: str = ""
    attention: str
    model: str
    int8: bool
    vae: str = "whole"
    width: int = 0
    height: int = 0
    num_frames: int = 0


Provenance = tuple[object, ...]
PROVENANCE = ("gpu", "total_bytes", "torch", "cudnn", "driver", "allocator", "kernels", "rates")
provenance_of = attrgetter(*PROVENANCE)


class Sample(Frozen):
    """One phase of one attempt.

    Args:
        predicted_bytes, slack_bytes: bytes of tensors beside the weights, and what the allocator loses to them, as the
            formula says before any calibration.
        measured_bytes: most that tensors took beside the weights; held_bytes: most that torch's allocator held beside
            them, None where unknown.
        reserved_bytes: most that torch's allocator held in the phase, weights included; nvml_bytes: most that the
            driver showed for the process, context included. For the record; None where unknown.
        predicted_s, measured_s: seconds, None where the phase did not come to its end.
        network: file of the network that a phase behind the decode ran, "" for ffmpeg's filter; None for other phases,
            and in samples of an older version, which did not say it: those of such a phase teach nothing.
    """

    kind: Kind
    phase: str
    predicted_bytes: int
    measured_bytes: int
    slack_bytes: int = 0
    held_bytes: int | None = None
    neighbours_moved_bytes: int = 0
    out_of_memory: bool = False
    reserved_bytes: int | None = None
    nvml_bytes: int | None = None
    predicted_s: float | None = None
    measured_s: float | None = None
    network: str | None = None
    estimator: int = ESTIMATOR

    @property
    def predicted_held_bytes(self) -> int:
        """What the formula says that the allocator holds beside the weights."""
        return self.predicted_bytes + self.slack_bytes

    @property
    def ratio(self) -> float:
        """What the formula should have said, over what it said; 1.0 where the need may be what it said."""
        tensors, held = self.measured_bytes / self.predicted_bytes, self.predicted_held_bytes
        if tensors > 1 or self.out_of_memory:
            return tensors
        return 1.0 if self.held_bytes is None else min(1.0, max(self.held_bytes, self.measured_bytes) / held)

    @property
    def tells_bytes(self) -> bool:
        """Whether it can teach about memory: a phase that decides something, and of a failed one an excess."""
        least = self.predicted_bytes if self.out_of_memory else 0
        return self.measured_bytes > least and self.predicted_bytes >= LEAST_BYTES

    @property
    def tells_seconds(self) -> bool:
        """Whether it can teach about seconds."""
        known = self.phase == "text_encode" and (self.measured_s or 0.0) < KNOWN_TEXT_S
        return bool(self.predicted_s and self.measured_s) and not known


class History:
    """Measured runs, oldest first, that plans learn from; two of them are equal only if they are the same object."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        # only what was measured while the neighbours stayed still, by this formula
        self._by_provenance: defaultdict[Provenance, list[Sample]] = defaultdict(list)
        self._calibrations: dict[Provenance, Calibration] = {}
        for sample in samples:
            if abs(sample.neighbours_moved_bytes) < STILL_BYTES and sample.estimator == ESTIMATOR:
                self._by_provenance[provenance_of(sample.kind)].append(sample)

    def calibration(self, where: Provenance) -> Calibration:
        """What runs of one provenance taught, a lesson for every clip and phase; none from runs of another."""
        if where not in self._calibrations:
            groups: defaultdict[Lesson, list[Sample]] = defaultdict(list)
            for sample in self._by_provenance.get(where, ()):
                kind = sample.kind
                steps, vae = sample.phase.startswith("denoise"), sample.phase in ("image_encode", "vae_decode")
                lesson = Lesson(
                    sample.phase, kind.model, steps and kind.int8, kind.attention if steps else "",
                    kind.vae if vae else "", (kind.num_frames, kind.height, kind.width), sample.predicted_held_bytes,
                    network=sample.network,
                )  # fmt: skip
                groups[lesson].append(sample)
            told = [_taught(lesson, group[-LAST:]) for lesson, group in groups.items()]
            self._calibrations[where] = Calibration(tuple([one for one in told if one.samples or one.timed]))
        return self._calibrations[where]


def provenance(gpu: GpuFacts | None, machine: Machine) -> Provenance:
    """What must be the same for a run to teach anything: the card (None: the CPU), its driver, torch, cuDNN, the
    allocator's mode and the kernels that run fused."""
    if gpu is None:
        return (f"CPU x {machine.cpu_count or 0}", 0, machine.torch or "", "", "", "", "", "")
    kernels = " ".join([name for name in get_args(KernelName) if machine.runs_fused(gpu, name)])
    allocator = machine.allocator or "expandable"
    versions = (machine.torch or "", machine.cudnn or "", machine.driver or "")
    rates = " ".join([f"{rate:.3g}" for rate in (gpu.block_rate, gpu.decode_rate) if rate is not None])
    return (gpu.name, gpu.total_bytes or 0, *versions, allocator, kernels, rates)


def kind_of(gpu: GpuFacts | None, machine: Machine, request: Request, levers: Levers) -> Kind:
    """What measurements of a request as it runs on a card (None: the CPU) are filed under."""
    where = dict(zip(PROVENANCE, provenance(gpu, machine), strict=True))
    return Kind.model_validate(where | {
        "attention": request.attention, "model": request.model, "int8": request.quant_linear == "on",
        "vae": levers.vae, "width": request.width, "height": request.height, "num_frames": request.num_frames,
    })  # fmt: skip


def work_bytes(plan: Plan, phase: Phase) -> int:
    """Bytes of tensors beside the weights that the formula itself says, before any calibration.

    Context and the allocator's slack are none of torch's tensors. `write` has nothing but context and scratch.
    """
    bare = next(other for other in plan.phases if other.name == "write")
    context = bare.workspace_bytes - bare.learned_bytes - WORKSPACE_BYTES
    beside = max(0, context) + phase.slack_bytes + phase.learned_bytes
    return phase.activations_bytes + phase.workspace_bytes - beside


def _taught(lesson: Lesson, group: Sequence[Sample]) -> Lesson:
    """A lesson with what its samples say, the newest last."""
    told = [sample for sample in group if sample.tells_bytes]
    timed = [(sample.measured_s or 0.0) / (sample.predicted_s or 1.0) for sample in group if sample.tells_seconds]
    timed = timed[-LAST_TIMED:]
    return lesson._replace(
        factor=_factor(told),
        measured=_factor([sample for sample in told if not sample.out_of_memory]),
        samples=len(told),
        seconds=min(max(median(timed), FASTEST), SLOWEST) if timed else 1.0,
        timed=len(timed),
    )


def _factor(group: Sequence[Sample]) -> float:
    """The 95th percentile of the ratios above 1, else the largest, drawn towards 1 while samples are few.

    Excesses are faded by the good runs after them; an out-of-memory is left out after enough of those.
    """
    ratios: list[float] = []
    good_after = 0
    for sample in reversed(group):
        if sample.out_of_memory and good_after >= OVERRULED_BY:
            continue
        ratio = sample.ratio
        ratios.append(ratio if ratio <= 1 else 1 + (min(ratio, HIGHEST) - 1) * FADES**good_after)
        good_after += not sample.out_of_memory
    if not ratios:
        return 1.0
    ratios.sort()
    high = ratios[min(len(ratios) - 1, int(0.95 * len(ratios)))]
    drawn = 1 + (ratios[-1] - 1) * len(ratios) / (len(ratios) + DOUBT)
    return min(max(high if high > 1 else drawn, LOWEST), HIGHEST)
