"""Every damage that shows in a frame is rejected: by decoding and comparing, even where no checksum helps."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.media.clips import SETTINGS, grain, shapes, write
from turbodiff.media.ffmpeg import ffmpeg_path
from turbodiff.media.fingerprints import LUMA, Bytes, fingerprint_rgb, psnr
from turbodiff.media.verify import verify_clip
from turbodiff.media.video import Written
from turbodiff.spec.errors import VerifyError
from turbodiff.spec.files import sha256_of

FRAMES = 13


@pytest.fixture(scope="module")
def sent() -> Bytes:
    return grain(FRAMES, 160, 112)


@pytest.fixture(scope="module")
def written(sent: Bytes, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(tmp_path_factory.mktemp("clip") / "good.mp4", sent)


def damaged(written: Written, data: bytes, path: Path) -> Written:
    """The same clip with other bytes; the checksum is brought up to date, so that only the frames can tell."""
    path.write_bytes(data)
    return replace(written, path=path, sha256=sha256_of(path))


def rejected(clip: Written) -> str:
    """The code of the rejection, "" where the clip is accepted."""
    try:
        verify_clip(clip)
    except VerifyError as error:
        assert error.field == "output" and error.try_instead
        return error.code
    return ""


def worst_luma_psnr_db(clip: Path, sent: Bytes) -> float:
    """Without fingerprints: every pixel of every frame that any decoder can still get out of the file."""
    out = ["-f", "rawvideo", "-vf", "extractplanes=y", "pipe:1"]
    run = subprocess.run([ffmpeg_path(), "-loglevel", "quiet", "-i", clip, *out], stdout=subprocess.PIPE)
    count, height, width, _ = sent.shape
    if len(run.stdout) != count * height * width:
        return 0.0
    luma = (np.frombuffer(run.stdout, np.uint8).reshape(count, height, width).astype(float) - 16) * 255 / 219
    return float(10 * np.log10(255**2 / np.square(luma - sent @ LUMA).mean(axis=(1, 2)).max()))


def test_fault_37_every_truncation_is_rejected(written: Written, tmp_path: Path) -> None:
    data = written.path.read_bytes()
    cuts = np.random.default_rng(0).integers(0, len(data) - 1, 20).tolist()
    accepted = [
        cut for cut in [0, 1, len(data) - 1, *cuts] if not rejected(damaged(written, data[:cut], tmp_path / "x"))
    ]
    assert accepted == []


def test_fault_37_every_damage_below_40_db_is_rejected(written: Written, sent: Bytes, tmp_path: Path) -> None:
    assert worst_luma_psnr_db(written.path, sent) > 41
    rng = np.random.default_rng(7)
    visible = 0
    for _ in range(25):
        data = bytearray(written.path.read_bytes())
        start, length = int(rng.integers(0, len(data))), int(rng.choice([1, 2, 16, 256]))
        zeroed = rng.random() < 0.5
        data[start : start + length] = bytes(0 if zeroed else byte ^ 0xFF for byte in data[start : start + length])
        clip = damaged(written, bytes(data), tmp_path / "x.mp4")
        if worst_luma_psnr_db(clip.path, sent) < 40:
            visible += 1
            assert rejected(clip), (start, length, zeroed)
    assert visible > 12, "the test must meet damages that show"


def test_a_byte_that_shows_nowhere_is_rejected_by_the_checksum(written: Written, tmp_path: Path) -> None:
    data = bytearray(written.path.read_bytes())
    data[data.index(b"Lavf")] ^= 1
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    assert rejected(replace(written, path=path)) == "clip_changed"


def other_frames(sent: Bytes, what: str) -> Bytes:
    frames = sent.copy()
    match what:
        case "another clip":
            return shapes(FRAMES, 160, 112)
        case "one frame brighter":
            frames[8] = np.clip(frames[8].astype(int) + 4, 0, 255)
        case "one block inverted":
            frames[8, 32:64, 32:64] = 255 - frames[8, 32:64, 32:64]
        case "another colour of the same luma":
            frames[8] = np.clip(frames[8].astype(float) + [30, -11.95, 30], 0, 255)
        case "swapped frames":
            frames[[3, 4]] = frames[[4, 3]]
        case "frame missing":
            return frames[:-1]
        case "frame too many":
            return np.concatenate((frames, frames[-1:]))
        case "wrong size":
            return grain(FRAMES, 176, 112)
    return frames


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("another clip", "clip_differs"),
        ("one frame brighter", "clip_differs"),
        ("one block inverted", "clip_differs"),
        ("another colour of the same luma", "clip_differs"),
        ("swapped frames", "clip_differs"),
        ("frame missing", "clip_frames"),
        ("frame too many", "clip_frames"),
        ("wrong size", "clip_size"),
        ("wrong rate", "clip_fps"),
        ("other settings", "clip_tags"),
    ],
)
def test_fault_36_a_perfect_file_of_something_else_is_rejected(
    written: Written, sent: Bytes, tmp_path: Path, what: str, code: str
) -> None:
    settings = {"request": {"seed": 43}} if what == "other settings" else SETTINGS
    fps = 15 if what == "wrong rate" else 16
    other = write(tmp_path / "x.mp4", other_frames(sent, what), fps=fps, settings=settings)
    assert rejected(replace(written, path=other.path, sha256=other.sha256)) == code


@pytest.mark.parametrize("content", [b"", b"no video", b"\0" * 5000])
def test_fault_37_a_file_that_is_no_clip_is_rejected(written: Written, tmp_path: Path, content: bytes) -> None:
    assert rejected(damaged(written, content, tmp_path / "x.mp4")) == "clip_broken"


def test_fault_37_a_missing_file_is_rejected(written: Written, tmp_path: Path) -> None:
    assert rejected(replace(written, path=tmp_path / "nothing.mp4")) == "clip_broken"


@pytest.mark.parametrize("damage", ["noise", "block", "blur", "shift"])
def test_a_fingerprint_measures_psnr_within_a_third_of_a_db(sent: Bytes, damage: str) -> None:
    frame, rng = sent[0], np.random.default_rng(3)
    other = frame.astype(float)
    if damage == "noise":
        other += rng.normal(0, 3, frame.shape)
    elif damage == "block":
        other[40:72, 40:72] += 40
    elif damage == "blur":
        other = (other + np.roll(other, 1, 0) + np.roll(other, 1, 1)) / 3
    else:
        other = np.roll(other, 1, 1)
    other = np.clip(other, 0, 255).astype(np.uint8)
    exact = 10 * np.log10(255**2 / np.square(frame @ LUMA - other @ LUMA).mean())
    assert psnr(fingerprint_rgb(frame), fingerprint_rgb(other)).luma_db == pytest.approx(exact, abs=0.3)
