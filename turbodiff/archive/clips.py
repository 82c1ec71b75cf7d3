"""The library: folders of finished clips, each with a sidecar that says what made it. Sidecars are the truth.

    outputs/2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4        the clip, settings in its tags
    outputs/2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4.json   its sidecar
    outputs/2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4.jpg    its poster
    outputs/.partial/                                                whatever is not finished

Order of `publish`: the verified clip is fsynced, poster and sidecar are written under temporary names and fsynced,
then each gets its final name by link(2), which never overwrites: poster, sidecar, and last the clip; then the folder is
fsynced and the temporary names go. The name of the clip is the commit: a process killed anywhere before it leaves no
clip (at most a sidecar without one, which nobody reads and `sweep` removes), killed after it leaves a complete one.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from turbodiff.media.tags import read_settings_tag
from turbodiff.spec.clips import Sidecar, read_record
from turbodiff.spec.errors import FileError
from turbodiff.spec.files import output_error, sync, write_synced

PARTIAL = ".partial"
MAX_SIDECAR_BYTES = 4 << 20
_STAMP = re.compile(r"_(\d{8}_\d{6})(?:_(\d+))?\.mp4$")


@dataclass(frozen=True)
class Clip:
    """A finished clip. `sidecar` is read from its own tags where the file is damaged; None: neither can be read."""

    path: Path
    sidecar: Sidecar | None
    poster: Path | None
    created: datetime | None


def clip_name(kind: str, seed: int, model: str, created: datetime) -> str:
    """The name people look for: t2v_42_wan2.1-1.3b_20261123_003107.mp4."""
    return f"{kind}_{seed}_{_slug(model)}_{created:%Y%m%d_%H%M%S}.mp4"


def clip_path(outputs: Path, kind: str, seed: int, model: str, created: datetime) -> Path:
    """Where a clip belongs: its day's folder in `outputs`. `publish` adds _2 where the name is taken."""
    return outputs / f"{created:%Y-%m-%d}" / clip_name(kind, seed, model, created)


def partial_path(outputs: Path, job: int, attempt: int) -> Path:
    """The temporary name of an attempt of a job; the process id in it tells `sweep` whether it is still wanted."""
    return outputs / PARTIAL / f"{job}.{attempt}.{os.getpid()}.mp4"


def partial_beside(output: Path) -> Path:
    """The temporary name for an output that a person named: hidden, in the same folder."""
    return output.parent / f".{output.stem}.{os.getpid()}.partial.mp4"


def sidecar_path(clip: Path) -> Path:
    """The sidecar of a clip."""
    return clip.with_name(clip.name + ".json")


def poster_path(clip: Path) -> Path:
    """The poster of a clip."""
    return clip.with_name(clip.name + ".jpg")


def publish(partial: Path, final: Path, sidecar: Sidecar, poster: bytes = b"", replace: bool = False) -> Path:
    """Give a verified clip its final name, with sidecar and poster; see the order above.

    Args:
        partial: the clip under its temporary name, on the file system of `final`. Gone afterwards.
        final: the wished name; _2, _3, ... is appended where it is taken.
        sidecar: what made the clip; what made it.
        poster: a JPEG, b"" for none.
        replace: take the name `final` even where it is taken: only for a name that a person typed.

    Returns:
        The final path.

    Raises:
        OutputError: field `output`. The clip keeps its temporary name, nothing else is left.
    """
    sidecar_partial, poster_partial = sidecar_path(partial), poster_path(partial)
    try:
        sync(partial)
        final.parent.mkdir(parents=True, exist_ok=True)
        write_synced(sidecar_partial, sidecar.model_dump_json(indent=1).encode())
        if poster:
            write_synced(poster_partial, poster)
        target = _commit(partial, final, replace)
        sync(target.parent)
        partial.unlink(missing_ok=True)
        return target
    except OSError as error:
        raise output_error(final.parent, error.strerror or str(error)) from None
    finally:
        for temporary in (sidecar_partial, poster_partial):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def clips(outputs: Path, limit: int = 24) -> list[Clip]:
    """The newest clips first, by the time in their names; damaged sidecars and foreign files do no harm."""
    found: list[Path] = []
    for day in sorted(_folders(outputs), reverse=True):
        found += sorted(_clips_of(day), key=_age_key, reverse=True)
        if len(found) >= limit:
            break
    return [_clip(path) for path in found[:limit]]


def read_sidecar(clip: Path) -> Sidecar:
    """What made a clip: from the file beside it, else from the tags inside the mp4 (which know no result).

    Raises:
        FileError: not an mp4, or one without our settings.
    """
    path = sidecar_path(clip)
    found: object = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text("utf-8")) if path.stat().st_size <= MAX_SIDECAR_BYTES else None
    sidecar = read_record(Sidecar, found if found and isinstance(found, dict) else read_settings_tag(clip))
    if sidecar is None:
        raise FileError(
            "this video does not carry settings of turbodiff",
            code="no_settings",
            field=clip.name,
            try_instead="a clip made by turbodiff, unchanged by other programs",
        )
    return sidecar


def sweep(outputs: Path) -> list[Path]:
    """Remove what killed processes left: partial files of processes that are gone, sidecars and posters without a clip.

    Call it at start, while nobody publishes. Returns what was removed.
    """
    gone = [path for path in _files(outputs / PARTIAL) if not _is_running(path)]
    for day in _folders(outputs):
        gone += [path for path in _files(day) if path.suffix in {".json", ".jpg"} and _is_orphan(path)]
    for path in gone:
        with contextlib.suppress(OSError):
            path.unlink()
    return gone


def _commit(partial: Path, final: Path, replace: bool) -> Path:
    parts = [name for name in (poster_path, sidecar_path, Path) if name(partial).exists()]
    if replace:
        for name in parts:
            name(partial).replace(name(final))
        return final
    for target in _names(final):
        if not any(name(target).exists() for name in parts) and _link_all([(n(partial), n(target)) for n in parts]):
            return target
    raise AssertionError("names are endless")


def _link_all(pairs: list[tuple[Path, Path]]) -> bool:
    """Whether every pair was linked; False, and none is, where a name was taken meanwhile."""
    linked: list[Path] = []
    try:
        for source, target in pairs:
            _link(source, target)
            linked.append(target)
    except OSError as error:
        for path in linked:
            path.unlink()
        if isinstance(error, FileExistsError):
            return False
        raise
    return True


def _names(final: Path) -> Iterator[Path]:
    yield final
    number = 2
    while True:
        yield final.with_name(f"{final.stem}_{number}{final.suffix}")
        number += 1


def _link(source: Path, target: Path) -> None:
    """link(2); on file systems without hard links (exFAT, some shares) a rename where the name is free."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        if target.exists():
            raise FileExistsError(target) from None
        source.rename(target)


def _clip(path: Path) -> Clip:
    sidecar, poster = None, poster_path(path)
    with contextlib.suppress(FileError):
        sidecar = read_sidecar(path)
    has_poster = poster.is_file() and not poster.is_symlink()
    return Clip(path, sidecar, poster if has_poster else None, _created(path))


def _created(clip: Path) -> datetime | None:
    stamp = _STAMP.search(clip.name)
    with contextlib.suppress(ValueError):
        return datetime.strptime(stamp[1], "%Y%m%d_%H%M%S").astimezone() if stamp else None
    return None


def _age_key(clip: Path) -> tuple[str, int, str]:
    stamp = _STAMP.search(clip.name)
    return (stamp[1], int(stamp[2] or 1), clip.name) if stamp else ("", 0, clip.name)


def _folders(outputs: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        found = [path for path in outputs.iterdir() if re.fullmatch(r"\d{4}-\d\d-\d\d", path.name)]
        return [path for path in found if path.is_dir() and not path.is_symlink()]
    return []


def _files(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [
            path for path in folder.iterdir() if path.is_file() and not path.is_symlink()
        ]  # a link may lead anywhere
    return []


def _clips_of(day: Path) -> list[Path]:
    return [path for path in _files(day) if path.suffix == ".mp4" and not path.name.startswith(".")]


def _is_running(partial: Path) -> bool:
    parts = partial.name.split(".")
    pid = parts[2] if len(parts) > 2 and parts[2].isdecimal() else ""
    return bool(pid) and Path(f"/proc/{pid}").exists()


def _is_orphan(path: Path) -> bool:
    clip = path.with_suffix("")
    return clip.suffix == ".mp4" and bool(_STAMP.search(clip.name)) and not clip.exists()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"
