"""Continue: three demo segments as one clip, whose seams are no larger than what happens inside a segment."""

import shutil
from pathlib import Path

import numpy as np

from turbodiff.media.joining import read_frames
from turbodiff.spec.models import Inventory
from turbodiff.studio.longer_clips import continuing_fields

ROWS = (("right", 1), ("left", 2), ("down", 3))
FRAMES = 17


def test_three_segments_are_one_clip_of_49_frames_without_a_jump(product, tmp_path: Path) -> None:
    clip = None
    for way, seed in ROWS:
        prompt = f"a red circle moves {way} on a black background"
        fields = {"prompt": prompt, "seed": seed, "model": "demo", "num_frames": FRAMES}
        product.clip(continuing_fields({**fields, "continues": str(clip)}, Inventory()) if clip else fields)
        clip = tmp_path / f"{way}.mp4"
        shutil.copyfile(product.folder / "clip.mp4", clip)
    frames = np.concatenate(list(read_frames(clip))).astype(float)
    assert len(frames) == 3 * FRAMES - 2
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert steps.min() > 0.2  # a doubled frame would not move at all
    seams, inside = (FRAMES - 1, 2 * FRAMES - 2), np.delete(steps, (FRAMES - 1, 2 * FRAMES - 2))
    for seam in seams:
        assert steps[seam] <= inside[seam - FRAMES + 1 : seam + FRAMES - 1].max(), steps.round(2)
    # the red of the first segment is the red of the last: a drift would add up
    red = [frame[(frame[..., 0] > 150)].mean(0) for frame in frames[[8, 44]]]
    assert np.abs(red[0] - red[1]).max() < 12, red
