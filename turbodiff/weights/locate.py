"""Which weights are on this disk: search roots, the bundled demo, the Hugging Face cache. No torch.

A file is matched to a model by what its header says. Its name and folder are asked only for what no header tells: which
expert of A14B it is, and which resolution it was distilled at.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.inventory import Component, FoundFile, FoundLora, Inventory
from turbodiff.spec.models import ModelFile, ModelSpec, all_models, find_model
from turbodiff.weights.detect import open_checkpoint
from turbodiff.weights.headers import ENDINGS

ROOTS_VARIABLE = "TURBODIFF_MODELS"
MAX_DEPTH = 5  # folders below a root: root/Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer/file
TOKENIZER = "spiece.model"

SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
EXPERT = re.compile(r"(?<![a-z])(high|low)(?![a-z])")
RESOLUTION = re.compile(r"(?<!\d)(480|720)p")


class Seen(NamedTuple):
    """What one checkpoint's header says, as far as the search needs it."""

    component: str
    layout: str
    nbytes: int
    numbers: Mapping[str, int]
    quant: bool
    sla: bool


def bundled_root() -> Path:
    """The folder of the demo weights inside the package."""
    return Path(__file__).resolve().parents[1] / "demo"


def model_roots() -> tuple[Path, ...]:
    """Folders to search, in order: $TURBODIFF_MODELS (several, separated like PATH), then ./checkpoints."""
    named = [Path(part).expanduser() for part in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if part]
    checkout = Path(__file__).resolve().parents[2] / "checkpoints"
    return tuple(dict.fromkeys(path.absolute() for path in (*named, Path("checkpoints"), checkout)))


def download_root() -> Path:
    """Where downloads go: the first search root."""
    return model_roots()[0]


def inventory(roots: Sequence[Path] | None = None) -> Inventory:
    """Every component of every model that was found, best first; unreadable and foreign files are passed over.

    The bundled demo is always searched; the Hugging Face cache only when `roots` is not given.
    """
    paths = [path for root in (bundled_root(), *(model_roots() if roots is None else roots)) for path in _walk(root)]
    if roots is None:
        paths += _cached_downloads()
    paths = list(dict.fromkeys(paths))
    found = [file for spec in all_models() for file in _files_of(spec, paths)]
    from turbodiff.weights.lora_files import find_loras  # which asks this module where to look

    loras = [
        FoundLora(path=str(file.path), bytes=file.bytes) for file in find_loras(None if roots is None else (*roots,))
    ]
    return Inventory(files=tuple(found), loras=tuple(loras))


def models_of(path: Path) -> list[FoundFile]:
    """What this file or folder is to each model that it fits; empty where it fits none."""
    return [file for spec in all_models() if (file := _match(spec, path))]


def need(model: str, found: Inventory, *, quant: bool | None = None, resolution: str = "") -> dict[str, FoundFile]:
    """The best file of each component that `model` needs; `quant` None takes what there is.

    `resolution` ("480p", "720p"): where a network was distilled once per resolution, that one goes first.

    Raises:
        FileError: lists every missing file together, with repo and target folder.
    """
    spec = find_model(model)
    components = dict.fromkeys(file.component for file in spec.files)
    got = {name: _best(found, spec, name, quant if name.startswith("dit") else None, resolution) for name in components}
    missing = [name for name, file in got.items() if file is None]
    if missing:
        _refuse_damaged(spec, missing)
        raise missing_error(spec, missing, quant)
    return {name: file for name, file in got.items() if file is not None}


def _best(found: Inventory, spec: ModelSpec, component: str, quant: bool | None, resolution: str) -> FoundFile | None:
    """The best file; of several that are as good, the one for the resolution."""
    first = found.of(spec.name, component, quant)
    if first is None or not resolution:
        return first
    like = (first.model, first.component, first.quant, first.sla)
    alike = [file for file in found.files if (file.model, file.component, file.quant, file.sla) == like]
    return next((file for file in alike if file.resolution == resolution), first)


def _refuse_damaged(spec: ModelSpec, missing: Sequence[str]) -> None:
    """A published file that is here but does not open is damaged, not missing: say that instead."""
    names = {
        name
        for file in spec.files
        if file.component in missing and file.component != "tokenizer"
        for name in file.names
    }
    for root in (bundled_root(), *model_roots()):
        for path in _walk(root):
            if path.name in names:
                open_checkpoint(path)


def missing_error(spec: ModelSpec, missing: Sequence[str], quant: bool | None = None) -> FileError:
    """The error that names every missing file, where to get it and where to put it."""
    lines = []
    for component in missing:
        files = [file for file in spec.files if file.component == component and quant in (None, file.quant)]
        lines.append(" or ".join(_sources(files)))
    return FileError(
        f"weights of {spec.display_name} are missing",
        code="weights_missing",
        field="model",
        got=f"no {', '.join(missing)}",
        expected=f"{'; '.join(lines)}; all in {download_root()}",
        try_instead=f"turbodiff models pull {spec.name}, or set {ROOTS_VARIABLE} to the folder that has them",
    )


def _sources(files: Sequence[ModelFile]) -> Iterator[str]:
    """Names that would do, those of one repository together."""
    for repo in dict.fromkeys(file.repo for file in files):
        names = " or ".join(file.names[0] for file in files if file.repo == repo)
        yield f"{names} from {repo}" if repo else names


def _walk(root: Path, depth: int = 0) -> Iterator[Path]:
    """Files and indexes of shards below `root`; unreadable and hidden folders are passed over."""
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if depth < MAX_DEPTH:
                yield from _walk(path, depth + 1)
        elif _is_candidate(path.name):
            yield path


def _is_candidate(name: str) -> bool:
    whole = name.endswith(ENDINGS) and not SHARD.search(name)
    return whole or name == TOKENIZER or name.endswith(".index.json")


def _cached_downloads() -> list[Path]:
    """Files of our models in the Hugging Face cache; the library is imported only where the cache has such a repo."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    files = [file for spec in all_models() for file in spec.files if file.repo]
    files = [file for file in files if (cache / f"models--{file.repo.replace('/', '--')}").is_dir()]
    if not files:
        return []
    from huggingface_hub import try_to_load_from_cache  # 0.3 s

    found = [try_to_load_from_cache(file.repo, name, cache) for file in files for name in file.names]
    return [Path(path) for path in found if isinstance(path, str)]


def _files_of(spec: ModelSpec, paths: Iterable[Path]) -> list[FoundFile]:
    found = [file for path in paths if (file := _match(spec, path))]
    return sorted(found, key=lambda file: _rank(spec, file))


def _match(spec: ModelSpec, path: Path) -> FoundFile | None:
    """The file as a component of this model, or None."""
    try:
        stat = path.stat()
    except OSError:
        return None
    if path.name == TOKENIZER:
        fits = _tokenizer_fits(spec, stat.st_size)
        return FoundFile(model=spec.name, component="tokenizer", path=str(path), bytes=stat.st_size) if fits else None
    seen = _look(path, stat.st_size, stat.st_mtime_ns)
    component = _component(spec, seen, path) if seen else None
    if seen is None or component is None:
        return None
    return FoundFile(
        model=spec.name,
        component=component,
        path=str(path),
        bytes=seen.nbytes,
        quant=seen.quant,
        sla=seen.sla,
        resolution=_hint(RESOLUTION, path).replace("480", "480p").replace("720", "720p"),
        layout=seen.layout,
    )


@lru_cache(maxsize=4096)
def _look(path: Path, size: int, mtime_ns: int) -> Seen | None:
    """What the header says; read again when size or time of the file change."""
    try:
        file = open_checkpoint(path)
    except FileError:
        return None
    if file.unknown:
        return None
    return Seen(file.component, file.layout, file.header.nbytes, file.numbers, file.quant, file.sla)


def _component(spec: ModelSpec, seen: Seen, path: Path) -> Component | None:
    if seen.component == "text_encoder":
        return "text_encoder" if _agree(seen.numbers, spec.text_encoder.model_dump()) else None
    if seen.component == "vae":
        return "vae" if _agree(seen.numbers, spec.vae.model_dump()) else None
    facts = spec.dit.model_dump() | {"text_dim": spec.text_encoder.dim, "head_dim": spec.dit.head_dim}
    if not _agree({name: number for name, number in seen.numbers.items() if number}, facts):
        return None
    expert = _expert(path)
    if not spec.two_experts:
        return None if expert else "dit"
    if expert == "high":
        return "dit_high"
    return "dit_low" if expert == "low" else None


def _agree(numbers: Mapping[str, int], facts: Mapping[str, object]) -> bool:
    return all(facts[name] == number for name, number in numbers.items())


def _expert(path: Path) -> str:
    """ "high" or "low" by file name, then folder; diffusers calls the low-noise one transformer_2."""
    if path.parent.name in {"transformer", "transformer_2"} and (path.parent.parent / "transformer_2").is_dir():
        return "high" if path.parent.name == "transformer" else "low"
    return _hint(EXPERT, path)


def _hint(pattern: re.Pattern[str], path: Path) -> str:
    for name in (path.name, path.parent.name, path.parent.parent.name):
        if match := pattern.search(name.lower()):
            return match[1]
    return ""


def _tokenizer_fits(spec: ModelSpec, size: int) -> bool:
    """A SentencePiece model spends 10 to 64 bytes a piece, and up to half a MiB on its character table."""
    return 8 * spec.text_encoder.vocab <= size <= 64 * spec.text_encoder.vocab + (1 << 19)


def _rank(spec: ModelSpec, file: FoundFile) -> tuple[object, ...]:
    """What is in a search root before what is bundled; distilled before plain; by the model's list; fp8 last."""
    listed = [
        place for place, known in enumerate(spec.files)
        if (known.component, known.quant) == (file.component, file.quant) and file.resolution in ("", known.resolution)
    ]  # fmt: skip
    components = list(dict.fromkeys(known.component for known in spec.files))
    return (
        components.index(file.component),
        Path(file.path).is_relative_to(bundled_root()),
        spec.turbo and file.component.startswith("dit") and not file.sla,
        min(listed, default=len(spec.files)),
        file.layout.endswith("fp8"),
    )
