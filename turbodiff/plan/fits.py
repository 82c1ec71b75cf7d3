"""Does a model fit this machine: the plan of its default clip, in a few words for a list. Pure."""

from typing import NamedTuple

from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import Refusal, plan_request
from turbodiff.spec.inventory import Inventory
from turbodiff.spec.models import ModelSpec
from turbodiff.spec.numbers import gib
from turbodiff.spec.plan import Band, Plan
from turbodiff.spec.request import make_request


class Fit(NamedTuple):
    """How the default clip of a model would run here. `levers` cost time only, `lowered` names what gets smaller."""

    band: Band
    levers: tuple[str, ...]
    lowered: tuple[str, ...]
    peak_bytes: int
    budget_bytes: int

    @property
    def words(self) -> str:
        """ "fits", "fits with int8, blocks streamed", "tight at 480p, 49 frames", or "does not fit: 9 of 6 GiB"."""
        if self.band == "no":
            return f"does not fit: needs {gib(self.peak_bytes)} of {gib(self.budget_bytes)}"
        size = f" at {', '.join(self.lowered)}" if self.lowered else ""
        return self.band + size + (f" with {', '.join(self.levers)}" if self.levers else "")


def fit_of(spec: ModelSpec, machine: Machine, inventory: Inventory) -> Fit:
    """The model's default clip on this machine; another model is no answer, so the model is pinned."""
    picture = {"image": "picture"} if spec.kind == "i2v" else {}
    request = make_request({"model": spec.name, "prompt": "-", "seed": 0, "pinned": ["model"], **picture})
    try:
        return _fit(plan_request(request, machine, inventory))
    except Refusal as error:
        return Fit("no", (), (), error.need_bytes, error.have_bytes)


def _fit(plan: Plan) -> Fit:
    return Fit(plan.band, tuple(_levers(plan)), tuple(_lowered(plan)), plan.peak_bytes, plan.budget_bytes)


def _levers(plan: Plan) -> list[str]:
    levers = plan.levers
    said = {
        "int8": plan.request.quant_linear == "on",
        "text encoder streamed": levers.text == "streamed",
        "text encoder on the CPU": levers.text == "cpu",
        "experts taking turns": levers.experts == "swapped",
        "blocks streamed": levers.experts == "streamed",
        "feed-forward in parts": levers.ffn_chunks > 1,
        "VAE tiled": levers.vae == "tiled",
    }
    return [words for words, holds in said.items() if holds]


def _lowered(plan: Plan) -> list[str]:
    fields = {change.field for change in plan.changes}
    size = [plan.request.resolution] if fields & {"resolution", "width", "height"} else []
    return size + ([f"{plan.request.num_frames} frames"] if "num_frames" in fields else [])
