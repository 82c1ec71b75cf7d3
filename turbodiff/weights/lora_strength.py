"""How strong a LoRA was trained to be: its alpha, where the file's tensors do not hold it. No torch.

Asked in this order, per layer: the tensor `.alpha`; the metadata `lora_adapter_metadata` of diffusers (a PEFT config in
JSON, keys behind the component's name, `transformer.lora_alpha`); the same keys flat in the metadata (SimpleTuner;
ComfyUI pull request 15830); `lora_alpha`, `network_alpha`, `ss_network_alpha`, `alpha` (kohya, LightX2V; sglang pull
request 35952); PEFT's adapter_config.json beside the file. A file without any means alpha = rank.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from turbodiff.spec.errors import FileError

EMBEDDED, BESIDE = "lora_adapter_metadata", "adapter_config.json"
PLAIN = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
MAX_CONFIG_BYTES, MAX_PATTERNS = 4 << 20, 2048
MAX_EXPRESSIONS = 16
MAX_LAYER_CHARS, MAX_PREFIX_WORDS = 100, 8  # of a name that expressions are tried on
LITERAL = re.compile(r"[\w.-]+")
# An expression that cannot take long: no groups, at most one `.*` and two runs of digits
SIMPLE = re.compile(r"(?!(?:.*\.\*){2})\^?(?:[\w-]|\\?\.)*(?:(?:\.\*|\\d\+|\[0-9\]\+)(?:[\w-]|\\?\.)*){0,3}\$?")
# Ways to begin a training that change the weights below, so that the file alone is not the change (PEFT's LoraConfig)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Strength:
    """alpha, and how it scales a change of some rank; `rank` is the trained one where the tensors do not tell."""

    alpha: float | None = None
    rank: float | None = None
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)  # PEFT's alpha_pattern and rank_pattern
    ranks: Mapping[str, float] = field(default_factory=dict)

    def scale(self, layer: str, rank: int | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732); `layer` as the file calls it.

        rank None: the tensors do not tell, as in a LoKr of two whole factors.
        """
        alpha = _by_pattern(self.alphas, layer, self.alpha)
        trained = rank if rank is not None else _by_pattern(self.ranks, layer, self.rank)
        if alpha is None or not trained:
            return 1.0
        return alpha / (math.sqrt(trained) if self.rslora else trained)


def strengths(path: Path, metadata: Mapping[str, str], stored: Iterable[str]) -> dict[str, Strength]:
    """What metadata and a config beside the file say, by component ("transformer", "transformer_2", or "").

    `stored`: names of the tensors; only with PEFT's is an adapter_config.json beside them theirs.

    Raises:
        FileError: a number that is none, a config that is damaged, a way of training that needs other weights below.
    """
    embedded = _object(path, metadata[EMBEDDED], EMBEDDED) if EMBEDDED in metadata else {}
    for config in (embedded, metadata):
        if found := _by_component(path, config):
            return found
    for key in PLAIN:
        if (alpha := _number(path, key, metadata.get(key))) is not None:
            return {"": Strength(alpha)}
    beside = (path if path.is_dir() else path.parent) / BESIDE
    peft = any(part in name for name in stored for part in (".lora_A", ".hada_w", ".lokr_w"))
    try:
        text = beside.read_bytes() if peft and beside.is_file() and beside.stat().st_size <= MAX_CONFIG_BYTES else b"{}"
    except OSError as error:
        raise _unreadable(path, BESIDE, error.strerror or "not readable") from None
    return _by_component(path, _object(path, text, BESIDE))


def _by_component(path: Path, config: Mapping[str, object]) -> dict[str, Strength]:
    """The PEFT configs in a mapping whose keys are `lora_alpha` or `<component>.lora_alpha`."""
    grouped: dict[str, dict[str, object]] = {}
    inside = [
        (f"{key}.{leaf}", x) for key, value in config.items() if isinstance(value, dict) for leaf, x in value.items()
    ]
    for key, value in (*config.items(), *inside):
        component, _, leaf = key.rpartition(".")
        if leaf in ("lora_alpha", "alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern", "init_lora_weights"):
            grouped.setdefault(component, {})[leaf] = value
    found = {}
    for component, told in grouped.items():
        begun = str(told.get("init_lora_weights", "")).lower()
        if begun.startswith(CHANGES_BASE):
            raise FileError(
                "a LoRA that needs other weights below it",
                code="lora_algorithm", field=f"lora {path}", got=f"{path.name}: {begun[:40]}",
                expected="LoRA, DoRA, LoHa or LoKr", try_instead="the adapter converted to plain LoRA",
            )  # fmt: skip
        alpha = _number(path, "lora_alpha", told.get("lora_alpha", told.get("alpha")))
        if "lora_alpha" not in told and ("r" not in told or alpha is None):
            continue  # a lone `alpha` is not a PEFT config
        found[component] = Strength(
            alpha, _number(path, "r", told.get("r")), str(told.get("use_rslora")).lower() in ("true", "1"),
            _patterns(path, told.get("alpha_pattern")), _patterns(path, told.get("rank_pattern")),
        )  # fmt: skip
    return found


def _patterns(path: Path, told: object) -> dict[str, float]:
    """alpha_pattern or rank_pattern: a regular expression of a layer's name -> its number."""
    if isinstance(told, str):
        told = _object(path, told or "{}", "alpha_pattern")
    if not isinstance(told, dict):
        return {}
    expressions = [key for key in told if not LITERAL.fullmatch(key)]
    simple = all(len(key) < 200 and SIMPLE.fullmatch(key) for key in expressions)
    if len(told) > MAX_PATTERNS or len(expressions) > MAX_EXPRESSIONS or not simple:
        raise _unreadable(path, "alpha_pattern", "names that are no plain layer names")
    numbers = {key: _number(path, key, value) for key, value in told.items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _by_pattern(patterns: Mapping[str, float], layer: str, otherwise: float | None) -> float | None:
    """PEFT's rule: the first pattern that matches the end of a layer's name, from a dot on."""
    words = layer.split(".")
    ends = [".".join(words[start:])[-MAX_LAYER_CHARS:] for start in range(min(len(words), MAX_PREFIX_WORDS))]
    for pattern, value in patterns.items():
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
    if told is None or told in ("", "None", "null"):
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
