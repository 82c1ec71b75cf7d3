"""Folders that may hold weights: search roots, the bundled demo, the Hugging Face cache. Walks them within limits."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from typing import Literal, NamedTuple

from turbodiff.spec.environment import current_folder, expand
from turbodiff.spec.errors import PACKAGES, FileError
from turbodiff.spec.models import FoundNetwork, NetworkKind
from turbodiff.spec.text import whole
from turbodiff.weights.detect import INDEX, is_weights

ROOTS_VARIABLE = "TURBODIFF_MODELS"
MAX_DEPTH = 5  # folders below a root: root/Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer/file
MAX_ENTRIES = 20_000  # names looked at below one root
TOKENIZER = "spiece.model"
LORA_FOLDERS = ("loras", "lora")  # below each search root: ours, and ComfyUI's other spelling
# kind -> its folders below each search root, ours first, and endings of its files; .pkl is RIFE's name for a torch file
NETWORK_FILES: Mapping[NetworkKind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "upscaler": (("upscalers", "upscale_models"), (".safetensors", ".pth", ".pt")),
    "interpolator": (("interpolators",), (".safetensors", ".pth", ".pt", ".pkl")),
}
NETWORK_FOLDERS = tuple([folder for folders, _ in NETWORK_FILES.values() for folder in folders])
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# Folders of programs, none of a person's: not searched, and no matter; beside those that begin with .Trash
CONVERTED = ".converted"  # below the folder of downloads: copies of weights as they run (weights/copies.py)
OWN_FOLDERS = frozenset(
    (CONVERTED, ".git", ".cache", ".venv", "lost+found", "$RECYCLE.BIN", "System Volume Information")
)
APPLE_DOUBLE = "._"  # what macOS writes beside a file on other disks
# Repositories of the cache that are looked into: whoever publishes them, Wan is in the name, or its text encoder
CACHED = re.compile(r"(?i)wan|umt5|turbodiffusion|autoencoders|taehv")  # the last two: small VAEs for previews


Why = Literal["", "shard", "hidden", "deep", "folder", "unreadable", "many", "loras", "name"]


class Entry(NamedTuple):
    """A file that may hold weights or a tokenizer; or what is passed over: `why`, and what is in it.

    shard: its folder has no index. folder: one that is called as weights and has none. loras: a folder of LoRAs where
    they are not looked for. many: the root has more names than are looked at. name: no UTF-8, which no list can tell.
    """

    path: Path
    why: Why = ""
    got: str = ""


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

    What is not searched is one entry with its reason if it holds weights: hidden and too deep folders, folders of LoRAs
    that are not the root's own. Folders that cannot be read are, too, and the root where it has more than MAX_ENTRIES
    names. Passed over in silence: OWN_FOLDERS, and a folder that was seen already by another name.
    """
    seen, left, peek = set[tuple[int, int]](), MAX_ENTRIES, _Peek()
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            stat = folder.stat()
            listed = sorted(folder.iterdir()) if (stat.st_dev, stat.st_ino) not in seen else []
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            yield Entry(folder, "unreadable", error.strerror or str(error))
            continue
        seen.add((stat.st_dev, stat.st_ino))
        listed = [path for path in listed if path.name not in OWN_FOLDERS and not path.name.startswith(".Trash")]
        full, found = len(listed) > left or (left == 0 and bool(waiting)), list[tuple[Path, int]]()
        entries = [path for path in listed[:left] if not path.name.startswith(".")]
        left -= len(listed[:left])
        yield from peek.hidden(listed)
        indexed = any(INDEX.search(path.name) for path in entries)
        for path in entries:
            name = path.name
            if _is_folder(path):
                below = path.stat()
                if (below.st_dev, below.st_ino) in seen:
                    continue
                if entry := peek.folder(path, depth):
                    yield entry
                elif depth < MAX_DEPTH and name.lower() not in (*LORA_FOLDERS, *NETWORK_FOLDERS):
                    found.append((path, depth + 1))
            elif SHARD.search(name) and is_weights(name):
                if not indexed:
                    yield Entry(path, "shard")
            elif is_weights(name) or name == TOKENIZER or INDEX.search(name):
                yield Entry(path, "" if _is_text(path) else "name")
        waiting = [] if full else [*waiting, *reversed(found)]
        if full:
            yield Entry(root, "many", str(MAX_ENTRIES))


class _Peek:
    """Whether what is not searched holds weights, by their names: of MAX_ENTRIES names in all, links not followed."""

    def __init__(self) -> None:
        self.left = MAX_ENTRIES

    def hidden(self, listed: list[Path]) -> list[Entry]:
        """Entries of what is hidden in a folder."""
        told = ((path, self.weights(path)) for path in listed if path.name.startswith("."))
        return [Entry(path, "hidden", inside) for path, inside in told if inside]

    def folder(self, path: Path, depth: int) -> Entry | None:
        """The entry of a folder `depth` folders below the root that is not searched or holds nothing."""
        loras = path.name.lower() in LORA_FOLDERS
        if loras and depth == 0 and path.name in LORA_FOLDERS:
            return None  # where they are looked for
        if not loras and depth < MAX_DEPTH and not is_weights(path.name):
            return None
        inside = self.weights(path)
        if not inside:
            return Entry(path, "folder") if is_weights(path.name) else None
        return Entry(path, "loras", inside) if loras else Entry(path, "deep", inside) if depth == MAX_DEPTH else None

    def weights(self, path: Path) -> str:
        """The name of the first file of weights in a folder, or of the file itself; "" where there is none."""
        if not _is_folder(path):
            return path.name if is_weights(path.name) and not path.name.startswith(APPLE_DOUBLE) else ""
        for folder, folders, files in os.walk(path):
            self.left -= len(folders) + len(files) + 1
            if self.left < 0:
                break
            folders[:] = sorted(name for name in folders if name not in OWN_FOLDERS)
            names = (name for name in sorted(files) if is_weights(name) and not name.startswith(APPLE_DOUBLE))
            if found := next(names, ""):
                return os.path.relpath(Path(folder) / found, path)
        return ""


def not_searched(entry: Entry) -> FileError:
    """Why an entry of `walk` with a reason was passed over, and what to do about it."""
    path, at = entry.path, entry.path.parent
    what, expected, try_instead = {
        "shard": ("a shard without its index", "*.index.json", "download the index, too"),
        "hidden": ("hidden files and folders are not searched", "a name without a dot before it", f"rename {path}"),
        "deep": (f"folders this deep are not searched: {MAX_DEPTH} below the search root are", f"at most {MAX_DEPTH} "
                 "folders", f"move it up, or name {at} in {ROOTS_VARIABLE}"),
        "folder": ("a folder that is called as a file of weights, with none in it", "a file", "download it again"),
        "unreadable": ("the folder cannot be read", "a folder that this user may list", f"chmod u+rx {path}"),
        "many": (f"only the first {MAX_ENTRIES} names in it were looked at", "a folder for weights alone",
                 f"name the folder of the weights in {ROOTS_VARIABLE}"),
        "name": ("its name, or that of a folder above it, is no UTF-8", "a name in UTF-8", "rename it"),
        "loras": ("LoRAs are looked for elsewhere", f"the folder {LORA_FOLDERS[0]} of the search root", f"move {path}"),
    }[entry.why]  # fmt: skip
    code = "index_missing" if entry.why == "shard" else f"folder_{entry.why}"
    return FileError(what, code=code, field=str(path), got=entry.got, expected=expected, try_instead=try_instead)


def lora_files(root: Path) -> Iterator[tuple[str, Path]]:
    """LoRA files of a root by their path below its folder of LoRAs, links followed."""
    for folder in (root / name for name in LORA_FOLDERS):
        for entry in walk(folder):
            if not entry.why and entry.path.suffix.lower() in (".safetensors", ".sft"):
                yield str(entry.path.relative_to(folder)), entry.path


def find_networks(roots: Iterable[Path] | None = None) -> tuple[FoundNetwork, ...]:
    """The files of networks that enlarge frames or make some in between, by name; of two of one name and kind that in
    the earlier root. Each says which package it lacks to run; a name that is no UTF-8 could not be asked for, and is
    passed over."""
    found, searched = dict[tuple[str, str], FoundNetwork](), model_roots() if roots is None else tuple(roots)
    for kind, (folders, endings) in NETWORK_FILES.items():
        lacks = next((name for name in (PACKAGES[kind][0], "torchvision") if not find_spec(name)), "")
        for path in [path for root in searched for folder in folders for path in _entries(root / folder)]:
            with contextlib.suppress(OSError):
                stat = path.stat()
                if S_ISREG(stat.st_mode) and path.name.lower().endswith(endings) and _is_text(path.absolute()):
                    file = {"name": path.name, "path": str(path.absolute()), "bytes": stat.st_size}
                    found.setdefault((kind, path.name), FoundNetwork(kind=kind, lacks=lacks, **file))
    return tuple(sorted(found.values(), key=lambda one: one.name))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_text(path: Path) -> bool:
    return whole(str(path)) == str(path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _expanded(text: str) -> Path:
    return expand(os.path.expandvars(text))
