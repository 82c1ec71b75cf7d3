"""Start and end picture through the product: the clip ends with the picture that it was given."""

import numpy as np
from PIL import Image

from scripts.evaluate_demo import chosen_captions
from scripts.train_demo.render import random_clip
from scripts.train_demo.scoring import psnr

NUMBER = 2  # of a held-out caption whose clip, left to itself, ends elsewhere


def test_the_clip_ends_with_the_picture_that_it_was_given(product, tmp_path) -> None:
    caption, sentence = chosen_captions(NUMBER + 1)[NUMBER]
    wanted = random_clip(caption, np.random.default_rng(10_000 + NUMBER))
    for name, frame in (("first.png", wanted[0]), ("last.png", wanted[-1])):
        Image.fromarray(frame).save(tmp_path / name)
    asked = {"model": "demo-i2v", "prompt": sentence, "seed": NUMBER, "image": str(tmp_path / "first.png")}
    told, alone = product.clip({**asked, "end_image": str(tmp_path / "last.png")}), product.clip(asked)
    assert psnr(told[0], wanted[0]) >= 24
    assert psnr(told[-1], wanted[-1]) >= max(24, psnr(alone[-1], wanted[-1]) + 3)
