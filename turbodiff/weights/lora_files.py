"""Which LoRA files are on this disk, by name: safetensors in a folder `loras` of the search roots. No torch.

Only their place is asked; whether one suits a model is said by weights/lora.py when it is read.
"""

from pathlib import Path
from typing import NamedTuple

from turbodiff.weights.locate import model_roots

FOLDERS = ("loras", "lora")  # below each search root: ours, and ComfyUI's other spelling
ENDING = ".safetensors"


class LoraFile(NamedTuple):
    """A LoRA on this disk; `name` is its path below the folder, and what a form may ask for."""

    name: str
    path: Path
    bytes: int


def find_loras(roots: tuple[Path, ...] | None = None) -> tuple[LoraFile, ...]:
    """Every LoRA file, sorted by name; of two with the same name the one in the earlier root."""
    found: dict[str, LoraFile] = {}
    for root in model_roots() if roots is None else roots:
        for folder in (root / name for name in FOLDERS):
            for path in sorted(folder.rglob(f"*{ENDING}")):
                name = str(path.relative_to(folder))
                if path.is_file() and not path.name.startswith("."):
                    found.setdefault(name, LoraFile(name, path.absolute(), path.stat().st_size))
    return tuple(sorted(found.values()))
