"""What the advisor says about pictures whose kind is known because they were made here."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from turbodiff.media.pictures import Look, look


@pytest.fixture
def advise(tmp_path):
    """What is said about pixels that come as a file."""

    def look_at(pixels: np.ndarray) -> Look:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        Image.fromarray(pixels).save(file)
        return look(file)

    return look_at


def plain(side=512):
    picture = Image.new("RGB", (side, side), (200, 205, 210))
    ImageDraw.Draw(picture).ellipse((180, 200, 330, 420), fill=(180, 40, 40))
    return picture


def portrait(side=512):
    """A face that fills the frame before a soft, uneven room."""
    ramp = np.linspace(60, 150, side)[:, None, None] * np.array([1.0, 0.8, 0.6]) * np.ones((1, side, 1))
    picture = Image.fromarray(ramp.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 60, side), fill=(190, 180, 160))
    draw.ellipse((110, 60, 410, 500), fill=(224, 172, 140))
    for x in (190, 300):
        draw.ellipse((x, 210, x + 40, 235), fill=(40, 30, 30))
    draw.ellipse((210, 380, 310, 410), fill=(170, 60, 60))
    return picture.filter(ImageFilter.GaussianBlur(4))


def crowd(side=512):
    """A street: hundreds of small things in all colours."""
    random = np.random.default_rng(0)
    picture = Image.new("RGB", (side, side), (128, 128, 128))
    draw = ImageDraw.Draw(picture)
    for _ in range(1500):
        x, y = random.integers(0, side, 2)
        w, h = random.integers(8, 40, 2)
        draw.rectangle((int(x), int(y), int(x + w), int(y + h)), fill=tuple(int(c) for c in random.integers(0, 256, 3)))
    return picture


def product(side=512):
    """A detailed thing on white: busy in the middle, nothing around it."""
    picture = Image.new("RGB", (side, side), "white")
    picture.paste(crowd(side).crop((0, 0, 300, 300)), (106, 106))
    return picture


@pytest.mark.parametrize(
    ("picture", "boundary", "key"),
    [
        (plain, 0.7, "advice_plain_background"),
        (portrait, 0.7, "advice_close_portrait"),
        (product, 0.7, "advice_plain_background"),
        (crowd, 0.9, "advice_busy_scene"),
    ],
)
def test_the_boundary_follows_the_picture_and_says_why(advise, picture, boundary, key):
    advice = advise(np.array(picture()))
    assert (advice.boundary, advice.sampler, advice.key) == (boundary, "sde", key)
    assert set(advice.numbers) == {"edges", "border_edges", "entropy_bits"}


@pytest.mark.parametrize("size", [(1280, 720), (300, 900), (64, 64), (16, 16)])
def test_size_and_aspect_do_not_matter(advise, size):
    for picture, boundary in ((plain, 0.7), (crowd, 0.9)):
        if min(size) < 64 and picture is crowd:
            continue  # so small a picture holds no crowd
        assert advise(np.array(picture().resize(size))).boundary == boundary


def test_a_little_noise_changes_nothing(advise):
    random = np.random.default_rng(1)
    for picture in (plain, portrait, crowd):
        pixels = np.array(picture()).astype(int)
        noisy = np.clip(pixels + random.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        assert advise(noisy).boundary == advise(np.array(picture())).boundary


def test_one_colour_has_no_edges_and_no_entropy_and_a_chessboard_has_all(advise):
    flat = advise(np.full((64, 64, 3), 77, np.uint8)).numbers
    board = advise(
        ((np.indices((128, 128)) // 2).sum(axis=0)[..., None] % 2 * np.full(3, 255)).astype(np.uint8)
    ).numbers
    assert flat == {"edges": 0, "border_edges": 0, "entropy_bits": 0}
    assert board["edges"] > 0.99 and board["entropy_bits"] == pytest.approx(1)
