"""A clip and its continuation as one: no frame doubled, none lost, the colours of the first, nothing that pops."""

from pathlib import Path

import numpy as np
import pytest

from tests.media.clips import grain, shapes, write
from turbodiff.media.fingerprints import Bytes
from turbodiff.media.joining import FADE_FRAMES, ClipFormat, check_format, clip_format, joined, read_frames, tail_of
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.request import make_request


def read(clip: Path) -> Bytes:
    return np.concatenate(list(read_frames(clip)))


def join(before: Path, after: Bytes, chunk: int = 4) -> Bytes:
    cut = (after[start : start + chunk] for start in range(0, len(after), chunk))
    return np.concatenate(list(joined(before, cut)))


def apart(frames: Bytes) -> np.ndarray:
    """How far each frame is from the one before it, in levels."""
    return np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))


@pytest.mark.parametrize(("one", "two", "chunk"), [(1, 1, 1), (5, 1, 1), (5, 9, 1), (17, 13, 4), (3, 8, 30)])
def test_the_frame_that_both_show_is_there_once(tmp_path: Path, one: int, two: int, chunk: int) -> None:
    whole = grain(one + two - 1, 128, 96)
    write(tmp_path / "before.mp4", whole[:one])
    frames = join(tmp_path / "before.mp4", whole[one - 1 :], chunk)
    assert len(frames) == one + two - 1
    assert np.array_equal(frames[:one], read(tmp_path / "before.mp4"))
    for got, sent in zip(frames[one:].astype(int), whole[one:], strict=True):  # what the encoder did to the seam
        assert np.abs(got - sent).mean() < 2


def test_what_the_encoder_wrote_is_what_comes_back(tmp_path: Path) -> None:
    frames = shapes(5)
    write(tmp_path / "clip.mp4", frames)
    assert np.abs(read(tmp_path / "clip.mp4").astype(int) - frames).mean() < 2
    count, last = tail_of(tmp_path / "clip.mp4")
    assert count == 5 and np.array_equal(last, read(tmp_path / "clip.mp4")[-1])


def test_colours_that_the_model_shifted_come_back_and_stay(tmp_path: Path) -> None:
    whole = grain(40, 128, 96)
    write(tmp_path / "before.mp4", whole[:8])
    shifted = (whole[7:] * np.array([0.9, 1.0, 1.08]) + np.array([9, -6, 4])).round().clip(0, 255).astype(np.uint8)
    frames = join(tmp_path / "before.mp4", shifted)
    assert np.abs(shifted[1:].astype(int) - whole[8:]).mean() > 5
    assert np.abs(frames[8:12].astype(int) - whole[8:12]).mean() < 3
    assert np.abs(frames[-4:].astype(int) - whole[-4:]).mean() < 3  # long after what is left has faded


def test_what_moved_says_nothing_of_the_colours(tmp_path: Path) -> None:
    write(tmp_path / "before.mp4", shapes(9)[:5])
    other = shapes(9)[4:].copy()
    other[:, :40, :40] = (255, 255, 255)  # something new, a tenth of the picture
    frames = join(tmp_path / "before.mp4", other)
    assert np.abs(frames[-1][100:, :20].astype(int) - (0, 0, 128)).max() <= 6


def test_a_soft_spot_that_the_model_forgets_fades_and_does_not_pop(tmp_path: Path) -> None:
    still = np.full((6, 64, 64, 3), 40, np.uint8)
    still[:, :32, :32] = 80
    write(tmp_path / "before.mp4", still)
    forgot = np.full((30, 64, 64, 3), 40, np.uint8)
    steps = apart(join(tmp_path / "before.mp4", forgot))
    popped = apart(np.concatenate([still[-1:], forgot[:1]]))[0]
    assert steps.max() < 2 * popped / FADE_FRAMES
    assert steps[5 + FADE_FRAMES + 1 :].max() == 0


def test_a_clip_of_another_size_or_rate_is_refused_before_anything_runs(tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4", shapes(3), fps=12)
    assert clip_format(tmp_path / "clip.mp4") == ClipFormat(128, 128, 12)
    asked = {"prompt": "-", "model": "demo-i2v", "continues": str(tmp_path / "clip.mp4")}
    check_format(make_request({**asked, "fps": 12}))
    with pytest.raises(RequestError, match="another size or rate"):
        check_format(make_request(asked))


@pytest.mark.parametrize("content", [None, b"", b"GIF89a", bytes(4096)])
def test_what_is_no_clip_is_an_error_of_its_field(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(FileError) as error:
        clip_format(tmp_path / "clip.mp4")
    assert (error.value.code, error.value.field) == ("continues_unreadable", "continues")
