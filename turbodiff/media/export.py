"""A clip in another format, by ffmpeg: whole or trimmed, with frames between its frames where a rate is asked for.

In between frames are ffmpeg's `minterpolate`: motion-compensated, nothing to download, slow on large pictures.
"""

import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from turbodiff.media.ffmpeg import Ffmpeg, source
from turbodiff.media.finishing import LARGER, MOTION
from turbodiff.spec.errors import FileError
from turbodiff.spec.exports import FORMATS, Export
from turbodiff.spec.files import atomic_write, check_file, output_error

Progress = Callable[[float], None]
PALETTE = "split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse=dither=bayer:bayer_scale=3"
TAGS = ("-map_metadata", "0")
MP4 = (*TAGS, "-movflags", "+faststart+use_metadata_tags", "-f", "mp4")


def export(clip: Path, asked: Export, target: Path, on_progress: Progress = lambda share: None) -> Path:
    """Write an export under the name `target`, which is whole or not there; an older file of that name is replaced.

    Raises:
        FileError: the clip cannot be read, or has no frame within the limits.
        OutputError: the target cannot be written, field `output`.
    """
    try:
        check_file(target)  # a pipe or a device would be replaced by a file, /dev/null as well
    except OSError as error:
        raise output_error(target, error.strerror or str(error)) from None
    frames, fps = _measure(clip)
    first, end = round(asked.start_s * fps), min(frames, round(asked.end_s * fps) or frames)
    if first >= end:
        raise FileError(
            "no frame of the clip is within these limits", code="export_empty", field="start_s",
            got=f"{asked.start_s:g}", expected=f"0..{(frames - 1) / fps:.2f}",
        )  # fmt: skip
    moves = FORMATS[asked.format].moves
    if not moves:
        first, end = (first, first + 1) if asked.format == "first" else (end - 1, end)
    chain = [f"trim=start_frame={first}:end_frame={end}", "setpts=PTS-STARTPTS"]
    wanted = asked.fps if moves else 0
    if wanted and end - first > 1:
        # its last frame has none after it to move to: repeated, so that nothing of the clip is cut off
        chain += ["tpad=stop_mode=clone:stop=2", MOTION.format(fps=wanted), f"trim=end={(end - first) / fps:.6f}"]
    chain += [LARGER.format(times=asked.upscale)] if asked.upscale > 1 else []
    if asked.format == "gif":
        chain.append(PALETTE)
    number = (end - first) * (wanted / fps if wanted else 1)
    pictures = tempfile.TemporaryDirectory(prefix="turbodiff-export-")
    try:
        with pictures as folder, atomic_write(target, durable=True) as part:
            goal = Path(folder) / "%06d.png" if asked.format == "png" else part
            _run(clip, ",".join(chain), _codec(asked), goal, number, on_progress)
            if asked.format == "png":
                with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as pack:
                    for picture in sorted(Path(folder).iterdir()):
                        pack.write(picture, f"{clip.stem}/{picture.name}")
    except OSError as error:
        raise output_error(target.parent, error.strerror or str(error)) from None
    return target


def _codec(asked: Export) -> tuple[str, ...]:
    """Options of the encoder; quality 1..100 becomes the codec's own scale, 80 a good one on each."""
    loss = (100 - asked.quality) / 100  # 0 is the best
    match asked.format:
        case "mp4":
            return (
                "-c:v",
                "libx264",
                "-preset",
                "medium",
                "-crf",
                f"{12 + 30 * loss:.0f}",
                "-pix_fmt",
                "yuv420p",
                *MP4,
            )
        case "h265":
            crf = ("-crf", f"{14 + 30 * loss:.0f}", "-pix_fmt", "yuv420p10le", "-tag:v", "hvc1")
            return ("-c:v", "libx265", "-preset", "medium", *crf, "-x265-params", "log-level=none", *MP4)
        case "webm":
            crf = ("-crf", f"{16 + 40 * loss:.0f}", "-b:v", "0", "-pix_fmt", "yuv420p")
            return (
                "-c:v",
                "libvpx-vp9",
                *crf,
                "-row-mt",
                "1",
                "-deadline",
                "good",
                "-cpu-used",
                "2",
                *TAGS,
                "-f",
                "webm",
            )
        case "webp":
            return ("-c:v", "libwebp_anim", "-quality", str(asked.quality), "-loop", "0", "-f", "webp")
        case "gif":
            return ("-loop", "0", "-f", "gif")
        case "prores":
            return (
                "-c:v",
                "prores_ks",
                "-profile:v",
                "3",
                "-vendor",
                "apl0",
                "-pix_fmt",
                "yuv422p10le",
                *TAGS,
                "-f",
                "mov",
            )
        case "png":
            return ("-c:v", "png", "-f", "image2")
    return ("-c:v", "png", "-f", "image2", "-update", "1")


def _run(clip: Path, filters: str, codec: tuple[str, ...], goal: Path, frames: float, on_progress: Progress) -> None:
    graph = ("-filter_complex", f"[0:v:0]{filters}[out]", "-map", "[out]", "-an")
    out = (*graph, "-progress", "pipe:1", *codec, f"file:{goal.absolute()}")
    ffmpeg = Ffmpeg(("-nostdin", "-y", *source(clip), *out), feed=False)
    try:
        for line in ffmpeg.stdout:
            if done := re.fullmatch(rb"frame=\s*(\d+)\s*", line):
                on_progress(min(1.0, int(done[1]) / max(1.0, frames)))
    except BaseException:
        ffmpeg.kill()
        raise
    status, errors = ffmpeg.finish()
    if status:
        raise output_error(goal.parent, errors)


def _measure(clip: Path) -> tuple[int, float]:
    """(frames, frames per second) of a clip, counted: what an index says proves nothing.

    Raises:
        FileError: there is no such clip, or nothing of it can be decoded.
    """
    frames, rate, said = 0, None, ""
    try:
        check_file(clip)
        clip.stat()
        reader = Ffmpeg(("-nostdin", *source(clip), "-map", "0:v:0", "-f", "framecrc", "pipe:1"), feed=False)
        for line in reader.stdout:  # "#tb 0: 1/16", then a line a frame
            rate = re.match(rb"#tb 0: (\d+)/(\d+)", line) or rate
            frames += not line.startswith(b"#")
        _, said = reader.finish()
    except OSError as error:
        said = error.strerror or str(error)
    if not frames or rate is None or not int(rate[1]):
        raise FileError(
            "the clip cannot be read",
            code="clip_unread",
            field=clip.name,
            got=said.splitlines()[-1][:200] if said else "",
        )
    return frames, int(rate[2]) / int(rate[1])
