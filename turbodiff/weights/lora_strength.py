"""How strong a LoRA was trained to be: its alpha, where the file's tensors do not hold it. No torch.

A layer's tensor `.alpha` comes first. For layers without one, every config that lies in the file or beside it is read,
told by what it holds and not by its name: a value of the metadata that is JSON with PEFT's keys, at any depth
(`lora_adapter_metadata` of diffusers, `lora_config` of finetrainers, `peft_config`, `adapter_config`), keys flat in the
metadata (SimpleTuner, `transformer.lora_alpha`: ComfyUI pull request 15830; kohya's `ss_network_alpha`, LightX2V's
`alpha`: sglang pull request 36082), and PEFT's adapter_config.json beside the file. Those that disagree, or whose rank
is not that of the tensors, are refused. A file without any means alpha = rank. A tensor `.alpha` is divided by the rank
whatever `use_rslora` says: LyCORIS, which writes both, has put the square root into it.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.weights.lora_names import FOREIGN, MAX_NAME_CHARS

BESIDE, PEFT_FILE, EMBEDDED = "adapter_config.json", "adapter_model", "lora_adapter_metadata"
WEIGHTS = (".safetensors", ".sft", ".pt", ".pth", ".bin")
# JSON that holds keys of any name: kohya's tags and ComfyUI's graphs
NO_CONFIG = re.compile(r"ss_.*|workflow|prompt")
PEFT = ("lora_alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern", "init_lora_weights", "use_dora")
# Of PEFT's LoraConfig: rules of their own for the layers or the weights below; none of them is computed
OTHER = ("kasa_config", "arrow_config", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication")
LEAVES = {
    **{name: name for name in PEFT}, **dict.fromkeys(OTHER, "other"),
    "network_alpha": "lora_alpha", "alpha": "lora_alpha", "rank": "r", "lora_rank": "r", "lora_r": "r",
    "network_dim": "r", "ss_network_alpha": "lora_alpha", "ss_network_dim": "r",
    "rslora": "use_rslora", "rs_lora": "use_rslora",
}  # fmt: skip
CONFIG = re.compile(r'"(?:[^"]{0,80}\.)?(?:' + "|".join(LEAVES) + ')"')
MAX_CONFIG_BYTES, MAX_PATTERNS, MAX_DEPTH, MAX_OBJECTS = 4 << 20, 2048, 5, 1000
MAX_EXPRESSIONS = 16
MAX_LAYER_CHARS, MAX_PREFIX_WORDS = 100, 8  # of a name that expressions are tried on
LITERAL = re.compile(r"[\w.-]+")
# An expression that cannot take long: no groups, at most one `.*` and two runs of digits
SIMPLE = re.compile(r"(?!(?:.*\.\*){2})\^?(?:[\w-]|\\?\.)*(?:(?:\.\*|\\d\+|\[0-9\]\+)(?:[\w-]|\\?\.)*){0,3}\$?")
NO, YES = ("", "none", "null", "false", "0", "{}", "[]"), ("true", "1")
# Ways to begin a training that leave the weights below as they are (PEFT's LoraConfig, DiffSynth-Studio). The others
# put what they begin with into those (pissa, olora, corda, loftq, lora_ga), or are not known: then the file alone is
# not the change. PEFT writes `true` into an adapter that was converted back (peft_model.py, save_pretrained).
BEGINNINGS = re.compile(r"true|default|gaussian|normal|kaiming\w*|xavier\w*|zeros?|eva|orthogonal|mica")


@dataclass(frozen=True)
class Strength:
    """alpha, and how it scales a change of some rank; `rank` is the trained one where the tensors do not tell."""

    alpha: float | None = None
    rank: float | None = None
    rslora: bool = False
    alphas: Mapping[str, float | None] = field(default_factory=dict)  # PEFT's alpha_pattern and rank_pattern
    ranks: Mapping[str, float | None] = field(default_factory=dict)

    def scale(self, layer: str, rank: int | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732); `layer` as the file calls it.

        rank None: the tensors do not tell, as in a LoKr of two whole factors.
        """
        alpha = _by_pattern(self.alphas, layer, self.alpha)
        trained = rank if rank is not None else _by_pattern(self.ranks, layer, self.rank)
        if alpha is None or not trained:
            return 1.0
        return alpha / (math.sqrt(trained) if self.rslora else trained)


class Told(NamedTuple):
    """What the configs tell by component ("transformer", "transformer_2", or "" for all of them).

    `shared`: the config that is used and lies beside several files, so that it may be another's; "" for none.
    """

    strengths: Mapping[str, Strength]
    shared: str = ""

    def of(self, layer: str) -> Strength:
        """That of a layer, as the file calls it."""
        mine = next((self.strengths[word] for word in layer.split(".") if word in self.strengths), None)
        only = next(iter(self.strengths.values())) if len(self.strengths) == 1 else Strength()
        return mine or self.strengths.get("", only)

    def another_rank(self, ranks: Mapping[str, int | None]) -> str:
        """The first layer whose rank is not the trained one, in words; "" for none."""
        for layer, rank in ranks.items():
            mine = self.of(layer)
            trained = _by_pattern(mine.ranks, layer, mine.rank)
            if rank is not None and trained not in (None, rank):
                return f"r {trained:g}, but {layer} has {rank}"
        return ""


class Entry(NamedTuple):
    """One thing that a config tells."""

    component: str
    leaf: str  # PEFT's name, see LEAVES
    where: str  # for people
    value: object


def strengths(
    path: Path, metadata: Mapping[str, str], stored: Collection[str], ranks: Mapping[str, int | None]
) -> Told:
    """What the metadata and a config beside the file say of the layers whose alpha is no tensor.

    Args:
        stored: names of the tensors; only with PEFT's is an adapter_config.json beside them theirs.
        ranks: of those layers, by the name that the file calls them; None where the tensors do not tell.

    Raises:
        FileError: a number that is none, a config that is damaged, two that disagree or one of another rank, a way of
            training that needs other weights below.
    """
    words = {word for name in stored for word in name[:MAX_NAME_CHARS].split(".")}
    inside = list(_entries("metadata", metadata, words))
    for key, text in metadata.items():
        is_config = text.lstrip()[:1] == "{" and not NO_CONFIG.fullmatch(key) and CONFIG.search(text[:MAX_CONFIG_BYTES])
        if is_config or key == EMBEDDED:
            inside += _entries(key, _object(path, text, key), words)
    folder, beside, alone = path if path.is_dir() else path.parent, list[Entry](), True
    if any(part in name for name in stored for part in (".lora_A", ".hada_w", ".lokr_w")):
        try:
            config = folder / BESIDE
            if config.is_file() and config.stat().st_size <= MAX_CONFIG_BYTES:
                beside = list(_entries(BESIDE, _object(path, config.read_bytes(), BESIDE), words))
                files = (other for other in folder.iterdir() if other.suffix.lower() in WEIGHTS and other != path)
                alone = folder == path or path.stem == PEFT_FILE or next(files, None) is None
        except OSError as error:
            raise _unreadable(path, BESIDE, error.strerror or "not readable") from None
    if not alone and (not ranks or Told(_agreed(path, beside)).another_rank(ranks)):
        beside, alone = [], True  # it is another's
    for entry in (*inside, *beside):
        text = str(entry.value).strip().lower()
        if text in NO or (entry.leaf == "init_lora_weights" and BEGINNINGS.fullmatch(text)):
            continue
        if entry.leaf in ("init_lora_weights", "other"):
            raise FileError(
                "a LoRA that needs other weights below it", code="lora_algorithm", field=f"lora {path}",
                got=f"{path.name}: {entry.where} {text[:40]}", expected="LoRA, DoRA, LoHa or LoKr",
                try_instead="the adapter converted to plain LoRA",
            )  # fmt: skip
        if entry.leaf == "use_dora" and text in YES and not any("magnitude" in x or "dora_scale" in x for x in stored):
            raise _unreadable(path, entry.where, "but no lengths of DoRA in the file")
    told = Told(_agreed(path, (*inside, *beside)) if ranks else {}, "" if alone else BESIDE)
    if wrong := told.another_rank(ranks):
        raise _unreadable(path, next(entry.where for entry in (*beside, *inside) if "r" in entry.leaf), wrong)
    return told


def _entries(source: str, config: Mapping[str, object], words: Collection[str]) -> Iterator[Entry]:
    """What a mapping tells under keys like `lora_alpha` or `<component>.lora_alpha`, also in mappings inside it.

    A component that no tensor is named by is all of them; one of another network tells nothing here.
    """
    todo = [("", config, 0)]
    for number, (name, inner, depth) in enumerate(todo):
        groups: dict[str, list[tuple[str, object]]] = {}
        for key, value in inner.items():
            before, _, leaf = key.rpartition(".")
            if leaf in LEAVES:
                groups.setdefault(before or name, []).append((leaf, value))
            elif isinstance(value, dict) and depth < MAX_DEPTH and len(todo) < MAX_OBJECTS and number < MAX_OBJECTS:
                todo.append((key, value, depth + 1))
        for component, told in groups.items():
            names = {leaf for leaf, _ in told}
            # deep in a config of something else a lone `alpha` or `rank` is no LoRA's
            if names <= {"alpha", "rank"} and len(names) < 2 and source != "metadata":
                continue
            if any(FOREIGN.fullmatch(word) for word in re.split(r"[._]", component.lower())):
                continue
            mine = component if component in words else ""
            yield from (Entry(mine, LEAVES[leaf], f"{source} {leaf}", value) for leaf, value in told)


def _agreed(path: Path, entries: Sequence[Entry]) -> dict[str, Strength]:
    """What all entries together tell, by component.

    Raises:
        FileError: two tell different numbers.
    """
    found = {}
    for component in {entry.component for entry in entries}:
        told: dict[str, tuple[str, object]] = {}
        for entry in entries:
            if entry.component not in (component, "") or str(entry.value) in ("", "None", "null"):
                continue
            if entry.leaf in ("lora_alpha", "r"):
                value: object = _number(path, entry.where, entry.value)
            elif entry.leaf in PEFT[3:5]:  # a regular expression of a layer's name -> its number
                text = entry.value
                patterns = _object(path, text or "{}", entry.where) if isinstance(text, str) else text
                patterns = patterns if isinstance(patterns, dict) else {}
                expressions = [key for key in patterns if not LITERAL.fullmatch(key)]
                simple = all(len(key) < 200 and SIMPLE.fullmatch(key) for key in expressions)
                if len(patterns) > MAX_PATTERNS or len(expressions) > MAX_EXPRESSIONS or not simple:
                    raise _unreadable(path, entry.where, "names that are no plain layer names")
                value = {key: _number(path, key, number) for key, number in patterns.items()}
            else:
                value = str(entry.value).lower() in YES
            if value is None:
                continue
            where, before = told.setdefault(entry.leaf, (entry.where, value))
            if entry.leaf in PEFT[:5] and before != value:
                raise _unreadable(path, where, f"{before}, {entry.where} {value}")
        alpha, rank, rslora, alphas, ranks = (told.get(leaf, ("", None))[1] for leaf in PEFT[:5])
        if alpha is None and (rslora or alphas):
            raise _unreadable(path, "lora_alpha", "is missing beside use_rslora or alpha_pattern")
        found[component] = Strength(alpha, rank, bool(rslora), alphas or {}, ranks or {})  # type: ignore[arg-type]
    return found


def _by_pattern(patterns: Mapping[str, float | None], layer: str, otherwise: float | None) -> float | None:
    """PEFT's rule: the first pattern that matches the end of a layer's name, from a dot on."""
    words = layer.split(".")
    ends = [".".join(words[start:])[-MAX_LAYER_CHARS:] for start in range(min(len(words), MAX_PREFIX_WORDS))]
    for pattern, value in patterns.items():
        if value is None:
            continue
        if LITERAL.fullmatch(pattern):
            matches = f".{layer}".endswith(f".{pattern}")
        else:
            matches = any(re.fullmatch(pattern.strip("^$"), end) for end in ends)
        if matches:
            return value
    return otherwise


def _number(path: Path, key: str, told: object) -> float | None:
    """A number that is stored as one or as text; None for none.

    Raises:
        FileError: NaN, infinite, or not a number at all.
    """
    if told is None or told in ("", "None", "null") or (told == "Dynamic" and "alpha" not in key):  # kohya's resize
        return None
    try:
        value = float(told) if isinstance(told, int | float | str) and not isinstance(told, bool) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise _unreadable(path, key, str(told)[:40])
    return value


def _object(path: Path, text: str | bytes, what: str) -> Mapping[str, object]:
    try:
        found = json.loads(text) if len(text) <= MAX_CONFIG_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _unreadable(path, what, "not a JSON object")
    return found


def _unreadable(path: Path, key: str, got: str) -> FileError:
    return FileError(
        "the strength (alpha) of this LoRA cannot be read",
        code="lora_alpha", field=f"lora {path}", got=f"{path.name}: {key} {got}", expected="a number",
        try_instead="another copy of the file",
    )  # fmt: skip
