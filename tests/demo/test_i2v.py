"""Image to video through the product: the clip begins with the picture and moves as the sentence says."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.evaluate_demo import chosen_captions
from scripts.train_demo.render import random_clip
from scripts.train_demo.scoring import psnr, score
from tests.soak import SOAK

ASKED = chosen_captions(12)


def clip(product, number: int, folder, **fields: Any) -> tuple[np.ndarray, np.ndarray]:
    """The picture that was given and the clip that came."""
    caption, sentence = ASKED[number]
    picture = random_clip(caption, np.random.default_rng(50 + number))[0]
    Image.fromarray(picture).save(folder / "picture.png")
    request = {"model": "demo-i2v", "prompt": sentence, "image": str(folder / "picture.png"), "seed": number, **fields}
    return picture, product.clip(request)


@pytest.mark.parametrize("number", [0, 1])
def test_the_clip_begins_with_the_picture_and_does_what_the_sentence_says(product, tmp_path, number: int) -> None:
    picture, frames = clip(product, number, tmp_path)
    assert psnr(frames[0], picture) >= 24
    marks = score(frames, ASKED[number][0])
    assert marks["colour"] and marks["motion"] and marks["background"], marks


def test_the_shape_is_where_the_picture_has_it(product, tmp_path) -> None:
    caption, sentence = ASKED[2]
    for seed in (1, 4):
        picture, other = (random_clip(caption, np.random.default_rng(s))[0] for s in (seed, seed + 1))
        Image.fromarray(picture).save(tmp_path / "picture.png")
        request = {"model": "demo-i2v", "prompt": sentence, "image": str(tmp_path / "picture.png"), "seed": 5}
        first = product.clip({**request, "steps": 2})[0]
        assert psnr(first, picture) > psnr(first, other) + 3


def test_the_same_picture_makes_the_same_clip(product, tmp_path) -> None:
    (_, first), (_, again) = (clip(product, 0, tmp_path, steps=2) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.slow
def test_over_many_pictures_first_frames_and_motions_are_right(product, tmp_path) -> None:
    shots, right = [], []
    for number in range(len(ASKED)):
        for seed in range(3 if SOAK else 1):
            picture, frames = clip(product, number, tmp_path, seed=100 + seed)
            shots.append(psnr(frames[0], picture))
            right.append(score(frames, ASKED[number][0])["motion"])
    assert np.mean(shots) >= 24
    assert np.mean(right) >= 0.9
