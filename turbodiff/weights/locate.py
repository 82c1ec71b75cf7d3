"""Which weights are on this disk: search roots, the bundled demo, the Hugging Face cache, folders of LoRAs. No torch.

A file is matched to a model by what its header says. Its name and folder are asked only for what no header tells: which
expert of A14B it is, and which resolution it was distilled at.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.experts import Expert
from turbodiff.spec.files import sha256_of
from turbodiff.spec.models import Component, FoundFile, FoundLora, Inventory, ModelSpec, all_models, find_model
from turbodiff.weights.detect import ENDINGS, expected_names, open_checkpoint

ROOTS_VARIABLE = "TURBODIFF_MODELS"
MAX_DEPTH = 5  # folders below a root: root/Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer/file
TOKENIZER = "spiece.model"
LORA_FOLDERS = ("loras", "lora")  # below each search root: ours, and ComfyUI's other spelling
VAE_TENSORS = 194  # of the Wan2.1 VAE at any width

SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
EXPERT = re.compile(r"(?<![a-z])(high|low)(?![a-z])")
RESOLUTION = re.compile(r"(?<!\d)(480|720)p")


class HeaderSummary(NamedTuple):
    """What one checkpoint's header says, as far as the search needs it."""

    component: str
    layout: str
    nbytes: int
    numbers: Mapping[str, int]
    quant: bool
    sla: bool


class LoraFile(NamedTuple):
    """A LoRA on this disk; `name` is its path below the folder, and what a form may ask for."""

    name: str
    path: Path
    bytes: int


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
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    published = [file for spec in all_models() for file in spec.files if file.repo and roots is None]
    published = [file for file in published if (cache / f"models--{file.repo.replace('/', '--')}").is_dir()]
    if published:  # else the library is not imported
        from huggingface_hub import try_to_load_from_cache  # 0.3 s

        cached = [try_to_load_from_cache(file.repo, name, cache) for file in published for name in file.names]
        paths += [Path(path) for path in cached if isinstance(path, str)]
    paths = list(dict.fromkeys(paths))
    files: list[FoundFile] = []
    for spec in all_models():
        found = [file for path in paths if (file := _match(spec, path))]
        files += sorted(found, key=partial(_rank, spec))
    loras = find_loras(None if roots is None else (*roots,))
    return Inventory(
        files=tuple(files), loras=tuple(FoundLora(path=str(file.path), bytes=file.bytes) for file in loras)
    )


def find_loras(roots: tuple[Path, ...] | None = None) -> tuple[LoraFile, ...]:
    """Every LoRA file in the search roots, sorted by name; of two with the same name the one in the earlier root.

    Whether one suits a model is said by weights/lora.py when it is read.
    """
    found: dict[str, LoraFile] = {}
    for root in model_roots() if roots is None else roots:
        for folder in (root / name for name in LORA_FOLDERS):
            for path in sorted(folder.rglob("*.safetensors")):
                name = str(path.relative_to(folder))
                if path.is_file() and not path.name.startswith("."):
                    found.setdefault(name, LoraFile(name, path.absolute(), path.stat().st_size))
    return tuple(sorted(found.values()))


def resolve_files(
    model: str, found: Inventory, *, quant: bool | None = None, resolution: str = ""
) -> dict[str, FoundFile]:
    """The best file of each component that `model` needs; `quant` None takes what there is.

    `resolution` ("480p", "720p"): where a network was distilled once per resolution, that one goes first.

    Raises:
        FileError: lists every missing file together, with repo and target folder; or a published file is damaged.
    """
    spec = find_model(model)
    resolved: dict[str, FoundFile] = {}
    missing = []
    for component in dict.fromkeys(file.component for file in spec.files):
        best = found.of(spec.name, component, quant if component.startswith("dit") else None)
        if best is None:
            missing.append(component)
            continue
        like = (best.model, best.component, best.quant, best.sla)
        alike = [file for file in found.files if (file.model, file.component, file.quant, file.sla) == like]
        resolved[component] = next((file for file in alike if resolution and file.resolution == resolution), best)
    if not missing:
        return resolved
    lacking = [file for file in spec.files if file.component in missing]
    names = {name for file in lacking if file.component != "tokenizer" for name in file.names}
    for path in (path for root in (bundled_root(), *model_roots()) for path in _walk(root)):
        if path.name in names:
            open_checkpoint(path)  # a published file that does not open is damaged, not missing: this says so
    lines = []
    for component in missing:
        files = [file for file in lacking if file.component == component and quant in (None, file.quant)]
        listed = {repo: [file.names[0] for file in files if file.repo == repo] for repo in (f.repo for f in files)}
        choices = (" or ".join(names) + (f" from {repo}" if repo else "") for repo, names in listed.items())
        lines.append(" or ".join(choices))
    raise FileError(
        f"weights of {spec.display_name} are missing", code="weights_missing", field="model",
        got=f"no {', '.join(missing)}", expected=f"{'; '.join(lines)}; all in {download_root()}",
        try_instead=f"turbodiff models pull {spec.name}, or set {ROOTS_VARIABLE} to the folder that has them",
    )  # fmt: skip


def verify(path: Path | str, *, sha256: bool = False) -> Report:
    """What the file or folder of shards at `path` is, whether it is complete, and which models can use it.

    Raises:
        FileError: damaged or foreign.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    header, sources, unknown = checkpoint.header, checkpoint.sources, checkpoint.unknown
    # a folder is matched by the file that stands for it: its index of shards, or its one file
    place = path if path.is_file() else next(iter(sorted(path.glob("*.index.json"))), header.files[0])
    models = tuple(dict.fromkeys(spec.name for spec in all_models() if _match(spec, place)))
    problems = []
    missing = sorted(expected_names(checkpoint) - set(sources))
    if missing:
        problems.append(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if checkpoint.component == "vae" and len(sources) != VAE_TENSORS:
        problems.append(f"{len(sources)} tensors, a Wan2.1 VAE has {VAE_TENSORS}")
    if unknown:
        problems.append(f"{len(unknown)} tensors have no place, such as {unknown[0]}")
    if not models:
        problems.append(f"no model of configs/models has these sizes: {dict(checkpoint.numbers)}")
    return Report(
        path, checkpoint.component, checkpoint.layout, models, header.nbytes, len(header.tensors),
        Counter(info.dtype for info in header.tensors.values()), checkpoint.numbers, checkpoint.quant, checkpoint.sla,
        tuple(problems), " ".join(map(sha256_of, header.files)) if sha256 else "",
    )  # fmt: skip


def _walk(root: Path, depth: int = 0) -> Iterator[Path]:
    """Weights, tokenizers and indexes of shards below `root`; unreadable and hidden folders are passed over."""
    try:
        entries = sorted(root.iterdir())
    except OSError:
        return
    for path in entries:
        name = path.name
        if name.startswith("."):
            continue
        if path.is_dir():
            if depth < MAX_DEPTH:
                yield from _walk(path, depth + 1)
        elif (name.endswith(ENDINGS) and not SHARD.search(name)) or name == TOKENIZER or name.endswith(".index.json"):
            yield path


def _match(spec: ModelSpec, path: Path) -> FoundFile | None:
    """The file as a component of this model, or None."""
    try:
        stat = path.stat()
    except OSError:
        return None
    if path.name == TOKENIZER:
        # a SentencePiece model spends 10 to 64 bytes a piece, and up to half a MiB on its character table
        vocab = spec.text_encoder.vocab
        fits = 8 * vocab <= stat.st_size <= 64 * vocab + (1 << 19)
        return FoundFile(model=spec.name, component="tokenizer", path=str(path), bytes=stat.st_size) if fits else None
    header = _summary(path, stat.st_size, stat.st_mtime_ns)
    component = _component(spec, header, path) if header else None
    if header is None or component is None:
        return None
    resolution = _hint(RESOLUTION, path)
    return FoundFile(
        model=spec.name, component=component, path=str(path), bytes=header.nbytes, quant=header.quant, sla=header.sla,
        resolution=f"{resolution}p" if resolution else "", layout=header.layout,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _summary(path: Path, _size: int, _mtime_ns: int) -> HeaderSummary | None:
    """What the header says; read again when size or time of the file change. None where a network cannot use it."""
    try:
        file = open_checkpoint(path)
    except FileError:
        return None
    if file.unknown:
        return None
    return HeaderSummary(file.component, file.layout, file.header.nbytes, file.numbers, file.quant, file.sla)


def _component(spec: ModelSpec, header: HeaderSummary, path: Path) -> Component | None:
    """Which component of the model has these sizes; an expert is told by file name, then folder."""
    dit = spec.dit.model_dump() | {"text_dim": spec.text_encoder.dim, "head_dim": spec.dit.head_dim}
    facts = {"dit": dit, "vae": spec.vae.model_dump(), "text_encoder": spec.text_encoder.model_dump()}[header.component]
    told = {name: number for name, number in header.numbers.items() if (name, number) != ("head_dim", 0)}
    if any(facts[name] != number for name, number in told.items()):
        return None
    if header.component != "dit":
        return "vae" if header.component == "vae" else "text_encoder"
    expert = _hint(EXPERT, path)
    if path.parent.name in {"transformer", "transformer_2"} and (path.parent.parent / "transformer_2").is_dir():
        expert = "high" if path.parent.name == "transformer" else "low"  # diffusers' names
    if not spec.two_experts:
        return None if expert else "dit"
    return Expert(expert).component if expert else None


def _hint(pattern: re.Pattern[str], path: Path) -> str:
    for name in (path.name, path.parent.name, path.parent.parent.name):
        if match := pattern.search(name.lower()):
            return match[1]
    return ""


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
