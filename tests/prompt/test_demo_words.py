"""Which words of a prompt the demo model does not know."""

import random

import pytest

from scripts.train_demo.captions import every_caption, paraphrase
from turbodiff.prompt.demo_words import unknown_words


def test_every_way_to_say_a_caption_of_its_training_is_known():
    rng = random.Random(0)
    said = [paraphrase(caption, rng) for caption in every_caption() for _ in range(3)]
    assert [text for text in said if unknown_words(text)] == []


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red circle moves right on a white background", ("white background",)),
        ("A cat chases a red ball", ("cat", "chases")),
        ("一个红色的圆形向右移动,白色背景", ("白色背景",)),
        ("一只橙色的猫，追逐着蝴蝶", ("猫", "追逐", "蝴蝶")),
        ("a (red:1.5) blue circle", ()),
        ("", ()),
    ],
)
def test_what_it_was_never_shown_is_named(prompt, words):
    assert unknown_words(prompt) == words
