"""Photographs of 24 and 36 megapixels: decoded within 200 MiB, as they are, or refused in one line before that."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from turbodiff.media import pictures
from turbodiff.spec.errors import FileError

HELD_MIB = 200
# A small process between, which adds up what the decoder has and the most that its ffmpeg had
CHILD = """
import os, sys, time
if not (child := os.fork()):
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
def of(pid, name):
    return int(open(f"/proc/{pid}/status").read().split(name + ":")[1].split()[0])
most = 0
while not os.waitpid(child, os.WNOHANG)[0]:
    try:
        beside = open(f"/proc/{child}/task/{child}/children").read().split()
        others = sum(of(pid, "VmHWM") for pid in beside if "ffmpeg" in os.readlink(f"/proc/{pid}/exe"))
        most = max(most, of(child, "VmHWM"), others + of(child, "VmRSS"))
    except (OSError, IndexError):
        pass  # it ends
    time.sleep(0.002)
print(most, file=sys.stderr)
"""
WANTED = {"want": "fit", "width": 1280, "height": 720, "fit": "stretch", "background": "white"}
KINDS: dict[str, Callable[[Image.Image, Path], object]] = {
    "PNG": lambda picture, path: picture.save(path, "PNG", compress_level=1),
    "PNG with alpha": lambda picture, path: with_alpha(picture).save(path, "PNG", compress_level=1),
    "PNG, sideways": lambda picture, path: picture.save(path, "PNG", compress_level=1, exif=sideways()),
    "PNG, palette": lambda picture, path: few_colours(picture).save(path, "PNG", compress_level=1),
    "JPEG": lambda picture, path: picture.save(path, "JPEG", quality=90),
    "JPEG, progressive": lambda picture, path: picture.save(path, "JPEG", quality=90, progressive=True),
    "JPEG, progressive, whole colours": lambda picture, path: picture.save(
        path, "JPEG", quality=90, progressive=True, subsampling=0
    ),
    "WebP": lambda picture, path: picture.save(path, "WEBP", quality=80, method=0),
    "WebP with alpha": lambda picture, path: with_alpha(picture).save(path, "WEBP", quality=80, method=0),
    "WebP, lossless": lambda picture, path: picture.save(path, "WEBP", lossless=True, quality=0, method=0),
}

TAKEN = {"WebP with alpha": (3840, 2560), "WebP, lossless": (4800, 3200)}  # ffmpeg holds more planes of these


def photo(width: int, height: int) -> Image.Image:
    """Soft colours and some grain."""
    small = Image.effect_noise((width // 64, height // 64), 20).resize((width, height), Image.Resampling.BICUBIC)
    ramp = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (ramp, small, ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))


def with_alpha(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def few_colours(picture: Image.Image) -> Image.Image:
    return picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def sideways() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


def decoded(path: Path) -> tuple[dict[str, object], bytes, float]:
    """The first line of the decoder's answer, the pixels, and the peak of the memory of all its processes in MiB."""
    with path.open("rb") as file:
        ran = subprocess.run(
            [sys.executable, "-S", "-c", CHILD, *pictures.DECODER, json.dumps(WANTED)], stdin=file,
            capture_output=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    line, _, pixels = ran.stdout.partition(b"\n")
    return json.loads(line), pixels, int(ran.stderr.split()[-1]) / 1024


@pytest.mark.parametrize("kind", KINDS)
def test_a_photograph_of_24_megapixels_takes_less_than_200_mib(kind: str, tmp_path: Path) -> None:
    size = TAKEN.get(kind, (6000, 4000))
    picture, path = photo(*size), tmp_path / "photo"
    KINDS[kind](picture, path)
    head, pixels, mib = decoded(path)
    print(f"{kind}: {mib:.0f} MiB")
    upright = size[::-1] if "sideways" in kind else size
    assert (head["width"], head["height"]) == upright and mib < HELD_MIB
    picture = few_colours(picture).convert("RGB") if "palette" in kind else picture
    expected = picture if "alpha" not in kind else Image.composite(
        picture, Image.new("RGB", picture.size, "white"), Image.linear_gradient("L").resize(picture.size)
    )  # fmt: skip
    expected = expected.rotate(-90, expand=True) if "sideways" in kind else expected
    wanted = np.asarray(expected.resize((1280, 720), Image.Resampling.BILINEAR), np.int16)
    got = np.frombuffer(pixels, np.uint8).reshape(720, 1280, 3).astype(np.int16)
    assert np.abs(got - wanted).mean() < 3, np.abs(got - wanted).mean((0, 1))


@pytest.mark.parametrize("kind", ["JPEG, progressive, whole colours", "WebP with alpha", "WebP, lossless"])
def test_what_would_take_more_is_refused_before_it_does(kind: str, tmp_path: Path) -> None:
    KINDS[kind](photo(7360, 4912), tmp_path / "photo")
    head, _, mib = decoded(tmp_path / "photo")
    assert head["code"] == "picture_memory" and "7360x4912" in str(head["got"]) and mib < HELD_MIB
    with pytest.raises(FileError, match="save it as PNG"):
        pictures.fit_picture(tmp_path / "photo", 64, 64, "crop")


@pytest.mark.parametrize("size", [(2_000_000, 16), (16, 2_000_000), (700_000, 16), (24_000, 1000)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_picture_of_any_proportions_takes_less_than_200_mib(
    size: tuple[int, int], fit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WANTED, "fit", fit)
    Image.new("RGB", size, "red").save(tmp_path / "long", "PNG", compress_level=1)
    head, pixels, mib = decoded(tmp_path / "long")
    assert mib < HELD_MIB
    if "code" in head:
        assert head["code"] == ("picture_too_small" if fit == "pad" else "picture_memory")
    else:
        assert len(pixels) == 1280 * 720 * 3


def test_a_large_png_that_is_cut_is_refused(tmp_path: Path) -> None:
    KINDS["PNG"](photo(4000, 3000), tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-20_000])
    assert decoded(tmp_path / "cut")[0]["code"] == "picture_broken"
