"""Which colours the numbers of an untrusted picture mean, where no ICC profile says so, and the profile that says it.

Run within decode_picture.py's limits; imports nothing of ours.
"""

import contextlib
import re
import struct
from typing import NamedTuple

from PIL import ExifTags, Image

# CIE 1931 x, y of red, green, blue and white by the number of H.273 (table 2), which cICP holds: ITU-R BT.709, BT.470,
# SMPTE 170M, film, BT.2020, SMPTE ST 428, RP 431, EG 432 (Display P3), EBU 3213
D65, ILLUMINANT_C, P3 = (0.3127, 0.3290), (0.310, 0.316), ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
SMPTE_170M = ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65)
PRIMARIES = {
    1: SRGB, 4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), ILLUMINANT_C),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), D65),
    6: SMPTE_170M, 7: SMPTE_170M, 8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), ILLUMINANT_C),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65), 10: ((1, 0), (0, 1), (0, 0), (1 / 3, 1 / 3)),
    11: (*P3, (0.314, 0.351)), 12: (*P3, D65), 22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), D65),
}  # fmt: skip
# From a code to light by the number of H.273 (table 3): g, a, b, c, d of ICC's curve, (a x + b)^g from d on, below c x.
# BT.709 and BT.2020 (the exact alpha of BT.2020, note to table 4), sRGB (IEC 61966-2-1), SMPTE ST 428-1
BT_2020 = (1 / 0.45, 1 / 1.09929682680944, 0.09929682680944 / 1.09929682680944, 1 / 4.5, 4.5 * 0.018053968510807)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
CURVES = {
    **dict.fromkeys((1, 6, 11, 12, 14, 15), BT_2020), 4: (2.2, 1, 0, 0, 0), 5: (2.8, 1, 0, 0, 0), 8: (1, 1, 0, 0, 0),
    7: (1 / 0.45, 1 / 1.1115, 0.1115 / 1.1115, 1 / 4, 0.0913), 13: SRGB_CURVE,
    17: (2.6, (52.37 / 48) ** (1 / 2.6), 0, 0, 0),
}  # fmt: skip
# Brighter than the white of sRGB, or a logarithm of light: what becomes of that is a matter of taste
HDR = {16: "HDR (PQ)", 18: "HDR (HLG)", 9: "a logarithmic scale", 10: "a logarithmic scale"}
PQ_BY_NAME = b"iCCPITUR_2100_PQ_FULL\0"  # W3C note "Using the ITU BT.2100 PQ EOTF with the PNG Format"
# Adobe RGB (1998) Color Image Encoding, 4.3.1; EXIF calls it 2, or R03 of DCF in the interoperability IFD
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65)
ADOBE_GAMMA = 2 + 51 / 256
NOT_CALIBRATED = 0xFFFF
SAME_XY, SAME_GAMMA = 0.002, 0.05  # encoders round chromaticities to 0.001; libpng's PNG_GAMMA_THRESHOLD
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
BRADFORD_BACK = (
    (0.9869929, -0.1470543, 0.1599627), (0.4323053, 0.5183603, 0.0492912), (-0.0085287, 0.0400428, 0.9684867)
)  # fmt: skip
D50 = (0.9642, 1.0, 0.8249)  # ICC.1:2010, 7.2.16


class Colours(NamedTuple):
    """What the numbers of a picture mean: x, y of red, green, blue and white, and the curve of each, see CURVES.

    `narrow`: 16 of 255 is black and 235 white.
    """

    xy: tuple[tuple[float, float], ...]
    curve: tuple[float, ...]
    narrow: bool = False


class CannotConvert(Exception):
    """The colours of a picture are not those of a clip, and no formula makes them so; the argument says which."""


def colours_of(picture: Image.Image, data: bytes) -> Colours | None:
    """What a picture says of its colours; None where that is sRGB or its ICC profile, which is dropped where PNG's cICP
    comes before it.

    In the order of PNG (3rd edition, 4.3): cICP, iCCP, sRGB, cHRM and gAMA; then EXIF.

    Raises:
        CannotConvert: HDR, or a logarithmic scale.
    """
    info, head = picture.info, data[: max(0, data.find(b"IDAT"))] if picture.format == "PNG" else b""
    told = re.search(rb"\0\0\0\x04cICP(..\0[\0\1])", head, re.DOTALL)
    profile = bytes(info.get("icc_profile") or b"")
    inside = re.search(rb"cicp\0{4}(..)", profile, re.DOTALL)  # ICC.1:2022, 9.2.17
    if (inside and inside[1][1] in HDR and not told) or PQ_BY_NAME in head:
        raise CannotConvert(HDR[inside[1][1]] if inside else HDR[16])
    if told:
        primaries, transfer, _, full = told[1]
        if transfer in HDR:
            raise CannotConvert(HDR[transfer])
        if primaries in PRIMARIES and transfer in CURVES:
            info.pop("icc_profile", None)
            colours = Colours(PRIMARIES[primaries], CURVES[transfer], not full)
            return None if colours == (SRGB, SRGB_CURVE, False) else colours
    if profile or "srgb" in info:
        return None
    if "gamma" in info or "chromaticity" in info:
        gamma, values = info.get("gamma", 0.0), info.get("chromaticity", ())  # white, red, green, blue
        xy = tuple((values[i], values[i + 1]) for i in (2, 4, 6, 0)) if values else SRGB
        same = all(abs(x - a) < SAME_XY and abs(y - b) < SAME_XY for (x, y), (a, b) in zip(xy, SRGB, strict=True))
        plain = not 0.1 <= gamma <= 5 or (same and abs(gamma * 2.2 - 1) < SAME_GAMMA)
        curve = SRGB_CURVE if plain else (1 / gamma, 1, 0, 0, 0)
        return None if same and plain else Colours(SRGB if same else xy, curve)
    with contextlib.suppress(Exception):  # EXIF that is none
        exif = Image.Image.getexif(picture)  # PNG's own decodes all pixels first
        inner = exif.get_ifd(ExifTags.IFD.Exif)
        space = inner.get(ExifTags.Base.ColorSpace, NOT_CALIBRATED)
        dcf = exif.get_ifd(ExifTags.IFD.Interop) if ExifTags.IFD.Interop in inner else {}
        index = str(dcf.get(ExifTags.Interop.InteropIndex, "")).strip("\0 ")
        if space == 2 or (space == NOT_CALIBRATED and index == "R03"):
            return Colours(ADOBE_RGB, (ADOBE_GAMMA, 1, 0, 0, 0))
    return None


def icc_profile(colours: Colours) -> bytes:
    """An ICC profile of primaries, a white and a curve (ICC.1:2010, 8.4.3), b"" where these are no colours.

    Red, green and blue are scaled so that together they are the white (SMPTE RP 177), which is adapted to D50
    (Bradford; ICC.1:2010, annex E).
    """

    def det(a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]) -> float:
        return sum(a[i] * (b[i - 2] * c[i - 1] - b[i - 1] * c[i - 2]) for i in range(3))

    def times(matrix: tuple[tuple[float, ...], ...], vector: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sum(one * other for one, other in zip(row, vector, strict=True)) for row in matrix)

    def number(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    try:
        red, green, blue, (x, y, z) = ((x, y, 1 - x - y) for x, y in colours.xy)
        white = (x / y, 1.0, z / y)
        size = det(red, green, blue)
        scales = det(white, green, blue) / size, det(red, white, blue) / size, det(red, green, white) / size
        cones = tuple(to / of for to, of in zip(times(BRADFORD, D50), times(BRADFORD, white), strict=True))
        tags = {b"wtpt": b"XYZ \0\0\0\0" + number(*D50)}
        for name, colour, scale in zip((b"r", b"g", b"b"), (red, green, blue), scales, strict=True):
            adapted = (cone * part * scale for cone, part in zip(cones, times(BRADFORD, colour), strict=True))
            tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + number(*times(BRADFORD_BACK, tuple(adapted)))
            tags[name + b"TRC"] = b"para\0\0\0\0\0\3\0\0" + number(*colours.curve)
    except (ZeroDivisionError, struct.error, ValueError, OverflowError):
        return b""
    table, bodies, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, body in tags.items():
        table += tag + struct.pack(">II", at + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    size_bytes = 128 + len(table) + len(bodies)
    head = struct.pack(">I4xI12s12x4s", size_bytes, 0x04300000, b"mntrRGB XYZ ", b"acsp")
    return head.ljust(68, b"\0") + number(*D50).ljust(60, b"\0") + table + bodies
