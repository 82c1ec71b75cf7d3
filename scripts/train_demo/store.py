"""Checkpoints that survive a kill, one log line per measurement, and the machine settings all trainers share."""

import json
import time
from pathlib import Path

import torch

from turbodiff.spec.files import atomic_write


def set_up_cpu(threads: int) -> None:
    """Denormals off (they cost 10x and more on CPUs) and a fixed thread count."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


def save(path: Path, state: dict) -> None:
    """Write `state` beside `path`, then rename, so that a kill leaves the old file whole."""
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict | None:
    """What `save` wrote, or None where nothing was written yet."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def log(path: Path, **fields: float | int | str) -> None:
    """Append one JSON line and print it."""
    line = json.dumps({"clock_s": round(time.time()), **fields})
    with path.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)
