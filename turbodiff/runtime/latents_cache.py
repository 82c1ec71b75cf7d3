"""Latents on disk from the end of sampling until the clip is verified: a failed decode never samples again."""

import contextlib
import hashlib
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbodiff.spec.files import atomic_write
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

# what latents depend on; everything else (fps, nonce, pins) may change without sampling again
RECIPE = [
    "kind",
    "prompt",
    "negative_prompt",
    "seed",
    "model",
    "width",
    "height",
    "num_frames",
    "steps",
    "sampler",
    "sigma_max",
    "guidance",
    "shift",
    "boundary",
    "attention",
    "topk",
    "quant_linear",
    "image",
    "fit",
    "adaptive_resolution",
    "loras",
    "noise_device",
]


SAME = ("kind", "prompt", "seed", "image", "loras")  # what no plan ever changes


def recipe_of(request: Request) -> str:
    """A fingerprint of everything that the latents of a request depend on."""
    fields = request.model_dump(mode="json", include=set(RECIPE))
    return hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()


def earlier_plan(state: Path, job: int, request: Request) -> Plan | None:
    """The plan whose latents an earlier attempt at this request left behind, or None."""
    try:
        with safe_open(_path(state, job), "pt") as file:
            plan = Plan.model_validate_json((file.metadata() or {}).get("plan", ""))
    except (OSError, SafetensorError, ValidationError):
        return None
    same = all(getattr(plan.request, name) == getattr(request, name) for name in SAME)
    return plan if same else None


def _path(state: Path, job: int) -> Path:
    return state / "latents" / f"{job}.safetensors"


class SavedLatents:
    """The latents of one job in `state/latents`; they count only while the recipe is the same."""

    def __init__(self, state: Path, job: int, request: Request) -> None:
        self._recipe = recipe_of(request)
        self._path = _path(state, job)

    def load(self) -> Tensor | None:
        """Latents [1, 16, T, H, W] float32 of an earlier attempt, or None."""
        try:
            tensors = load_file(self._path)
        except (FileNotFoundError, SafetensorError):
            return None
        return tensors.get(self._recipe)

    def save(self, latents: Tensor, plan: Plan) -> None:
        """Keep the latents and the plan that they were made by; a full disk costs only the shortcut."""
        told = {"plan": plan.model_dump_json()}
        with contextlib.suppress(OSError, SafetensorError), atomic_write(self._path) as part:
            save_file({self._recipe: latents.float().cpu().contiguous()}, part, told)

    def forget(self) -> None:
        """The clip is safe: the latents may go."""
        self._path.unlink(missing_ok=True)
