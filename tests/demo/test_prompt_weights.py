"""A weighted word wins: `a (red:1.5) blue circle` against `a red (blue:1.5) circle`, through the product."""

from collections import Counter
from pathlib import Path

import pytest

from scripts.train_demo.captions import COLOURS, words_of_fact
from scripts.train_demo.scoring import read_clip
from tests.soak import SOAK
from turbodiff.prompt.tokens import Tokenizer, token_weights
from turbodiff.prompt.weights import parse

BUNDLE = Path(__file__).resolve().parents[2] / "turbodiff" / "demo"
SENTENCES = {
    "english": {
        "red": "a (red:1.5) blue circle moves right on a black background",
        "blue": "a red (blue:1.5) circle moves right on a black background",
    },
    "chinese": {
        "red": "一个(红色:1.5)蓝色的圆形向右移动,黑色背景",
        "blue": "一个红色(蓝色:1.5)的圆形向右移动,黑色背景",
    },
}


def colours(product, prompt: str, seeds: int, steps: int) -> Counter:
    clips = (product.clip({"model": "demo", "prompt": prompt, "seed": seed, "steps": steps}) for seed in range(seeds))
    return Counter(read_clip(clip).colour for clip in clips)


def check(product, language: str, seeds: int, steps: int) -> None:
    seen = {word: colours(product, prompt, seeds, steps) for word, prompt in SENTENCES[language].items()}
    assert seen["red"]["red"] > seen["red"]["blue"], seen
    assert seen["blue"]["blue"] > seen["blue"]["red"], seen


@pytest.mark.parametrize("language", SENTENCES)
def test_the_weighted_colour_wins_on_a_few_seeds(product, language: str) -> None:
    check(product, language, seeds=3, steps=2)


@pytest.mark.slow
def test_the_weighted_colour_wins_more_often_on_many_seeds(product) -> None:
    check(product, "english", seeds=40 if SOAK else 8, steps=2)


def test_every_word_of_a_fact_is_one_token_so_a_weight_is_for_it_alone() -> None:
    tokenizer = Tokenizer(BUNDLE / "spiece.model")
    for word in words_of_fact():
        sentence = f"a ({word}:1.5) thing" if word.isascii() else f"一个({word}:1.5)的东西"
        weights = token_weights(tokenizer, parse(sentence))
        assert [weight for weight in weights if weight != 1] == [1.5], word


@pytest.mark.parametrize("colour", COLOURS)
def test_two_colours_side_by_side_stay_two_tokens(colour: str) -> None:
    tokenizer = Tokenizer(BUNDLE / "spiece.model")
    chinese = next(word for word, fact in words_of_fact().items() if fact == (0, colour) and not word.isascii())
    for sentence in (f"a cyan ({colour}:1.5) star", f"青色({chinese}:1.5)的星形"):
        assert [weight for weight in token_weights(tokenizer, parse(sentence)) if weight != 1] == [1.5], sentence
