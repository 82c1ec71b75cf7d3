"""Pictures of strangers: each gives a frame or one clear error, and leaves no file and no process behind."""

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.media.icc import profile
from turbodiff.media import pictures
from turbodiff.media.pictures import Fitted, adapt_size, picture_size, preview
from turbodiff.spec.errors import FileError
from turbodiff.spec.request import Request, make_request

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def i2v(picture: Path, **fields: Any) -> Request:
    wishes = {
        "model": "Wan2.2-A14B",
        "prompt": "the cat jumps",
        "image": str(picture),
        "size": "64x32",
        "fit": "stretch",
    }
    return make_request(wishes | fields)


def fit_picture(request: Request, background: str = "white") -> Fitted:
    return pictures.fit_picture(Path(request.image), request.width, request.height, request.fit, background)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (64, 32), RED)
    picture.paste(BLUE, (32, 0, 64, 32))
    return picture.convert(mode)


def palette_with_hole() -> bytes:
    picture = Image.new("P", (64, 32), 0)
    picture.putpalette([*RED, *BLUE])
    picture.paste(1, (32, 0, 64, 32))
    return saved(picture, "PNG", transparency=1)


def animation() -> bytes:
    first, second = (Image.new("P", (64, 32), 0) for _ in range(2))
    first.putpalette([*RED])
    second.putpalette([*BLUE])
    return saved(first, "GIF", save_all=True, append_images=[second])


def heic() -> bytes:
    return b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 500


GOOD: dict[str, tuple[Callable[[], bytes], tuple[int, int, int], tuple[int, int, int]]] = {
    "jpeg": (lambda: saved(halves(), "JPEG", quality=95, subsampling=0), RED, BLUE),
    "webp": (lambda: saved(halves(), "WEBP", lossless=True), RED, BLUE),
    "cmyk jpeg": (lambda: saved(halves("CMYK"), "JPEG", quality=95), RED, BLUE),
    "16 bit grey": (
        lambda: png(64, 32, 16, 0, (b"\0" + b"\x40\x40" * 32 + b"\xc0\xc0" * 32) * 32),
        (64, 64, 64),
        (192, 192, 192),
    ),
    "16 bit rgb": (
        lambda: png(64, 32, 16, 2, (b"\0" + b"\xff\xff\0\0\0\0" * 32 + b"\0\0\0\0\xff\xff" * 32) * 32),
        RED,
        BLUE,
    ),
    "palette with a hole": (palette_with_hole, RED, GREEN),
    "rgba": (lambda: saved(Image.merge("RGBA", (*halves().split(), halves().split()[0])), "PNG"), RED, GREEN),
    "animated gif": (animation, RED, RED),
    "one bit": (lambda: saved(halves("L").point(lambda level: level * 4).convert("1"), "PNG"), (255,) * 3, (0,) * 3),
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_picture_gives_its_colours(tmp_path: Path, kind: str) -> None:
    make, left, right = GOOD[kind]
    picture = tmp_path / "picture.bin"  # names mean nothing
    picture.write_bytes(make())
    pixels = fit_picture(i2v(picture), background="#00ff00").pixels
    assert pixels.shape == (32, 64, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[16, 8].astype(int) - left).max() < 30, pixels[16, 8]
    if kind != "one bit":
        assert np.abs(pixels[16, 56].astype(int) - right).max() < 30, pixels[16, 56]
    assert list(tmp_path.iterdir()) == [picture], "no file is left"


BAD: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "bomb": (lambda: png(50_000, 50_000, 1, 0, bytes(6251) * 2000), "picture_too_large", "50000x50000"),
    "wide": (lambda: png(60_000, 2, 8, 0, bytes(60_001) * 2), "picture_too_small", "60000x2"),
    "one pixel": (lambda: png(1, 1, 8, 0, b"\0\0"), "picture_too_small", "1x1"),
    "truncated jpeg": (lambda: saved(halves(), "JPEG")[:-60], "picture_broken", "truncated"),
    "truncated png": (lambda: saved(Image.effect_noise((64, 64), 90), "PNG")[:1500], "picture_broken", ""),
    "heic named jpg": (heic, "picture_kind", "HEIC"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "picture_kind", "SVG"),
    "svg with xxe": (lambda: b'<?xml version="1.0"?><!DOCTYPE svg SYSTEM "file:///etc/passwd">', "picture_kind", "SVG"),
    "tiff": (lambda: saved(halves(), "TIFF"), "picture_kind", "TIFF"),
    "empty": (lambda: b"", "picture_kind", "empty"),
    "text": (lambda: b"hello " * 50, "picture_kind", "text"),
    "zeros": (lambda: bytes(4096), "picture_kind", "unknown"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "picture_kind", "text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_hostile_picture_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    make, code, got = BAD[kind]
    picture = tmp_path / "photo.jpg"
    picture.write_bytes(make())
    with pytest.raises(FileError) as caught:
        fit_picture(i2v(picture))
    error = caught.value
    assert (error.code, error.field, error.exit_code) == (code, "image", 2)
    assert (
        got in error.got.replace("Truncated", "truncated")
        and "photo.jpg" in error.got
        and error.expected
        and error.try_instead
    )
    assert list(tmp_path.iterdir()) == [picture], "no file is left"


def with_chunks(*chunks: tuple[bytes, bytes], after: bool = False, crc: bytes = b"") -> bytes:
    """The halves as a PNG with more chunks before the pixels or after them, and their checksum where it is wrong."""
    data = saved(halves(), "PNG")
    at = data.index(b"IEND" if after else b"IDAT") - 4
    more = b"".join(chunk(*one)[: -4 if crc else None] + crc for one in chunks)
    return data[:at] + more + data[at:]


def text_bomb(kind: bytes) -> tuple[bytes, bytes]:
    packed = zlib.compress(bytes(80 << 20), 9)
    heads = {b"zTXt": b"Raw profile type exif\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"iCCP": b"icc\0\0"}
    return kind, heads[kind] + packed


def segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes((kind,)) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(*segments: bytes, **options: Any) -> bytes:
    data = saved(halves(), "JPEG", quality=95, subsampling=0, **options)
    return data[:2] + b"".join(segments) + data[2:]


def exif(orientation: object) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\x7f\xff\xff\xff\x7f" * 9
DAMAGED_BESIDE_THE_PIXELS: dict[str, Callable[[], bytes]] = {
    "png, compressed text of 80 MB": lambda: with_chunks(text_bomb(b"zTXt")),
    "png, compressed xmp of 80 MB": lambda: with_chunks(text_bomb(b"iTXt")),
    "png, profile of 80 MB": lambda: with_chunks(text_bomb(b"iCCP")),
    "png, text of 2 MB": lambda: with_chunks((b"tEXt", b"prompt\0" + b"x" * (2 << 20))),
    "png, 70 texts of 1 MB": lambda: with_chunks(*[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 70),
    "png, text that is not deflate": lambda: with_chunks((b"zTXt", b"Raw profile type exif\0\0nonsense")),
    "png, profile that is not deflate": lambda: with_chunks((b"iCCP", b"icc\0\0nonsense")),
    "png, profile that is no profile": lambda: with_chunks((b"iCCP", b"icc\0\0" + zlib.compress(b"x" * 500))),
    "png, exif that is none": lambda: with_chunks((b"eXIf", BROKEN_EXIF[6:])),
    "png, text after the pixels": lambda: with_chunks((b"tEXt", b"a\0b"), (b"zTXt", b"a"), after=True),
    "png, wrong checksum of a text": lambda: with_chunks((b"tEXt", b"a\0b"), crc=b"\0\0\0\0"),
    "png, wrong checksum of a size": lambda: with_chunks((b"pHYs", bytes(9)), crc=b"\1\2\3\4"),
    "png, wrong checksum of exif": lambda: with_chunks((b"eXIf", exif(1)[6:]), crc=b"\1\2\3\4"),
    "png, short private chunk": lambda: with_chunks((b"gAMA", b""), (b"cHRM", b"1"), (b"sRGB", b""), (b"tIME", b"")),
    "png, without its end": lambda: saved(halves(), "PNG")[:-12],
    "png, animation that is none": lambda: with_chunks((b"acTL", b"\xff" * 8), (b"fcTL", bytes(3))),
    "jpeg, broken exif": lambda: jpeg_with(segment(0xE1, BROKEN_EXIF)),
    "jpeg, empty exif": lambda: jpeg_with(segment(0xE1, b"Exif\0\0")),
    "jpeg, orientation 9": lambda: jpeg_with(segment(0xE1, exif(9))),
    "jpeg, orientation 65535": lambda: jpeg_with(segment(0xE1, exif(65535))),
    "jpeg, orientation 0": lambda: jpeg_with(segment(0xE1, exif(0))),
    "jpeg, profile that is none": lambda: jpeg_with(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 200)),
    "jpeg, half a profile": lambda: jpeg_with(segment(0xE2, b"ICC_PROFILE\0\1\7" + b"x" * 200)),
    "jpeg, broken list of pictures": lambda: jpeg_with(segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + bytes(40))),
    "jpeg, photoshop block that lies": lambda: jpeg_with(segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0" + b"\xff" * 4)),
    "jpeg, 2 MB of comments": lambda: jpeg_with(*[segment(0xFE, b"x" * 65_000)] * 32),
    "jpeg, fill bytes": lambda: jpeg_with(b"\xff\xff\xff" + segment(0xFE, b"x")),
    "jpeg, without its end": lambda: saved(halves(), "JPEG", quality=95, subsampling=0)[:-2],
    "progressive jpeg, without its end": lambda: saved(halves(), "JPEG", quality=95, progressive=True)[:-2],
    "jpeg, half its end": lambda: saved(halves(), "JPEG", quality=95, subsampling=0)[:-1],
    "jpeg, zeros instead of its end": lambda: saved(halves(), "JPEG", quality=95)[:-2] + bytes(512),
    "jpeg, zeros behind its end": lambda: saved(halves(), "JPEG", quality=95) + bytes(4096),
    "webp, broken exif": lambda: saved(halves(), "WEBP", lossless=True, exif=BROKEN_EXIF),
    "webp, exif of a wrong kind": lambda: saved(halves(), "WEBP", lossless=True, exif=b"Exif\0\0" + b"\xff" * 40),
    "webp, profile that is none": lambda: saved(halves(), "WEBP", lossless=True, icc_profile=b"x" * 500),
}


@pytest.mark.parametrize("kind", DAMAGED_BESIDE_THE_PIXELS)
def test_a_picture_is_not_condemned_for_what_is_beside_its_pixels(tmp_path: Path, kind: str) -> None:
    picture = tmp_path / "picture.bin"
    picture.write_bytes(DAMAGED_BESIDE_THE_PIXELS[kind]())
    assert picture_size(picture) == (64, 32)
    pixels = fit_picture(i2v(picture)).pixels
    for column, colour in ((8, RED), (56, BLUE)):
        assert np.abs(pixels[16, column].astype(int) - colour).max() < 12, pixels[16, column]


@pytest.mark.parametrize("kind", ["exif", "xmp"])
def test_a_png_is_turned_upright_by_what_editors_write_into_texts(tmp_path: Path, kind: str) -> None:
    packed = exif(6)
    raw = f"\nexif\n{len(packed):8}\n{packed.hex()}\n".encode()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    texts = {
        "exif": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    }
    (tmp_path / "a.png").write_bytes(with_chunks(texts[kind]))
    assert picture_size(tmp_path / "a.png") == (32, 64)


@pytest.mark.parametrize(
    ("space", "wanted"), [("Adobe RGB", (230, 79, 56)), ("Display P3", (218, 67, 47)), ("ProPhoto RGB", (255, 15, 70))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "palette", "transparent", "turned"])
def test_embedded_profiles_are_converted_to_srgb(
    tmp_path: Path, space: str, wanted: tuple[int, int, int], kind: str
) -> None:
    """Adobe (200, 80, 60) is sRGB (230, 79, 56): the conversion of littleCMS, and of the issue that reported it."""
    colour = Image.new("RGB", (64, 32), (200, 80, 60))
    options: dict[str, Any] = {"icc_profile": profile(space)}
    if kind == "palette":
        colour = colour.quantize(2)
    elif kind == "transparent":
        colour.putalpha(255)
    elif kind == "turned":
        options["exif"] = exif(3)
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    form = kind if kind.isupper() else "PNG"
    (tmp_path / "a").write_bytes(saved(colour, form, **options, **lossless.get(form, {})))
    pixel = fit_picture(i2v(tmp_path / "a")).pixels[16, 32]
    tolerance = 4 if kind == "JPEG" else 2  # JPEG rounds each colour by 1, which the wider spaces stretch
    assert np.abs(pixel.astype(int) - wanted).max() <= tolerance, pixel


def test_a_profile_of_other_planes_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(saved(halves("CMYK"), "JPEG", quality=95, icc_profile=profile("Adobe RGB")))
    assert np.abs(fit_picture(i2v(tmp_path / "a.jpg")).pixels[16, 8].astype(int) - RED).max() < 30


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(tmp_path: Path) -> None:
    data = saved(Image.new("RGB", (2000, 2000), RED), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[:start] + data[start:-2] * 2000 + data[-2:])
    with pytest.raises(FileError, match="scans"):
        fit_picture(i2v(tmp_path / "a.jpg"))


def test_a_path_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.png", tmp_path / "nothing.png" / "x"):
        with pytest.raises(FileError) as caught:
            fit_picture(i2v(path))
        assert caught.value.code == "picture_missing"
    os.mkfifo(tmp_path / "pipe.png")
    for path, got in ((tmp_path, "folder"), (Path("/dev/zero"), "device"), (tmp_path / "pipe.png", "named pipe")):
        with pytest.raises(FileError) as caught:
            fit_picture(i2v(path))
        assert caught.value.code == "picture_unreadable" and caught.value.got.endswith(f"it is a {got}")


def test_a_bomb_costs_this_process_no_memory_and_no_time(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(3999, 16_000, 8, 2, bytes(3999 * 3 + 1) * 16_000))  # 64 megapixels in 200 kB: legal, 192 MB
    before_s = time.process_time()
    pixels = fit_picture(i2v(bomb)).pixels
    assert not pixels.any() and time.process_time() - before_s < 0.5


def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path: Path) -> None:
    picture = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right to stand upright
    picture.write_bytes(saved(halves(), "JPEG", exif=exif, quality=95))
    assert picture_size(picture) == (32, 64)
    fitted = fit_picture(i2v(picture, size="32x64"))
    assert (fitted.source_width, fitted.source_height) == (32, 64)
    assert np.abs(fitted.pixels[8, 16].astype(int) - RED).max() < 20, "the left half is on top now"
    assert np.abs(fitted.pixels[56, 16].astype(int) - BLUE).max() < 20


def test_crop_keeps_the_middle_pad_keeps_everything_stretch_bends(tmp_path: Path) -> None:
    wide = Image.new("RGB", (128, 32), RED)
    wide.paste(BLUE, (48, 0, 80, 32))
    picture = tmp_path / "a.png"
    wide.save(picture)
    frames = {
        fit: fit_picture(i2v(picture, size="32x32", fit=fit), "white").pixels for fit in ("crop", "pad", "stretch")
    }
    assert (frames["crop"] == BLUE).all()
    assert (
        (frames["pad"][0] == 255).all()
        and (frames["pad"][16, 2] == RED).all()
        and (frames["pad"][16, 16] == BLUE).all()
    )
    assert (frames["stretch"][0, 2] == RED).all() and (frames["stretch"][0, 16] == BLUE).all()


def test_the_preview_is_the_fitted_picture(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    halves().save(picture)
    fitted = fit_picture(i2v(picture))
    with Image.open(io.BytesIO(preview(picture, 64, 32, "stretch"))) as shown:
        assert np.abs(np.asarray(shown).astype(int) - fitted.pixels).mean() < 6, "JPEG"


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (1920, 200), (64, 4000)])
def test_adaptive_resolution_keeps_area_and_aspect(tmp_path: Path, size: tuple[int, int]) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", size).save(picture)
    request = make_request({"model": "Wan2.2-A14B", "prompt": "x", "image": str(picture), "resolution": "480p"})
    adapted = adapt_size(request)
    assert adapted.width % 16 == adapted.height % 16 == 0 and max(adapted.width, adapted.height) <= 2048
    if max(size) / min(size) < 2:
        assert adapted.width * adapted.height == pytest.approx(request.width * request.height, rel=0.05)
        assert adapted.width / adapted.height == pytest.approx(size[0] / size[1], rel=0.05)
    assert adapt_size(adapted) == adapted, "asking twice changes nothing"


def test_adaptive_resolution_leaves_a_size_of_ones_own(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    halves().save(picture)
    for request in (
        i2v(picture, size="848x480"),
        i2v(picture, size=None, resolution="480p", adaptive_resolution=False),
    ):
        assert adapt_size(request) == request


def test_a_refused_picture_costs_one_process_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"<svg/>")
    for _ in range(2):
        with pytest.raises(FileError, match="known kind"):
            picture_size(picture)
        monkeypatch.setattr("turbodiff.media.pictures.DECODER", (str(tmp_path / "nothing"),))
    monkeypatch.undo()
    halves().save(picture)
    assert picture_size(picture) == (64, 32)
