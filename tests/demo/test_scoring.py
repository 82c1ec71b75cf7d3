"""The evaluator must be honest: right on rendered truth, silent on anything else."""

import random

import numpy as np
import pytest

from scripts.train_demo.captions import every_caption
from scripts.train_demo.render import BACKGROUND_RGB, random_clip
from scripts.train_demo.scoring import FIELDS, Reading, flicker, psnr, read_clip, score

CAPTIONS = random.Random(4).sample(every_caption(), 80)


@pytest.fixture(scope="module")
def truth() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [random_clip(caption, rng) for caption in CAPTIONS]


@pytest.fixture(scope="module")
def readings(truth: list[np.ndarray]) -> list[Reading]:
    return [read_clip(clip) for clip in truth]


def test_rendered_truth_is_read_right(readings: list[Reading]) -> None:
    right = [getattr(r, f) == getattr(c, f) for r, c in zip(readings, CAPTIONS, strict=True) for f in FIELDS]
    assert np.mean(right) >= 0.99


def test_a_noisy_copy_of_the_truth_is_still_read_right(truth: list[np.ndarray]) -> None:
    rng = np.random.default_rng(6)
    right = []
    for clip, caption in list(zip(truth, CAPTIONS, strict=True))[::8]:
        noisy = np.clip(clip + rng.normal(0, 10, clip.shape), 0, 255).astype(np.uint8)
        right += score(noisy, caption).values()
    assert np.mean(right) >= 0.99


def test_shuffled_captions_score_no_better_than_chance(readings: list[Reading]) -> None:
    shuffled = np.random.default_rng(7).permutation(len(CAPTIONS))
    for field, chance in zip(FIELDS, (1 / 8, 1 / 4, 1 / 6, 1 / 4), strict=True):
        hits = [getattr(r, field) == getattr(CAPTIONS[i], field) for r, i in zip(readings, shuffled, strict=True)]
        assert np.mean(hits) < chance + 0.15, field


def test_noise_shows_nothing() -> None:
    rng = np.random.default_rng(8)
    for _ in range(5):
        assert read_clip(rng.integers(0, 256, (17, 128, 128, 3), dtype=np.uint8)) == Reading()


def test_smooth_blobs_show_neither_shape_nor_motion() -> None:
    rng = np.random.default_rng(9)
    for _ in range(5):
        coarse = rng.integers(0, 256, (17, 4, 4, 3), dtype=np.uint8)
        reading = read_clip(coarse.repeat(32, axis=1).repeat(32, axis=2))
        assert (reading.shape, reading.motion) == (None, None)


def test_an_empty_ground_shows_only_the_ground() -> None:
    clip = np.zeros((17, 128, 128, 3), np.uint8) + np.array(BACKGROUND_RGB["navy"], np.uint8)
    assert read_clip(clip) == Reading(background="navy")


def test_a_still_shape_has_no_motion(truth: list[np.ndarray]) -> None:
    for clip in truth[::16]:
        assert read_clip(clip[8:9].repeat(17, axis=0)).motion is None


def test_a_clip_played_backwards_shows_the_opposite_motion(truth: list[np.ndarray], readings: list[Reading]) -> None:
    opposite = {
        "moves right": "moves left", "moves left": "moves right", "moves up": "moves down",
        "moves down": "moves up", "grows": "shrinks", "shrinks": "grows",
    }  # fmt: skip
    for clip, reading in list(zip(truth, readings, strict=True))[::8]:
        assert read_clip(clip[::-1]).motion == opposite[str(reading.motion)]


def test_flicker_is_the_change_of_the_ground_and_not_of_the_shape(truth: list[np.ndarray]) -> None:
    rng = np.random.default_rng(8)
    for clip in truth[::20]:
        assert flicker(clip) < 1.0
        lighter = (clip.astype(int) + 4 * (np.arange(len(clip)) % 2)[:, None, None, None]).clip(0, 255).astype(np.uint8)
        assert 3.5 < flicker(lighter) - flicker(clip) < 4.5
    assert flicker(rng.integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)) > 20


def test_psnr_knows_equal_pictures_and_a_known_error() -> None:
    picture = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(picture, picture) == 99.0
    assert abs(psnr(picture + 10, picture) - 28.13) < 0.01
