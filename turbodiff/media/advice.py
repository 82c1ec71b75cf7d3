"""What the picture itself says about the settings of an image-to-video run: where the experts should hand over.

A low boundary gives the high-noise expert more of the steps: motion is freer, which a picture with one large, smooth
subject (a close portrait, a plain background) carries without falling apart. A busy scene needs the low-noise expert
sooner, which keeps its detail (0.9 is Wan2.2's own value, 0.7 what users of TurboDiffusion settle on for portraits).
A proposal, never a rule: whoever sets a value keeps it.
"""

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from turbodiff.media.fingerprints import Bytes

SIDE = 64  # pixels of the thumbnail that is looked at
EDGE = 24.0  # step of luma, of 255, between neighbours from which on people see an edge
BINS = 8  # per colour channel, for the entropy: 512 colours
BUSY_EDGES = 0.12  # share of pixels on an edge: below it portraits and plain backgrounds lie, above it crowds, foliage
BUSY_ENTROPY_BITS = 5.5  # of at most 9
QUIET_BORDER_EDGES = 0.05  # a subject before an empty border is a portrait however detailed it is itself
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

CALM_BOUNDARY, BUSY_BOUNDARY = 0.7, 0.9
Key = Literal["advice_plain_background", "advice_close_portrait", "advice_busy_scene"]


class Advice(NamedTuple):
    """A proposal with its reason: `key` of the wording, and the numbers that decided."""

    boundary: float
    sampler: Literal["sde", "ode"]
    key: Key
    numbers: dict[str, float]


def advise(pixels: Bytes) -> Advice:
    """What to propose for a picture, uint8 RGB [H, W, 3].

    The sampler is always SDE: from a picture, ODE keeps noise in the first frames (TurboDiffusion's own default).
    """
    small = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    edges, border = edge_density(small), edge_density(small, border=True)
    entropy = colour_entropy_bits(small)
    numbers = {"edges": round(edges, 3), "border_edges": round(border, 3), "entropy_bits": round(entropy, 2)}
    if edges < BUSY_EDGES and entropy < BUSY_ENTROPY_BITS:
        key: Key = "advice_plain_background" if border < QUIET_BORDER_EDGES else "advice_close_portrait"
        return Advice(CALM_BOUNDARY, "sde", key, numbers)
    if border < QUIET_BORDER_EDGES:
        return Advice(CALM_BOUNDARY, "sde", "advice_plain_background", numbers)
    return Advice(BUSY_BOUNDARY, "sde", "advice_busy_scene", numbers)


def edge_density(small: np.ndarray, *, border: bool = False) -> float:
    """Share of pixels whose luma differs visibly from a neighbour's, 0 to 1; of the outer eighth only with `border`."""
    luma = small @ np.array(LUMA)
    steps = np.zeros(luma.shape, bool)
    steps[:, 1:] |= np.abs(np.diff(luma, axis=1)) > EDGE
    steps[1:, :] |= np.abs(np.diff(luma, axis=0)) > EDGE
    if not border:
        return float(steps.mean())
    inside = np.zeros(luma.shape, bool)
    inside[SIDE // BINS : -(SIDE // BINS), SIDE // BINS : -(SIDE // BINS)] = True
    return float(steps[~inside].mean())


def colour_entropy_bits(small: np.ndarray) -> float:
    """Shannon entropy of the colours in 512 bins: 0 for one colour, at most 9."""
    bins = (small.astype(np.uint8) // (256 // BINS)).astype(np.int64)
    counts = np.bincount((bins @ np.array([BINS**2, BINS, 1])).ravel())
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
