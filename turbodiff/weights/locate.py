"""Which weights are on this disk: search roots, the bundled demo, the Hugging Face cache, folders of LoRAs. No torch.

A file is matched to a model by what its header says, and only if it fills the model's network (weights/fit.py): what is
listed loads. Its name and folder are asked only for what no header tells: which expert of A14B it is
(weights/experts.py), and which resolution it was distilled at. Any other file of a search root is passed over with the
reason; no file can stop the search.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from turbodiff.prompt.tokens import Tokenizer
from turbodiff.spec.errors import FileError
from turbodiff.spec.experts import Expert
from turbodiff.spec.files import sha256_of
from turbodiff.spec.models import (
    Component,
    FoundFile,
    FoundLora,
    Inventory,
    ModelSpec,
    PassedOver,
    all_models,
    find_model,
)
from turbodiff.spec.request import Lora
from turbodiff.weights import experts
from turbodiff.weights.copies import room_bytes
from turbodiff.weights.detect import INDEX, expected_names, open_checkpoint
from turbodiff.weights.folders import (
    ROOTS_VARIABLE,
    TOKENIZER,
    Entry,
    cache_snapshots,
    find_networks,
    lora_files,
    model_roots,
    not_searched,
    walk,
)
from turbodiff.weights.forms import TOKENIZER_TENSOR
from turbodiff.weights.headers import bad_file
from turbodiff.weights.look import Looked, look
from turbodiff.weights.lora_fit import check_loras, fitted_lora, found_lora

VAE_TENSORS = 194  # of the Wan2.1 VAE at any width
RESOLUTION = re.compile(r"(?<!\d)(480|720)p")
FORMS = (TOKENIZER_TENSOR, "int8", "fp8", "gguf")  # of layouts: what is left out of a weight, worst last
SHOWN_REASONS = 3


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


@cache
def bundled_root() -> Path:
    """The folder of the demo weights inside the package."""
    return Path(__file__).resolve().parents[1] / "demo"


def download_root() -> Path:
    """Where downloads go: the first search root."""
    return model_roots()[0]


def inventory(roots: Sequence[Path] | None = None) -> Inventory:
    """Every component of every model that was found, best first; what no model uses with the reason.

    The bundled demo is always searched; the Hugging Face cache only when `roots` is not given, and of what no model
    uses there only what lacks a package is told.
    """
    searched = model_roots() if roots is None else roots
    entries = {entry.path: entry for root in (bundled_root(), *searched) for entry in walk(root)}
    cached = [entry for snapshot in (cache_snapshots() if roots is None else ()) for entry in walk(snapshot)]
    found: list[FoundFile] = []
    passed_over: dict[str, PassedOver] = {}
    for entry in (*entries.values(), *(entry for entry in cached if entry.path not in entries)):
        files, error, looked = _match(entry)
        found += files
        if error is not None and (entry.path in entries or looked.models):
            passed_over[str(entry.path)] = PassedOver(
                path=str(entry.path), code=error.code, what=error.what, got=error.got, expected=error.expected,
                component=looked.component if looked.models else "", models=looked.models,
            )  # fmt: skip
    beside = {str(Path(path).parent) for path in passed_over}
    for index in {file.path for file in found if INDEX.search(file.path) and str(Path(file.path).parent) in beside}:
        with contextlib.suppress(FileError):  # a part of it, whatever that is called
            for part in open_checkpoint(index).header.files:
                passed_over.pop(str(part), None)
    files = []
    for spec in all_models():
        files += _sorted(spec, [file for file in found if file.model == spec.name])
    loras = find_loras(None if roots is None else (*roots,))
    return Inventory(
        files=tuple(files),
        loras=tuple([found_lora(file.path, file.bytes) for file in loras]),
        networks=find_networks(roots),
        passed_over=tuple(passed_over.values()),
        copies_room_bytes=room_bytes(download_root()) if roots is None else None,
    )


def with_loras(found: Inventory, loras: Iterable[Lora]) -> Inventory:
    """The inventory with the LoRAs of a request, wherever on this disk, and what each model's networks take of them."""
    told, configs = dict[str, FoundLora](), os.environ.get("TURBODIFF_CONFIGS", "")
    for path in dict.fromkeys([lora.path for lora in loras]):
        with contextlib.suppress(OSError):
            stat = Path(path).stat()
            if S_ISREG(stat.st_mode):
                told[path] = fitted_lora(path, stat.st_size, stat.st_mtime_ns, configs)
    others = [lora for lora in found.loras if lora.path not in told]
    return found.model_copy(update={"loras": (*others, *told.values())}) if told else found


def find_loras(roots: tuple[Path, ...] | None = None) -> tuple[LoraFile, ...]:
    """Every LoRA file in the search roots, sorted by name; of two with the same name the one in the earlier root.

    Whether one suits a model is said by weights/lora.py when it is read.
    """
    found: dict[str, LoraFile] = {}
    for root in model_roots() if roots is None else roots:
        for name, path in lora_files(root):
            try:
                stat = path.stat()
            except OSError:
                continue
            if S_ISREG(stat.st_mode):
                found.setdefault(name, LoraFile(name, path.absolute(), stat.st_size))
    return tuple(sorted(found.values()))


def resolve_files(model: str, found: Inventory, loras: Iterable[Lora] = ()) -> dict[str, FoundFile]:
    """The best file of each component that `model` needs; which of several networks runs is said by a plan
    (plan/schedule.py `network_file`).

    Raises:
        FileError: lists every missing file together, with repo and target folder; a published file is damaged; or one
            of `loras` cannot be used.
    """
    spec = find_model(model)
    check_loras(spec, loras, found)
    resolved: dict[str, FoundFile] = {}
    missing = []
    for component in dict.fromkeys(file.component for file in spec.files):
        best = found.of(spec.name, component)
        if best is None:
            missing.append(component)
        else:
            resolved[component] = best
    if not missing:
        return resolved
    lacking = [file for file in spec.files if file.component in missing]
    names = {Path(name).name for file in lacking if file.component != "tokenizer" for name in file.names}
    passed_over = sorted(found.passed_over, key=lambda one: spec.name not in one.models)
    for one in passed_over:
        would_do = spec.name in one.models and any(component.startswith(one.component) for component in missing)
        if would_do or Path(one.path).name in names:  # a published file that does not open is not missing
            raise FileError(
                one.what, code=one.code, field=one.path, got=one.got, expected=one.expected,
                try_instead=one.expected if would_do else "",
            )  # fmt: skip
    lines = []
    for component in missing:
        files = [file for file in lacking if file.component == component]
        listed = {repo: [file.names[0] for file in files if file.repo == repo] for repo in (f.repo for f in files)}
        choices = (" | ".join(names) + (f" ({repo})" if repo else "") for repo, names in listed.items())
        lines.append(" | ".join(choices))  # in no language: lists show them in any
    # what was passed over may be what the person thinks is there
    told = [(Path(one.path).name, one) for one in passed_over if not one.models]  # those of others fit those
    reasons = [f"{name}: {one.got if one.got not in ('', name) else one.what}"[:160] for name, one in told]
    more = f" and {len(reasons) - SHOWN_REASONS} more" if len(reasons) > SHOWN_REASONS else ""
    also = f"; passed over: {', '.join(reasons[:SHOWN_REASONS])}{more}" if reasons else ""
    raise FileError(
        f"weights of {spec.display_name} are missing", code="weights_missing", field="model",
        got=f"no files for {', '.join(missing)}{also}",
        expected=f"{'; '.join(lines)}; -> {download_root()}",
        try_instead=f"turbodiff models pull {spec.name}, or set {ROOTS_VARIABLE} to the folder that has them",
    )  # fmt: skip


def open_tokenizer(file: FoundFile) -> Tokenizer:
    """The tokenizer of a file: a SentencePiece model, or ComfyUI's UMT5, which has one inside.

    Raises:
        FileError: not a SentencePiece model, or no longer there.
    """
    path = Path(file.path)
    if file.layout != TOKENIZER_TENSOR:
        return Tokenizer(path)
    info = open_checkpoint(path).header.tensors[TOKENIZER_TENSOR]
    with info.file.open("rb") as opened:
        opened.seek(info.offset)
        return Tokenizer(path, opened.read(info.nbytes))


def verify(path: Path | str, *, sha256: bool = False) -> Report:
    """What the file or folder of shards at `path` is, whether it is complete, and which models can use it.

    Raises:
        FileError: damaged or foreign.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    header, sources, unknown = checkpoint.header, checkpoint.sources, checkpoint.unknown
    # a folder is matched by the file that stands for it: its index of shards, or its one file
    place = (
        path
        if path.is_file()
        else next((file for file in sorted(path.iterdir()) if INDEX.search(file.name)), header.files[0])
    )
    files, error, _ = _match(Entry(place))
    models = tuple(dict.fromkeys(file.model for file in files))
    problems = []
    missing = sorted(expected_names(checkpoint) - set(sources))
    if missing:
        problems.append(f"{len(missing)} tensors are missing, such as {missing[0]}")
    if checkpoint.component == "vae" and len(sources) != VAE_TENSORS:
        problems.append(f"{len(sources)} tensors, a Wan2.1 VAE has {VAE_TENSORS}")
    if unknown:
        problems.append(f"{len(unknown)} tensors have no place, such as {unknown[0]}")
    if not models:
        none = f"no model of configs/models has these sizes: {dict(checkpoint.numbers)}"
        problems.append(none if error is None or error.code == "no_model" or problems else str(error))
    return Report(
        path, checkpoint.component, checkpoint.layout, models, header.nbytes, len(header.tensors),
        Counter(info.dtype for info in header.tensors.values()), checkpoint.numbers, checkpoint.quant, checkpoint.sla,
        tuple(problems), " ".join(map(sha256_of, header.files)) if sha256 else "",
    )  # fmt: skip


def _match(entry: Entry) -> tuple[list[FoundFile], FileError | None, Looked]:
    """The file as a component of each model that it fits, or why there is none; and what looking at it gave, which
    names models where only a package or a person's word is missing. Never raises."""
    looked = Looked()
    path = entry.path
    if entry.why:
        return [], not_searched(entry), looked
    try:
        stat = path.stat()
        if path.name == TOKENIZER:
            return *_tokenizers(path, stat.st_size), looked
        looked = look(path, stat.st_size, stat.st_mtime_ns, os.environ.get("TURBODIFF_CONFIGS", ""))
        if looked.error:
            return [], looked.error, looked
        inside = _tokenizers(path, looked.tokenizer_bytes)[0] if looked.tokenizer_bytes else []
        return _files_of(path, looked) + inside, None, looked
    except FileError as error:
        pairs = [spec.name for spec in all_models() if spec.two_experts and spec.name in looked.models]
        return [], error, looked._replace(models=tuple(pairs))
    except OSError as error:
        return [], bad_file(path, "the file cannot be read", code="file_unreadable", got=error.strerror), Looked()


def _tokenizers(path: Path, size: int) -> tuple[list[FoundFile], FileError | None]:
    """A SentencePiece model spends 10 to 64 bytes a piece, and up to half a MiB on its character table."""
    fits = [spec for spec in all_models() if 8 * (n := spec.text_encoder.vocab) <= size <= 64 * n + (1 << 19)]
    layout = "" if path.name == TOKENIZER else TOKENIZER_TENSOR
    found = [
        FoundFile(model=spec.name, component="tokenizer", path=str(path), bytes=size, layout=layout) for spec in fits
    ]
    got = f"{size} bytes"
    return found, None if fits else bad_file(path, "the tokenizer of another model", code="file_foreign", got=got)


def _files_of(path: Path, looked: Looked) -> list[FoundFile]:
    """The file for each model that it fills; an expert is told by weights/experts.py.

    Raises:
        FileError: it is one of two experts and nothing tells which.
    """
    specs = [spec for spec in all_models() if spec.name in looked.models]
    components: dict[str, Component] = {}
    if looked.component != "dit":
        components = {spec.name: looked.component for spec in specs}
    else:
        alone, twins = [spec for spec in specs if not spec.two_experts], [spec for spec in specs if spec.two_experts]
        side, is_twin = experts.expert_of(path, looked.metadata, alone=bool(alone)) if twins else ("", False)
        if side in ("high", "low"):
            components = {spec.name: Expert(side).component for spec in twins}
        elif not is_twin or side == "single":
            components = {spec.name: "dit" for spec in alone}
    if not components:
        if side == "single" and (refused := _not_to_be_told(path, looked, side)):
            raise refused
        tell = f"turbodiff models tell {path} --expert high (or low)"
        raise FileError(
            "which expert this is cannot be told", code="expert_unknown", field=str(path), got=path.name,
            expected=tell, try_instead=tell,
        )  # fmt: skip
    names = (folder.name.lower() for folder in (path, path.parent, path.parent.parent))
    resolution = next((match[0] for name in names if (match := RESOLUTION.search(name))), "")
    return [
        FoundFile(
            model=model, component=component, path=str(path), bytes=looked.nbytes, quant=looked.quant, sla=looked.sla,
            converted=looked.converted, resolution=resolution, layout=looked.layout,
            training=looked.training if looked.component == "dit" else None,
        )
        for model, component in components.items()
    ]  # fmt: skip


def tell_expert(path: Path, side: experts.Side) -> Path:
    """Write beside a checkpoint or LoRA which expert a person says it is; returns the file written.

    Raises:
        FileError: it cannot be read or written; no weights of a model here; or its sizes say otherwise.
    """
    if path.is_file():  # what else there may be is told by experts.tell
        stat = path.stat()
        looked = look(path, stat.st_size, stat.st_mtime_ns, os.environ.get("TURBODIFF_CONFIGS", ""))
        is_lora = looked.error is not None and str(looked.error.got).startswith("a LoRA")
        if not is_lora and (refused := _not_to_be_told(path, looked, side)):
            raise refused
    return experts.tell(path, side)


def _not_to_be_told(path: Path, looked: Looked, side: experts.Side) -> FileError | None:
    """Why a file cannot be what a person says it is; None where it can."""
    if not looked.models:
        return looked.error
    specs = [spec for spec in all_models() if spec.name in looked.models]
    if looked.component == "dit" and any(spec.two_experts is (side != "single") for spec in specs):
        return None
    got = ", ".join(spec.display_name for spec in specs)
    if looked.component == "dit" and side == "single":
        tell = f"turbodiff models tell {path} --expert high (or low)"
        return FileError(
            "no model with one network has these sizes", code="expert_of_two", field=str(path), got=got,
            expected=tell, try_instead=tell,
        )  # fmt: skip
    return FileError(
        "not one of two experts", code="expert_of_none", field=str(path), got=f"{looked.component}: {got}",
        expected="a network of a model with two experts",
    )  # fmt: skip


def _sorted(spec: ModelSpec, files: Sequence[FoundFile]) -> list[FoundFile]:
    """A model's files, best first. Two experts are never taken from two distillations where one has both: of those
    that have, the one whose worse file is best."""
    ranked = sorted(files, key=partial(_rank, spec))
    if not spec.two_experts:
        return ranked
    best: list[dict[object, tuple[object, ...]]] = []  # per expert: training -> rank of its best file
    for expert in spec.experts:
        own = [file for file in ranked if file.component == expert.component]
        best.append({_kind(file): _rank(spec, file)[1:] for file in reversed(own)})
    pairs = {kind: max(ranks[kind] for ranks in best) for kind in best[0] if kind in best[1]}
    chosen = min(pairs, key=lambda kind: pairs[kind], default=None)
    return sorted(ranked, key=lambda f: f.component.startswith("dit") and bool(pairs) and _kind(f) != chosen)


def _kind(file: FoundFile) -> object:
    return file.training and file.training.trained_for


def _rank(spec: ModelSpec, file: FoundFile) -> tuple[object, ...]:
    """What is in a search root before what is bundled; distilled before plain; by the model's list; fp8 last."""
    listed = [
        place for place, known in enumerate(spec.files)
        if (known.component, known.quant) == (file.component, file.quant) and file.resolution in ("", known.resolution)
    ]  # fmt: skip
    components = [*dict.fromkeys(known.component for known in spec.files), "preview_vae"]
    return (
        components.index(file.component),
        Path(file.path).is_relative_to(bundled_root()),
        spec.turbo and file.component.startswith("dit") and not file.sla,
        _kind(file) == "base",
        min(listed, default=len(spec.files)),
        max((place + 1 for place, form in enumerate(FORMS) if form in file.layout), default=0),
        -file.bytes if file.layout.endswith("gguf") else 0,  # the finer one
    )
