"""The demo's little world in pixels: anti-aliased shapes that move or change size over a plain ground."""

from dataclasses import dataclass

import numpy as np

from scripts.train_demo.captions import Caption

SIZE = 128  # px, both sides
FRAMES = 17

COLOUR_RGB = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 90, 225),
    "yellow": (240, 215, 50),
    "purple": (150, 60, 200),
    "white": (245, 245, 245),
    "orange": (245, 135, 25),
    "cyan": (60, 210, 220),
}
BACKGROUND_RGB = {"black": (10, 10, 10), "gray": (125, 125, 125), "navy": (18, 24, 84), "brown": (105, 66, 36)}
_DIRECTION = {"moves right": (1, 0), "moves left": (-1, 0), "moves up": (0, -1), "moves down": (0, 1)}


@dataclass(frozen=True)
class Path:
    """Where the shape is: centre x, y and radius, in pixels, one value per frame ([F] each)."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


def draw_path(caption: Caption, rng: np.random.Generator, frames: int = FRAMES) -> Path:
    """A path with small jitter in place, size and speed, so that four steps can be sharp."""
    clock = np.linspace(-0.5, 0.5, frames)
    x, y = SIZE / 2 + rng.uniform(-6, 6, 2)
    if caption.motion in _DIRECTION:
        step_x, step_y = _DIRECTION[caption.motion]
        travel = rng.uniform(50, 62)
        radius = np.full(frames, rng.uniform(19, 23))
        return Path(x + step_x * travel * clock, y + step_y * travel * clock, radius)
    small, large = rng.uniform(11, 14), rng.uniform(33, 38)
    growth = clock + 0.5 if caption.motion == "grows" else 0.5 - clock
    return Path(np.full(frames, x), np.full(frames, y), small + (large - small) * growth)


def render(caption: Caption, path: Path) -> np.ndarray:
    """The clip as uint8 [F, SIZE, SIZE, 3]."""
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    dx = axis[None, None, :] - path.x[:, None, None].astype(np.float32)
    dy = axis[None, :, None] - path.y[:, None, None].astype(np.float32)
    radius = path.radius[:, None, None].astype(np.float32)
    distance = _DISTANCE[caption.shape](dx, dy, radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    front = np.array(COLOUR_RGB[caption.colour], np.float32)
    ground = np.array(BACKGROUND_RGB[caption.background], np.float32)
    return np.round(ground + (front - ground) * cover).astype(np.uint8)


def random_clip(caption: Caption, rng: np.random.Generator, frames: int = FRAMES) -> np.ndarray:
    """One clip of `caption`, uint8 [F, SIZE, SIZE, 3]."""
    return render(caption, draw_path(caption, rng, frames))


def random_frames(captions: list[Caption], rng: np.random.Generator) -> np.ndarray:
    """One frame from a random moment of each caption's clip, uint8 [B, SIZE, SIZE, 3]."""
    pictures = []
    for caption in captions:
        path, moment = draw_path(caption, rng), int(rng.integers(FRAMES))
        pictures.append(
            render(caption, Path(*(part[moment : moment + 1] for part in (path.x, path.y, path.radius))))[0]
        )
    return np.stack(pictures)


def _circle(dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.hypot(dx, dy) - radius


def _square(dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius


def _polygon(corners: np.ndarray, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the closed polygon `radius * corners` ([K, 2], y down), negative inside."""
    nearest, inside = (
        np.full(np.broadcast(dx, dy).shape, np.inf, np.float32),
        np.zeros(np.broadcast(dx, dy).shape, bool),
    )
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        px, py = dx - radius * start[0], dy - radius * start[1]
        ex, ey = radius * (end[0] - start[0]), radius * (end[1] - start[1])
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(px - ex * along, py - ey * along))
        crosses = (py < 0) != (py - ey < 0)
        inside ^= crosses & (px < ex * py / np.where(ey == 0, 1, ey))
    return np.where(inside, -nearest, nearest)


def _corners(count: int, scale: float, inner: float | None) -> np.ndarray:
    angles = -np.pi / 2 + np.arange(count) * 2 * np.pi / count
    reach = np.where(np.arange(count) % 2 == 0, 1.0, inner) if inner else np.ones(count)
    return (scale * reach[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1)).astype(np.float32)


_TRIANGLE, _STAR = _corners(3, 1.2, None), _corners(10, 1.25, 0.42)
_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": lambda dx, dy, radius: _polygon(_TRIANGLE, dx, dy, radius),
    "star": lambda dx, dy, radius: _polygon(_STAR, dx, dy, radius),
}
