"""What is remembered of every frame that was sent to the encoder: enough to measure its PSNR later, in 20 kB.

A fingerprint holds a thumbnail (block means of luma and chroma), a sketch of the luma, and its grain. The sketch is a
count sketch (Charikar, Chen, Farach-Colton 2002): every pixel gets a random sign and a bucket, a bucket holds the
signed sum of its pixels. It is linear, and the squared distance of two sketches is an unbiased estimate of the squared
distance of the two frames with a relative error of about sqrt(2 / buckets) = 2 %, or 0.1 dB. So a frame of any size is
compared pixel by pixel with what was sent, without keeping it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BUCKETS = 4093  # a prime: rows of a damaged block fall into different buckets whatever the width
GRID = 32  # thumbnail of 32 x 32 blocks

# Grain is looked for in patches of half a latent pixel and of a whole one (8 pixels of the screen): noise that is left
# in the latents comes out of the decoder as blotches of that size, not as pixel noise (measured on the demo's VAE).
PATCHES = (4, 8)
GRAIN_REGIONS = 8  # per side; the quietest quarter of them decides: noise is everywhere, texture is not
LAPLACE_SIGMA = math.sqrt(math.pi / 2) / 6  # mean |Laplacian difference| -> sigma of white noise (Immerkaer 1996)

# BT.709: luma weights, and the divisors of (B - Y) and (R - Y); Y, Cb, Cr here span 0..255 and -127.5..127.5
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
CB_DIVISOR, CR_DIVISOR = 1.8556, 1.5748


@dataclass(frozen=True)
class Fingerprint:
    """One frame in short: block means [32, 32, 3] of Y, Cb, Cr (fewer for small frames), sketch [4093] and sum of Y.

    `grain`: sigma of the noise of Y in its quietest quarter, in levels of 255; only of frames that were sent.
    """

    thumbnail: Floats
    sketch: Floats
    luma_sum: float
    pixels: int
    grain: float = 0.0


class Psnr(NamedTuple):
    """Peak signal-to-noise ratios of two frames in dB, at most 99: luma within about 0.1 dB, chroma of thumbnails."""

    luma_db: float
    chroma_db: float


def fingerprint_rgb(frame: Bytes) -> Fingerprint:
    """The fingerprint of an RGB frame [H, W, 3]."""
    height, width, _ = frame.shape
    red, green, blue = np.moveaxis(_blocks(frame, 2), -1, 0)
    y = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    thumbnail = np.stack((y, (blue - y) / CB_DIVISOR, (red - y) / CR_DIVISOR), axis=-1)
    luma = frame.reshape(-1, 3).astype(np.float32) @ LUMA
    grain = _grain(luma.reshape(height, width))
    return Fingerprint(thumbnail, _sketch(luma), float(luma.sum(dtype=np.float64)), height * width, grain)


def fingerprint_planes(y_plane: Bytes, *chroma_planes: Bytes) -> Fingerprint:
    """The fingerprint of a decoded 4:2:0 frame, 8 bit, limited range: Y [H, W], then Cb and Cr [H/2, W/2]."""
    luma = (y_plane.astype(np.float32) - 16) * (255 / 219)
    y = _blocks(y_plane[..., None], 2)[..., 0]
    chroma = (_blocks(plane[..., None], 1)[..., 0] for plane in chroma_planes)
    thumbnail = np.stack(((y - 16) * (255 / 219), *((plane - 128) * (255 / 224) for plane in chroma)), axis=-1)
    return Fingerprint(thumbnail, _sketch(luma.ravel()), float(luma.sum(dtype=np.float64)), luma.size)


def psnr(a: Fingerprint, b: Fingerprint) -> Psnr:
    """How alike two frames of one size are."""
    luma = float(np.square(a.sketch - b.sketch, dtype=np.float64).sum()) / a.pixels
    chroma = float(np.square(a.thumbnail[..., 1:] - b.thumbnail[..., 1:]).mean())
    return Psnr(*(min(99.0, 10 * math.log10(255**2 / max(squared_error, 1e-9))) for squared_error in (luma, chroma)))


def _grain(luma: Floats) -> float:
    """Sigma of the noise of a frame [H, W] in its quietest quarter, in patches of 4 and of 8 pixels together.

    Immerkaer, "Fast noise variance estimation" (1996): second differences along both axes cancel edges and slopes.
    """
    sigmas = [0.0]
    for side in PATCHES:
        height, width = (length // side for length in luma.shape)
        if min(height, width) < 3:
            continue
        patches = luma[: height * side, : width * side].reshape(height, side, width, side).mean(axis=(1, 3))
        rough = np.abs(np.diff(np.diff(patches, 2, axis=0), 2, axis=1))
        rows, columns = (_starts(length, GRAIN_REGIONS) for length in rough.shape)
        sigmas.append(float(np.percentile(_region_means(rough, rows, columns), 25)) * LAPLACE_SIGMA)
    return math.hypot(*sigmas)


def _sketch(luma: Floats) -> Floats:
    signs = _signs(math.ceil(luma.size / BUCKETS) * BUCKETS)
    padded = np.zeros(signs.size, np.float32)
    np.multiply(luma, signs[: luma.size], out=padded[: luma.size])
    buckets: Floats = padded.reshape(-1, BUCKETS).sum(axis=0)
    return buckets


@lru_cache(maxsize=4)
def _signs(count: int) -> Floats:
    return np.random.default_rng(BUCKETS).choice(np.array([-1, 1], np.float32), count)


def _blocks(plane: Bytes, stride: int) -> Floats:
    """Means over a grid of at most 32 x 32 blocks, [H, W, C] -> [32, 32, C]; the same blocks on luma and chroma.

    Args:
        stride: 2 on a plane of full size, 1 on a halved chroma plane.
    """
    rows, columns = (stride * _starts(length // stride, GRID) for length in plane.shape[:2])
    return _region_means(plane.astype(np.uint32), rows, columns).astype(np.float32)


def _starts(length: int, count: int) -> NDArray[np.intp]:
    """Where at most `count` regions of about the same length begin."""
    return np.linspace(0, length, min(count, length), endpoint=False).astype(np.intp)


def _region_means(plane: Floats | NDArray[np.uint32], rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Floats:
    """Means of the regions that begin at these rows and columns, [H, W, ...] -> [rows, columns, ...]."""
    sums = np.add.reduceat(np.add.reduceat(plane, rows, axis=0), columns, axis=1)
    counts = np.outer(np.diff([*rows, plane.shape[0]]), np.diff([*columns, plane.shape[1]]))
    means: Floats = sums / counts.reshape(*counts.shape, *[1] * (plane.ndim - 2))
    return means
