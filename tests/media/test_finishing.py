"""Frames in between and larger frames: how many, where what moves is, and what a failure says."""

from pathlib import Path

import numpy as np
import pytest

from turbodiff.media.finishing import RawFrames, enlarged, frames_between, interpolated
from turbodiff.spec.errors import OutputError

WIDTH, HEIGHT, FPS = 96, 64, 16


def moving(count):
    """A white square of 20 pixels that moves four pixels a frame over black."""
    frames = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    for number in range(count):
        frames[number, 20:40, 4 * number : 4 * number + 20] = 255
    return frames


def spilled(folder, frames):
    return RawFrames.spill(folder / "raw", [frames[:3], frames[3:]], WIDTH, HEIGHT, FPS)


def centre(frame):
    return float((frame[..., 0].sum(0) @ np.arange(frame.shape[1])) / frame[..., 0].sum())


def test_raw_frames_come_back_in_order(tmp_path):
    frames = moving(9)
    raw = spilled(tmp_path, frames)
    assert raw.frames == 9 and np.array_equal(np.concatenate(list(raw)), frames)


@pytest.mark.parametrize(("wanted", "count"), [(24, 26), (30, 32), (60, 64)])
def test_a_clip_at_another_rate_is_as_long_and_moves_as_evenly(tmp_path, wanted, count):
    told = []
    made = np.concatenate(list(interpolated(spilled(tmp_path, moving(17)), wanted, lambda *at: told.append(at))))
    assert len(made) == count == frames_between(17, FPS, wanted)
    assert told[-1] == (count, count)
    places = np.array([centre(frame) for frame in made[2 : count - 5]])
    assert np.abs(np.diff(places) - 4 * FPS / wanted).max() < 2  # pixels: no frame stands still, none jumps


def test_one_frame_is_held(tmp_path):
    raw = RawFrames.spill(tmp_path / "raw", [moving(1)], WIDTH, HEIGHT, FPS)
    assert len(list(interpolated(raw, 60, lambda *_: None))) == 4


def test_enlarged_frames_show_the_same_at_twice_the_side(tmp_path):
    frames = moving(5)
    made = np.concatenate(list(enlarged(spilled(tmp_path, frames), 2, lambda *_: None)))
    assert made.shape == (5, 2 * HEIGHT, 2 * WIDTH, 3)
    small = made.reshape(5, HEIGHT, 2, WIDTH, 2, 3).mean((2, 4))
    assert np.abs(small - frames).mean() < 3


def test_frames_that_ffmpeg_cannot_read_are_an_error(tmp_path):
    raw = spilled(tmp_path, moving(5))
    raw.path.write_bytes(b"\0" * 100)
    with pytest.raises(OutputError, match="did not make all frames"):
        list(enlarged(raw, 2, lambda *_: None))


def test_a_full_disk_is_said():
    frames = np.zeros((99, HEIGHT, WIDTH, 3), np.uint8)
    with pytest.raises(OutputError):
        RawFrames.spill(Path("/dev/full"), [frames], WIDTH, HEIGHT, FPS)
