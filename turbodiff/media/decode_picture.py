"""The one place where untrusted pictures are decoded: run by `pictures.py` as a program of its own, within limits.

Standard input is the picture, the only argument a JSON object {"want": "size" | "fit", "width", "height", "fit",
"background"}. Standard output is one JSON line {"width", "height"} of the upright picture, followed for "fit" by RGB
bytes of the wanted size, in sRGB; or {"code", "got"} of what is wrong. Imports next to nothing of ours, to start fast.

A large picture is made smaller while it is decoded, or in strips, so that 64 megapixels do not take four bytes each.
"""

import contextlib
import hashlib
import io
import json
import math
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Literal, NoReturn, TypedDict

from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from turbodiff.media.picture_colours import CannotConvert, colours_of, icc_profile
from turbodiff.media.picture_files import (
    JPEG_END,
    STRIP_PIXELS,
    Pieces,
    is_ended,
    is_short,
    jpeg_held_bytes,
    kind_of,
    opened,
    png_strips,
    refuse,
    strip_rows,
    webp_bodies,
    without_metadata,
)

MEGAPIXELS = 64
MIN_SIDE = 16
LARGE = 6_000_000  # pixels that are copied as a whole: four times 23 MiB
SUMMED = ("RGB", "RGBA", "L", "LA", "CMYK")  # modes whose values may be averaged
MEMORY_BYTES = 2 << 30  # of address space, most of it libraries
HELD_MIB = 200  # what a decoder may take, by what is known of its memory before it starts
BASE_MIB = 60  # the interpreter and Pillow 30, what is made of LARGE pixels
JPEG_BASE_MIB = 32  # what a JPEG's decoder holds is gone before anything is made of the pixels
CPU_S = 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # in Pillow; every other mode takes four
# What ffmpeg takes for a WebP beside us: bytes a pixel and a byte of the file, then MiB and bytes a byte of what it
# hands on; and what we take until then (ffmpeg 9.0, 12 to 36 megapixels, 8 to 40 MiB above what was measured)
WEBP_PRICES = {"lossy": (1.3, 2.0), "alpha": (5.5, 0.0), "lossless": (4.3, 0.0)}
FFMPEG_MIB, FFMPEG_MADE = 20, 3.5
BESIDE_MIB, BESIDE_FILE, BESIDE_MADE = 35, 3, 1
UPRIGHT = {  # EXIF 2.32, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = tuple(UPRIGHT[orientation] for orientation in (5, 6, 7, 8))


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
    data = sys.stdin.buffer.read()
    try:
        head, pixels = decode(data, wanted)
    except UnidentifiedImageError:
        refuse("picture_kind", kind_of(data))
    except MemoryError:
        refuse("picture_memory", f"more than {MEMORY_BYTES >> 20} MiB")
    except Exception as error:  # noqa: BLE001  whatever a decoder raises on untrusted bytes, the picture is broken
        refuse("picture_broken", f"{error}"[:200])
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + pixels)


def decode(data: bytes, wanted: Wanted) -> tuple[dict[str, int], bytes]:
    """The first line of a good answer and the pixels (none for "size"), without metadata if that is what is damaged."""
    kept = without_metadata(data, keep_helpful=True)
    try:
        return decode_pixels(kept, wanted)
    except MemoryError:
        raise
    except Exception:
        bare = without_metadata(data, keep_helpful=False)
        if bare == kept:  # nothing is left that could be at fault but the pixels
            raise
        return decode_pixels(bare, wanted)


def decode_pixels(pieces: Pieces, wanted: Wanted) -> tuple[dict[str, int], bytes]:
    """See `decode`."""
    picture: Image.Image = Image.open(opened(pieces), formats=FORMATS)
    width, height = picture.size
    if width * height > MEGAPIXELS * 1_000_000:
        refuse("picture_too_large", f"{width}x{height}")
    if min(width, height) < MIN_SIDE:
        refuse("picture_too_small", f"{width}x{height}")
    turn = None
    with contextlib.suppress(Exception):  # EXIF that is none: the pixels are what counts
        turn = UPRIGHT.get(Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1))
    try:
        beside = [piece for piece in pieces if bytes(piece[4:8]) != b"IDAT"] if picture.format == "PNG" else []
        colours = colours_of(picture, b"".join(beside) + b"IDAT")
    except CannotConvert as error:
        refuse("picture_colours", str(error))
    head = {"width": height, "height": width} if turn in SIDEWAYS else {"width": width, "height": height}
    if wanted["want"] == "size":
        return head, b""
    if is_short(pieces, picture.format, width * height):
        raise OSError("image file is truncated")
    asked = (wanted["height"], wanted["width"]) if turn in SIDEWAYS else (wanted["width"], wanted["height"])
    ratios = width / asked[0], height / asked[1]
    small = shrunk(picture, pieces, max(ratios) if wanted["fit"] == "pad" else min(ratios))
    info, turned = small.info, small.transpose(turn) if turn is not None else small
    del picture, small
    if turned.mode.startswith("I"):  # 16 bits of grey
        turned = eight_bits(turned)
    turned.info = info
    if colours and colours.narrow:  # 16 to 235 of 255 (H.273, VideoFullRangeFlag 0); alpha is whole
        turned = turned.convert("RGBA" if turned.has_transparency_data else "RGB")
        levels = [min(255, max(0, round((level - 16) * 255 / 219))) for level in range(256)]
        turned = turned.point(levels * 3 + list(range(256)) * (turned.mode == "RGBA"))
    if colours:
        turned.info["icc_profile"] = icc_profile(colours)
    rgb = flatten(to_srgb(turned), wanted["background"])
    size = (wanted["width"], wanted["height"])
    if wanted["fit"] == "stretch":
        rgb = rgb.resize(size, Image.Resampling.BILINEAR)  # all three are antialiased
    elif wanted["fit"] == "pad":
        rgb = ImageOps.pad(rgb, size, Image.Resampling.BILINEAR, color=wanted["background"])
    else:
        rgb = ImageOps.fit(rgb, size, Image.Resampling.BILINEAR)
    return head, rgb.tobytes()


def shrunk(picture: Image.Image, pieces: Pieces, ratio: float) -> Image.Image:
    """The pixels of a picture that was opened, smaller by a whole factor where it is large: still twice what is asked,
    or once where that is large, too.

    Where its proportions let it not become smaller, it is priced before it is decoded: what is left of it is there
    twice, with alpha three times, and a strip of more than STRIP_PIXELS four times.

    Args:
        ratio: sides of the picture by the sides that are asked, of the two the one that counts.

    Raises:
        OSError: pixels are missing.
    """
    pixels = math.prod(picture.size)
    if min(picture.size) < ratio / 2:  # padded, nothing would be left of its shorter side
        refuse("picture_too_small", f"{picture.width}x{picture.height}")
    factor = max(1, int(ratio / 2))
    if pixels > LARGE * factor**2:
        factor = max(factor, min(int(ratio), math.ceil(math.sqrt(pixels / LARGE))))
    strip_pixels = min(pixels, strip_rows(picture.width) * picture.width)
    kept_bytes = (12 if picture.has_transparency_data else 8) * pixels / factor**2
    kept_bytes += 16 * max(0, strip_pixels - STRIP_PIXELS)
    if pixels > LARGE and (mib := BASE_MIB + kept_bytes / (1 << 20)) > HELD_MIB:  # a very long one
        refuse_price(picture, mib)
    if picture.format == "WEBP" and pixels > LARGE:
        return webp_shrunk(picture, pieces, factor)
    if picture.format == "PNG" and pixels > LARGE and (strips := png_strips(pieces)):
        return joined(strips, picture, factor)
    draft, held_bytes = 1, sum(map(len, pieces))
    if picture.format == "JPEG":
        held_bytes += jpeg_held_bytes(pieces, pixels)
        draft = 1 << min(3, factor.bit_length() - 1)
        while 2 * draft <= min(8, ratio) and price_mib(held_bytes, picture, draft) > HELD_MIB:
            draft *= 2
    if (mib := price_mib(held_bytes, picture, draft)) > HELD_MIB:
        refuse_price(picture, mib)
    if picture.format == "JPEG":
        draft_size, factor = (picture.width // draft, picture.height // draft), max(1, factor // draft)
        picture.draft("RGB", draft_size)
        if not is_ended(bytes(pieces[-1])):
            picture = without_end(pieces, draft_size)
    picture.load()
    if math.prod(picture.size) <= LARGE or factor < 2:
        return picture
    return joined(bands(picture), picture, factor)


def price_mib(held_bytes: int, picture: Image.Image, draft: int) -> float:
    """What decoding a picture takes in all."""
    nbytes = held_bytes + math.prod(picture.size) * PIXEL_BYTES.get(picture.mode, 4) / draft**2
    return nbytes / (1 << 20) + (JPEG_BASE_MIB if picture.format == "JPEG" else BASE_MIB)


def refuse_price(picture: Image.Image, mib: float) -> NoReturn:
    """Refuse a picture whose decoder would take too much."""
    refuse("picture_memory", f"{picture.width}x{picture.height}, {picture.format}: {mib:.0f} MiB")


def bands(picture: Image.Image) -> Iterator[Image.Image]:
    """A picture in strips from its top."""
    rows = strip_rows(picture.width)
    for top in range(0, picture.height, rows):
        yield picture.crop((0, top, picture.width, min(picture.height, top + rows)))


def joined(strips: Iterator[Image.Image], picture: Image.Image, factor: int) -> Image.Image:
    """Strips of a picture, each smaller by a factor, as one; what is transparent by its colour is so by its alpha."""
    made, top, held = None, 0, None
    for strip in strips:
        plain = strip
        if strip.mode.startswith("I"):
            plain = eight_bits(strip)
        elif strip.mode == "1":
            plain = strip.convert("L")
        elif strip.mode not in SUMMED or "transparency" in strip.info:
            plain = strip.convert("RGBA" if strip.has_transparency_data else "RGB")
        if held is not None:
            both = Image.new(plain.mode, (plain.width, held.height + plain.height))
            both.paste(held)
            both.paste(plain, (0, held.height))
            plain = both
        whole = plain.height // factor * factor
        last = top + plain.height == picture.height
        held = None if last or whole == plain.height else plain.crop((0, whole, plain.width, plain.height))
        part = plain if last else plain.crop((0, 0, plain.width, whole))
        made = made or Image.new(part.mode, (-(-picture.width // factor), -(-picture.height // factor)))
        made.paste(part.reduce(factor), (0, top // factor))
        top += part.height
    assert made is not None
    made.info = {name: value for name, value in picture.info.items() if name != "transparency"}
    return made


def webp_shrunk(picture: Image.Image, pieces: Pieces, factor: int) -> Image.Image:
    """A large WebP by ffmpeg, which holds the planes of one frame; Pillow holds four canvases.

    Raises:
        OSError: pixels are missing, or there is no ffmpeg that reads them.
    """
    import imageio_ffmpeg

    pixels, file_mib = math.prod(picture.size), sum(map(len, pieces)) / (1 << 20)
    names = {name for name, _ in webp_bodies(pieces)}
    kind = "lossless" if b"VP8 " not in names else "alpha" if b"ALPH" in names else "lossy"
    width, height = -(-picture.width // factor), -(-picture.height // factor)
    mode, layout = ("RGBA", "rgba") if picture.mode == "RGBA" else ("RGB", "rgb24")
    per_pixel, per_byte = WEBP_PRICES[kind]
    made_mib = width * height * len(mode) / (1 << 20)
    mib = FFMPEG_MIB + pixels * per_pixel / (1 << 20) + per_byte * file_mib + FFMPEG_MADE * made_mib
    mib += BESIDE_MIB + BESIDE_FILE * file_mib + BESIDE_MADE * made_mib
    if mib > HELD_MIB:
        refuse_price(picture, mib)
    bare = b"".join(without_metadata(b"".join(pieces), False))
    scale = f"scale={width}:{height}:flags=area+accurate_rnd+full_chroma_int,format={layout}"
    source = ("-protocol_whitelist", "pipe", "-noautorotate", "-f", "webp_pipe", "-i", "pipe:0", "-frames:v", "1")
    command = (imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-threads", "1", "-filter_threads", "1", *source)
    run = subprocess.run([*command, "-vf", scale, "-f", "rawvideo", "-"], input=bare, stdout=subprocess.PIPE)
    if len(run.stdout) != width * height * len(mode):
        raise OSError("image file is truncated")
    made = Image.frombytes(mode, (width, height), run.stdout)
    made.info = picture.info
    return made


def eight_bits(picture: Image.Image) -> Image.Image:
    """16 bits of grey as 8."""
    return picture.convert("I").point(lambda level: level * (1 / 257)).convert("L")


def without_end(pieces: Pieces, draft_size: tuple[int, int]) -> Image.Image:
    """A JPEG whose end marker is missing, which is no loss, or whose pixels are, which is told from two endings.

    libjpeg ends a scan at the marker and fills what is missing with grey; with other bytes before the marker it would
    decode those. Where nothing is missing neither is looked at.

    Raises:
        OSError: pixels are missing.
    """

    def ended_with(ending: bytes) -> tuple[Image.Image, bytes]:
        last = memoryview(bytes(pieces[-1]).rstrip(b"\xff") + ending + JPEG_END)
        picture = Image.open(opened([*pieces[:-1], last]), formats=("JPEG",))
        picture.draft("RGB", draft_size)
        digest = hashlib.sha256()
        for band in bands(picture):
            digest.update(band.tobytes())
        return picture, digest.digest()

    other = ended_with(b"\x55" * 64)[1]
    picture, digest = ended_with(b"")
    if digest != other:
        raise OSError("image file is truncated")
    return picture


def to_srgb(picture: Image.Image) -> Image.Image:
    """The same colours in sRGB where a profile is embedded; one that does not belong to these pixels is passed over."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    try:
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        if (mode == "CMYK") != (picture.mode == "CMYK") or (mode == "L" and picture.mode not in ("1", "L", "LA")):
            return picture
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        converted = ImageCms.profileToProfile(picture.convert(mode), source, srgb, intent, "RGB")
    except (ImageCms.PyCMSError, KeyError, OSError, TypeError, ValueError):
        return picture
    assert converted is not None  # it is not made in place
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def flatten(picture: Image.Image, background: str) -> Image.Image:
    """Any mode -> RGB of 8 bits; what is transparent shows the background."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    flat = Image.new("RGB", rgba.size, background)
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return flat


if __name__ == "__main__":
    main()
