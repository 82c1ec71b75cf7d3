"""Which fused kernels run here, as the last self-check on such a card said, without torch.

turbodiff_kernels/backend.py keeps its verdicts in the state folder, per card, driver, torch, Triton and version
of its files. All but the driver's CUDA version are known here too; of several, the one written last counts.
"""

import hashlib
import importlib.util
import json
import os
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from turbodiff.plan.hardware import ALL_REFERENCE, Kernels
from turbodiff.spec.files import open_file, state_folder

FILE = "kernels.json"  # as turbodiff_kernels/backend.py names it


def kernels_of(name: str | None, capability: tuple[int, int] | None) -> Kernels:
    """The verdicts for cards of a name and capability; what was not checked yet is None."""
    wish = os.environ.get("TURBODIFF_KERNELS", "auto")
    if wish == "triton":
        names = set(Kernels.model_fields) - {"wish"}
        return Kernels.model_validate(dict.fromkeys(names, True) | {"wish": wish})
    if wish == "reference":
        return ALL_REFERENCE.model_copy(update={"wish": wish})
    if importlib.util.find_spec("triton") is None:
        return ALL_REFERENCE
    try:
        with open_file(state_folder() / FILE) as file:
            stored = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return Kernels()
    if name is None or capability is None or not isinstance(stored, dict):
        return Kernels()
    torch, triton, digest = map(re.escape, _versions())
    # as backend.py words a machine: "NVIDIA H200 sm_90 driver 13000 torch 2.13.0+cu130 triton 3.5.0 1a2b3c4d"
    card = f"{re.escape(name)} sm_{capability[0]}{capability[1]}"
    here = re.compile(rf"{card} driver \S+ torch {torch}(\+\S+)? triton {triton} {digest}")
    found = [verdicts for machine, verdicts in stored.items() if here.fullmatch(machine)]
    if not found or not isinstance(found[-1], dict):
        return Kernels()
    known = set(Kernels.model_fields) - {"wish"}
    return Kernels.model_validate({name: text == "" for name, text in found[-1].items() if name in known})


@cache
def _versions() -> tuple[str, str, str]:
    """Release of torch, version of Triton, digest of the kernels' files as turbodiff_kernels/backend.py makes it."""
    spec = importlib.util.find_spec("turbodiff_kernels")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")) if spec is not None else ():
        digest.update(path.read_bytes())
    versions = []
    for package in ("torch", "triton"):
        try:
            versions.append(metadata.version(package).partition("+")[0])
        except metadata.PackageNotFoundError:
            versions.append("")
    return versions[0], versions[1], digest.hexdigest()[:8]
