"""An export has the frames that were asked for, in the format that was asked for, and is whole or not there."""

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.media.clips import shapes, write
from turbodiff.media import export as exporting
from turbodiff.media.ffmpeg import ffmpeg_path
from turbodiff.media.joining import clip_format
from turbodiff.media.pictures import frame
from turbodiff.spec.errors import FileError, OutputError, RequestError
from turbodiff.spec.exports import FORMATS, make_export

FRAMES, FPS = 17, 16


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("export") / "a clip 'x' 猫.mp4", shapes(FRAMES)).path


def made(clip: Path, folder: Path, **fields: object) -> Path:
    asked = make_export(fields)
    return exporting.export(clip, asked, folder / f"out{FORMATS[asked.format].suffix}")


def stream(path: Path) -> tuple[str, int]:
    """(what ffmpeg says of the picture stream, how many frames can be decoded)."""
    command = [ffmpeg_path(), "-hide_banner", "-i", str(path), "-map", "0:v:0", "-f", "framecrc", "-"]
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert ran.returncode == 0, ran.stderr
    told = re.search(r"Stream #0:\d.*?: Video: (.*)", ran.stderr)
    return told[1], sum(not line.startswith("#") for line in ran.stdout.splitlines())


@pytest.mark.parametrize(
    ("kind", "codec"),
    [("mp4", "h264"), ("h265", "hevc (Main 10)"), ("webm", "vp9"), ("gif", "gif"), ("prores", "prores (HQ)")],
)
def test_every_video_format_has_every_frame(clip, tmp_path, kind, codec):
    told, frames = stream(made(clip, tmp_path, format=kind))
    assert told.startswith(codec) and frames == FRAMES


def test_pictures_and_frames_are_those_of_the_clip(clip, tmp_path):
    first, last = (Image.open(made(clip, tmp_path, format=kind)).convert("RGB") for kind in ("first", "last"))
    with zipfile.ZipFile(made(clip, tmp_path, format="png")) as pack:
        names = pack.namelist()
        frames = [Image.open(pack.open(name)).convert("RGB") for name in (names[0], names[-1])]
    assert len(names) == FRAMES and [frame.tobytes() for frame in frames] == [first.tobytes(), last.tobytes()]
    webp = Image.open(made(clip, tmp_path, format="webp"))
    assert webp.n_frames == FRAMES and webp.size == first.size


def test_two_handles_cut_to_the_frame(clip, tmp_path):
    path = made(clip, tmp_path, format="png", start_s=4 / FPS, end_s=9 / FPS)
    (tmp_path / "whole").mkdir()
    with zipfile.ZipFile(path) as pack, zipfile.ZipFile(made(clip, tmp_path / "whole", format="png")) as whole:
        cut = [Image.open(pack.open(name)).tobytes() for name in pack.namelist()]
        assert cut == [Image.open(whole.open(name)).tobytes() for name in whole.namelist()[4:9]]


@pytest.mark.parametrize("fps", [24, 30, 60])
def test_frames_in_between_keep_the_length(clip, tmp_path, fps):
    told, frames = stream(made(clip, tmp_path, fps=fps))
    assert f"{fps} fps" in told
    assert abs(frames / fps - FRAMES / FPS) <= 1.5 / fps


def test_a_better_quality_is_a_larger_file(clip, tmp_path):
    for kind in ("mp4", "webm", "h265", "webp"):
        sizes = [made(clip, tmp_path, format=kind, quality=quality).stat().st_size for quality in (20, 95)]
        assert sizes[0] < sizes[1], kind


@pytest.mark.parametrize(
    "fields",
    [{"format": "avi"}, {"quality": 0}, {"quality": "x"}, {"fps": 25}, {"start_s": -1}, {"start_s": 2, "end_s": 1},
     {"format": None}, {"end_s": float("nan")}],
)  # fmt: skip
def test_what_is_no_export_is_refused_by_its_field(fields):
    with pytest.raises(RequestError) as refused:
        make_export(fields)
    assert refused.value.field in fields


def test_a_damaged_clip_and_limits_without_a_frame_are_refused_and_leave_nothing(clip, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(os.urandom(5000))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clip}\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    for source in ("bad.mp4", "list.mp4", "pipe.mp4", "absent.mp4"):
        with pytest.raises(FileError):
            made(tmp_path / source, tmp_path / "out")
    with pytest.raises(FileError):
        made(clip, tmp_path / "out", start_s=100)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_export_that_fails_leaves_the_older_file_as_it_was(clip, tmp_path, monkeypatch):
    old = made(clip, tmp_path, format="gif")
    before = old.read_bytes()
    monkeypatch.setattr(exporting, "PALETTE", "no_such_filter")
    with pytest.raises(OutputError):
        made(clip, tmp_path, format="gif", quality=10)
    assert old.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [old.name]

    def stopped(share: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        exporting.export(clip, make_export({}), tmp_path / "new.mp4", stopped)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]


def test_a_clip_that_names_other_files_is_refused_at_every_door(clip, tmp_path):
    """ffmpeg would take a playlist for what it lists, whatever the name of the file that it is in."""
    (tmp_path / "other.mp4").write_bytes(clip.read_bytes())
    listed = tmp_path / "listed.mp4"
    listed.write_text("ffconcat version 1.0\nfile other.mp4\n")
    doors = (lambda: made(listed, tmp_path), lambda: clip_format(listed), lambda: frame(listed, 0, tmp_path / "frames"))
    for door in doors:
        with pytest.raises(FileError):
            door()


def test_a_pipe_or_a_device_is_never_replaced_by_a_file(clip, tmp_path):
    os.mkfifo(tmp_path / "out.gif")
    with pytest.raises(OutputError):
        made(clip, tmp_path, format="gif")
    assert (tmp_path / "out.gif").is_fifo()
