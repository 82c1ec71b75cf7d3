"""Frames -> H.264 mp4, chunk by chunk as they leave the decoder, with the settings inside."""

import contextlib
import io
import json
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from turbodiff.media.ffmpeg import ENCODERS, Ffmpeg, encoder_for
from turbodiff.media.fingerprints import Bytes, Fingerprint, fingerprint_rgb
from turbodiff.media.tags import TAG
from turbodiff.spec.errors import OutputError
from turbodiff.spec.files import output_error, sha256_of, sync
from turbodiff.spec.request import Encoder
from turbodiff.spec.shapes import check_size

TO_BT709 = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+area"
BT709 = ("-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709", "-color_range", "tv")
QUEUED_CHUNKS = 2  # that wait for the encoder: it works on one while the next is made
POSTER_SIDE = 480  # pixels of the longer side
ESCAPE = str.maketrans({mark: f"\\{mark}" for mark in "=;#\\\n"})  # in ffmpeg's metadata format


@dataclass(frozen=True)
class Written:
    """A finished mp4 under its temporary name, and all that `verify_clip` needs to hold it to what was sent."""

    path: Path
    width: int
    height: int
    fps: int
    settings: str
    encoder: str
    sha256: str
    fingerprints: tuple[Fingerprint, ...]
    poster: bytes

    @property
    def frames(self) -> int:
        """How many frames were sent to the encoder."""
        return len(self.fingerprints)


class ClipWriter:
    """Streams RGB frames into an H.264 mp4 (yuv420p, BT.709, faststart) with the settings as JSON tags.

    A context manager: leaving it closes the file and sets `written`; leaving it by an exception removes the file. A
    thread of its own feeds the encoder, so that frames are made while the last ones are encoded.

    Args:
        path: a temporary name on the file system of the final one (see archive/clips.py: partial_path).
        width / height: pixels, multiples of 16.
        fps: frames per second.
        settings: what made the clip; stored as JSON in the tags `turbodiff` and `comment`.
        num_frames: frames to come; the poster is the middle one (the first where unknown).
        wish: what should encode; `encoder` is what does.

    Raises:
        FileError: from the constructor: no ffmpeg that encodes H.264.
        OutputError: from any method, field `output`: folder not writable, disk full, encoder failed. Nothing is left.
            What fails in the thread is raised by the next call.
    """

    def __init__(
        self, path: Path, width: int, height: int, fps: int, settings: Mapping[str, object], num_frames: int = 1,
        wish: Encoder = "cpu",
    ) -> None:  # fmt: skip
        check_size(width, height)
        self.encoder = encoder_for(wish)
        self.path, self.width, self.height, self.fps = path, width, height, fps
        self.written: Written | None = None
        self._settings = json.dumps(settings, ensure_ascii=False, separators=(",", ":"))
        self._poster_at = num_frames // 2
        self._poster = b""
        self._fingerprints: list[Fingerprint] = []
        text = self._settings.translate(ESCAPE)
        tags = os.memfd_create("clip-tags")  # the encoder reads the settings in ffmpeg's metadata format
        frames = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps))
        arguments = (
            "-y", *frames, "-i", "pipe:0", "-f", "ffmetadata", "-i", f"/dev/fd/{tags}", "-map", "0:v",
            "-map_metadata", "1", "-vf", TO_BT709, *ENCODERS[self.encoder], *BT709,
            "-movflags", "+faststart+use_metadata_tags", "-f", "mp4", str(path.absolute()),
        )  # fmt: skip
        try:
            os.write(tags, f";FFMETADATA1\ncomment={text}\n{TAG}={text}\n".encode())
            os.lseek(tags, 0, os.SEEK_SET)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb"):  # says why before a frame is made, in the system's own words
                pass
            self._ffmpeg = Ffmpeg(arguments, feed=True, inherit=(tags,))
        except OSError as error:
            raise output_error(path.parent, error.strerror or str(error)) from None
        finally:
            os.close(tags)
        self._chunks: queue.Queue[Bytes | None] = queue.Queue(QUEUED_CHUNKS)  # None: no more come
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._encode, name="mp4", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._ffmpeg.kill()  # what the thread is writing fails, the rest is dropped
            self._end()
            self.path.unlink(missing_ok=True)

    def write(self, frames: Bytes) -> None:
        """Append frames, uint8 RGB [T, H, W, 3], which stay as they are; waits only while QUEUED_CHUNKS wait before."""
        assert frames.dtype == np.uint8 and frames.shape[1:] == (self.height, self.width, 3), frames.shape
        self._chunks.put(frames)
        self._raise_failure()

    def _encode(self) -> None:
        """The thread: what comes goes to the encoder until None comes; after a failure it is dropped."""
        while (frames := self._chunks.get()) is not None:
            if self._failure is None:
                try:
                    self._encode_frames(frames)
                except Exception as error:  # noqa: BLE001 - raised again by the caller's next call
                    self._failure = error

    def _encode_frames(self, frames: Bytes) -> None:
        for frame in np.ascontiguousarray(frames):
            if len(self._fingerprints) == self._poster_at:
                picture, jpeg = Image.fromarray(frame), io.BytesIO()
                picture.thumbnail((POSTER_SIDE, POSTER_SIDE))
                picture.save(jpeg, "JPEG", quality=85)
                self._poster = jpeg.getvalue()
            self._fingerprints.append(fingerprint_rgb(frame))
            self._ffmpeg.stdin.write(frame.data)

    def _end(self) -> None:
        """Wait until the thread is done with what it was given."""
        self._chunks.put(None)
        self._thread.join()

    def _raise_failure(self) -> None:
        if isinstance(self._failure, OSError):
            raise self._failed() from None
        if self._failure is not None:
            raise self._failure

    def close(self) -> Written:
        """Finish the file and bring it to the disk."""
        assert self.written is None, "closed twice"
        self._end()
        self._raise_failure()
        assert self._fingerprints, "a clip has at least one frame"
        with contextlib.suppress(OSError):  # a broken pipe here shows in the exit status
            self._ffmpeg.stdin.flush()
        status, errors = self._ffmpeg.finish()
        if status or errors:
            raise self._failed(errors)
        try:
            sync(self.path)
            sha256 = sha256_of(self.path)
        except OSError as error:
            raise self._failed(str(error)) from None
        self.written = Written(
            self.path, self.width, self.height, self.fps, self._settings, self.encoder, sha256,
            tuple(self._fingerprints), self._poster,
        )  # fmt: skip
        return self.written

    def _failed(self, errors: str | None = None) -> OutputError:
        if errors is None:
            _, errors = self._ffmpeg.finish()
        self.path.unlink(missing_ok=True)
        return output_error(self.path.parent, errors)
