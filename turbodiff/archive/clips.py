"""The library: folders of finished clips, each with a sidecar that says what made it. Sidecars are the truth.

    outputs/2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4        the clip, settings in its tags
    outputs/2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4.json   its sidecar
    outputs/2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4.jpg    its poster
    outputs/.partial/                                                whatever is not finished

Order of `publish`: the verified clip is fsynced, poster and sidecar are written under temporary names and fsynced,
then each gets its final name by link(2), which never overwrites: poster, sidecar, and last the clip; then the folder is
fsynced and the temporary names go. The name of the clip is the commit: a process killed anywhere before it leaves no
clip (at most a sidecar without one, which nobody reads and `sweep` removes), killed after it leaves a complete one.

The worker has decoded the file in full before; the supervisor trusts nothing but bytes: size, SHA-256, sidecar.
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from pydantic import JsonValue

from turbodiff.gpu.process_identity import is_alive, process_mark
from turbodiff.media.tags import read_settings_tag
from turbodiff.spec.clips import MAX_CLIP_NAME_BYTES, ClipResult, Sidecar, read_record
from turbodiff.spec.errors import FileError, VerifyError
from turbodiff.spec.files import (
    STEM_BYTES,
    atomic_write,
    cut_name,
    files_of,
    make_folder,
    open_file,
    output_error,
    sha256_of,
    sync,
    write_synced,
)  # fmt: skip

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


def clip_path(outputs: Path, kind: str, seed: int, model: str, created: datetime) -> Path:
    """Where a clip belongs: 2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4; `publish` adds _2 to a taken name."""
    slug = re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-.") or "model"
    return outputs / f"{created:%Y-%m-%d}" / f"{kind}_{seed}_{slug}_{created:%Y%m%d_%H%M%S}.mp4"


def partial_path(outputs: Path, job: int, attempt: int, output: Path | None = None) -> Path:
    """The temporary name of an attempt of a job; the process id in it tells `sweep` whether it is still wanted.

    For an `output` that a person named it is hidden, in the same folder, and a long name is cut; others may write
    there, too, so the process is named for ever.
    """
    if output is not None:
        return output.parent / f".{cut_name(output.stem, STEM_BYTES)}.{process_mark(os.getpid())}.partial.mp4"
    return outputs / PARTIAL / f"{job}.{attempt}.{os.getpid()}.mp4"


def sidecar_path(clip: Path) -> Path:
    """The sidecar of a clip."""
    return clip.with_name(clip.name + ".json")


def poster_path(clip: Path) -> Path:
    """The poster of a clip."""
    return clip.with_name(clip.name + ".jpg")


def numbered(clip: Path, number: int) -> Path:
    """The name of a clip whose own is taken, number 2 and on; a stem that would be too long for it is cut."""
    if number == 1:
        return clip
    end = f"_{number}"
    return clip.with_name(f"{cut_name(clip.stem, MAX_CLIP_NAME_BYTES - len(end))}{end}{clip.suffix}")


def publish(partial: Path, final: Path, sidecar: Sidecar, poster: bytes = b"", replace: bool = False) -> Path:
    """Give a verified clip its final name, with sidecar and poster; see the order above.

    Args:
        partial: the clip under its temporary name, on the file system of `final`. Gone afterwards.
        final: the wished name; _2, _3, ... is appended where it is taken.
        sidecar: what made the clip.
        poster: a JPEG, b"" for none.
        replace: take the name `final` even where it is taken: only for a name that a person typed.

    Returns:
        The final path.

    Raises:
        OutputError: field `output`. The clip keeps its temporary name, nothing else is left.
    """
    sidecar_partial, poster_partial = sidecar_path(partial), poster_path(partial)
    target = final
    try:
        sync(partial)
        if final.parent.is_symlink() and not replace:  # the folder of a day is ours: clips shall not leave the library
            make_folder(final.parent, link=False)
        final.parent.mkdir(parents=True, exist_ok=True)
        write_synced(sidecar_partial, sidecar.model_dump_json(indent=1).encode())
        if poster:
            write_synced(poster_partial, poster)
        parts = [name for name in (poster_path, sidecar_path, Path) if name(partial).exists()]
        if replace:
            for name in parts:
                name(partial).replace(name(final))
        else:
            for number in itertools.count(1):
                target = numbered(final, number)
                taken = any(name(target).exists() for name in parts)
                if not taken and link_all([(name(partial), name(target)) for name in parts]):
                    break
        sync(target.parent)
        partial.unlink(missing_ok=True)
        return target
    except OSError as error:
        raise output_error(final.parent, error.strerror or str(error)) from None
    finally:
        for temporary in (sidecar_partial, poster_partial):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def link_all(pairs: list[tuple[Path, Path]]) -> bool:
    """Whether every source got its target's name by link(2); False, and none has, where one was taken meanwhile.

    On file systems without hard links (exFAT, some shares) a rename where the name is free.
    """
    linked: list[Path] = []
    try:
        for source, target in pairs:
            try:
                os.link(source, target)
            except FileExistsError:
                raise
            except OSError:
                if target.exists():
                    raise FileExistsError(target) from None
                source.rename(target)
            linked.append(target)
    except OSError as error:
        for path in linked:
            path.unlink()
        if isinstance(error, FileExistsError):
            return False
        raise
    return True


def clips(outputs: Path, limit: int = 24) -> list[Clip]:
    """The newest clips first, by the time in their names; damaged sidecars and foreign files do no harm."""
    found: list[tuple[str, int, str, Path]] = []  # time in the name, number behind it, name, path
    for day in sorted(day_folders(outputs), reverse=True):
        dated = []
        for path in files_of(day):
            if path.suffix == ".mp4" and not path.name.startswith("."):
                stamp = _STAMP.search(path.name)
                dated.append((stamp[1], int(stamp[2] or 1), path.name, path) if stamp else ("", 0, path.name, path))
        found += sorted(dated, reverse=True)
        if len(found) >= limit:
            break
    return [_clip(path) for *_, path in found[:limit]]


def clip_named(outputs: Path, name: str) -> Clip | None:
    """The clip of that file name without its ending, of whichever day; `name` must be one name of a file."""
    paths = (day / f"{name}.mp4" for day in day_folders(outputs))
    return next((_clip(path) for path in paths if path.is_file() and not path.is_symlink()), None)


def _clip(path: Path) -> Clip:
    """A clip of the library with what lies beside it."""
    sidecar, poster = None, poster_path(path)
    with contextlib.suppress(FileError):
        sidecar = read_sidecar(path)
    return Clip(path, sidecar, poster if poster.is_file() and not poster.is_symlink() else None, created_at(path))


def created_at(clip: Path) -> datetime | None:
    """The time in the name of a clip, None where it has none that this world knows."""
    stamp = _STAMP.search(clip.name)
    with contextlib.suppress(ValueError, OverflowError):
        return datetime.strptime(stamp[1] if stamp else "", "%Y%m%d_%H%M%S").astimezone()
    return None


def read_sidecar(clip: Path) -> Sidecar:
    """What made a clip: from the file beside it, else from the tags inside the mp4 (which know no result).

    Raises:
        FileError: not an mp4, or one without our settings.
    """
    path, sidecar = sidecar_path(clip), None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        stat = path.stat()
        sidecar = _read_once(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    sidecar = sidecar or read_record(Sidecar, read_settings_tag(clip))
    if sidecar is None:
        raise FileError(
            "this video does not carry settings of turbodiff",
            code="no_settings",
            field=clip.name,
            try_instead="a clip made by turbodiff, unchanged by other programs",
        )
    return sidecar


@lru_cache(maxsize=512)  # 20 KB each; the page looks at 200 every few seconds
def _read_once(path: Path, _state: tuple[int, int, int]) -> Sidecar | None:
    found = json.loads(sidecar_text(path))
    return read_record(Sidecar, found) if found and isinstance(found, dict) else None


def sidecar_text(path: Path) -> str:
    """The text of a sidecar. Raises OSError, ValueError: no file, larger than any, not UTF-8."""
    with open_file(path) as file:
        data = file.read(MAX_SIDECAR_BYTES + 1)
    if len(data) > MAX_SIDECAR_BYTES:
        raise ValueError(f"more than {MAX_SIDECAR_BYTES} bytes")
    return data.decode("utf-8")


def edit_sidecar(clip: Path, cells: Mapping[str, JsonValue]) -> None:
    """Write what a person says of a clip into its sidecar; every other part of the file stays as it is.

    A sidecar that is missing or damaged is made anew from the tags inside the clip.

    Raises:
        FileError: there is no such clip, or nothing says what made it.
        OutputError: the folder cannot be written.
    """
    path, document = sidecar_path(clip), None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        document = json.loads(sidecar_text(path))
    if not isinstance(document, dict):
        document = read_sidecar(clip).model_dump(mode="json")
    try:
        with atomic_write(path, durable=True) as part:
            part.write_bytes(
                json.dumps(document | dict(cells), ensure_ascii=False, indent=1).encode("utf-8", "replace")
            )
    except OSError as error:
        raise output_error(clip.parent, error.strerror or str(error)) from None


def sidecars(outputs: Path) -> Iterator[tuple[Path, Sidecar]]:
    """Every clip with its sidecar (else what its tags say), oldest name first; clips of other programs are left out."""
    for clip in sorted(outputs.glob("*/*.mp4")):
        if not clip.name.startswith(".") and clip.parent.name != PARTIAL:
            with contextlib.suppress(FileError):
                yield clip, read_sidecar(clip)


def find_clip(outputs: Path, nonce: str) -> ClipResult | None:
    """The result that stands for the sound clip that the job of this nonce left behind, or None; one without its final
    name is none, it is swept."""
    for path in itertools.chain.from_iterable(day.glob("*.mp4.json") for day in day_folders(outputs)):
        clip = path.with_suffix("")
        with contextlib.suppress(OSError, ValueError, FileError):
            if nonce in sidecar_text(path):
                sidecar = read_sidecar(clip)
                if sidecar.request.nonce == nonce and sidecar.sha256 == sha256_of(clip):
                    return sidecar.result(clip)
    return None


def check_clip(outputs: Path, result: ClipResult) -> None:
    """Compare a `result` with the disk. A clip that is not sound leaves the library for `.partial`, which is swept.

    Raises:
        VerifyError: the file is missing, empty, or not the one that was verified.
    """
    clip = Path(result.path)
    try:
        if not clip.is_file() or clip.stat().st_size == 0:
            raise VerifyError(
                "the clip is not on disk", code="clip_missing", field="path", got=clip.name, try_instead="run it again"
            )
        got = sha256_of(clip)
        if result.sha256 == got:
            return
        raise VerifyError(
            "the clip on disk is not the one that was verified",
            code="clip_changed",
            field="sha256",
            got=got[:12],
            expected=result.sha256[:12],
            try_instead="run it again; check the disk",
        )
    except (OSError, VerifyError) as error:
        aside = outputs / PARTIAL
        for path in (clip, sidecar_path(clip), poster_path(clip)) if clip.name else ():
            with contextlib.suppress(OSError):
                make_folder(aside, ours=True, link=False)
                path.rename(aside / path.name)
        if isinstance(error, VerifyError):
            raise
        raise VerifyError("the clip cannot be read", code="clip_unreadable", field="path", got=error) from None


def sweep(outputs: Path) -> list[Path]:
    """Remove what killed processes left: partial files of processes that are gone, sidecars and posters without a clip.

    Call it at start, while nobody publishes. Returns what was removed.
    """
    gone = []
    for path in files_of(outputs / PARTIAL):
        parts = path.name.split(".")
        if not (len(parts) > 2 and parts[2].isdecimal() and is_alive(int(parts[2]))):
            gone.append(path)
    for path in itertools.chain.from_iterable(files_of(day) for day in day_folders(outputs)):
        clip = path.with_suffix("")
        if path.suffix in {".json", ".jpg"} and _STAMP.search(clip.name) and not clip.exists():
            gone.append(path)
    for path in gone:
        with contextlib.suppress(OSError):
            path.unlink()
    return gone


def day_folders(outputs: Path) -> list[Path]:
    """The folders of clips, one a day; [] where `outputs` cannot be read."""
    with contextlib.suppress(OSError):
        found = [path for path in outputs.iterdir() if re.fullmatch(r"\d{4}-\d\d-\d\d", path.name)]
        return [path for path in found if path.is_dir() and not path.is_symlink()]
    return []
