"""Tiers and rounds: what the form starts with on a card of this size; and whether a model fits, for a list."""

from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import Refusal, plan_request
from turbodiff.spec.models import Frozen, Inventory, ModelSpec, configs_folder, read_toml
from turbodiff.spec.numbers import GIB, gib
from turbodiff.spec.plan import Band
from turbodiff.spec.request import make_request


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


class Fit(NamedTuple):
    """How the default clip of a model would run here. `words`: "fits", "fits with int8, blocks streamed", "tight at
    480p, 49 frames", or "does not fit: needs 9 GiB of 6 GiB"."""

    band: Band
    words: str
    peak_bytes: int
    budget_bytes: int


def fit_of(spec: ModelSpec, machine: Machine, inventory: Inventory) -> Fit:
    """The model's default clip on this machine, with the levers that cost time only and what gets smaller; another
    model is no answer, so the model is pinned."""
    picture = {"image": "picture"} if spec.kind == "i2v" else {}
    asked = make_request({"model": spec.name, "prompt": "-", "seed": 0, "pinned": ["model"], **picture})
    try:
        plan = plan_request(asked, machine, inventory)
    except Refusal as error:
        need, have = error.need_bytes, error.have_bytes
        return Fit("no", f"does not fit: needs {gib(need)} of {gib(have)}", need, have)
    levers, request, changed = plan.levers, plan.request, {change.field for change in plan.changes}
    with_levers = {
        "int8": request.quant_linear == "on",
        "text encoder streamed": levers.text == "streamed",
        "text encoder on the CPU": levers.text == "cpu",
        "experts taking turns": levers.experts == "swapped",
        "blocks streamed": levers.experts == "streamed",
        "feed-forward in parts": levers.ffn_chunks > 1,
        "VAE tiled": levers.vae == "tiled",
    }
    smaller = {
        request.resolution: bool(changed & {"resolution", "width", "height"}),
        f"{request.num_frames} frames": "num_frames" in changed,
    }
    at, using = ([words for words, holds in said.items() if holds] for said in (smaller, with_levers))
    words = plan.band + (f" at {', '.join(at)}" if at else "") + (f" with {', '.join(using)}" if using else "")
    return Fit(plan.band, words, plan.peak_bytes, plan.budget_bytes)
