"""Where a request is planned for: the machine, the chosen card or those that share a clip, what a job may use there."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, get_args

from turbodiff.plan.hardware import GpuFacts, Machine, sharing_cards
from turbodiff.plan.memory_limits import NO_LIMIT_BYTES, MemoryLimits, Option
from turbodiff.plan.roofline import Speed, speed_of
from turbodiff.plan.torch_compat import conv3d_is_broken, cudnn_number
from turbodiff.plan.weight_sizes import Weights, weights_of
from turbodiff.spec.models import Inventory, ModelSpec
from turbodiff.spec.plan import Calibration
from turbodiff.spec.request import Request, TextDtype

if TYPE_CHECKING:
    from turbodiff.plan.offload_search import CandidateCost

EvaluationKey = tuple[str, int, int, int, bool, int, bool]


@dataclass(frozen=True, slots=True)
class PlanContext:
    """The machine, the chosen card (None: the CPU), what a job may use there, and what is at hand.

    It remembers what was worked out here, since a refusal and the marks of a form look at each candidate again and
    again: for requests that differ in nothing but steps and what a candidate replaces (planner.NOT_COSTED).
    """

    machine: Machine
    gpu: GpuFacts | None
    limits: MemoryLimits
    speed: Speed
    inventory: Inventory
    calibration: Calibration | None = None
    loaded: frozenset[str] = frozenset()
    text_cached: bool = False
    text_dtypes: tuple[TextDtype, ...] = ("bf16",)  # of the text encoder, those that may be taken, in this order
    ranks: int = 1  # processes that share the clip, at most; limits are those of the one that has the least
    cards: tuple[GpuFacts, ...] = ()  # theirs, the chosen one first
    alone: "PlanContext | None" = None  # the same for one process
    evaluated: "dict[EvaluationKey, CandidateCost]" = field(default_factory=dict, compare=False, repr=False)
    schedules: dict[tuple[str, bool, int, int], Request] = field(default_factory=dict, compare=False, repr=False)
    text_options: dict[tuple[str, bool, bool, bool], Option] = field(default_factory=dict, compare=False, repr=False)

    @property
    def total_bytes(self) -> int | None:
        """Memory of the card; None on a CPU."""
        return None if self.gpu is None else self.gpu.total_bytes or self.limits.device

    @property
    def conv3d_is_broken(self) -> bool:
        """Whether this torch takes many times the memory for the VAE."""
        return conv3d_is_broken(self.machine.torch or "2.11", cudnn_number(self.machine.cudnn))

    def weights(self, spec: ModelSpec, int8: bool) -> Weights:
        """A model's weights as they sit here: bf16 on a card, float32 on a CPU."""
        return weights_of(spec, int8, 4 if self.gpu is None else 2)


def plan_context(
    machine: Machine,
    inventory: Inventory,
    calibration: Calibration | None = None,
    loaded: frozenset[str] = frozenset(),
    text_cached: bool = False,
    limit_bytes: int | None = None,
    asked: Request | None = None,
    ranks: int = 1,
) -> PlanContext:
    """The freest card that this torch can use, else the CPU. `limit_bytes` lowers the budget below what is free.

    ranks: processes that share a clip, each on a card of its own kind: the freest as many (a machine with fewer is that
    of one of them), the one with the least free memory decides; host memory is divided.
    asked: says which precision of the text encoder is wished or pinned; without it, and where bitsandbytes or the card
    is missing, that is bf16. A wish that does not fit makes room for bf16 that passes through, then for fewer bits.
    """
    cpu_torch = not machine.pretended and (machine.torch or "").endswith("+cpu")
    host = machine.host_budget_bytes
    gpu, device = None, NO_LIMIT_BYTES if host is None else host // ranks
    budgets = (
        [] if cpu_torch else [(machine.card_budget_bytes(card), -card.index, card) for card in machine.usable_gpus]
    )
    cards: tuple[GpuFacts, ...] = ()
    if budgets:
        device, _, gpu = max(budgets, key=lambda budget: budget[:2])
    if budgets and ranks > 1:
        cards = sharing_cards(machine)[:ranks] or machine.usable_gpus[:1]
        gpu, device = cards[0], min(map(machine.card_budget_bytes, cards))
    host = machine.host_budget_with(gpu)
    host = host if host is None else host // ranks
    one_pool = gpu is not None and machine.unified_memory
    device = min(device, NO_LIMIT_BYTES if limit_bytes is None else limit_bytes)
    limits = MemoryLimits(device if host is None or not one_pool else min(device, host), host, one_pool)
    speed = speed_of(gpu, machine.cpu_count)
    dtypes: tuple[TextDtype, ...] = ("bf16",)
    if asked is not None and gpu is not None and machine.bitsandbytes:
        wish: TextDtype = "bf16" if asked.text_dtype == "auto" else asked.text_dtype
        others = () if "text_dtype" in asked.pinned else get_args(TextDtype)
        dtypes = tuple(dict.fromkeys((wish, *others)))
    context = PlanContext(machine, gpu, limits, speed, inventory, calibration, loaded, text_cached, dtypes)
    if ranks == 1:
        return context
    alone = plan_context(machine, inventory, calibration, loaded, text_cached, limit_bytes, asked)
    slowest = min((speed_of(card, machine.cpu_count) for card in cards), default=speed)
    return replace(context, ranks=ranks, cards=cards, alone=alone, speed=slowest, evaluated={}, schedules={})
