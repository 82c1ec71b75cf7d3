"""Downloads of weights beside the queue: one process per model, its words in state/downloads/<model>.log.

The process is `turbodiff models pull MODEL`: it checks the disk, goes on where it stopped, and checks what it got.
It outlives the page; a second start while it runs does nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from turbodiff.archive.disk import free_bytes
from turbodiff.diagnostics import background_tasks
from turbodiff.spec.inventory import Inventory
from turbodiff.spec.models import ModelSpec, find_model
from turbodiff.weights.download import choose_files, endpoint, missing_files
from turbodiff.weights.locate import download_root

PULL = (sys.executable, "-m", "turbodiff.cli", "models", "pull")
FOLDER = "downloads"


class Offer(NamedTuple):
    """What a download would bring: file names with their repositories, bytes in all, where to, and the room there."""

    files: tuple[tuple[str, str, int], ...]  # name, repository, bytes
    nbytes: int
    folder: Path
    free_bytes: int
    endpoint: str


class Download(NamedTuple):
    """A download that was started: whether it still runs, and its last words."""

    running: bool
    words: str


def offer(spec: ModelSpec, memory_bytes: int | None, found: Inventory) -> Offer | None:
    """The files that suit a card of this memory and are not here; None where nothing is missing or published."""
    files = choose_files(spec, memory_bytes=memory_bytes)
    wanted = [file for file in missing_files(files, spec, found) if file.repo]
    if not wanted:
        return None
    folder = download_root().absolute()
    listed = tuple((file.names[0], file.repo, file.bytes) for file in wanted)
    return Offer(listed, sum(file.bytes for file in wanted), folder, free_bytes(folder) or 0, endpoint())


def start(state: Path, model: str, argv: Sequence[str] = PULL) -> None:
    """Start the download of a model, unless it runs already.

    Raises:
        RequestError: no such model.
    """
    name = find_model(model).name
    background_tasks.start(state / FOLDER, name, (*argv, name))


def download(state: Path, model: str) -> Download:
    """How the download of a model is doing."""
    found = background_tasks.errand(state / FOLDER, model)
    return Download(found.running, found.lines[-1] if found.lines else "")
