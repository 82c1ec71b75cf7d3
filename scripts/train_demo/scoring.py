"""What a clip shows, read from its pixels alone: colour, shape, motion and background, each known or None.

Nothing here knows the caption, the seed or the model. A clip that is not a plain shape on a plain ground reads as
None, so noise scores nothing.
"""

from dataclasses import dataclass

import numpy as np

from scripts.train_demo.captions import Caption
from scripts.train_demo.render import _DISTANCE, BACKGROUND_RGB, COLOUR_RGB

FIELDS = ("colour", "shape", "motion", "background")
_NEAR = 60.0  # RGB distance within which a measured colour may be called by a palette name
_PLAIN = 30.0  # RGB deviation above which an area is not one plain colour
_SHAPE_OVERLAP = 0.80  # intersection over union with the ideal shape of the same place and area


@dataclass(frozen=True)
class Reading:
    """What the pixels show; None where they show nothing clear."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    background: str | None = None


def read_clip(frames: np.ndarray) -> Reading:
    """Read a clip, uint8 [F, H, W, 3]."""
    video = frames.astype(np.float32)
    ground_rgb, ground_spread = _plain_colour(np.concatenate([c.reshape(-1, 3) for c in _corners(video)]))
    background = _nearest(ground_rgb, BACKGROUND_RGB) if ground_spread < _PLAIN else None
    if background is None:
        return Reading()
    masks = np.linalg.norm(video - ground_rgb, axis=-1) > 45
    areas = masks.mean((1, 2))
    seen = (areas > 0.004) & (areas < 0.6)
    if seen.mean() < 0.8:
        return Reading(background=background)
    core = np.concatenate([v[m] for v, m in zip(video[seen], _eroded(masks[seen]), strict=True)])
    colour = None
    if len(core) > 50:
        front_rgb, front_spread = _plain_colour(core)
        colour = _nearest(front_rgb, COLOUR_RGB) if front_spread < 1.5 * _PLAIN else None
    return Reading(colour, _shape(masks[seen]), _motion(masks, seen), background)


def score(frames: np.ndarray, caption: Caption) -> dict[str, bool]:
    """Which of the caption's four facts the clip shows."""
    reading = read_clip(frames)
    return {field: getattr(reading, field) == getattr(caption, field) for field in FIELDS}


def psnr(frame: np.ndarray, picture: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures uint8 [H, W, 3], in dB; 99 where they are equal."""
    error = float(np.square(frame.astype(np.float32) - picture).mean())
    return 10 * float(np.log10(255**2 / error)) if error else 99.0


def flicker(frames: np.ndarray) -> float:
    """Mean change from frame to frame of the pixels that never show the shape, in 8-bit levels; uint8 [F, H, W, 3]."""
    video = frames.astype(np.float32)
    ground = np.median(np.concatenate([c.reshape(-1, 3) for c in _corners(video)]), axis=0)
    still = (np.linalg.norm(video - ground, axis=-1) < 45).all(axis=0)
    return float(np.abs(np.diff(video[:, still], axis=0)).mean()) if still.any() else 255.0


def _corners(video: np.ndarray) -> list[np.ndarray]:
    """The four corner patches, where no shape ever goes."""
    edge = max(2, video.shape[1] // 12)
    return [video[:, ys, xs] for ys in (slice(edge), slice(-edge, None)) for xs in (slice(edge), slice(-edge, None))]


def _plain_colour(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Median colour of [N, 3] pixels and their mean distance from it."""
    middle = np.median(pixels, axis=0)
    return middle, float(np.linalg.norm(pixels - middle, axis=1).mean())


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] < _NEAR else None


def _eroded(masks: np.ndarray) -> np.ndarray:
    """Masks [F, H, W] without their outer two pixels, where colours mix."""
    for _ in range(2):
        padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
        masks = masks & padded[:, 2:, 1:-1] & padded[:, :-2, 1:-1] & padded[:, 1:-1, 2:] & padded[:, 1:-1, :-2]
    return masks


def _track(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, centre y and equivalent radius of each mask, in pixels."""
    axis = np.arange(masks.shape[1]) + 0.5
    area = masks.sum((1, 2))
    return (masks.sum(1) @ axis) / area, (masks.sum(2) @ axis) / area, np.sqrt(area / np.pi)


def _motion(masks: np.ndarray, seen: np.ndarray) -> str | None:
    """The motion that the straight-line fit through centre and log radius shows, over the whole clip."""
    height = masks.shape[1]
    clock = np.flatnonzero(seen) / max(1, len(seen) - 1)
    x, y, radius = _track(masks[seen])
    across, down = np.polyfit(clock, x, 1)[0] / height, np.polyfit(clock, y, 1)[0] / height
    growth = np.polyfit(clock, np.log(radius), 1)[0]
    travel = max(abs(across), abs(down))
    if abs(growth) > 0.5:
        return ("grows" if growth > 0 else "shrinks") if travel < 0.15 else None
    if travel < 0.2 or abs(growth) > 0.35 or min(abs(across), abs(down)) > 0.4 * travel:
        return None
    if abs(across) > abs(down):
        return "moves right" if across > 0 else "moves left"
    return "moves down" if down > 0 else "moves up"


def _shape(masks: np.ndarray) -> str | None:
    """The ideal shape that overlaps the masks best on average over the clip, if it overlaps them well."""
    overlaps = {name: float(np.mean([_overlap(name, mask) for mask in masks[::2]])) for name in _DISTANCE}
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] > _SHAPE_OVERLAP else None


def _overlap(name: str, mask: np.ndarray) -> float:
    """Best intersection over union of `mask` with the ideal shape of its area, over small shifts."""
    x, y, radius = (float(value[0]) for value in _track(mask[None]))
    axis = np.arange(mask.shape[0], dtype=np.float32) + 0.5
    size = np.float32(radius) * _RADIUS_PER_AREA[name]
    best = 0.0
    # The ideal outline is placed by its centre of mass; the triangle's and star's own centres agree with it.
    for shift in (-1.0, 0.0, 1.0):
        ideal = _DISTANCE[name](axis[None, :] - x, axis[:, None] - y - shift, size) < 0
        union = (mask | ideal).sum()
        best = max(best, float((mask & ideal).sum() / union) if union else 0.0)
    return best


def _radius_per_area(name: str) -> np.float32:
    """How a shape's nominal radius relates to the radius of the circle of equal area."""
    axis = np.arange(-255.5, 256, dtype=np.float32)
    area = (_DISTANCE[name](axis[None, :], axis[:, None], np.float32(150)) < 0).sum()
    return np.float32(150 / np.sqrt(area / np.pi))


_RADIUS_PER_AREA = {name: _radius_per_area(name) for name in _DISTANCE}
