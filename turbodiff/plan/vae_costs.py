"""Bytes of the VAE at work, in frames of full size and of its base width; no device.

The coefficients are read off dry runs of the real modules on turbodiff/memory_lab/dry_run.py, and a test holds them to
it within 5 %.

The remembered frames of the past are 2.6 of 2.9 GiB (480p) and 6.1 of 6.8 GiB (720p) of a whole decode at its peak, a
third of them the place of the next one. In host memory the others would cross the bus twice for every latent frame: for
81 frames at 720p 2 x 85 GiB, on an RTX 4060 16 s where nothing hides them, beside 70 s of maths. Tiles of 96 cost it
11 s and are enough on every card of the README's table, whose frames and size the decode never decides; so there is no
such lever.
"""

from functools import lru_cache

from turbodiff.spec.shapes import (
    DECODER_MARGINS,
    ENCODER_MARGIN,
    SPACE_STRIDE,
    TIME_STRIDE,
    LatentShape,
    pixel_frames,
)

RGB = 3
# The VAE at work, level by level, as models/vae.py runs it: a frame at a time, whole or in tiles. Counts are in frames
# of the base width b: level 0 is the latent grid with 4b channels, level 3 full size with b. Every 3x3x3 convolution
# has room for three frames of its input from the first one on; on top comes the widest moment.
# Remembered frames plus work at levels 0-3, in channels of width b, at the widest moment of the first and of any later
# latent frame: the last block's own work, then a frame that is made twice as large for it
DECODER_WIDTHS = ((77, 66, 36, 23), (98, 86, 36, 24))
# the same for the encoder, in frames of full size: everything scales with the tile, nothing is cropped on the way
ENCODER_FRAMES = (22.1, 23.8)
BEGIN_WIDTH = 4 + 4 * 3 * 4  # the middle block on the whole picture: its frame, four convolutions that remember three
CHUNKS_IN_FLIGHT = 3  # the chunk being made, handed over, and turned into bytes
SHAPES = 4096  # that are remembered: models and kinds of weights share a VAE


@lru_cache(SHAPES)
def decode_bytes(latent: LatentShape, base: int, element_bytes: int, tile: int | None, *, ranks: int = 1) -> int:
    """Peak beyond weights while latents become frames; `tile`: side in latent pixels, None for the whole picture;
    `ranks`: so many processes have a strip of the columns each.

    Whole: the chunk being made, the one handed over and the one turned into bytes. Tiled: all features and a canvas of
    all frames, beside one tile; the middle block is done by then.
    """
    area, strip = latent.height * latent.width, -(-latent.width // ranks)
    pixels = [_tile_area(latent, tile, margin, strip) << 2 * level for level, margin in enumerate(DECODER_MARGINS)]
    work = 0
    for moment in range(min(latent.frames, len(DECODER_WIDTHS))):
        work = max(work, sum([width * size for width, size in zip(DECODER_WIDTHS[moment], pixels, strict=True)]))
    frames, frame = pixel_frames(latent.frames), RGB * SPACE_STRIDE**2 * latent.height * strip
    if tile:
        held = frames * frame + latent.frames * 4 * base * area
    else:
        held = min(frames, CHUNKS_IN_FLIGHT * TIME_STRIDE) * frame + BEGIN_WIDTH * base * area
    # latents as they came, float32, and as the decoder takes them
    state = (4 + element_bytes) * latent.channels * latent.frames * area
    return element_bytes * (base * work + held) + state


@lru_cache(SHAPES)
def encode_bytes(latent: LatentShape, base: int, element_bytes: int, tile: int | None, *, ranks: int = 1) -> int:
    """Peak beyond weights while frames become latents; the video arrives in the dtype of the VAE. Several `ranks` have
    features of a strip each, then send them to all: what leaves and what comes is those of the whole picture."""
    area, strip = latent.height * latent.width, -(-latent.width // ranks)
    video = pixel_frames(latent.frames) * RGB * SPACE_STRIDE**2 * area
    tiles = _tile_area(latent, tile, ENCODER_MARGIN, strip)
    work = ENCODER_FRAMES[min(latent.frames, len(ENCODER_FRAMES)) - 1] * SPACE_STRIDE**2 * tiles
    own, whole = (latent.frames * 4 * base * latent.height * width for width in (strip, latent.width))
    exchanging = own + 2 * whole if ranks > 1 else 0
    return int(element_bytes * (max(base * work + own, exchanging) + video))


@lru_cache(SHAPES)
def tile_work(latent: LatentShape, margin: int, tile: int) -> float:
    """How much more is computed with tiles than without: their margins are computed twice."""
    rows, columns = (_spans(size, margin, tile) for size in (latent.height, latent.width))
    return sum(rows) * sum(columns) / (latent.height * latent.width)


def strip_factor(width: int, ranks: int, margins: float = DECODER_MARGINS[1]) -> float:
    """Seconds of a strip of the picture over those of the whole, `width` latent pixels wide: its share and what is
    computed beside it, both margins together, of the decoder those of the second block as a mean of all."""
    return min(1.0, (width / ranks + margins) / width)


def _tile_area(latent: LatentShape, tile: int | None, margin: int, strip: int = 1 << 30) -> int:
    """Latent pixels of the largest tile with its margin, or of the whole picture; of a strip so many columns wide."""
    rows, columns = _spans(latent.height, margin, tile or latent.height), min(strip, tile or latent.width)
    return max(rows) * max(_spans(latent.width, margin, columns))


def _spans(size: int, margin: int, tile: int) -> list[int]:
    """Rows of each tile with its margin, cut at the picture's edge."""
    starts = range(0, size, tile)
    return [min(size, min(size, start + tile) + margin) - max(0, start - margin) for start in starts]
