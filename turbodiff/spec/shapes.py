"""Pixels, latents, tokens: the only file that knows /8, /4, 4n+1, the patch of 2 and the 128-patch limit.

Facts: Wan2.1's VAE divides space by 8 and time by 4 (first frame alone), the DiT takes patches of 1x2x2; RoPE
tables hold 128 positions per spatial axis in TurboDiffusion (research: networks/wan2pt1.py).
"""

import math
from typing import NamedTuple

from turbodiff.spec.errors import RequestError

SPACE_STRIDE = 8
TIME_STRIDE = 4
PATCH = 2
PIXEL_MULTIPLE = SPACE_STRIDE * PATCH
MAX_PATCHES = 128
LATENT_CHANNELS = 16
# Small VAEs of Wan2.1's latents: LightVAE has a quarter of every width (lightvaew2_1), TAEHV's decoder those of its own
WAN_VAE_DIM, LIGHT_VAE_DIM = 96, 24
TINY_VAE_WIDTHS = (256, 128, 64, 64)
CONDITION_CHANNELS = 4 + LATENT_CHANNELS  # I2V: 4 mask channels + the picture's latents

# Pieces in which the networks work; the plan's formulas count them, so both read them here.
# Margins around a tile in latent pixels: the decoder's convolutions carry 12.25 across, 6.5 in the first block, 3.25 in
# the second at twice the size, 1.625 and 0.875 in the last two; what a block has used up is cropped after it.
VAE_TILES = (96, 64, 32)  # sides of a tile in latent pixels, without its margin; the larger, the less is computed twice
DECODER_MARGINS = (13, 6, 3, 1)
ENCODER_MARGIN = 9  # 8.5: its costly layers come first and need all of it
HEAD_TOKENS = 8192  # tokens that pass the DiT's float32 head at a time: bounds its temporaries, not its result
INT8_TILE = 128  # INT8 weights carry one float32 scale per 128 x 128 tile (TurboDiffusion's quant_linear files)
INT8_PART_TOKENS = 64 * INT8_TILE  # tokens whose rows are wide at a time between INT8 layers, and for a LoRA's branch
FLOAT32_ELEMENTS = 1 << 24  # of a 16-bit weight of the time path or the head that are in float32 at a time: 64 MiB

# (width, height) per resolution and aspect, TurboDiffusion rcm/datasets/utils.py
RESOLUTIONS: dict[str, dict[str, tuple[int, int]]] = {
    "480p": {"1:1": (640, 640), "4:3": (640, 480), "3:4": (480, 640), "16:9": (832, 480), "9:16": (480, 832)},
    "720p": {"1:1": (960, 960), "4:3": (960, 720), "3:4": (720, 960), "16:9": (1280, 720), "9:16": (720, 1280)},
    "128": {"1:1": (128, 128)},  # the bundled demo model
}


class LatentShape(NamedTuple):
    """A video in the VAE's latent space, axes C, T, H, W."""

    channels: int
    frames: int
    height: int
    width: int

    @property
    def patch_grid(self) -> tuple[int, int, int]:
        """(T, H, W) of the DiT's tokens."""
        return self.frames, self.height // PATCH, self.width // PATCH

    @property
    def tokens(self) -> int:
        """N tokens L of one clip."""
        return math.prod(self.patch_grid)


class VideoShape(NamedTuple):
    """A video in pixels."""

    frames: int
    height: int
    width: int

    @property
    def latent(self) -> LatentShape:
        """The latents that decode to this video."""
        return LatentShape(
            LATENT_CHANNELS, latent_frames(self.frames), self.height // SPACE_STRIDE, self.width // SPACE_STRIDE
        )


def latent_frames(num_frames: int) -> int:
    """Latent frames T of a video of 4n+1 frames."""
    assert is_frame_count(num_frames), num_frames
    return 1 + (num_frames - 1) // TIME_STRIDE


def pixel_frames(frames_latent: int) -> int:
    """Frames that T latent frames decode to."""
    return 1 + (frames_latent - 1) * TIME_STRIDE


def ffn_chunk_tokens(tokens: int, chunks: int) -> int:
    """Tokens per chunk of the feed-forward, in at most `chunks` of them: whole INT8 tiles, so that the numbers stay."""
    return -(-tokens // (chunks * INT8_TILE)) * INT8_TILE


def token_shares(tokens: int, ranks: int) -> list[int]:
    """Tokens of each process that shares a clip: whole INT8 tiles, the last one excepted, as alike as they can be.

    None is without a tile: kernels know no empty tensors.
    """
    tiles = -(-tokens // INT8_TILE)
    assert 1 <= ranks <= tiles, f"{tokens} tokens are {tiles} tiles: too few for {ranks} processes"
    ends = [min(tokens, tiles * (rank + 1) // ranks * INT8_TILE) for rank in range(ranks)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def is_frame_count(num_frames: int) -> bool:
    """Whether a video of this many frames has latents: 1, 5, 9, ... (4n+1)."""
    return num_frames >= 1 and (num_frames - 1) % TIME_STRIDE == 0


def nearest_frame_counts(num_frames: int) -> tuple[int, int]:
    """The legal frame counts just below and just above."""
    below = max(1, 1 + (max(num_frames, 1) - 1) // TIME_STRIDE * TIME_STRIDE)
    return below, below + TIME_STRIDE


def frame_counts(maximum: int) -> list[int]:
    """Every legal frame count up to `maximum`."""
    return list(range(1, maximum + 1, TIME_STRIDE))


def table_size(resolution: str, aspect: str) -> tuple[int, int]:
    """(width, height) of a named resolution.

    Raises:
        RequestError: unknown resolution, or an aspect that this resolution does not have.
    """
    if resolution not in RESOLUTIONS:
        raise RequestError(
            "unknown resolution", code="unknown_resolution", field="resolution", got=resolution,
            expected=" | ".join(RESOLUTIONS), try_instead="--resolution 480p",
        )  # fmt: skip
    by_aspect = RESOLUTIONS[resolution]
    if aspect not in by_aspect:
        raise RequestError(
            f"{resolution} has no such aspect ratio", code="unknown_aspect", field="aspect", got=aspect,
            expected=" | ".join(by_aspect), try_instead=f"--aspect {next(iter(by_aspect))}",
        )  # fmt: skip
    return by_aspect[aspect]


def named_size(width: int, height: int, resolutions: tuple[str, ...] = tuple(RESOLUTIONS)) -> tuple[str, str] | None:
    """(resolution, aspect) of a size in the table, or None."""
    for resolution in resolutions:
        for aspect, size in RESOLUTIONS[resolution].items():
            if size == (width, height):
                return resolution, aspect
    return None


def check_size(width: int, height: int) -> None:
    """Refuse sizes that the network cannot take: multiples of 16, at most 128 patches a side.

    Raises:
        RequestError: names the field and the nearest legal size.
    """
    near = f"{_legal_side(width)}x{_legal_side(height)}"
    if width % PIXEL_MULTIPLE or height % PIXEL_MULTIPLE or min(width, height) < PIXEL_MULTIPLE:
        raise RequestError(
            f"width and height must be multiples of {PIXEL_MULTIPLE}", code="size_not_multiple", field="size",
            got=f"{width}x{height}", expected=f"multiples of {PIXEL_MULTIPLE}", try_instead=f"--size {near}",
        )  # fmt: skip
    if max(width, height) > MAX_PATCHES * PIXEL_MULTIPLE:
        raise RequestError(
            "the network's position tables end here", code="size_too_large", field="size", got=f"{width}x{height}",
            expected=f"at most {MAX_PATCHES * PIXEL_MULTIPLE} a side", try_instead=f"--size {near}",
        )  # fmt: skip


def adaptive_size(image_width: int, image_height: int, area: int) -> tuple[int, int]:
    """(width, height) of the picture's aspect and about `area` pixels, in multiples of 16 within the patch limit.

    TurboDiffusion's Adaptive Resolution rounds both sides (half to even), so the area may exceed `area` by 1-2 %;
    its missing limit of 128 patches is added here: a very wide picture keeps its longer side at the limit.
    """
    aspect = image_height / image_width
    width, height = math.sqrt(area / aspect), math.sqrt(area * aspect)
    return _legal_side(width), _legal_side(height)


def _legal_side(side: float) -> int:
    rounded = round(side / PIXEL_MULTIPLE) * PIXEL_MULTIPLE
    return min(max(rounded, PIXEL_MULTIPLE), MAX_PATCHES * PIXEL_MULTIPLE)
