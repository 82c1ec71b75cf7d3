"""Latents on disk from the end of sampling until the clip is verified: a failed decode never samples again."""

import contextlib
import hashlib
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbodiff.spec.files import atomic_write, check_file, check_own_folder, make_folder
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

# what latents depend on; everything else (fps, nonce, pins) may change without sampling again
RECIPE = {
    "kind", "prompt", "negative_prompt", "seed", "model", "width", "height", "num_frames", "steps", "sampler",
    "sigma_max", "guidance", "guidance_low", "shift", "boundary", "attention", "topk", "quant_linear", "image", "fit",
    "text_dtype", "exchange", "end_image",
    "adaptive_resolution", "loras", "noise_device",
}  # fmt: skip
NEVER_CHANGED = ("kind", "prompt", "seed", "image", "end_image", "loras")  # by any plan


class LatentsCache:
    """The latents of one job in `state/latents`, beside the plan that made them."""

    def __init__(self, state: Path, job: int) -> None:
        self._path = state / "latents" / f"{job}.safetensors"

    def load(self, request: Request) -> Tensor | None:
        """Latents [1, 16, T, H, W] float32 of an earlier attempt at the same recipe, or None."""
        try:
            self._check()
            return load_file(self._path).get(_recipe_of(request))
        except (OSError, SafetensorError):
            return None

    def load_plan(self, request: Request) -> Plan | None:
        """The plan of the latents that an earlier attempt at this request left, whatever it lowered; or None."""
        try:
            self._check()
            with safe_open(self._path, "pt") as file:
                plan = Plan.model_validate_json((file.metadata() or {}).get("plan", ""))
        except (OSError, SafetensorError, ValidationError):
            return None
        same = all(getattr(plan.request, name) == getattr(request, name) for name in NEVER_CHANGED)
        return plan if same else None

    def save(self, latents: Tensor, plan: Plan) -> None:
        """Keep the latents and the plan that they were made by; on a full disk they are not kept."""
        tensors = {_recipe_of(plan.request): latents.float().cpu().contiguous()}
        with contextlib.suppress(OSError, SafetensorError):
            make_folder(self._path.parent, ours=True, link=False)
            with atomic_write(self._path) as part:
                save_file(tensors, part, {"plan": plan.model_dump_json()})

    def delete(self) -> None:
        """Remove them: the clip is verified."""
        with contextlib.suppress(OSError):  # what else stands under that name harms nobody
            check_own_folder(self._path.parent)
            self._path.unlink(missing_ok=True)

    def _check(self) -> None:
        """Raise OSError where the folder leads elsewhere, or the file is none: a pipe would wait for its writer."""
        check_own_folder(self._path.parent)
        check_file(self._path)


def _recipe_of(request: Request) -> str:
    """A fingerprint of everything that the latents of a request depend on."""
    fields = request.model_dump(mode="json", include=RECIPE)
    return hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()
