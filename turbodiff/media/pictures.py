"""A person's picture: its first frame in the size of the clip, what it proposes for the run, a small preview.

The bytes are decoded by decode_picture.py in a process of its own, within limits. A clip is ours and is read by ffmpeg.
numpy and PIL are imported where pixels are looked at: the front door imports this module.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, cast

from turbodiff.media.ffmpeg import Ffmpeg, source
from turbodiff.spec.errors import FileError
from turbodiff.spec.files import STEM_BYTES, cut_name, open_file
from turbodiff.spec.request import Fit, Request
from turbodiff.spec.shapes import adaptive_size, table_size

if TYPE_CHECKING:
    from turbodiff.media.fingerprints import Bytes

F = TypeVar("F", bound=Callable[..., object])

DECODER = ("-P", "-m", "turbodiff.media.decode_picture")
MAX_FILE_BYTES = 128 << 20  # 64 megapixels of a noisy photograph take 105 MiB as a PNG
TIMEOUT_S = 120  # the decoder's own limit is 20 s of CPU; a busy machine may need longer for that
PREVIEW_SIDE = 360  # pixels of the longer side of a preview
LOOK_SIDE = 128  # pixels of the picture that the advisor looks at

# What is said about each way a picture can be wrong: what, expected, try instead
REFUSALS = {
    "picture_missing": ("the picture does not exist", "a file", "another path"),
    "picture_unreadable": ("the picture cannot be read", "a file that this user may read", "another path"),
    "picture_kind": ("not a picture of a known kind", "PNG, JPEG, WebP or GIF", "save it as PNG or JPEG"),
    "picture_too_large": ("the picture is too large", "at most 64 megapixels", "scale it down to 4000 pixels a side"),
    "picture_memory": (
        "decoding the picture takes too much memory",
        "at most 200 MiB",
        "save it as PNG or as a JPEG that is not progressive, or scale it down to 4000 pixels a side",
    ),
    "picture_too_small": ("the picture is too small", "at least 16 pixels a side", "a larger picture"),
    "picture_broken": ("the picture is damaged", "a whole picture", "open it in a viewer and save it again"),
    "picture_colours": (
        "the picture's colours cannot be converted to those of a clip",
        "SDR in any RGB space",
        "save it as sRGB (SDR)",
    ),
    "picture_slow": ("decoding the picture takes too long", f"at most {TIMEOUT_S} s", "save it as PNG or JPEG"),
}

# The advisor: a low boundary gives the high-noise expert more of the steps. Motion is freer, which a picture with one
# large, smooth subject (a close portrait, a plain background) carries without falling apart; a busy scene needs the
# low-noise expert sooner, which keeps its detail. 0.9 is Wan2.2's own value, 0.7 what users of TurboDiffusion settle on
# for portraits. It proposes, whoever sets a value keeps it.
CALM_BOUNDARY, BUSY_BOUNDARY = 0.7, 0.9
SIDE = 64  # pixels of the thumbnail that is looked at
EDGE = 24.0  # step of luma, of 255, between neighbours from which on people see an edge
BINS = 8  # per colour channel, for the entropy: 512 colours
BUSY_EDGES = 0.12  # share of pixels on an edge: below it portraits and plain backgrounds lie, above it crowds, foliage
BUSY_ENTROPY_BITS = 5.5  # of at most 9
QUIET_BORDER_EDGES = 0.05  # a subject before an empty border is a portrait however detailed it is itself
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
AdviceKey = Literal["advice_plain_background", "advice_close_portrait", "advice_busy_scene"]


class Fitted(NamedTuple):
    """A picture in the size of the clip, uint8 RGB [H, W, 3], and the size it came in (upright)."""

    pixels: "Bytes"
    source_width: int
    source_height: int


class Look(NamedTuple):
    """Size of a picture held upright, and what its content proposes; `key` and `numbers` say why."""

    width: int
    height: int
    boundary: float
    sampler: Literal["sde", "ode"]
    key: AdviceKey
    numbers: dict[str, float]


def until_changed(read: F) -> F:
    """Remember what `read(path, *more)` makes of a picture, a refusal included, until the file changes.

    A form asks a dozen times a second, and every answer costs a process.
    """

    @lru_cache(maxsize=64)
    def answer(path: Path, _state: tuple[int, int], *more: Hashable) -> object:
        try:
            return read(path, *more)
        except FileError as refused:
            return refused.to_keep()

    @wraps(read)
    def current(path: Path, *more: Hashable) -> object:
        try:
            stat = path.stat()
            state = stat.st_mtime_ns, stat.st_size
        except OSError:
            state = 0, 0  # the decoder says that it is missing
        found = answer(path, state, *more)
        if isinstance(found, FileError):
            raise found.with_traceback(None)
        return found

    return cast(F, current)


def fit_picture(path: Path, width: int, height: int, fit: Fit, background: str = "white") -> Fitted:
    """A picture file in exactly `width` x `height` pixels: cropped, padded or stretched as `fit` says.

    Args:
        background: colour ("white", "#102030") behind transparency and around a padded picture.

    Raises:
        FileError: field `image`: missing, not a picture, damaged, too large or too small.
    """
    import numpy as np

    wanted = {"want": "fit", "fit": fit, "background": background, "width": width, "height": height}
    source_width, source_height, pixels = _decode(path, wanted)
    return Fitted(np.frombuffer(pixels, np.uint8).reshape(height, width, 3), source_width, source_height)


@until_changed
def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture held upright, from its head alone.

    Raises:
        FileError: as `fit_picture`, but damage behind the head is not seen.
    """
    width, height, _ = _decode(path, {"want": "size"})
    return width, height


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


@until_changed
def look(picture: Path) -> Look:
    """What a picture proposes for its image-to-video run.

    Decided by the share of pixels on a visible edge (in all, and in the outer eighth) and by the Shannon entropy of the
    colours in 512 bins. The sampler is always SDE: from a picture, ODE keeps noise in the first frames
    (TurboDiffusion's own default).

    Raises:
        FileError: field `image`: not a picture that can be used.
    """
    import numpy as np
    from PIL import Image

    pixels, width, height = fit_picture(picture, LOOK_SIDE, LOOK_SIDE, "stretch")
    small = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    luma = small @ np.array(LUMA)
    is_edge = np.zeros(luma.shape, bool)
    is_edge[:, 1:] |= np.abs(np.diff(luma, axis=1)) > EDGE
    is_edge[1:, :] |= np.abs(np.diff(luma, axis=0)) > EDGE
    inside = np.zeros(luma.shape, bool)
    inside[SIDE // BINS : -(SIDE // BINS), SIDE // BINS : -(SIDE // BINS)] = True
    edges, border = float(is_edge.mean()), float(is_edge[~inside].mean())
    bins = (small.astype(np.uint8) // (256 // BINS)).astype(np.int64)
    counts = np.bincount((bins @ np.array([BINS**2, BINS, 1])).ravel())
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log2(shares)).sum())
    numbers = {"edges": round(edges, 3), "border_edges": round(border, 3), "entropy_bits": round(entropy, 2)}
    boundary, key = BUSY_BOUNDARY, cast("AdviceKey", "advice_busy_scene")
    if border < QUIET_BORDER_EDGES:
        boundary, key = CALM_BOUNDARY, "advice_plain_background"
    elif edges < BUSY_EDGES and entropy < BUSY_ENTROPY_BITS:
        boundary, key = CALM_BOUNDARY, "advice_close_portrait"
    return Look(width, height, boundary, "sde", key, numbers)


@until_changed
def preview(picture: Path, width: int, height: int, fit: Fit) -> bytes:
    """What fitting to `width` x `height` makes of a picture, small, as a JPEG.

    Raises:
        FileError: as `look`.
    """
    from PIL import Image

    share = min(1.0, PREVIEW_SIDE / max(width, height))
    fitted = fit_picture(picture, max(1, round(width * share)), max(1, round(height * share)), fit)
    data = io.BytesIO()
    Image.fromarray(fitted.pixels).save(data, "JPEG", quality=82)
    return data.getvalue()


def frame(clip: Path, number: int, into: Path) -> Path:
    """Frame `number` (from 0) of a clip of the library as a PNG in the folder `into`.

    Raises:
        FileError: the clip has no such frame or cannot be read.
    """
    choice = f"select=eq(n\\,{number})"  # the comma is ffmpeg's separator of filters: it is escaped within one
    out = ("-frames:v", "1", "-c:v", "png", "-f", "image2pipe", "-")
    reader = Ffmpeg(("-nostdin", *source(clip), "-vf", choice, *out), feed=False)
    png = reader.stdout.read()
    status, words = reader.finish()
    if status or not png:
        raise FileError(
            "the clip has no such frame", code="frame_missing", field="frame", got=words[-200:] or number,
            expected="a frame of the clip", try_instead="another frame",
        )  # fmt: skip
    into.mkdir(parents=True, exist_ok=True)
    made = into / f"{cut_name(clip.stem, STEM_BYTES)}-frame{number}.png"
    made.write_bytes(png)
    return made


def _decode(path: Path, wanted: Mapping[str, object]) -> tuple[int, int, bytes]:
    """Width and height of the upright picture, and the pixels that are wanted; see decode_picture.py."""
    try:
        with open_file(path) as file:
            if (nbytes := os.fstat(file.fileno()).st_size) > MAX_FILE_BYTES:
                raise _refused("picture_too_large", path, f"a file of {nbytes >> 20} MiB")
            run = subprocess.run(
                [sys.executable, *DECODER, json.dumps(wanted)],
                stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TIMEOUT_S,
            )  # fmt: skip
    except (FileNotFoundError, NotADirectoryError):
        raise _refused("picture_missing", path, path.name) from None
    except OSError as error:
        raise _refused("picture_unreadable", path, error.strerror or "not readable") from None
    except subprocess.TimeoutExpired:
        raise _refused("picture_slow", path, path.name) from None
    line, _, pixels = run.stdout.partition(b"\n")
    if run.returncode or not line:  # killed by a limit, or a decoder crashed
        raise _refused("picture_broken", path, f"the decoder ended with status {run.returncode}")
    head = json.loads(line)
    if "code" in head:
        raise _refused(head["code"], path, head["got"])
    return head["width"], head["height"], pixels


def _refused(code: str, path: Path, got: str) -> FileError:
    what, expected, try_instead = REFUSALS[code]
    got_text = got if got == path.name else f"{path.name}: {got}"
    return FileError(what, code=code, field="image", got=got_text, expected=expected, try_instead=try_instead)
