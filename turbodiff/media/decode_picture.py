"""The one place where untrusted pictures are decoded: run by `pictures.py` as a program of its own, within limits.

Standard input is the picture, the only argument a JSON object {"want": "size" | "fit", "width", "height", "fit",
"background"}. Standard output is one JSON line {"width", "height"} of the upright picture, followed for "fit" by RGB
bytes of the wanted size, in sRGB; or {"code", "got"} of what is wrong. Imports next to nothing of ours, to start fast.

The pixels are what counts: metadata that is damaged, huge or in the wrong place is left out before Pillow sees it.
"""

import contextlib
import io
import json
import re
import resource
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import Literal, NoReturn, TypedDict

from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from turbodiff.media.picture_colours import CannotConvert, colours_of, icc_profile

MEGAPIXELS = 64
MIN_SIDE = 16
LARGE, SUMMED = 16_000_000, ("RGB", "RGBA", "L", "LA", "CMYK")  # pixels; modes whose values may be averaged
MEMORY_BYTES = 2 << 30  # 64 megapixels as RGBA and as RGB, turned once, and the interpreter
CPU_S = 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_CHUNKS = 200_000  # of a PNG; 200 MB in the 8 KB pieces that libpng writes have 25,000
MAX_SCANS = 100  # of a progressive JPEG, each costs a pass over all pixels; encoders write 10, optimisers at most 64
MAX_METADATA_BYTES = 1 << 20  # a chunk of a PNG when decompressed; printers' ICC profiles have up to 1 MiB
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
PNG_HELPFUL = (b"iCCP", b"eXIf")  # colours and which way is up
PNG_COLOURS = {b"cICP": 4, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32}  # and their bytes
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type (PNG, 3rd edition, 11.2.1)
DEFLATE = 1040  # at most so many bytes from one: 258 from two bits (RFC 1951), and some
VP8_PIXELS = (
    700  # at most of one byte: a macroblock of 256 has 3.4 bits of modes, whose odds are fixed (RFC 6386, 11.2)
)
PNG_TEXTS = (b"Raw profile type ", b"XML:com.adobe.xmp\0")  # ImageMagick and Adobe keep the orientation in these
JPEG_SCAN, JPEG_END, JPEG_ADOBE = 0xDA, b"\xff\xd9", 0xEE
JPEG_HELPFUL = (0xE1, 0xE2, JPEG_ADOBE)  # EXIF and XMP, ICC, which colours the four or three planes are
JPEG_MARKER = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xda-\xef\xfe]")  # of those with a length, the ones in use
WEBP_PIXELS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
WEBP_BESIDE = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # and the bit of VP8X that says they are there
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
        refuse("picture_too_large", f"needs more than {MEMORY_BYTES >> 20} MiB")
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


def decode_pixels(data: bytes, wanted: Wanted) -> tuple[dict[str, int], bytes]:
    """See `decode`."""
    picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > MEGAPIXELS * 1_000_000:
        refuse("picture_too_large", f"{width}x{height}")
    if min(width, height) < MIN_SIDE:
        refuse("picture_too_small", f"{width}x{height}")
    turn = None
    with contextlib.suppress(Exception):  # EXIF that is none: the pixels are what counts
        turn = UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    try:
        colours = colours_of(picture, data)
    except CannotConvert as error:
        refuse("picture_colours", str(error))
    head = {"width": height, "height": width} if turn in SIDEWAYS else {"width": width, "height": height}
    if wanted["want"] == "size":
        return head, b""
    long_side = 2 * max(wanted["width"], wanted["height"])
    if is_short(data, picture.format, width * height):
        raise OSError("image file is truncated")
    picture.draft("RGB", (long_side, long_side))  # decodes a large JPEG at 1/2 to 1/8, still twice what is asked
    if picture.format == "JPEG" and data.rfind(JPEG_END) < data.rfind(bytes((0xFF, JPEG_SCAN))):
        picture = without_end(data, (long_side, long_side))
    factor = min(picture.size) // long_side
    if factor > 1 and width * height > LARGE and picture.mode in SUMMED and "transparency" not in picture.info:
        reduced = picture.reduce(factor)  # of 48 megapixels each further copy would take 183 MiB
        reduced.info, picture = picture.info, reduced
    turned = picture.transpose(turn) if turn is not None else picture
    if turned.mode.startswith("I"):  # 16 bits of grey
        turned = turned.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    turned.info = picture.info
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


def is_short(data: bytes, kind: str | None, pixels: int) -> bool:
    """Whether a PNG or a lossy WebP has fewer bytes than so many pixels take under the strongest compression; a decoder
    would allocate all of them before it says so."""
    if kind == "PNG":
        bits, colour = struct.unpack_from(">BB", data, 24)
        packed = sum(len(chunk) - 12 for chunk in png_chunks(data, False) if chunk[4:8] == b"IDAT")
        return bool(pixels * bits * PNG_CHANNELS.get(colour, 1) > 8 * DEFLATE * packed)
    lossy = [len(chunk) - 8 for chunk in webp_chunks(data, False) if chunk[:4] == b"VP8 "] if kind == "WEBP" else []
    return bool(lossy) and pixels > VP8_PIXELS * sum(lossy)


def without_end(data: bytes, draft_size: tuple[int, int]) -> Image.Image:
    """A JPEG whose end marker is missing, which is no loss, or whose pixels are, which is told from two endings.

    libjpeg ends a scan at the marker and fills what is missing with grey; with other bytes before the marker it would
    decode those. Where nothing is missing neither is looked at.

    Raises:
        OSError: pixels are missing.
    """
    both = []
    for ending in (b"", b"\x55" * 64):
        picture = Image.open(io.BytesIO(data.rstrip(b"\xff") + ending + JPEG_END), formats=("JPEG",))
        picture.draft("RGB", draft_size)
        picture.load()
        both.append(picture)
    if both[0].tobytes() != both[1].tobytes():
        raise OSError("image file is truncated")
    return both[0]


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


def without_metadata(data: bytes, keep_helpful: bool) -> bytes:
    """The file without what no pixel needs: PNG and JPEG; others as they are.

    Args:
        keep_helpful: what turns the picture upright and names its colours stays.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[:8] + b"".join(png_chunks(data, keep_helpful)) + struct.pack(">I4sI", 0, b"IEND", 0xAE426082)
    if data.startswith(b"\xff\xd8"):
        return b"".join(jpeg_segments(data, keep_helpful))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        chunks = b"".join(webp_chunks(data, keep_helpful))
        return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    return data


def webp_chunks(data: bytes, keep_helpful: bool) -> Iterator[bytes]:
    """The chunks of a WebP that are kept, to the end of the file, whatever size its head says (RFC 9649, 2.3)."""
    at, beside = 12, b"".join(WEBP_BESIDE) if keep_helpful else b""
    while at + 8 <= len(data) and (data[at : at + 4] in WEBP_PIXELS or data[at : at + 4] in WEBP_BESIDE):
        name, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        if name == b"VP8X" and not keep_helpful and body:
            body = bytes((body[0] & ~sum(WEBP_BESIDE.values()),)) + body[1:]
        if name in WEBP_PIXELS or name in beside:
            yield name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
        at += 8 + length + length % 2


def png_chunks(data: bytes, keep_helpful: bool) -> Iterator[bytes]:
    """The chunks of a PNG that are kept; one beside the pixels gets its checksum anew (PNG, 3rd edition, 5.3)."""
    at = 8
    for number in range(MAX_CHUNKS + 1):
        if at + 8 > len(data):
            return
        if number == MAX_CHUNKS:
            refuse("picture_broken", f"more than {MAX_CHUNKS} chunks")
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if name == b"IEND":
            return
        body = data[at + 8 : end - 4]
        if name in PNG_PIXELS and name != b"tRNS":
            yield data[at:end]
        elif name == b"tRNS" or (keep_helpful and is_helpful(name, body)):
            yield data[at : end - 4] + struct.pack(">I", zlib.crc32(name + body))
        at = end


def is_helpful(name: bytes, body: bytes) -> bool:
    """Whether a chunk beside the pixels is worth reading, and small when decompressed."""
    if name in (b"zTXt", b"iTXt", b"tEXt") and not body.startswith(PNG_TEXTS):
        return False
    if name in PNG_COLOURS:
        return len(body) == PNG_COLOURS[name]
    if name not in (*PNG_HELPFUL, b"zTXt", b"iTXt", b"tEXt") or len(body) > MAX_METADATA_BYTES:
        return False
    if name in (b"eXIf", b"tEXt"):
        return True
    key, _, rest = body.partition(b"\0")
    if name == b"iTXt" and rest[:1] == b"\0":
        return True
    packed = rest[1:] if name != b"iTXt" else rest[2:].split(b"\0", 2)[-1]
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(packed, MAX_METADATA_BYTES)
    except zlib.error:
        return False
    return bool(key) and inflate.eof


def jpeg_segments(data: bytes, keep_helpful: bool) -> Iterator[bytes]:
    """A JPEG without comments, application segments and what is between segments, up to its first scan, and the rest
    (ITU-T T.81, B.1.1.4)."""
    yield data[:2]
    at = 2
    while found := JPEG_MARKER.search(data, at):
        at, kind = found.start(), data[found.end() - 1]
        if kind == JPEG_SCAN or at + 4 > len(data):
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        other = 0xE0 <= kind <= 0xEF or kind == 0xFE
        if not other or kind == JPEG_ADOBE or (keep_helpful and kind in JPEG_HELPFUL):
            yield data[at:end]
        at = end
    scans = data.count(bytes((0xFF, JPEG_SCAN)), at)
    if scans > MAX_SCANS:
        refuse("picture_broken", f"{scans} scans")
    yield data[at:]


def flatten(picture: Image.Image, background: str) -> Image.Image:
    """Any mode -> RGB of 8 bits; what is transparent shows the background."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    flat = Image.new("RGB", rgba.size, background)
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return flat


def kind_of(data: bytes) -> str:
    """What the bytes look like, where they are none of our formats."""
    start = data[:256]
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
