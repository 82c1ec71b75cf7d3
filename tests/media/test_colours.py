"""Pictures that say what their numbers mean: each in sRGB as the published formulas have it, or one sentence."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.media.icc import profile
from tests.media.test_images import (
    BLUE,
    RED,
    chunk,
    exif,
    fit_picture,
    halves,
    i2v,
    jpeg_with,
    png,
    saved,
    segment,
    with_chunks,
)  # fmt: skip
from turbodiff.media.pictures import picture_size
from turbodiff.spec.errors import FileError

Numbers = NDArray[np.float64]
D65, DCI, C = (0.3127, 0.3290), (0.314, 0.351), (0.310, 0.316)
P709 = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65)  # ITU-R BT.709-6, 1.3 and 1.4
P2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65)  # ITU-R BT.2020-2, table 3
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))  # SMPTE RP 431-2 and EG 432-1
P601 = ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65)  # SMPTE ST 170
PBG = ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), D65)  # ITU-R BT.470, system B, G
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65)  # Adobe RGB (1998) Color Image Encoding, 4.3.1.2


def of_709(code: Numbers) -> Numbers:
    """ITU-R BT.709-6, 1.2, solved for light."""
    return np.where(code < 0.081, code / 4.5, ((code + 0.099) / 1.099) ** (1 / 0.45))


def of_srgb(code: Numbers) -> Numbers:
    """IEC 61966-2-1, 5.2."""
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def of_428(code: Numbers) -> Numbers:
    """SMPTE ST 428-1, 4.3, of the reference white of 48 cd/m2."""
    return 52.37 / 48 * code**2.6


def power(gamma: float) -> Callable[[Numbers], Numbers]:
    return lambda code: code**gamma


def xyz(primaries: tuple[tuple[float, float], ...]) -> Numbers:
    """Light of red, green, blue -> XYZ (SMPTE RP 177)."""
    columns = np.array([[x, y, 1 - x - y] for x, y in primaries[:3]]).T
    return columns * np.linalg.solve(columns, white(primaries[3]))


def white(xy: tuple[float, float]) -> Numbers:
    return np.array([xy[0] / xy[1], 1, (1 - xy[0] - xy[1]) / xy[1]])


def in_srgb(
    code: tuple[int, ...], primaries: tuple[tuple[float, float], ...], to_light: Callable[..., Numbers]
) -> Numbers:
    """What a colour is in sRGB: its light, adapted to D65 (Bradford), in BT.709's primaries, clipped, encoded."""
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapt = np.linalg.inv(cone) @ np.diag(cone @ white(D65) / (cone @ white(primaries[3]))) @ cone
    light = np.linalg.inv(xyz(P709)) @ adapt @ xyz(primaries) @ to_light(np.array(code) / 255)
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def patch(colour: tuple[int, ...]) -> Image.Image:
    return Image.new("RGB", (64, 32), colour)


def png_of(picture: Image.Image, *chunks: tuple[bytes, bytes], **options: Any) -> bytes:
    data = saved(picture, "PNG", **options)
    at = data.index(b"IHDR") + 4 + 13 + 4
    return data[:at] + b"".join(chunk(*one) for one in chunks) + data[at:]


def cicp(primaries: int, transfer: int, matrix: int = 0, full: int = 1) -> tuple[bytes, bytes]:
    return b"cICP", bytes((primaries, transfer, matrix, full))


def iccp(space: str, name: bytes = b"a") -> tuple[bytes, bytes]:
    return b"iCCP", name + b"\0\0" + zlib.compress(profile(space))


def gama(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def chrm(primaries: tuple[tuple[float, float], ...]) -> tuple[bytes, bytes]:
    numbers = [round(value * 100_000) for point in (primaries[3], *primaries[:3]) for value in point]
    return b"cHRM", struct.pack(">8I", *numbers)


COLOURS = [(200, 80, 60), (90, 160, 90), (128, 128, 128), (255, 255, 255), (20, 12, 9), (0, 255, 0), (60, 90, 220)]
SAYING = {
    "cICP Display P3": ([cicp(12, 13)], (*P3, D65), of_srgb),
    "cICP BT.2020": ([cicp(9, 14)], P2020, of_709),
    "cICP BT.2020, 12 bits": ([cicp(9, 15)], P2020, of_709),
    "cICP BT.709": ([cicp(1, 1)], P709, of_709),
    "cICP sRGB": ([cicp(1, 13)], P709, of_srgb),
    "cICP linear": ([cicp(1, 8)], P709, power(1)),
    "cICP 601": ([cicp(6, 6)], P601, of_709),
    "cICP BG": ([cicp(5, 5)], PBG, power(2.8)),
    "cICP M": ([cicp(4, 4)], ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), C), power(2.2)),
    "cICP DCI-P3": ([cicp(11, 17)], (*P3, DCI), of_428),
    "cICP XYZ": ([cicp(10, 8)], ((1, 0), (0, 1), (0, 0), (1 / 3, 1 / 3)), power(1)),
    "cICP before iCCP": ([cicp(12, 13), iccp("ProPhoto RGB")], (*P3, D65), of_srgb),
    "cICP before sRGB": ([cicp(12, 13), (b"sRGB", b"\0")], (*P3, D65), of_srgb),
    "cICP not told, gAMA": ([cicp(2, 2), gama(1)], P709, power(1)),
    "cICP not RGB": ([cicp(9, 14, matrix=9), gama(1)], P709, power(1)),
    "gAMA linear": ([gama(1)], P709, power(1)),
    "gAMA 1/1.8": ([gama(1 / 1.8)], P709, power(1.8)),
    "gAMA 1/2.2": ([gama(1 / 2.2)], P709, of_srgb),
    "gAMA 1/2.2, cHRM of sRGB": ([gama(1 / 2.2), chrm(P709)], P709, of_srgb),
    "gAMA and cHRM of Adobe RGB": ([gama(1 / 2.19921875), chrm(ADOBE)], ADOBE, power(2.19921875)),
    "cHRM of P3 alone": ([chrm((*P3, D65))], (*P3, D65), of_srgb),
    "cHRM of DCI-P3": ([gama(1 / 2.6), chrm((*P3, DCI))], (*P3, DCI), power(2.6)),
    "sRGB before gAMA and cHRM": ([(b"sRGB", b"\0"), gama(1), chrm(P2020)], P709, of_srgb),
    "gAMA 0": ([gama(0)], P709, of_srgb),
    "gAMA of nonsense": ([gama(40_000)], P709, of_srgb),
    "cHRM of zeros": ([chrm(((0, 0),) * 4)], P709, of_srgb),
    "cHRM of one point": ([chrm((D65,) * 4), gama(1 / 2.2)], P709, of_srgb),
    "cHRM of nonsense": ([(b"cHRM", b"\xff" * 32)], P709, of_srgb),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAYING)
def test_a_png_that_says_its_colours_is_what_the_formulas_say(tmp_path: Path, kind: str) -> None:
    chunks, primaries, to_light = SAYING[kind]
    strips = Image.new("RGB", (64 * len(COLOURS), 32))
    for number, colour in enumerate(COLOURS):
        strips.paste(colour, (64 * number, 0, 64 * number + 64, 32))
    (tmp_path / "a.png").write_bytes(png_of(strips, *chunks))
    pixels = fit_picture(i2v(tmp_path / "a.png", size=f"{strips.width}x32")).pixels
    for number, colour in enumerate(COLOURS):
        wanted, got = in_srgb(colour, primaries, to_light), pixels[16, 64 * number + 32]
        # 8 bits of linear light below 20 are steps of 4 in sRGB; otherwise littleCMS is off by one
        assert np.abs(got - wanted).max() <= 1.6, (colour, got, wanted)


@pytest.mark.parametrize("form", ["palette", "transparent", "grey", "16 bit grey", "16 bit rgb", "turned"])
def test_every_kind_of_pixels_is_converted(tmp_path: Path, form: str) -> None:
    colour, tag = (200, 80, 60), cicp(12, 13)
    primaries: tuple[tuple[float, float], ...] = (*P3, D65)
    to_light: Callable[..., Numbers] = of_srgb
    if form == "palette":
        data = png_of(patch(colour).quantize(2), tag)
    elif form == "transparent":
        picture = patch(colour)
        picture.putalpha(255)
        data = png_of(picture, tag)
    elif form in ("grey", "16 bit grey"):
        colour, primaries, to_light, tag = (128,) * 3, P709, power(1), gama(1)
        picture = Image.new("L", (64, 32), 128)
        deep = png(64, 32, 16, 0, (b"\0" + b"\x80\x80" * 64) * 32)
        at = 8 + 25
        data = png_of(picture, tag) if form == "grey" else deep[:at] + chunk(*tag) + deep[at:]
    elif form == "16 bit rgb":
        deep = png(64, 32, 16, 2, (b"\0" + bytes(part for level in colour for part in (level, level)) * 64) * 32)
        data = deep[:33] + chunk(*tag) + deep[33:]
    else:
        data = png_of(patch(colour), tag, exif=exif(3))
    (tmp_path / "a.png").write_bytes(data)
    got = fit_picture(i2v(tmp_path / "a.png")).pixels[16, 32]
    assert np.abs(got - in_srgb(colour, primaries, to_light)).max() <= 1.6, got


def test_narrow_range_is_stretched(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 32), (16, 16, 16))
    picture.paste((235, 126, 16), (32, 0, 64, 32))
    (tmp_path / "a.png").write_bytes(png_of(picture, cicp(1, 13, full=0)))
    pixels = fit_picture(i2v(tmp_path / "a.png")).pixels
    assert not pixels[16, 8].any() and np.abs(pixels[16, 56].astype(int) - (255, 128, 0)).max() <= 1


def icc_with_cicp(transfer: int) -> bytes:
    """A profile with the tag of ICC.1:2022, 9.2.17, in place of its copyright."""
    body = profile("Display P3")
    at = 128 + 4 + 12 * next(i for i in range(9) if body[132 + 12 * i : 136 + 12 * i] == b"cprt")
    offset = int.from_bytes(body[at + 4 : at + 8], "big")
    body = body[:at] + b"cicp" + body[at + 4 :]
    return body[:offset] + b"cicp\0\0\0\0" + bytes((9, transfer, 0, 1)) + body[offset + 12 :]


NO_SDR: dict[str, tuple[Callable[[], bytes], str]] = {
    "PQ": (lambda: png_of(halves(), cicp(9, 16)), "PQ"),
    "PQ of P3": (lambda: png_of(halves(), cicp(12, 16)), "PQ"),
    "PQ with a profile for others": (
        lambda: png_of(halves(), cicp(9, 16), iccp("Display P3")), "PQ"
    ),
    "HLG": (lambda: png_of(halves(), cicp(9, 18)), "HLG"),
    "a logarithm": (lambda: png_of(halves(), cicp(1, 9)), "logarithm"),
    "PQ by the name of its profile": (
        lambda: png_of(halves(), iccp("Display P3", b"ITUR_2100_PQ_FULL")), "PQ"
    ),
    "PQ in the profile of a JPEG": (lambda: saved(halves(), "JPEG", icc_profile=icc_with_cicp(16)), "PQ"),
    "HLG in the profile of a WebP": (lambda: saved(halves(), "WEBP", icc_profile=icc_with_cicp(18)), "HLG"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_SDR)
def test_colours_that_no_formula_makes_those_of_a_clip_are_one_sentence(tmp_path: Path, kind: str) -> None:
    make, got = NO_SDR[kind]
    (tmp_path / "a").write_bytes(make())
    for ask in (picture_size, lambda path: fit_picture(i2v(path))):
        with pytest.raises(FileError) as caught:
            ask(tmp_path / "a")
        assert caught.value.code == "picture_colours" and got in caught.value.got and caught.value.try_instead


def adobe(space: int | None, index: str | None) -> bytes:
    """EXIF with a ColorSpace and DCF's interoperability index."""
    tags = Image.Exif()
    inner: dict[int, object] = {} if space is None else {0xA001: space}
    if index:
        inner[0xA005] = {1: index}
    tags._ifds[0x8769] = inner  # Pillow writes what lies there
    tags[0x8769] = inner
    return tags.tobytes()


@pytest.mark.parametrize(
    ("space", "index", "is_adobe"),
    [
        (0xFFFF, "R03", True), (None, "R03", True), (2, None, True), (2, "R98", True), (0xFFFF, None, False),
        (1, "R03", False), (1, None, False), (0xFFFF, "R98", False), (None, None, False), (0xFFFF, "THM", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
def test_a_camera_that_says_adobe_rgb_in_exif_alone_is_believed(
    tmp_path: Path, form: str, space: int | None, index: str | None, is_adobe: bool
) -> None:
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    (tmp_path / "a").write_bytes(saved(patch((200, 80, 60)), form, exif=adobe(space, index), **options))
    got = fit_picture(i2v(tmp_path / "a")).pixels[16, 32]
    wanted = in_srgb((200, 80, 60), ADOBE, power(563 / 256)) if is_adobe else np.array((200, 80, 60))
    assert np.abs(got - wanted).max() <= (4 if form == "JPEG" else 1.6), got


def test_a_profile_and_a_chunk_come_before_exif(tmp_path: Path) -> None:
    tags = adobe(0xFFFF, "R03")
    jpeg = saved(patch((200, 80, 60)), "JPEG", quality=100, subsampling=0, exif=tags, icc_profile=profile("Display P3"))
    (tmp_path / "a.jpg").write_bytes(jpeg)
    assert np.abs(fit_picture(i2v(tmp_path / "a.jpg")).pixels[16, 32].astype(int) - (218, 67, 47)).max() <= 4
    (tmp_path / "a.png").write_bytes(png_of(patch((200, 80, 60)), (b"sRGB", b"\0"), exif=tags))
    assert tuple(fit_picture(i2v(tmp_path / "a.png")).pixels[16, 32]) == (200, 80, 60)


def webp(size: int | None = None, behind: bytes = b"", **options: Any) -> bytes:
    """The halves as a WebP whose head says another size."""
    data = saved(halves(), "WEBP", **({"lossless": True} | options))
    return data[:4] + (data[4:8] if size is None else struct.pack("<I", size % (1 << 32))) + data[8:] + behind


def odd_chunk() -> bytes:
    """A WebP whose last chunk has an odd length and no byte to fill it up."""
    data = webp()
    length = struct.unpack_from("<I", data, 16)[0]
    pixels = data[20 : 20 + length] + (b"" if length % 2 else b"\0")
    return data[:16] + struct.pack("<I", len(pixels)) + pixels


def before_scan(junk: bytes) -> bytes:
    data = jpeg_with()
    at = data.index(b"\xff\xda")
    return data[:at] + junk + data[at:]


def after_each(junk: bytes) -> bytes:
    """A JPEG with stray bytes behind every segment before its scan."""
    data, at = jpeg_with(segment(0xE1, exif(1)), segment(0xFE, b"a word")), 2
    made = data[:2]
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        made += data[at:end] + junk
        at = end
    return made + data[at:]


STRAY: dict[str, Callable[[], bytes]] = {
    "webp, size 0": lambda: webp(0),
    "webp, size of half": lambda: webp(40),
    "webp, size off by one": lambda: webp(len(webp()) - 9),
    "webp, size of the whole file": lambda: webp(len(webp())),
    "webp, size of 4 GB": lambda: webp(-1),
    "webp, size too large": lambda: webp(len(webp()) + 1000),
    "webp, with more behind": lambda: webp(behind=b"\0" * 100),
    "webp, size that counts what is behind": lambda: webp(len(webp()) + 92, behind=b"\0" * 100),
    "webp, without a filling byte": odd_chunk,
    "webp, lossy, size 0": lambda: webp(0, lossless=False, quality=95),
    "webp, with a profile, size 12": lambda: webp(12, icc_profile=profile("Adobe RGB")[:-40] + b"x" * 40, exif=exif(1)),
    "webp, moving, size 0": lambda: webp(0, save_all=True, append_images=[halves().rotate(180)]),
    "jpeg, a byte after APP0": lambda: after_each(b"\0"),
    "jpeg, seven bytes behind each": lambda: after_each(b"garbage"),
    "jpeg, escaped FF behind each": lambda: after_each(b"\xff\0\xff\0"),
    "jpeg, fill bytes behind each": lambda: after_each(b"\xff" * 9),
    "jpeg, restart markers behind each": lambda: after_each(b"\xff\xd0\xff\x01"),
    "jpeg, garbage before the scan": lambda: before_scan(bytes(range(1, 200))),
    "jpeg, much before the scan": lambda: before_scan(b"\0\xaa" * 40_000),
    "jpeg, garbage behind its first marker": lambda: jpeg_with().replace(b"\xff\xd8", b"\xff\xd8\0\0", 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRAY)
def test_a_size_that_lies_and_stray_bytes_cost_no_pixel(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(STRAY[kind]())
    assert picture_size(tmp_path / "a") == (64, 32)
    pixels = fit_picture(i2v(tmp_path / "a")).pixels
    for column, colour in ((8, RED), (56, BLUE)):
        assert np.abs(pixels[16, column].astype(int) - colour).max() < 16, pixels[16, column]


def test_stray_bytes_hide_neither_orientation_nor_profile(tmp_path: Path) -> None:
    data = saved(
        patch((200, 80, 60)), "JPEG", quality=100, subsampling=0, icc_profile=profile("Adobe RGB"), exif=exif(6)
    )
    at = data.index(b"\xff\xe1") if b"\xff\xe1" in data[:40] else 20
    (tmp_path / "a.jpg").write_bytes(data[:at] + b"stray" + data[at:])
    assert picture_size(tmp_path / "a.jpg") == (32, 64)
    assert np.abs(fit_picture(i2v(tmp_path / "a.jpg")).pixels[16, 32].astype(int) - (230, 79, 56)).max() <= 4


def test_a_webp_that_is_cut_is_refused(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 90)
    (tmp_path / "a.webp").write_bytes(saved(noise, "WEBP", lossless=True)[:-300])
    with pytest.raises(FileError) as caught:
        fit_picture(i2v(tmp_path / "a.webp"))
    assert caught.value.code == "picture_broken"


@pytest.mark.parametrize(("data", "kind"), [(b"\0\0\0\x20ftypavif", "AVIF"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF")])
def test_kinds_that_are_not_read_are_named_whatever_their_colours(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data + bytes(500))
    with pytest.raises(FileError, match=kind):
        fit_picture(i2v(tmp_path / "a.jpg"))


def test_chunks_of_colours_with_other_lengths_are_passed_over(tmp_path: Path) -> None:
    wrong = ((b"cICP", b"\x09\x10\0"), (b"gAMA", bytes(3)), (b"cHRM", bytes(31)), (b"sRGB", b""))
    (tmp_path / "a.png").write_bytes(with_chunks(*wrong))
    assert tuple(fit_picture(i2v(tmp_path / "a.png")).pixels[16, 8]) == RED
