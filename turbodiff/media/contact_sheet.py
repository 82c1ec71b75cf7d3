"""Many clips as one: each in its place under the label of its column, beside the label of its row."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from turbodiff.media.fingerprints import Bytes
from turbodiff.media.joining import clip_format, read_frames

MOST_PIXELS = 1920  # of the longer side
LABEL_PX, LETTER_PX = 24, 14
SPACE_PX = 4
BACK, FRONT = (18, 18, 20), (235, 235, 235)
Cells = Mapping[tuple[int, int], Path]


def sheet_size(cells: Cells, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(width, height) of a sheet, multiples of 16, and of one cell: as large as the first clip, or as fits."""
    first = clip_format(next(iter(cells.values())))
    room = MOST_PIXELS - LABEL_PX
    share = min(1.0, room / (columns * (first.width + SPACE_PX)), room / (rows * (first.height + SPACE_PX)))
    width, height = max(16, int(share * first.width)), max(16, int(share * first.height))
    sides = (LABEL_PX + columns * (width + SPACE_PX), LABEL_PX + rows * (height + SPACE_PX))
    return -(-sides[0] // 16) * 16, -(-sides[1] // 16) * 16, width, height


def sheet_frames(cells: Cells, row_labels: Sequence[str], column_labels: Sequence[str]) -> Iterator[Bytes]:
    """Every frame of the sheet uint8 [1, H, W, 3]; a shorter clip stays at its last frame.

    Args:
        cells: (row, column) -> clip; a place without one stays dark.

    Raises:
        FileError: a clip cannot be read.
    """
    across, down, width, height = sheet_size(cells, len(row_labels), len(column_labels))
    canvas = np.array(_labelled(across, down, width, height, row_labels, column_labels))
    for frames in zip_longest(*map(read_frames, cells.values())):
        for (row, column), frame in zip(cells, frames, strict=True):
            if frame is not None:
                picture = Image.fromarray(frame[0])
                if picture.size != (width, height):
                    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
                top, left = LABEL_PX + row * (height + SPACE_PX), LABEL_PX + column * (width + SPACE_PX)
                canvas[top : top + height, left : left + width] = np.asarray(picture)
        yield canvas[None].copy()


def _labelled(
    across: int, down: int, width: int, height: int, row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """The empty sheet with its labels, those of rows upright along the left side."""
    sheet, font = Image.new("RGB", (across, down), BACK), ImageFont.load_default(LETTER_PX)
    for column, label in enumerate(column_labels):
        place = (LABEL_PX + column * (width + SPACE_PX), 3)
        sheet.paste(_label(label, width, font), place)
    for row, label in enumerate(row_labels):
        turned = _label(label, height, font).transpose(Image.Transpose.ROTATE_90)
        sheet.paste(turned, (3, LABEL_PX + row * (height + SPACE_PX)))
    return sheet


def _label(text: str, length: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """A line of text in the middle of so many pixels; letters that the font lacks are question marks."""
    strip = Image.new("RGB", (length, LABEL_PX - 6), BACK)
    said = text.encode("latin-1", "replace").decode("latin-1")
    while len(said) > 1 and font.getlength(said) > length:
        said = said[:-2] + "…"
    ImageDraw.Draw(strip).text((max(0.0, (length - font.getlength(said)) / 2), 0), said, fill=FRONT, font=font)
    return strip
