"""Is the clip that a worker reports really there, whole, and its own? And the clip of a job that died too late to say.

The worker has already decoded the file in full; the supervisor trusts nothing but bytes: size, SHA-256, sidecar.
The record of a clip (its sidecar, else its tags) is the truth about it; `["request"]["nonce"]` says whose clip it is.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from turbodiff.archive.clips import PARTIAL, poster_path, read_settings, sidecar_path
from turbodiff.spec.errors import FileError, VerifyError
from turbodiff.spec.files import sha256_of


def check_clip(result: Mapping[str, Any]) -> None:
    """Compare a `result` with the disk.

    Raises:
        VerifyError: the file is missing, empty, or not the one that was verified.
    """
    path = Path(str(result.get("path", "")))
    if not path.is_file() or path.stat().st_size == 0:
        raise VerifyError(
            "the clip is not on disk", code="clip_missing", field="path", got=path.name, try_instead="run it again"
        )
    expected = str(result.get("sha256", ""))
    try:
        got = sha256_of(path)
    except OSError as error:
        raise VerifyError("the clip cannot be read", code="clip_unreadable", field="path", got=error) from None
    if expected != got:
        raise VerifyError(
            "the clip on disk is not the one that was verified",
            code="clip_changed",
            field="sha256",
            got=got[:12],
            expected=expected[:12],
            try_instead="run it again; check the disk",
        )


def discard(outputs: Path, result: Mapping[str, Any]) -> None:
    """Take a clip that is not sound out of the library; what is in `.partial` goes at the next start."""
    clip = Path(str(result.get("path", "")))
    aside = outputs / PARTIAL
    for path in (clip, sidecar_path(clip), poster_path(clip)) if clip.name else ():
        with contextlib.suppress(OSError):
            aside.mkdir(parents=True, exist_ok=True)
            path.rename(aside / path.name)


def records(outputs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every clip with what its sidecar or its own tags say, oldest name first; clips of other programs are left out."""
    for clip in sorted(outputs.glob("*/*.mp4")):
        if clip.name.startswith(".") or clip.parent.name == PARTIAL:
            continue
        try:
            yield clip, read_settings(clip)
        except FileError:
            continue


def find_clip(outputs: Path, nonce: str) -> dict[str, Any] | None:
    """The `result` fields of the sound clip that this job left behind, or None."""
    for sidecar in outputs.glob("*/*.mp4.json"):
        clip = sidecar.with_suffix("")
        try:
            if nonce not in sidecar.read_text("utf-8"):
                continue
            record = read_settings(clip)
            if record["request"].get("nonce") == nonce and record.get("sha256") == sha256_of(clip):
                return result_of(clip, record)
        except (OSError, ValueError, FileError):
            continue
    return None


def result_of(clip: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The `result` fields that a record stands for; `seconds` is the clip's making, where it was measured."""
    fields = {name: record[name] for name in ("sha256", "frames", "width", "height", "fps", "ran") if name in record}
    seconds = (record.get("measured") or {}).get("seconds")
    return {"path": str(clip), "sidecar": str(sidecar_path(clip)), "seconds": seconds, **fields}
