"""Untrusted picture files as bytes: what of them is handed to a decoder, and what decoding will take.

The pixels are what counts: metadata that is damaged, huge or in the wrong place is left out before Pillow sees it.
Files are kept as pieces of what was read, never copied. Run within decode_picture.py's limits; imports nothing of ours.
"""

import io
import json
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from PIL import Image

MAX_CHUNKS = 200_000  # of a PNG; 200 MB in the 8 KB pieces that libpng writes have 25,000
MAX_SCANS = 100  # of a progressive JPEG, each costs a pass over all pixels; encoders write 10, optimisers at most 64
MAX_METADATA_BYTES = 1 << 20  # a chunk of a PNG when decompressed; printers' ICC profiles have up to 1 MiB
PNG_MARK = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
PNG_HELPFUL = (b"iCCP", b"eXIf")  # colours and which way is up
PNG_COLOURS = {b"cICP": 4, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32}  # and their bytes
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type (PNG, 3rd edition, 11.2.1)
PNG_END = struct.pack(">I4sI", 0, b"IEND", 0xAE426082)
DEFLATE = 1040  # at most so many bytes from one: 258 from two bits (RFC 1951), and some
VP8_PIXELS = (
    700  # at most of one byte: a macroblock of 256 has 3.4 bits of modes, whose odds are fixed (RFC 6386, 11.2)
)
PNG_TEXTS = (b"Raw profile type ", b"XML:com.adobe.xmp\0")  # ImageMagick and Adobe keep the orientation in these
JPEG_SCAN, JPEG_END, JPEG_ADOBE = 0xDA, b"\xff\xd9", 0xEE
JPEG_SCAN_MARK = bytes((0xFF, JPEG_SCAN))
JPEG_HELPFUL = (0xE1, 0xE2, JPEG_ADOBE)  # EXIF and XMP, ICC, which colours the four or three planes are
JPEG_MARKER = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xda-\xef\xfe]")  # of those with a length, the ones in use
JPEG_FRAMES = range(0xC0, 0xD0)  # the segment that says size and planes (ITU-T T.81, table B.1)
JPEG_PROGRESSIVE = (0xC2, 0xCA)
WEBP_PIXELS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
WEBP_BESIDE = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # and the bit of VP8X that says they are there
STRIP_PIXELS = 1 << 20
Pieces = list[memoryview]


def strip_rows(width: int) -> int:
    """Rows of a strip of a picture."""
    return max(8, STRIP_PIXELS // width)


class Kept(io.RawIOBase):
    """Pieces one after another, as a file that can be read anywhere."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces, self._starts, self._at, end = pieces, list[int](), 0, 0
        for piece in pieces:
            self._starts.append(end)
            end += len(piece)
        self._end, self._last = end, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence])
        return self._at

    def readinto(self, into: Any) -> int:
        """Fill `into` from the piece that is next; 0 at the end."""
        if self._at >= self._end:
            return 0
        number = self._last if self._starts[self._last] <= self._at else 0
        while self._at >= self._starts[number] + len(self._pieces[number]):
            number += 1
        self._last = number
        room = memoryview(into).cast("B")
        begin = self._at - self._starts[number]
        found = self._pieces[number][begin : begin + len(room)]
        room[: len(found)] = found
        self._at += len(found)
        return len(found)


def opened(pieces: Sequence[memoryview]) -> io.BufferedReader:
    """Pieces as a file for a decoder."""
    return io.BufferedReader(Kept(pieces), 1 << 16)


def is_short(pieces: Pieces, kind: str | None, pixels: int) -> bool:
    """Whether a PNG or a lossy WebP has fewer bytes than so many pixels take under the strongest compression; a decoder
    would allocate all of them before it says so."""
    if kind == "PNG":
        bits, colour = struct.unpack_from(">BB", pieces[1], 16)
        packed = sum(len(body) for body in png_pixels(pieces))
        return bool(pixels * bits * PNG_CHANNELS.get(colour, 1) > 8 * DEFLATE * packed)
    lossy = [len(body) for name, body in webp_bodies(pieces) if name == b"VP8 "] if kind == "WEBP" else []
    return bool(lossy) and pixels > VP8_PIXELS * sum(lossy)


def without_metadata(data: bytes, keep_helpful: bool) -> Pieces:
    """The file without what no pixel needs: PNG, JPEG and WebP; others as they are.

    Args:
        keep_helpful: what turns the picture upright and names its colours stays.
    """
    view = memoryview(data)
    if data.startswith(PNG_MARK):
        chunks = sorted(png_chunks(view, keep_helpful), key=lambda chunk: bytes(chunk[4:8]) == b"IDAT")
        return [view[:8], *chunks, memoryview(PNG_END)]  # Pillow decodes all to see what is behind the pixels
    if data.startswith(b"\xff\xd8"):
        return list(jpeg_segments(data, keep_helpful))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        chunks = list(webp_chunks(view, keep_helpful))
        size = struct.pack("<I", 4 + sum(map(len, chunks)))
        return [memoryview(b"RIFF" + size + b"WEBP"), *chunks]
    return [view]


def webp_chunks(data: memoryview, keep_helpful: bool) -> Iterator[memoryview]:
    """The chunks of a WebP that are kept, to the end of the file, whatever size its head says (RFC 9649, 2.3)."""
    at, beside = 12, b"".join(WEBP_BESIDE) if keep_helpful else b""
    while at + 8 <= len(data) and ((name := bytes(data[at : at + 4])) in WEBP_PIXELS or name in WEBP_BESIDE):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + length]
        if name == b"VP8X" and not keep_helpful and body:
            body = memoryview(bytes((body[0] & ~sum(WEBP_BESIDE.values()),)) + body[1:])
        if name in WEBP_PIXELS or name in beside:
            yield memoryview(name + struct.pack("<I", len(body)))
            yield body
            yield memoryview(bytes(len(body) % 2))
        at += 8 + length + length % 2


def webp_bodies(pieces: Pieces) -> list[tuple[bytes, memoryview]]:
    """The names and bodies of the chunks of a WebP."""
    return [(bytes(head[:4]), body) for head, body in zip(pieces[1::3], pieces[2::3], strict=True)]


def png_chunks(data: memoryview, keep_helpful: bool) -> Iterator[memoryview]:
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
        if name in PNG_PIXELS and name != b"tRNS":
            yield data[at:end]
        elif length <= MAX_METADATA_BYTES:
            body = bytes(data[at + 8 : end - 4])
            if name == b"tRNS" or (keep_helpful and is_helpful(name, body)):
                yield memoryview(bytes(data[at : end - 4]) + struct.pack(">I", zlib.crc32(name + body)))
        at = end


def png_pixels(pieces: Pieces) -> list[memoryview]:
    """The compressed pixels of a PNG."""
    return [chunk[8:-4] for chunk in pieces[1:-1] if bytes(chunk[4:8]) == b"IDAT"]


def png_strips(pieces: Pieces) -> Iterator[Image.Image] | None:
    """A PNG in strips from its top, each decoded as a PNG of its own: its first row is the last of the strip before,
    without a filter, which is then cut off. None where that cannot be done: samples of other than 8 bits, interlaced.

    Raises:
        OSError: pixels are missing.
    """
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", pieces[1], 8)
    if bits != 8 or interlaced or colour not in PNG_CHANNELS:
        return None
    around = [chunk for chunk in pieces[2:-1] if bytes(chunk[4:8]) in (b"PLTE", b"tRNS")]
    row_bytes, rows = 1 + width * PNG_CHANNELS[colour], strip_rows(width)

    def strip(raw: bytes, before: bytes) -> Image.Image:
        count = (len(raw) + len(before)) // row_bytes
        head = struct.pack(">IIBBBBB", width, count, 8, colour, 0, 0, 0)
        start = memoryview(PNG_MARK + png_chunk(b"IHDR", head))
        packed = memoryview(png_chunk(b"IDAT", zlib.compress(before + raw, 0)) + PNG_END)
        picture: Image.Image = Image.open(opened([start, *around, packed]), formats=("PNG",))
        return picture.crop((0, 1 if before else 0, width, count)) if before else picture

    def strips() -> Iterator[Image.Image]:
        before, done = b"", 0
        for raw in inflated(png_pixels(pieces), rows * row_bytes, height * row_bytes):
            if len(raw) % row_bytes:
                raise OSError("image file is truncated")
            done += len(raw)
            made = strip(raw, before)
            made.load()
            before = b"\0" + made.crop((0, made.height - 1, width, made.height)).tobytes()
            yield made
        if done < height * row_bytes:
            raise OSError("image file is truncated")

    return strips()


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def inflated(packed: Sequence[memoryview], step: int, total: int) -> Iterator[bytes]:
    """Decompressed data in pieces of `step` bytes, at most `total`; the last one may be shorter."""
    inflate, held = zlib.decompressobj(), bytearray()
    for piece in packed:
        left: memoryview | bytes = piece
        while len(left) and total > 0:
            held += inflate.decompress(left, min(step, total) - len(held))
            left = inflate.unconsumed_tail
            if len(held) >= min(step, total):
                total -= len(held)
                yield bytes(held)
                held.clear()
            elif inflate.eof:
                break
    if held:
        yield bytes(held)


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


def jpeg_segments(data: bytes, keep_helpful: bool) -> Iterator[memoryview]:
    """A JPEG without comments, application segments and what is between segments, up to its first scan, and the rest
    (ITU-T T.81, B.1.1.4)."""
    view = memoryview(data)
    yield view[:2]
    at = 2
    while found := JPEG_MARKER.search(data, at):
        at, kind = found.start(), data[found.end() - 1]
        if kind == JPEG_SCAN or at + 4 > len(data):
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        other = 0xE0 <= kind <= 0xEF or kind == 0xFE
        if not other or kind == JPEG_ADOBE or (keep_helpful and kind in JPEG_HELPFUL):
            yield view[at:end]
        at = end
    scans = data.count(JPEG_SCAN_MARK, at)
    if scans > MAX_SCANS:
        refuse("picture_broken", f"{scans} scans")
    yield view[at:]


def jpeg_held_bytes(pieces: Pieces, pixels: int) -> int:
    """What a JPEG's decoder holds beside the pixels: two bytes for each coefficient where the planes do not come in one
    scan (libjpeg, jdcoefct.c)."""
    for frame in pieces[1:-1]:
        if len(frame) < 10 or frame[1] not in JPEG_FRAMES or frame[1] in (0xC4, 0xC8, 0xCC):
            continue
        planes = frame[9]
        if frame[1] not in JPEG_PROGRESSIVE and len(pieces[-1]) > 4 and pieces[-1][4] >= planes:
            return 0
        areas = [(each >> 4) * (each & 15) for each in frame[11 : 10 + 3 * planes : 3]]
        return 2 * pixels * sum(areas) // max(1, *areas, 1)
    return 0


def is_ended(scans: bytes) -> bool:
    """Whether there is an end marker behind a JPEG's last scan."""
    return scans.rfind(JPEG_END) >= scans.rfind(JPEG_SCAN_MARK)


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
