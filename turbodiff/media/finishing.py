"""What is made of decoded frames before they become a file: frames in between, larger frames, by ffmpeg's filters.

Each takes raw frames from a file and gives raw frames, so that a network may stand in for either.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbodiff.media.ffmpeg import Ffmpeg
from turbodiff.media.fingerprints import Bytes
from turbodiff.spec.errors import OutputError
from turbodiff.spec.files import output_error

# bidirectional motion estimation, overlapped blocks of changing size; its guess at cuts (scd) would freeze fast motion
MOTION = "minterpolate=fps={fps}:mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1:scd=none"
LARGER = "scale=iw*{times}:ih*{times}:flags=lanczos+accurate_rnd+full_chroma_int"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RawFrames:
    """Frames uint8 RGB [frames, height, width, 3] in a file, one behind the other."""

    path: Path
    width: int
    height: int
    fps: int
    frames: int

    @classmethod
    def spill(cls, path: Path, chunks: Iterable[Bytes], width: int, height: int, fps: int) -> "RawFrames":
        """Write the frames of chunks uint8 [T, H, W, 3].

        Raises:
            OutputError: the disk is full, or cannot be written.
        """
        count = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for chunk in chunks:
                    assert chunk.dtype == np.uint8 and chunk.shape[1:] == (height, width, 3), chunk.shape
                    file.write(np.ascontiguousarray(chunk).data)
                    count += len(chunk)
        except OSError as error:
            raise output_error(path.parent, error.strerror or str(error)) from None
        return cls(path, width, height, fps, count)

    def __iter__(self) -> Iterator[Bytes]:
        """Each frame uint8 [1, H, W, 3]."""
        size = self.width * self.height * 3
        with self.path.open("rb") as file:
            while len(data := file.read(size)) == size:
                yield np.frombuffer(data, np.uint8).reshape(1, self.height, self.width, 3)


def frames_between(frames: int, fps: int, wanted: int) -> int:
    """How many frames so many at `fps` become at the rate `wanted`."""
    return max(1, round(frames * wanted / fps))


def interpolated(raw: RawFrames, wanted: int, progress: Progress) -> Iterator[Bytes]:
    """The frames at the rate `wanted`, motion-compensated, each uint8 [1, H, W, 3]: `frames_between` of them."""
    count = frames_between(raw.frames, raw.fps, wanted)
    # behind the last frame there is none to move to: it is repeated, so that nothing of the clip is cut off
    filters = f"tpad=stop_mode=clone:stop={2 + wanted // raw.fps},{MOTION.format(fps=wanted)}"
    if raw.frames == 1:
        filters = f"fps={wanted}"
    return _filtered(raw, filters, count, 1, progress)


def enlarged(raw: RawFrames, times: int, progress: Progress) -> Iterator[Bytes]:
    """The frames with their sides `times` as long, by Lanczos' filter, each uint8 [1, times H, times W, 3]."""
    return _filtered(raw, LARGER.format(times=times), raw.frames, times, progress)


def _filtered(raw: RawFrames, filters: str, count: int, times: int, progress: Progress) -> Iterator[Bytes]:
    """The first `count` frames that ffmpeg makes of these.

    Raises:
        OutputError: it failed.
    """
    size = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{raw.width}x{raw.height}", "-r", str(raw.fps))
    out = ("-vf", filters, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1")
    ffmpeg = Ffmpeg(("-nostdin", *size, "-i", f"file:{raw.path.absolute()}", *out), feed=False)
    height, width, made = raw.height * times, raw.width * times, 0
    try:
        while made < count and len(data := ffmpeg.stdout.read(height * width * 3)) == height * width * 3:
            made += 1
            progress(made, count)
            yield np.frombuffer(data, np.uint8).reshape(1, height, width, 3)
    except BaseException:
        ffmpeg.kill()
        raise
    if made == count:
        ffmpeg.kill()
        return
    _, errors = ffmpeg.finish()
    raise OutputError(
        "ffmpeg did not make all frames", code="finishing_failed", field=filters.partition("=")[0],
        got=errors[-200:] or f"{made} of {count}", try_instead="leave it out, or another IMAGEIO_FFMPEG_EXE",
    )  # fmt: skip
