"""Draws loss curves from the JSON-lines logs with Pillow; both axes logarithmic."""

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 480, 300, 44
LOGS = (
    ("UMT5", "umt5"),
    ("VAE", "vae"),
    ("T2V, flow matching", "dit"),
    ("T2V, consistency", "distilled"),
    ("I2V, high-noise expert", "i2v_high"),
    ("I2V, low-noise expert", "i2v_low"),
)
COLUMNS = 3
_INK, _GRID, _LINE = (40, 40, 40), (222, 222, 222), (36, 96, 200)


def read_log(path: Path) -> list[tuple[int, float]]:
    """(step, loss) pairs, the last one where a step was logged twice (a resumed run), by step."""
    points = {}
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        points[fields["step"]] = fields["loss"]
    return sorted(points.items())


def smooth(points: list[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    """Running mean of the loss over `window` log lines."""
    losses = [loss for _, loss in points]
    return [(s, sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1)) for i, (s, _) in enumerate(points)]


def draw_curve(title: str, points: list[tuple[int, float]]) -> Image.Image:
    """One panel: loss over steps."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, 8), title, fill=_INK)
    x_low, x_high = math.log10(points[0][0]), math.log10(points[-1][0]) + 1e-9
    y_low, y_high = (math.log10(f(loss for _, loss in points)) for f in (min, max))
    y_high += 1e-9

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (math.log10(step) - x_low) / (x_high - x_low) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (math.log10(loss) - y_low) / (y_high - y_low) * (HEIGHT - 2 * MARGIN)
        return x, y

    for i in range(5):
        step = 10 ** (x_low + (x_high - x_low) * i / 4)
        loss = 10 ** (y_low + (y_high - y_low) * i / 4)
        (x, _), (_, y) = place(step, points[0][1]), place(points[0][0], loss)
        pen.line((x, MARGIN, x, HEIGHT - MARGIN), fill=_GRID)
        pen.line((MARGIN, y, WIDTH - MARGIN, y), fill=_GRID)
        pen.text((x - 10, HEIGHT - MARGIN + 6), f"{step:.0f}", fill=_INK)
        pen.text((4, y - 6), f"{loss:.3g}", fill=_INK)
    pen.line([place(*point) for point in smooth(points)], fill=_LINE, width=2)
    return image


def draw_curves(folder: Path, target: Path) -> None:
    """All logs in `folder`, three panels a row, in one PNG; nothing where no log has two lines yet."""
    panels = [
        draw_curve(title, points)
        for title, name in LOGS
        if (folder / f"{name}_log.jsonl").exists() and len(points := read_log(folder / f"{name}_log.jsonl")) > 1
    ]
    if not panels:
        return
    rows = -(-len(panels) // COLUMNS)
    picture = Image.new("RGB", (WIDTH * min(len(panels), COLUMNS), HEIGHT * rows), "white")
    for i, panel in enumerate(panels):
        picture.paste(panel, (i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT))
    picture.save(target)
