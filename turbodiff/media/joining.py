"""A clip and its continuation as one: the frames of the first, then those of the second, in the first one's colours.

The continuation was made from the last frame of the clip before it, so its own first frame shows that picture again: it
is left out, what the model made of the picture's colours on the way is taken back from all that follow, and what else
it lost or added (a soft spot, a shade) goes over half a second instead of from one frame to the next.
numpy is imported where pixels are looked at: the front door imports this module.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from turbodiff.media.ffmpeg import Ffmpeg, source
from turbodiff.media.pictures import until_changed
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.request import Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from turbodiff.media.fingerprints import Bytes

FROM_BT709 = "scale=in_color_matrix=bt709:in_range=tv:out_range=pc:flags=accurate_rnd+full_chroma_int+full_chroma_inp"
# Beyond these the two pictures are not the same one, and matching would paint over what the prompt asked for
MOST_GAIN, MOST_OFFSET = 1.25, 24.0  # of a channel; levels of 255
LEAST_SPREAD = 1.0  # levels: below it a channel is flat, and only its offset says anything
ALIKE = 0.75  # share of the pixels that colours are told from: what moved or vanished differs most and says nothing
FADE_FRAMES = 8  # half a second at 16 frames a second
FADE_BLOCK = 8  # pixels: finer differences are edges, which would stand still while what they belong to moves


class ClipFormat(NamedTuple):
    """Pixels of a clip, and frames per second."""

    width: int
    height: int
    fps: int


class Tail(NamedTuple):
    """How many frames a clip has, and the last of them, uint8 RGB [H, W, 3]."""

    frames: int
    last: "Bytes"


@until_changed
def clip_format(clip: Path) -> ClipFormat:
    """Size and rate of a clip, from its first frame.

    Raises:
        FileError: field `continues`: there is no such clip, or nothing of it can be decoded.
    """
    out = ("-map", "0:v:0", "-frames:v", "1", "-f", "yuv4mpegpipe", "-pix_fmt", "yuv420p", "pipe:1")
    reader = Ffmpeg(("-nostdin", *source(clip), *out), feed=False)
    head = reader.stdout.readline(200).decode("ascii", "replace").split()
    reader.kill()
    told = {word[0]: word[1:] for word in head[1:]}
    try:
        over, _, under = told["F"].partition(":")
        return ClipFormat(int(told["W"]), int(told["H"]), round(int(over) / int(under)))
    except (KeyError, ValueError, ZeroDivisionError):
        raise FileError(
            "the clip to continue cannot be read", code="continues_unreadable", field="continues", got=clip.name,
            expected="an mp4 of this library", try_instead="another clip",
        ) from None  # fmt: skip


def check_format(request: Request) -> None:
    """Refuse a request whose frames cannot follow those of the clip that it continues.

    Raises:
        RequestError: field `continues`: another size or rate.
        FileError: as `clip_format`.
    """
    found = clip_format(Path(request.continues))
    if found != (request.width, request.height, request.fps):
        raise RequestError(
            "the clip to continue has another size or rate", code="continues_differs", field="continues",
            got=f"{request.width}x{request.height}, {request.fps} fps",
            expected=f"{found.width}x{found.height}, {found.fps} fps", try_instead="leave size and rate out",
        )  # fmt: skip


def read_frames(clip: Path) -> Iterator["Bytes"]:
    """Every frame of a clip, uint8 RGB [1, H, W, 3].

    Raises:
        FileError: as `clip_format`.
    """
    import numpy as np

    width, height, _ = clip_format(clip)
    out = ("-map", "0:v:0", "-fps_mode", "passthrough", "-vf", FROM_BT709, "-pix_fmt", "rgb24", "-f", "rawvideo")
    reader = Ffmpeg(("-nostdin", *source(clip), *out, "pipe:1"), feed=False)
    try:
        while len(data := reader.stdout.read(width * height * 3)) == width * height * 3:
            yield np.frombuffer(data, np.uint8).reshape(1, height, width, 3)
    finally:
        reader.kill()


@until_changed
def tail_of(clip: Path) -> Tail:
    """The end of a clip. Raises FileError: as `clip_format`."""
    count, last = 0, None
    for frame in read_frames(clip):
        count, last = count + 1, frame[0]
    assert last is not None, "clip_format has read a frame"
    return Tail(count, last)


def joined(before: Path, after: Iterable["Bytes"]) -> Iterator["Bytes"]:
    """The frames of the clip `before`, then those of its continuation but the first, each uint8 RGB [T, H, W, 3].

    Args:
        before: the clip; its last frame is the picture that `after` was made from.
        after: frames of the continuation in order, in chunks, of the same size. Drawn only when their turn comes.
    """
    last = None
    for frame in read_frames(before):
        last = frame[0]
        yield frame
    assert last is not None, "clip_format has read a frame"
    seam, shown = None, 0
    for chunk in after:
        if seam is None:  # the first frame of all shows the picture again
            seam, chunk = Seam.between(chunk[0], last), chunk[1:]
        if len(chunk):
            yield seam.mended(chunk, shown)
            shown += len(chunk)


class Seam(NamedTuple):
    """What a continuation's first frame made of the picture that it started from.

    Args:
        gain, offset: of each channel [3], float32; they bring its colours back to the picture's.
        rest: coarse differences that remain, float32 [H, W, 3].
    """

    gain: "NDArray[np.float32]"
    offset: "NDArray[np.float32]"
    rest: "NDArray[np.float32]"

    @classmethod
    def between(cls, made: "Bytes", picture: "Bytes") -> "Seam":
        """The seam between the frame that was `made` of a `picture`, both [H, W, 3].

        Mean and spread of each channel become those of the picture (Reinhard et al. 2001, "Color Transfer between
        Images", in RGB), as far as the pixels that are ALIKE tell, and within MOST_GAIN and MOST_OFFSET.
        """
        import numpy as np
        from PIL import Image

        one, other = made.astype(np.float32), picture.astype(np.float32)
        apart = np.abs(other - one - np.median(other - one, axis=(0, 1))).max(axis=2)
        alike = apart <= np.quantile(apart, ALIKE)
        (was, spread), (wanted, width) = [(pixels[alike].mean(0), pixels[alike].std(0)) for pixels in (one, other)]
        flat = np.minimum(spread, width) < LEAST_SPREAD
        gain = np.where(flat, 1, width / np.maximum(spread, LEAST_SPREAD)).clip(1 / MOST_GAIN, MOST_GAIN)
        # measured at the mean: from zero a gain would count as an offset
        offset = (wanted - was).clip(-MOST_OFFSET, MOST_OFFSET) + was * (1 - gain)
        height, across, _ = made.shape
        coarse = (max(1, across // FADE_BLOCK), max(1, height // FADE_BLOCK))
        planes = [Image.fromarray(plane) for plane in np.moveaxis(other - one * gain - offset, 2, 0)]
        small = [plane.resize(coarse, Image.Resampling.BOX) for plane in planes]
        rest = [plane.resize((across, height), Image.Resampling.BILINEAR) for plane in small]
        return cls(gain, offset, np.stack([np.asarray(plane) for plane in rest], axis=2))

    def mended(self, frames: "Bytes", number: int) -> "Bytes":
        """Frames uint8 [T, H, W, 3], the first of which is the `number`th (from 0) behind the seam."""
        import numpy as np

        left = 1 - np.arange(number + 1, number + 1 + len(frames), dtype=np.float32) / (FADE_FRAMES + 1)
        faded = left.clip(0)[:, None, None, None] * self.rest
        return (frames * self.gain + self.offset + faded).round().clip(0, 255).astype(np.uint8)
