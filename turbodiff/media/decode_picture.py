"""The one place where untrusted pictures are decoded: run by `pictures.py` as a program of its own, within limits.

Standard input is the picture, the only argument a JSON object {"want": "size" | "fit", "width", "height", "fit",
"background"}. Standard output is one JSON line {"width", "height"} of the upright picture, followed for "fit" by RGB
bytes of the wanted size; or {"code", "got"} of what is wrong. Imports nothing of ours, so that it starts fast.
"""

import json
import resource
import sys
import warnings
from typing import BinaryIO, Literal, NoReturn, TypedDict

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MEGAPIXELS = 64
MIN_SIDE = 16
MEMORY_BYTES = 2 << 30  # 64 megapixels as RGBA and as RGB, turned once, and the interpreter
CPU_S = 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


class Wanted(TypedDict):
    """What the argument asks for; "size" needs nothing else."""

    want: Literal["size", "fit"]
    width: int
    height: int
    fit: Literal["crop", "pad", "stretch"]
    background: str


def main() -> None:
    """Decode standard input within limits."""
    wanted: Wanted = json.loads(sys.argv[1])
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before anything is decoded
    try:
        head, pixels = decode(sys.stdin.buffer, wanted)
    except UnidentifiedImageError:
        refuse("picture_kind", kind_of(sys.stdin.buffer))
    except MemoryError:
        refuse("picture_too_large", f"needs more than {MEMORY_BYTES >> 20} MiB")
    except Exception as error:  # noqa: BLE001  whatever a decoder raises on untrusted bytes, the picture is broken
        refuse("picture_broken", f"{error}"[:200])
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + pixels)


def decode(source: BinaryIO, wanted: Wanted) -> tuple[dict[str, int], bytes]:
    """The first line of a good answer and the pixels (none for "size")."""
    picture = Image.open(source, formats=FORMATS)
    width, height = picture.size
    if width * height > MEGAPIXELS * 1_000_000:
        refuse("picture_too_large", f"{width}x{height}")
    if min(width, height) < MIN_SIDE:
        refuse("picture_too_small", f"{width}x{height}")
    lies = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # orientations 5 to 8 lie on their side
    head = {"width": height, "height": width} if lies else {"width": width, "height": height}
    if wanted["want"] == "size":
        return head, b""
    long_side = 2 * max(wanted["width"], wanted["height"])
    picture.draft("RGB", (long_side, long_side))  # decodes a large JPEG at 1/2 to 1/8, still twice what is asked
    ImageOps.exif_transpose(picture, in_place=True)
    rgb = flatten(picture, wanted["background"])
    size = (wanted["width"], wanted["height"])
    if wanted["fit"] == "stretch":
        rgb = rgb.resize(size, Image.Resampling.BILINEAR)  # all three are antialiased
    elif wanted["fit"] == "pad":
        rgb = ImageOps.pad(rgb, size, Image.Resampling.BILINEAR, color=wanted["background"])
    else:
        rgb = ImageOps.fit(rgb, size, Image.Resampling.BILINEAR)
    return head, rgb.tobytes()


def flatten(picture: Image.Image, background: str) -> Image.Image:
    """Any mode -> RGB of 8 bits; what is transparent shows the background."""
    if picture.mode.startswith("I"):  # 16 bits of grey
        picture = picture.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    flat = Image.new("RGB", rgba.size, background)
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return flat


def kind_of(source: BinaryIO) -> str:
    """What the bytes look like, where they are none of our formats."""
    source.seek(0)
    start = source.read(256)
    if not start:
        return "an empty file"
    if start[4:8] == b"ftyp":
        return {b"hei": "a HEIC picture", b"avi": "an AVIF picture", b"mif": "a HEIC picture"}.get(
            start[8:11], "a video"
        )
    if b"<svg" in start or start.lstrip().startswith(b"<?xml"):
        return "an SVG drawing"
    known = {b"BM": "a BMP picture", b"II*\0": "a TIFF picture", b"MM\0*": "a TIFF picture", b"%PDF": "a PDF"}
    for mark, kind in known.items():
        if start.startswith(mark):
            return kind
    return "text" if start.isascii() and b"\0" not in start else "an unknown kind of file"


def refuse(code: str, got: str) -> NoReturn:
    """Say what is wrong and end."""
    sys.stdout.write(json.dumps({"code": code, "got": got}) + "\n")
    sys.exit(0)


if __name__ == "__main__":
    main()
