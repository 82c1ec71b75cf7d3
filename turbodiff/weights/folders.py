"""Folders that may hold weights: search roots, the bundled demo, the Hugging Face cache. Walks them within limits."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from turbodiff.spec.environment import current_folder, expand
from turbodiff.weights.detect import INDEX, is_weights

ROOTS_VARIABLE = "TURBODIFF_MODELS"
MAX_DEPTH = 5  # folders below a root: root/Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer/file
MAX_ENTRIES = 20_000  # names looked at below one root
TOKENIZER = "spiece.model"
LORA_FOLDERS = ("loras", "lora")  # below each search root: ours, and ComfyUI's other spelling
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# Repositories of the cache that are looked into: whoever publishes them, Wan is in the name, or its text encoder
CACHED = re.compile(r"(?i)wan|umt5|turbodiffusion|autoencoders|taehv")  # the last two: small VAEs for previews


class Entry(NamedTuple):
    """A file that may hold weights or a tokenizer; `stray` is a shard whose folder has no index."""

    path: Path
    stray: bool = False


def model_roots() -> tuple[Path, ...]:
    """Folders to search, in order: $TURBODIFF_MODELS (several, separated like PATH), then ./checkpoints."""
    named = [_expanded(part) for part in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if part]
    checkout = Path(__file__).resolve().parents[2] / "checkpoints"
    return tuple(dict.fromkeys(current_folder() / path for path in (*named, Path("checkpoints"), checkout)))


def cache_snapshots() -> Iterator[Path]:
    """The newest snapshot of each repository in the Hugging Face cache that may hold a part of Wan.

    The cache is where huggingface_hub puts it: $HF_HUB_CACHE, $HUGGINGFACE_HUB_CACHE, $HF_HOME/hub,
    $XDG_CACHE_HOME/huggingface/hub; variables in these are followed. Which snapshot: that of refs/main, or where there
    is none the one that was written last.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    cache = _expanded(named) if named else _expanded(home) / "hub"
    for repo in _entries(cache):
        if not repo.name.startswith("models--") or not CACHED.search(repo.name):
            continue
        try:
            main = repo / "refs" / "main"
            snapshot = repo / "snapshots" / (main.read_text("utf-8").strip()[:80] if main.is_file() else "-")
            written = [(path.stat().st_mtime_ns, path) for path in _entries(repo / "snapshots") if path.is_dir()]
        except (OSError, ValueError):
            continue
        if snapshot.is_dir():
            yield snapshot
        elif written:
            yield max(written)[1]


def walk(root: Path) -> Iterator[Entry]:
    """Weights, tokenizers and indexes of shards below `root`, sorted within each folder, links followed.

    Passed over: hidden and unreadable folders, those of LoRAs, a folder that was seen already by another name, and
    whatever comes after MAX_ENTRIES names.
    """
    seen, left = set[tuple[int, int]](), MAX_ENTRIES
    waiting = [(root, 0)]
    while waiting and left > 0:
        folder, depth = waiting.pop()
        try:
            stat = folder.stat()
        except OSError:
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        entries = [path for path in _entries(folder) if not path.name.startswith(".")][:left]
        left -= len(entries)
        indexed = any(path.name.endswith(INDEX) for path in entries)
        for path in entries:
            name = path.name
            if SHARD.search(name) and is_weights(name):
                if not indexed:
                    yield Entry(path, stray=True)
            elif not path.is_dir() and (is_weights(name) or name == TOKENIZER or name.endswith(INDEX)):
                yield Entry(path)
        below = [path for path in entries if depth < MAX_DEPTH and _is_folder(path)]
        waiting += [(path, depth + 1) for path in reversed(below) if path.name.lower() not in LORA_FOLDERS]


def lora_files(root: Path) -> Iterator[tuple[str, Path]]:
    """LoRA files of a root by their path below its folder of LoRAs, links followed."""
    for folder in (root / name for name in LORA_FOLDERS):
        for entry in walk(folder):
            if entry.path.suffix.lower() in (".safetensors", ".sft"):
                yield str(entry.path.relative_to(folder)), entry.path


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _expanded(text: str) -> Path:
    return expand(os.path.expandvars(text))
