"""A person's picture -> the first frame of a clip. The bytes are decoded in a process of its own, within limits."""

import io
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from turbodiff.media.fingerprints import Bytes
from turbodiff.spec.errors import FileError
from turbodiff.spec.request import Fit, Request
from turbodiff.spec.shapes import adaptive_size, table_size

DECODER = Path(__file__).with_name("decode_picture.py")
MAX_FILE_BYTES = 256 << 20  # 64 megapixels of incompressible RGB and some
TIMEOUT_S = 120  # the decoder's own limit is 20 s of CPU; a busy machine may need longer for that

# What is said about each way a picture can be wrong: what, expected, try instead
REFUSALS = {
    "picture_missing": ("the picture does not exist", "a file", "another path"),
    "picture_kind": ("not a picture of a known kind", "PNG, JPEG, WebP or GIF", "save it as PNG or JPEG"),
    "picture_too_large": ("the picture is too large", "at most 64 megapixels", "scale it down to 4000 pixels a side"),
    "picture_too_small": ("the picture is too small", "at least 16 pixels a side", "a larger picture"),
    "picture_broken": ("the picture is damaged", "a whole picture", "open it in a viewer and save it again"),
    "picture_slow": ("decoding the picture takes too long", f"at most {TIMEOUT_S} s", "save it as PNG or JPEG"),
}


class Fitted(NamedTuple):
    """A picture in the size of the clip, uint8 RGB [H, W, 3], and the size it came in (upright)."""

    pixels: Bytes
    source_width: int
    source_height: int

    def png(self) -> bytes:
        """The fitted picture as a PNG, for the preview."""
        data = io.BytesIO()
        Image.fromarray(self.pixels).save(data, "PNG", compress_level=1)
        return data.getvalue()


def fit_picture(request: Request, background: str = "white") -> Fitted:
    """The picture of a request in exactly its width and height: cropped, padded or stretched as `request.fit` says.

    Args:
        background: colour ("white", "#102030") behind transparency and around a padded picture.

    Raises:
        FileError: field `image`: missing, not a picture, damaged, too large or too small.
    """
    return fit_file(Path(request.image), request.width, request.height, request.fit, background)


def fit_file(path: Path, width: int, height: int, fit: Fit = "crop", background: str = "white") -> Fitted:
    """A picture file in `width` x `height` pixels; see `fit_picture`."""
    order = {"want": "fit", "fit": fit, "background": background, "width": width, "height": height}
    head, pixels = _decode(path, order)
    return Fitted(np.frombuffer(pixels, np.uint8).reshape(height, width, 3), head["width"], head["height"])


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture held upright, from its head alone; remembered until the file changes.

    Raises:
        FileError: as `fit_picture`, but damage behind the head is not seen.
    """
    try:
        state = path.stat()
    except OSError:
        raise _refused("picture_missing", path, path.name) from None
    found = _picture_size(path, state.st_mtime_ns, state.st_size)
    if isinstance(found, FileError):
        raise found.with_traceback(None)
    return found


def adapt_size(request: Request) -> Request:
    """Adaptive Resolution: the same request in the picture's aspect and the resolution's area.

    Call it before the plan is made. A size of one's own ("custom") and a model with fixed sizes stay as they are.

    Raises:
        FileError: as `picture_size`.
    """
    if not (request.image and request.adaptive_resolution and request.spec.limits.free_size):
        return request
    if request.resolution == "custom":
        return request
    table_width, table_height = table_size(request.resolution, request.aspect)
    width, height = adaptive_size(*picture_size(Path(request.image)), table_width * table_height)
    return request.model_copy(update={"width": width, "height": height})


@lru_cache(maxsize=64)
def _picture_size(path: Path, mtime_ns: int, size_bytes: int) -> tuple[int, int] | FileError:
    """The size, or why there is none: a form asks a dozen times a second and a refusal costs a process too."""
    try:
        head, _ = _decode(path, {"want": "size"})
    except FileError as refused:
        return refused
    return head["width"], head["height"]


def _decode(path: Path, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    if not path.is_file():
        raise _refused("picture_missing", path, "a folder" if path.is_dir() else path.name)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise _refused("picture_too_large", path, f"a file of {path.stat().st_size >> 20} MiB")
    try:
        with path.open("rb") as file:
            run = subprocess.run(
                [sys.executable, "-P", str(DECODER), json.dumps(order)],
                stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TIMEOUT_S,
            )  # fmt: skip
    except OSError as error:
        raise _refused("picture_missing", path, error.strerror or "not readable") from None
    except subprocess.TimeoutExpired:
        raise _refused("picture_slow", path, path.name) from None
    return _answer(path, run)


def _answer(path: Path, run: subprocess.CompletedProcess[bytes]) -> tuple[dict[str, Any], bytes]:
    line, _, pixels = run.stdout.partition(b"\n")
    if run.returncode or not line:  # killed by a limit, or a decoder crashed
        raise _refused("picture_broken", path, f"the decoder ended with status {run.returncode}")
    head = json.loads(line)
    if "code" in head:
        raise _refused(head["code"], path, head["got"])
    return head, pixels


def _refused(code: str, path: Path, got: str) -> FileError:
    what, expected, try_instead = REFUSALS[code]
    got_text = got if got == path.name else f"{path.name}: {got}"
    return FileError(what, code=code, field="image", got=got_text, expected=expected, try_instead=try_instead)
