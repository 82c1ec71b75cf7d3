"""Is the clip that a worker reports really there, whole, and its own? And the clip of a job that died too late to say.

The worker has already decoded the file in full; the supervisor trusts nothing but bytes: size, SHA-256, sidecar.
The sidecar of a clip (else its tags) is the truth about it; the nonce of its request says whose clip it is.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from turbodiff.archive.clips import PARTIAL, poster_path, read_sidecar, sidecar_path
from turbodiff.spec.clips import ClipResult, Sidecar
from turbodiff.spec.errors import FileError, VerifyError
from turbodiff.spec.files import sha256_of


def check_clip(result: ClipResult) -> None:
    """Compare a `result` with the disk.

    Raises:
        VerifyError: the file is missing, empty, or not the one that was verified.
    """
    path = Path(result.path)
    if not path.is_file() or path.stat().st_size == 0:
        raise VerifyError(
            "the clip is not on disk", code="clip_missing", field="path", got=path.name, try_instead="run it again"
        )
    try:
        got = sha256_of(path)
    except OSError as error:
        raise VerifyError("the clip cannot be read", code="clip_unreadable", field="path", got=error) from None
    if result.sha256 != got:
        raise VerifyError(
            "the clip on disk is not the one that was verified",
            code="clip_changed",
            field="sha256",
            got=got[:12],
            expected=result.sha256[:12],
            try_instead="run it again; check the disk",
        )


def discard(outputs: Path, clip: Path) -> None:
    """Take a clip that is not sound out of the library; what is in `.partial` goes at the next start."""
    aside = outputs / PARTIAL
    for path in (clip, sidecar_path(clip), poster_path(clip)) if clip.name else ():
        with contextlib.suppress(OSError):
            aside.mkdir(parents=True, exist_ok=True)
            path.rename(aside / path.name)


def sidecars(outputs: Path) -> Iterator[tuple[Path, Sidecar]]:
    """Every clip with its sidecar (else what its tags say), oldest name first; clips of other programs are left out."""
    for clip in sorted(outputs.glob("*/*.mp4")):
        if clip.name.startswith(".") or clip.parent.name == PARTIAL:
            continue
        try:
            yield clip, read_sidecar(clip)
        except FileError:
            continue


def find_clip(outputs: Path, nonce: str) -> ClipResult | None:
    """The result that stands for the sound clip that this job left behind, or None."""
    for path in outputs.glob("*/*.mp4.json"):
        clip = path.with_suffix("")
        try:
            if nonce not in path.read_text("utf-8"):
                continue
            sidecar = read_sidecar(clip)
            if sidecar.request.nonce == nonce and sidecar.sha256 == sha256_of(clip):
                return sidecar.result(clip)
        except (OSError, ValueError, FileError):
            continue
    return None
