"""What `turbodiff models list` and `verify` tell: the files that are here, those that are missing, what is in each."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.files import sha256_of
from turbodiff.spec.inventory import FoundFile, Inventory
from turbodiff.spec.models import ModelFile, ModelSpec, all_models, find_model
from turbodiff.weights.detect import Checkpoint, expected_names, open_checkpoint
from turbodiff.weights.download import choose_files, download_bytes, missing_files
from turbodiff.weights.locate import inventory, models_of, need

VAE_TENSORS = 194  # of the Wan2.1 VAE at any width


class Listing(NamedTuple):
    """One model: its files on this disk, and the files that this card would still download."""

    spec: ModelSpec
    found: tuple[FoundFile, ...]
    missing: tuple[ModelFile, ...]
    download_bytes: int

    @property
    def ready(self) -> bool:
        """Whether every component is here, quantised or not."""
        components = {file.component for file in self.spec.files}
        return components <= {file.component for file in self.found}


class Report(NamedTuple):
    """What one checkpoint is. `problems` is empty for a file that loads; `sha256` is "" where not asked for."""

    path: Path
    component: str
    layout: str
    models: tuple[str, ...]
    nbytes: int
    tensors: int
    dtypes: Mapping[str, int]
    numbers: Mapping[str, int]
    quant: bool
    sla: bool
    problems: tuple[str, ...]
    sha256: str = ""


def list_models(found: Inventory | None = None, memory_bytes: int | None = None) -> list[Listing]:
    """Every model of configs/models; `memory_bytes` of the card decides which files it would download."""
    found = inventory() if found is None else found
    return [_listing(spec, found, memory_bytes) for spec in all_models()]


def verify(path: Path | str, *, sha256: bool = False) -> Report:
    """What the file or folder of shards at `path` is, whether it is complete, and which models can use it.

    Raises:
        FileError: damaged or foreign.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    header = checkpoint.header
    models = tuple(
        dict.fromkeys(file.model for file in models_of(path if path.is_file() else _index_of(checkpoint, path)))
    )
    return Report(
        path, checkpoint.component, checkpoint.layout, models, header.nbytes, len(header.tensors),
        Counter(info.dtype for info in header.tensors.values()), checkpoint.numbers, checkpoint.quant, checkpoint.sla,
        _problems(checkpoint, models), " ".join(map(sha256_of, header.files)) if sha256 else "",
    )  # fmt: skip


def verify_model(
    model: str, found: Inventory | None = None, *, sha256: bool = False
) -> tuple[list[Report], FileError | None]:
    """A report per checkpoint of `model` on this disk, and the error that lists what is missing, if anything is."""
    found = inventory() if found is None else found
    spec = find_model(model)
    files = [file for file in found.files if file.model == spec.name and file.component != "tokenizer"]
    reports = [verify(file.path, sha256=sha256) for file in files]
    try:
        need(spec.name, found)
    except FileError as error:
        return reports, error
    return reports, None


def _listing(spec: ModelSpec, found: Inventory, memory_bytes: int | None) -> Listing:
    files = choose_files(spec, memory_bytes=memory_bytes)
    here = tuple(file for file in found.files if file.model == spec.name)
    return Listing(spec, here, tuple(missing_files(files, spec, found)), download_bytes(spec, files, found))


def _index_of(checkpoint: Checkpoint, folder: Path) -> Path:
    """The file of a folder that stands for it: its index of shards, or its one file."""
    return next(iter(sorted(folder.glob("*.index.json"))), checkpoint.header.files[0])


def _problems(checkpoint: Checkpoint, models: tuple[str, ...]) -> tuple[str, ...]:
    problems = []
    missing = sorted(expected_names(checkpoint) - set(checkpoint.sources))
    if missing:
        problems.append(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if checkpoint.component == "vae" and len(checkpoint.sources) != VAE_TENSORS:
        problems.append(f"{len(checkpoint.sources)} tensors, a Wan2.1 VAE has {VAE_TENSORS}")
    if checkpoint.unknown:
        problems.append(f"{len(checkpoint.unknown)} tensors have no place, such as {checkpoint.unknown[0]}")
    if not models:
        problems.append(f"no model of configs/models has these sizes: {dict(checkpoint.numbers)}")
    return tuple(problems)
