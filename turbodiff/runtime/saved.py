"""Latents on disk from the end of sampling until the clip is verified: a failed decode never samples again."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def recipe_of(request: Request) -> str:
    """A fingerprint of everything that the latents of a request depend on."""
    fields = request.model_dump(mode="json", include=set(RECIPE))
    return hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()


class SavedLatents:
    """The latents of one job in `state/latents`; they count only while the recipe is the same."""

    def __init__(self, state: Path, job: int, request: Request) -> None:
        self._recipe = recipe_of(request)
        self._path = state / "latents" / f"{job}.safetensors"

    def load(self) -> Tensor | None:
        """Latents [1, 16, T, H, W] float32 of an earlier attempt, or None."""
        try:
            tensors = load_file(self._path)
        except (FileNotFoundError, SafetensorError):
            return None
        return tensors.get(self._recipe)

    def save(self, latents: Tensor) -> None:
        """Keep the latents; a full disk costs only the shortcut."""
        part = self._path.with_suffix(".part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file({self._recipe: latents.float().cpu().contiguous()}, part)
            part.replace(self._path)
        except (OSError, SafetensorError):
            part.unlink(missing_ok=True)

    def forget(self) -> None:
        """The clip is safe: the latents may go."""
        self._path.unlink(missing_ok=True)
