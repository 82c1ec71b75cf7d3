"""What a sound file may still look like: all black, frozen, noisy at its start. Legal, kept, and worth a badge.

Everything is read off the marks that the writer makes of every frame anyway. Measured 2026-11, on clips of the demo
model and its VAE (128x128) and on footage at 480p:

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

from turbodiff.media.fingerprints import Mark, luma_psnr_db
from turbodiff.prompt.motion import asks_for_stillness

Flaw = Literal["black", "frozen", "noisy_start"]

BLACK_LUMA = 4.0  # no block of any frame is brighter, of 255
FROZEN_LEVELS = 8.0  # no block of the thumbnail changes by more over the whole clip
GRAIN_LEVELS = 2.0  # of noise beyond what the rest has; a third of it is hardly seen
GRAIN_TIMES = 1.8  # texture that comes and goes stays below
PICTURE_LEVELS = 20.0  # between first frame and picture, finer than a block; a VAE's own blur costs 5 to 16


def flaws(marks: Sequence[Mark], picture: Mark | None = None, prompt: str = "") -> Iterator[Flaw]:
    """What may be wrong with the look of a clip.

    Args:
        marks: of every frame, in order.
        picture: of the picture that the clip starts from, at the clip's size.
        prompt: who asks for stillness gets it without a remark.
    """
    if is_black(marks):
        yield "black"
    if is_frozen(marks) and not asks_for_stillness(prompt):
        yield "frozen"
    if is_noisy_at_start(marks, picture):
        yield "noisy_start"


def is_black(marks: Sequence[Mark]) -> bool:
    """Whether nothing can be seen in any frame."""
    return all(mark.thumbnail[..., 0].max() < BLACK_LUMA for mark in marks)


def is_frozen(marks: Sequence[Mark]) -> bool:
    """Whether no part of the picture changes from the first frame to the last; one frame is no clip."""
    luma = np.stack([mark.thumbnail[..., 0] for mark in marks])
    return len(marks) > 1 and float(np.ptp(luma, axis=0).max()) < FROZEN_LEVELS


def is_noisy_at_start(marks: Sequence[Mark], picture: Mark | None = None) -> bool:
    """Whether the first quarter has noise that the rest has not, or the first frame noise that its picture has not."""
    first = math.ceil(len(marks) / 4)
    grain = [mark.grain for mark in marks]
    if len(marks) > 1 and _is_grainier(max(grain[:first]), max(grain[first:])):
        return True
    if picture is None:
        return False
    return _is_grainier(grain[0], picture.grain) or fine_difference(marks[0], picture) > PICTURE_LEVELS


def fine_difference(a: Mark, b: Mark) -> float:
    """Root mean square of what differs within the blocks of the thumbnails: detail and noise, not light or colour."""
    whole = 255**2 / 10 ** (luma_psnr_db(a, b) / 10)
    blocks = float(np.square(a.thumbnail[..., 0] - b.thumbnail[..., 0]).mean())
    return math.sqrt(max(0.0, whole - blocks))


def _is_grainier(one: float, other: float) -> bool:
    return one > GRAIN_TIMES * other and one**2 - other**2 > GRAIN_LEVELS**2
