"""What is made of a clip's frames once they are decoded: frames in between, larger frames. Bytes and seconds.

All read the frames before them from a raw file and hold a few of them. Seconds of ffmpeg's filters were measured on
one core of an AMD EPYC with AVX2 (2026-11): `minterpolate` makes 3.0 million pixels a second, `scale` with Lanczos 40
million. A network's are predictions until a run of it was measured, as those of every phase are (calibration.py).
"""

from turbodiff.spec.models import Inventory
from turbodiff.spec.plan import FinishCost
from turbodiff.spec.request import Request
from turbodiff.spec.shapes import VideoShape

BETWEEN_PIXELS_S, LANCZOS_PIXELS_S = 3.0e6, 40e6
FRAMES_HELD = 8  # of the larger size, in ffmpeg's filters
TILE, MARGIN = 256, 16  # pixels of the side of what an upscaler sees at once, and around it
# Channels alive at once in a dense block of ESRGAN, at the side of the tile: its features, those that it adds, and the
# copy that joins them; the widest of the usual networks. Behind the last enlargement there are 64 more, twice.
CHANNELS, TAIL_CHANNELS = 64 + 2 * (64 + 4 * 32), 2 * 64
OWN_SCALE = 4  # of most files; a smaller one needs less
# RIFE 4.26 heavy in float32, by dry runs of ccvfi's module at five sizes (tests/runtime/test_interpolator.py): bytes
# alive at once and operations, for a pixel of frames whose sides are filled up to multiples of 64
EVEN, RIFE_PIXEL_BYTES, RIFE_PIXEL_FLOPS = 64, 1400, 50_600
RIFE_WEIGHT_BYTES = 22_892_624  # a file in 16 bits is half as large


def file_pixels(request: Request, shape: VideoShape) -> int:
    """Of all frames of the file."""
    rate = request.smooth_fps / request.fps if "interpolate" in request.finishing else 1
    return round(shape.frames * rate) * shape.width * shape.height * request.upscale**2


def finish_costs(
    request: Request, shape: VideoShape, here: Inventory, flops: float, element_bytes: int
) -> tuple[FinishCost, ...]:
    """The phases that a request asks for.

    Args:
        shape: of the clip that is decoded.
        flops: of the device's convolutions in a second.
        element_bytes: of a number there.

    Raises:
        FileError: field `upscaler` or `interpolator`: there is no such file.
    """
    found, frame = list[FinishCost](), shape.width * shape.height
    larger = request.upscale**2
    pixels = file_pixels(request, shape) // larger  # of all frames behind the first phase
    if "interpolate" in request.finishing and request.interpolator:
        here.network("interpolator", request.interpolator)
        filled = -(-shape.width // EVEN) * -(-shape.height // EVEN) * EVEN**2
        # float32 at half the rate of the device's own numbers: flow in 16 bits is off by parts of a pixel
        seconds = pixels / frame * filled * RIFE_PIXEL_FLOPS * (4 / element_bytes) / flops
        device_bytes = RIFE_WEIGHT_BYTES, RIFE_PIXEL_BYTES * filled
        found.append(FinishCost("interpolate", *device_bytes, 3 * FRAMES_HELD * frame, seconds))
    elif "interpolate" in request.finishing:
        found.append(FinishCost("interpolate", 0, 0, 3 * FRAMES_HELD * frame, pixels / BETWEEN_PIXELS_S))
    if "upscale" in request.finishing and not request.upscaler:
        host_bytes = 3 * FRAMES_HELD * frame * larger
        found.append(FinishCost("upscale", 0, 0, host_bytes, pixels * larger / LANCZOS_PIXELS_S))
    elif "upscale" in request.finishing:
        file_bytes = here.network("upscaler", request.upscaler).bytes
        tile = (TILE + 2 * MARGIN) ** 2
        # whole frames stay on the device in numbers of its own, those of the network's own scale among them
        activations = element_bytes * (
            tile * (CHANNELS + TAIL_CHANNELS * OWN_SCALE**2) + 3 * frame * (1 + OWN_SCALE**2 + larger)
        )
        # two operations a weight and a pixel, and as much again behind the enlargement
        seconds = pixels * (tile / TILE**2) * 4 * (file_bytes / 4) / flops
        found.append(FinishCost("upscale", file_bytes, activations, 3 * FRAMES_HELD * frame * larger, seconds))
    return tuple(found)
