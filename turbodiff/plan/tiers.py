"""Tiers and rounds: what the form starts with on a card of this size; and which files of a model fit, for a list."""

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from turbodiff.plan.calibration import History
from turbodiff.plan.candidates import network_files
from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import Refusal, plan_request
from turbodiff.plan.weight_sizes import missing_files
from turbodiff.spec.models import (
    FoundFile,
    Frozen,
    Inventory,
    ModelSpec,
    Variant,
    all_models,
    configs_folder,
    read_toml,
)  # fmt: skip
from turbodiff.spec.numbers import GIB
from turbodiff.spec.plan import Fit, Plan, Reason
from turbodiff.spec.request import Request, make_request
from turbodiff.spec.schedules import SCHEDULE_REASONS, WARNINGS

NO_FILES = Inventory()


class Start(Frozen):
    """Fields of a request that a tier or a round fills in; None leaves the model's default."""

    model: str | None = None
    resolution: str | None = None
    num_frames: int | None = None
    steps: int | None = None
    quant_linear: Literal["auto", "on", "off"] | None = None
    topk: float | None = None
    boundary: float | None = None

    def fields(self) -> dict[str, Any]:
        """What is said, as fields of a request."""
        return self.model_dump(exclude_none=True)


class Tier(Frozen):
    """Cards of one size."""

    name: str
    nameplate_gb: int
    from_gib: float
    cards: tuple[str, ...]
    t2v: Start
    i2v: Start


class Round(Frozen):
    """One step on the way from an idea to a clip, with the seconds a person grants it."""

    name: str
    budget_s: float
    keeps: tuple[str, ...]
    t2v: Start
    i2v: Start


class _TierFile(Frozen):
    tiers: tuple[Tier, ...]


class _RoundFile(Frozen):
    rounds: tuple[Round, ...]
    demo_rounds: tuple[Round, ...]


@cache
def tiers(folder: Path | None = None) -> tuple[Tier, ...]:
    """Every tier of configs/tiers.toml, smallest first."""
    found = read_toml((folder or configs_folder()) / "tiers.toml", _TierFile).tiers
    return tuple(sorted(found, key=lambda tier: tier.from_gib))


@cache
def rounds(demo: bool = False, folder: Path | None = None) -> tuple[Round, ...]:
    """The rounds of configs/presets.toml in order, Wan's or the demo's."""
    found = read_toml((folder or configs_folder()) / "presets.toml", _RoundFile)
    return found.demo_rounds if demo else found.rounds


def tier_of(total_bytes: int | None) -> Tier | None:
    """The highest tier that a card reaches; None for an unknown size or one below all of them."""
    reached = [tier for tier in tiers() if total_bytes is not None and total_bytes >= tier.from_gib * GIB]
    return reached[-1] if reached else None


def tier_here(machine: Machine) -> Tier | None:
    """The tier of a machine's largest card."""
    return tier_of(max([gpu.total_bytes or 0 for gpu in machine.usable_gpus], default=None))


def first_request(spec: ModelSpec, machine: Machine, variant: Variant | None = None) -> Request:
    """What the form starts with when this model is chosen on this machine (another model would be no answer, so it is
    pinned); with a variant at the resolution and precision of its files, where the model is published in several."""
    tier = tier_here(machine)
    start = getattr(tier, spec.kind) if tier is not None else Start()
    fields = start.fields() if start.model == spec.name else {"model": spec.name}
    if variant is not None:
        several = {other.resolution for other in spec.variants} > {variant.resolution}
        fields |= {"resolution": variant.resolution} if several else {}
        fields |= (
            {"quant_linear": "on" if variant.quant else "off"} if len({v.quant for v in spec.variants}) > 1 else {}
        )
    picture = {"image": "-"} if spec.kind == "i2v" else {}
    return make_request({**fields, "prompt": "-", "seed": 0, "pinned": ["model"], **picture})


def downloaded(spec: ModelSpec, variants: Sequence[Variant], here: Inventory = NO_FILES) -> Inventory:
    """The disk once these variants of a model are on it beside what is `here`, which is not downloaded again."""
    files = dict.fromkeys(file for variant in variants for file in missing_files(spec.files_of(variant), spec, here))
    fetched = [
        FoundFile(
            model=spec.name, component=file.component, path=file.names[0], bytes=file.bytes, quant=file.quant,
            sla=spec.turbo and file.component.startswith("dit"), converted=file.converted, resolution=file.resolution,
            to_fetch=True,
        )
        for file in files
    ]  # fmt: skip
    return Inventory(files=(*fetched, *(file for file in here.files if file.model == spec.name)))


@lru_cache(256)
def _fit_of(asked: Request, machine: Machine, history: History | None, disk: Inventory) -> tuple[Fit, Plan]:
    try:
        plan = plan_request(asked, machine, disk, history=history)
    except Refusal as error:
        return Fit("no", error.plan.seconds, (), error.need_bytes, error.have_bytes), error.plan
    lowered = tuple(change for change in plan.changes if change.lossy)
    size, frames = plan.request.resolution, plan.request.num_frames
    return Fit(
        plan.band, plan.seconds, lowered, plan.peak_bytes, plan.budget_bytes, size=size, frames=frames,
    ), plan  # fmt: skip


class Installed(NamedTuple):
    """What a model's clip is made with on this disk, and how the form's first clip would run with it. `reasons`: which
    schedule, what cannot work."""

    files: tuple[FoundFile, ...]
    fit: Fit
    reasons: tuple[Reason, ...]


def installed(machine: Machine, here: Inventory, history: History | None = None) -> dict[str, Installed]:
    """By model name: the networks on this disk as a plan takes them; without the models that lack one."""
    machine, found = _still(machine), dict[str, Installed]()
    for spec in all_models():
        fit, plan = _fit_of(first_request(spec, machine), machine, history, here)
        said = tuple(reason for reason in plan.reasons if reason.key in (*SCHEDULE_REASONS, *WARNINGS))
        if files := network_files(plan.request, here):
            found[spec.name] = Installed(files, fit, said)
    return found


def counted_on(request: Request, machine: Machine, history: History | None, here: Inventory) -> Inventory:
    """The disk as a plan of this request counts on it: what is `here`; where a network of the model is not, beside it
    the files that would be downloaded for it, so that a form and the list of downloads speak of the same clip. Those
    are of the variant that is `suited`, or of the precision and the resolution that the request asks for."""
    spec = request.spec
    if spec.bundled or here.has_networks(spec):
        return here
    best = suited(spec, _still(machine), history)
    quant = best.quant if request.quant_linear == "auto" else request.quant_linear == "on"
    wanted = (Variant(quant, request.resolution), Variant(quant, best.resolution))
    variant = next((one for one in wanted if one in spec.variants), best)
    files = downloaded(spec, [variant], here).files
    return here.model_copy(update={"files": (*files, *(file for file in here.files if file.model != spec.name))})


@lru_cache(256)
def suited(spec: ModelSpec, machine: Machine, history: History | None = None) -> Variant:
    """The variant to download where nobody says which: of the resolution that the form starts with here, and INT8 if a
    plan with both at hand would run it; without a card INT8, where the smaller file is the lesser risk. Where that clip
    would be lowered, the highest other resolution whose clip would not."""
    asked = first_request(spec, machine)
    alike = [variant for variant in spec.variants if variant.resolution == asked.resolution] or list(spec.variants)
    if not machine.usable_gpus:
        return alike[0]
    runs = plan_request(asked, machine, downloaded(spec, alike), policy="anyway").request.quant_linear
    best = next((variant for variant in alike if variant.quant == (runs == "on")), alike[0])
    others = [other for other in reversed(spec.variants) if other.quant == best.quant]
    for one in (best, *others):
        if _fit_of(first_request(spec, machine, one), machine, history, downloaded(spec, [one]))[0].mark == "fits":
            return one
    return best


def fits_of(
    spec: ModelSpec, machine: Machine, history: History | None = None, here: Inventory = NO_FILES
) -> dict[Variant, Fit]:
    """Of each variant of a model what `plan_request` says of the form's first clip once its files are here, beside
    those that are; remembered while nothing changes that a plan reads of the machine."""
    machine, found = _still(machine), {}
    best = suited(spec, machine, history)
    for one in spec.variants:
        fit, _ = _fit_of(first_request(spec, machine, one), machine, history, downloaded(spec, [one], here))
        found[one] = fit._replace(suited=one == best)
    return found


def _still(machine: Machine) -> Machine:
    """The machine without what changes from one moment to the next and no plan reads."""
    still = {"utilisation": None, "power_w": None, "temperature_c": None}
    return machine.model_copy(update={"gpus": tuple(gpu.model_copy(update=still) for gpu in machine.gpus)})
