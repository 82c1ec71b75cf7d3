"""Small clips to write and to damage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from turbodiff.media.fingerprints import Bytes
from turbodiff.media.video import ClipWriter, Written

SETTINGS: Mapping[str, Any] = {"request": {"prompt": "a red circle moves right", "seed": 42}}


def shapes(frames: int, width: int = 128, height: int = 128) -> Bytes:
    """A red circle that moves right on navy: saturated colours with hard edges."""
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[...] = (0, 0, 128)
    y, x = np.mgrid[:height, :width]
    for index, frame in enumerate(clip):
        frame[(x - width * (index + 1) / (frames + 1)) ** 2 + (y - height / 2) ** 2 < (height / 5) ** 2] = (255, 0, 0)
    return clip


def grain(frames: int, width: int, height: int) -> Bytes:
    """Soft colours that move under film grain: the hardest content that a video model makes."""
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    large = np.asarray(small.resize((width * 2, height * 2), Image.Resampling.BICUBIC), np.float32)
    moved = (large[2 * i : 2 * i + height, 3 * i : 3 * i + width] for i in range(frames))
    return np.stack([np.clip(view + rng.normal(0, 4, view.shape), 0, 255) for view in moved]).astype(np.uint8)


def write(
    path: Path, frames: Bytes, *, fps: int = 16, chunk: int = 4, settings: Mapping[str, Any] = SETTINGS
) -> Written:
    """A clip under `path`, written as the decoder would: chunk by chunk."""
    _, height, width, _ = frames.shape
    with ClipWriter(path, width, height, fps, settings, len(frames)) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])
    assert writer.written
    return writer.written
