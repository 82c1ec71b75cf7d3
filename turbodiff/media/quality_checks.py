"""What a correctly written clip may still look like: all black, frozen, noisy at its start. It is kept with a warning.

Everything is read off the fingerprints that the writer makes of every frame anyway. Measured 2026-11, on clips of the
demo model and its VAE (128x128) and on footage at 480p:

    largest grain of the first quarter / of the rest, levels: 30 good clips 0.0-0.3 / 0.0-0.9; noise in the first latent
    frame of sigma 0.8 (a few specks) 0.2-0.6 / 0.1, of sigma 1.5 (plainly seen) 3.4-9.6 / 0.0-1.3
    change of the block that changes most, levels: good clips 41-240, slow footage 28-41, a small thing far away 15-40;
    still latents 7, still footage 0.5, constant frames 0
    first frame against the clean one, finer than a block: sigma 0.8 3-6, sigma 1.5 12-15 levels
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from turbodiff.media.fingerprints import Fingerprint, psnr
from turbodiff.prompt.lint import asks_for_stillness

QualityWarning = Literal["black", "frozen", "noisy_start"]

BLACK_LUMA = 4.0  # no block of any frame is brighter, of 255
FROZEN_LEVELS = 8.0  # no block of the thumbnail changes by more over the whole clip
GRAIN_LEVELS = 2.0  # of noise beyond what the rest has; a third of it is hardly seen
GRAIN_TIMES = 1.8  # texture that comes and goes stays below
PICTURE_LEVELS = 20.0  # between first frame and picture, finer than a block; a VAE's own blur costs 5 to 16


def quality_warnings(
    frames: Sequence[Fingerprint], picture: Fingerprint | None = None, prompt: str = ""
) -> Iterator[QualityWarning]:
    """What may be wrong with the look of a clip.

    "black": nothing can be seen in any frame. "frozen": no part of the picture changes from the first frame to the
    last. "noisy_start": the first quarter has noise that the rest has not, or the first frame noise that its picture
    has not.

    Args:
        frames: fingerprints of every frame, in order.
        picture: of the picture that the clip starts from, at the clip's size.
        prompt: who asks for stillness gets it without a remark.
    """
    luma = np.stack([frame.thumbnail[..., 0] for frame in frames])
    if luma.max() < BLACK_LUMA:
        yield "black"
    if len(frames) > 1 and float(np.ptp(luma, axis=0).max()) < FROZEN_LEVELS and not asks_for_stillness(prompt):
        yield "frozen"
    first, grain = math.ceil(len(frames) / 4), [frame.grain for frame in frames]
    noisy = len(frames) > 1 and _is_grainier(max(grain[:first]), max(grain[first:]))
    if picture is not None and not noisy:
        # root mean square of what differs within the blocks of the thumbnails: detail and noise, not light or colour
        whole = 255**2 / 10 ** (psnr(frames[0], picture).luma_db / 10)
        blocks = float(np.square(frames[0].thumbnail[..., 0] - picture.thumbnail[..., 0]).mean())
        fine = math.sqrt(max(0.0, whole - blocks))
        noisy = _is_grainier(grain[0], picture.grain) or fine > PICTURE_LEVELS
    if noisy:
        yield "noisy_start"


def _is_grainier(one: float, other: float) -> bool:
    return one > GRAIN_TIMES * other and one**2 - other**2 > GRAIN_LEVELS**2
