"""Bytes of the VAE at work, level by level, as models/vae.py runs it: one latent frame at a time, whole or in tiles.

Counts are in frames of the base width b: level 0 is the latent grid with 4b channels, level 3 full size with b. Every
3x3x3 convolution remembers two frames of its input; on top comes the widest moment, one residual block over the four
frames of level 2. The counts were read off dry runs of the real modules (runtime/ledger.py); a test holds them there.
"""

from turbodiff.spec.shapes import SPACE_STRIDE, TIME_STRIDE, LatentShape, pixel_frames

TILE = 32  # side of a tile in latent pixels, without its margin
DECODER_MARGINS = (13, 6, 3, 1)  # latent pixels around a tile at each level (models/vae.py)
ENCODER_MARGIN = 9
RGB = 3

# remembered frames plus work at levels 0-3, in channels of width b: 6 convolutions x 2 frames x 4b and so on
DECODER_WIDTHS = (56, 84, 64, 14)
ENCODER_WIDTH = 22.5 * 64  # everything scales with the tile: the encoder crops nothing on the way
ENCODER_WIDTH_2D = 21.5 * 64
SUM_OF_2D = 2  # more at level 2 where a 3-D convolution runs as a sum of 2-D ones
BEGIN_WIDTH = 4 * 2 * 4  # the middle block on the whole picture: four convolutions x 2 frames x 4b
CHUNKS_IN_FLIGHT = 3  # the chunk being made, handed over, and turned into bytes


def decode_bytes(latent: LatentShape, base: int, element_bytes: int, *, tiled: bool, conv2d: bool) -> int:
    """Peak beyond weights while latents become frames."""
    side = TILE if tiled else None
    area = latent.height * latent.width
    tile_widths = sum(
        width * _pixels(latent, side, margin, level)
        for level, (width, margin) in enumerate(zip(DECODER_WIDTHS, DECODER_MARGINS, strict=True))
    )
    tile_widths += SUM_OF_2D * conv2d * _pixels(latent, side, DECODER_MARGINS[2], 2)
    begin = (BEGIN_WIDTH * base + 2 * latent.channels) * area
    frames = RGB * SPACE_STRIDE**2 * area
    if tiled:
        held = pixel_frames(latent.frames) * frames + latent.frames * 4 * base * area
    else:
        held = CHUNKS_IN_FLIGHT * TIME_STRIDE * frames
    state = (8 + element_bytes) * latent.elements  # latents as they came, in float32, and as the decoder takes them
    return element_bytes * (base * tile_widths + begin + held) + state


def encode_bytes(
    latent: LatentShape, base: int, element_bytes: int, *, tiled: bool, conv2d: bool, arrives_float32: bool = True
) -> int:
    """Peak beyond weights while frames become latents; the video arrives in float32 and is converted on the device."""
    side = TILE if tiled else None
    tile = _pixels(latent, side, ENCODER_MARGIN, 0)
    area = latent.height * latent.width
    video = pixel_frames(latent.frames) * RGB * SPACE_STRIDE**2 * area
    copies = element_bytes + (4 if arrives_float32 and element_bytes != 4 else 0)
    width = ENCODER_WIDTH_2D if conv2d else ENCODER_WIDTH
    features = latent.frames * 4 * base * area
    return int(element_bytes * (base * width * tile + features) + copies * video)


def tile_work(latent: LatentShape, margin: int) -> float:
    """How much more is computed with tiles than without: their margins are computed twice."""
    rows, columns = (_spans(size, TILE, margin) for size in (latent.height, latent.width))
    return sum(rows) * sum(columns) / (latent.height * latent.width)


def _pixels(latent: LatentShape, side: int | None, margin: int, level: int) -> int:
    """Pixels of the largest tile with its margin at a level (each level doubles both sides)."""
    rows, columns = (max(_spans(size, side or size, margin)) for size in (latent.height, latent.width))
    return rows * columns << 2 * level


def _spans(size: int, side: int, margin: int) -> list[int]:
    """Rows of each tile with its margin, cut at the picture's edge."""
    return [min(size, min(size, start + side) + margin) - max(0, start - margin) for start in range(0, size, side)]
