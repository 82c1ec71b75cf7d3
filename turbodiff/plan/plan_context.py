"""Where a request is planned for, and one candidate worked out there."""

from dataclasses import dataclass, field
from typing import Any

from turbodiff.plan import offload_search, phase_costs
from turbodiff.plan.calibration import Calibration
from turbodiff.plan.candidates import Candidate
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.plan.offload_search import CandidateCost, Room
from turbodiff.plan.roofline import Speed, speed_of
from turbodiff.plan.torch_compat import conv3d_is_broken
from turbodiff.plan.weight_sizes import Weights, lora_bytes, weights_of
from turbodiff.spec.inventory import Inventory
from turbodiff.spec.models import ModelSpec
from turbodiff.spec.plan import Levers
from turbodiff.spec.request import Request

ALL_MEMORY = Room(1 << 60, None)
NO_LIMIT_BYTES = 1 << 60
FP8_CAPABILITY = (8, 9)  # Ada; an unknown card counts as one, which is the larger need


@dataclass(frozen=True, slots=True)
class PlanContext:
    """The machine, the chosen card (None: the CPU), what a job may use there, and what is at hand.

    One per plan: it remembers what this plan has worked out, since a refusal looks at each placement again and again.
    Of a request only the steps are ever varied on the way.
    """

    machine: Machine
    gpu: GpuFacts | None
    room: Room
    speed: Speed
    inventory: Inventory
    calibration: Calibration | None = None
    loaded: frozenset[str] = frozenset()
    text_cached: bool = False
    worked_out: dict[tuple[Any, ...], CandidateCost] = field(default_factory=dict, compare=False, repr=False)
    weighed: dict[tuple[str, bool], Weights] = field(default_factory=dict, compare=False, repr=False)

    @property
    def total_bytes(self) -> int | None:
        """Memory of the card; None on a CPU."""
        return None if self.gpu is None else self.gpu.total_bytes or self.room.device

    def weights(self, spec: ModelSpec, int8: bool) -> Weights:
        """A model's weights as they sit here: bf16 on a card, float32 on a CPU."""
        key = (spec.name, int8)
        if key not in self.weighed:
            self.weighed[key] = weights_of(spec, int8, 4 if self.gpu is None else 2)
        return self.weighed[key]


def setting_of(
    machine: Machine,
    inventory: Inventory,
    calibration: Calibration | None = None,
    loaded: frozenset[str] = frozenset(),
    text_cached: bool = False,
    limit_bytes: int | None = None,
) -> PlanContext:
    """The freest card that this torch can use, else the CPU. `limit_bytes` lowers the budget below what is free."""
    host = phase_costs.host_budget(machine)
    cpu_torch = not machine.pretended and (machine.torch or "").endswith("+cpu")
    gpus = () if cpu_torch else machine.gpus
    limit = NO_LIMIT_BYTES if limit_bytes is None else limit_bytes
    gpu, device = None, NO_LIMIT_BYTES if host is None else host
    if gpus:
        gpu = max(gpus, key=lambda card: (phase_costs.device_budget(card, machine), -card.index))
        device = phase_costs.device_budget(gpu, machine)
    room, speed = Room(min(device, limit), host), speed_of(gpu, machine.cpu_count)
    return PlanContext(machine, gpu, room, speed, inventory, calibration, loaded, text_cached)


def job_of(request: Request, choice: Candidate, setting: PlanContext) -> phase_costs.Job:
    """One candidate with everything the formulas need."""
    spec, gpu = choice.spec, setting.gpu
    context = 0 if gpu is None else phase_costs.CONTEXT_BYTES if gpu.context_bytes is None else gpu.context_bytes
    latent, element_bytes = choice.shape.latent, 4 if gpu is None else 2
    tokens = latent.tokens
    weights = setting.weights(spec, choice.int8)
    worn = max(lora_bytes(request.loras, spec, setting.inventory, expert) for expert in spec.experts)
    return phase_costs.Job(
        spec=spec,
        shape=choice.shape,
        latent=latent,
        tokens=tokens,
        unit=tokens * spec.dit.dim * element_bytes,
        int8=choice.int8,
        attention=settled_attention(request, choice, setting),
        topk=request.topk,
        forwards=2 if request.guidance > 1 else 1,
        experts=request.model_copy(update={"model": spec.name}).experts,
        weights=weights,
        made=weights.dit if (_only_plain(choice, setting) if choice.int8 else worn) else 0,
        lora=worn if choice.int8 else 0,
        speed=setting.speed,
        on_cpu=gpu is None,
        element_bytes=element_bytes,
        context_bytes=context,
        loaded=setting.loaded,
        fp8=gpu is not None and (gpu.capability is None or gpu.capability >= FP8_CAPABILITY),
        conv2d=gpu is None or conv3d_is_broken(setting.machine.torch or "2.11", cudnn_number(setting.machine.cudnn)),
        correction=1.0 if setting.calibration is None else setting.calibration.factor,
    )


def settled_attention(request: Request, choice: Candidate, setting: PlanContext) -> str:
    """What "auto" becomes: dense on a CPU, for the demo and for UniPC; SageSLA for distilled weights, else Sage."""
    if request.attention != "auto":
        return request.attention
    if setting.gpu is None or choice.spec.bundled or request.sampler == "unipc":
        return "dense"
    return "sagesla" if choice.spec.turbo and _has_linear_branch(choice, setting.inventory) else "sage"


def _has_linear_branch(choice: Candidate, inventory: Inventory) -> bool:
    """Whether the file that would run has SLA's projections; a file that is not here is taken for the published one."""
    part = "dit_high" if choice.spec.two_experts else "dit"
    file = inventory.of(choice.spec.name, part, choice.int8) or inventory.of(choice.spec.name, part)
    return file is None or file.sla


def _only_plain(choice: Candidate, setting: PlanContext) -> bool:
    """Whether the INT8 weights have to be made from a plain file; a pretended disk has both."""
    part = "dit_high" if choice.spec.two_experts else "dit"
    files = setting.inventory
    return not setting.machine.pretended and (
        files.of(choice.spec.name, part, True) is None and files.of(choice.spec.name, part, False) is not None
    )


def placement_of(
    request: Request, choice: Candidate, setting: PlanContext, like: Levers | None = None
) -> CandidateCost:
    """One candidate with its levers: the best for this setting, or `like` some levers already chosen."""
    if like is not None:
        return offload_search.placed_like(job_of(request, choice, setting), like, setting.room)
    key = (choice.spec.name, choice.width, choice.height, choice.num_frames, choice.int8, request.steps)
    if key not in setting.worked_out:
        job = job_of(request, choice, setting)
        setting.worked_out[key] = offload_search.place(job, setting.room, text_cached=setting.text_cached)
    return setting.worked_out[key]


def unlimited(request: Request, choice: Candidate, setting: PlanContext) -> CandidateCost:
    """The same candidate with all memory in the world: what levers cost is measured against it."""
    return offload_search.place(job_of(request, choice, setting), ALL_MEMORY, text_cached=setting.text_cached)


def cudnn_number(version: str | None) -> int:
    """ "9.10.2.21" as torch counts it, 91002; 0 when unknown."""
    parts = [int(part) for part in (version or "0").split(".")[:3] if part.isdecimal()]
    major, minor, patch = (*parts, 0, 0)[:3]
    return major * 10_000 + minor * 100 + patch
