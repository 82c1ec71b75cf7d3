"""The demo's little world in words: 8 colours x 4 shapes x 6 motions x 4 backgrounds, in English and Chinese."""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass
from functools import cache

COLOURS = ("red", "green", "blue", "yellow", "purple", "white", "orange", "cyan")
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("moves right", "moves left", "moves up", "moves down", "grows", "shrinks")
BACKGROUNDS = ("black", "gray", "navy", "brown")

_ZH_COLOUR = dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "紫色", "白色", "橙色", "青色"), strict=True))
_ZH_SHAPE = {
    "circle": ("圆形", "圆", "圆圈"),
    "square": ("正方形", "方形", "方块"),
    "triangle": ("三角形", "三角"),
    "star": ("星形", "五角星", "星星"),
}
_ZH_MOTION = {
    "moves right": ("向右移动", "往右移动", "向右边移动"),
    "moves left": ("向左移动", "往左移动", "向左边移动"),
    "moves up": ("向上移动", "往上移动", "向上方移动"),
    "moves down": ("向下移动", "往下移动", "向下方移动"),
    "grows": ("变大", "逐渐变大", "放大"),
    "shrinks": ("变小", "逐渐变小", "缩小"),
}
_ZH_BACKGROUND = {"black": "黑色", "gray": "灰色", "navy": "深蓝色", "brown": "棕色"}
_EN_SHAPE = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
_EN_MOTION = {
    "moves right": ("moves right", "moves to the right", "is moving right", "slides right", "goes right"),
    "moves left": ("moves left", "moves to the left", "is moving left", "slides left", "goes left"),
    "moves up": ("moves up", "moves upward", "is moving up", "rises", "goes up"),
    "moves down": ("moves down", "moves downward", "is moving down", "falls", "goes down"),
    "grows": ("grows", "gets bigger", "is growing", "becomes larger", "expands"),
    "shrinks": ("shrinks", "gets smaller", "is shrinking", "becomes smaller", "contracts"),
}
# The word alone that names a motion, wherever the sentence puts it.
_MOTION_WORDS = {
    "moves right": ("right", "向右", "往右", "向右边"),
    "moves left": ("left", "向左", "往左", "向左边"),
    "moves up": ("up", "upward", "rises", "向上", "往上", "向上方"),
    "moves down": ("down", "downward", "falls", "向下", "往下", "向下方"),
    "grows": ("grows", "bigger", "growing", "larger", "expands", "变大", "放大"),
    "shrinks": ("shrinks", "smaller", "shrinking", "contracts", "变小", "缩小"),
}


@dataclass(frozen=True, order=True)
class Caption:
    """What a clip shows; the canonical tuple that splits, renders and scores are keyed on."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def english(self) -> str:
        """The canonical English sentence."""
        return f"a {self.colour} {self.shape} {self.motion} on a {self.background} background"

    @property
    def chinese(self) -> str:
        """The canonical Chinese sentence."""
        shape, motion = _ZH_SHAPE[self.shape][0], _ZH_MOTION[self.motion][0]
        return f"一个{_ZH_COLOUR[self.colour]}的{shape}{motion},{_ZH_BACKGROUND[self.background]}背景"

    @property
    def held_out(self) -> bool:
        """True for the fixed eighth of all captions that no training step ever sees."""
        key = "|".join((self.colour, self.shape, self.motion, self.background))
        return hashlib.sha256(key.encode()).digest()[0] < 32


def every_caption() -> list[Caption]:
    """All 768 captions in a fixed order."""
    return [Caption(*parts) for parts in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)]


def training_captions() -> list[Caption]:
    """The captions that may be trained on."""
    return [caption for caption in every_caption() if not caption.held_out]


def held_out_captions() -> list[Caption]:
    """The captions that only evaluation may use."""
    return [caption for caption in every_caption() if caption.held_out]


def english_paraphrase(caption: Caption, rng: random.Random) -> str:
    """One of many English ways to say `caption`, canonical about a third of the time."""
    if rng.random() < 0.3:
        return _recase(caption.english, rng)
    article = rng.choice(("a", "the", "one"))
    subject = f"{article} {caption.colour} {rng.choice(_EN_SHAPE[caption.shape])}"
    subject = f"{subject} {rng.choice(_EN_MOTION[caption.motion])}"
    ground = caption.background
    sentence = rng.choice(
        (
            f"{subject} on a {ground} background",
            f"{subject} on {ground}",
            f"{subject} in front of a {ground} background",
            f"{subject}, {ground} background",
            f"on a {ground} background, {subject}",
        )
    )
    return _recase(sentence, rng)


def chinese_paraphrase(caption: Caption, rng: random.Random) -> str:
    """One of many Chinese ways to say `caption`, canonical about a third of the time."""
    if rng.random() < 0.3:
        return caption.chinese if rng.random() < 0.5 else caption.chinese.replace(",", "，")
    colour = _ZH_COLOUR[caption.colour]
    colour = rng.choice((colour, colour[:-1])) if len(colour) == 2 else colour
    shape, motion = rng.choice(_ZH_SHAPE[caption.shape]), rng.choice(_ZH_MOTION[caption.motion])
    subject = f"{rng.choice(('一个', '', '这个'))}{colour}{rng.choice(('的', ''))}{shape}"
    ground, comma = _ZH_BACKGROUND[caption.background], rng.choice((",", "，"))
    end = rng.choice(("", "。"))
    return rng.choice(
        (
            f"{subject}{motion}{comma}{ground}背景{end}",
            f"{subject}在{ground}背景上{motion}{end}",
            f"{ground}背景{comma}{subject}{motion}{end}",
            f"在{ground}背景上{comma}{subject}{motion}{end}",
        )
    )


def paraphrase(caption: Caption, rng: random.Random) -> str:
    """A sentence for `caption` in a language drawn evenly."""
    return english_paraphrase(caption, rng) if rng.random() < 0.5 else chinese_paraphrase(caption, rng)


def two_colours(caption: Caption, rng: random.Random) -> str:
    """A sentence for `caption` with a second colour beside the true one: "a red blue circle ..."."""
    other = rng.choice([colour for colour in COLOURS if colour != caption.colour])
    sentence = paraphrase(caption, rng)
    if sentence.isascii():
        pair, old = [caption.colour, other], caption.colour
        rng.shuffle(pair)
        return re.sub(rf"\b{old}\b", " ".join(pair), sentence, count=1)
    chinese = _ZH_COLOUR[caption.colour]
    pair = [chinese, _ZH_COLOUR[other]]
    rng.shuffle(pair)
    # the colour's word may be short (红), and 蓝色 also ends the background's 深蓝色
    return re.sub(rf"(?<!深){chinese[0]}(色|(?=[的圆正方三五星]))", "".join(pair), sentence, count=1)


@cache
def words_of_fact() -> dict[str, tuple[int, str]]:
    """Every word, English lower case or Chinese, that alone names a fact: which of the four, and its value."""
    words: dict[str, tuple[int, str]] = {}
    for colour, chinese in _ZH_COLOUR.items():
        words |= {colour: (0, colour), chinese: (0, colour), chinese[:-1]: (0, colour)}
    for attribute, tables in ((1, (_EN_SHAPE, _ZH_SHAPE)), (2, (_MOTION_WORDS,))):
        for value, names in ((value, names) for table in tables for value, names in table.items()):
            words |= dict.fromkeys(names, (attribute, value))
    for ground, chinese in _ZH_BACKGROUND.items():
        words |= {ground: (3, ground), chinese: (3, ground)}
    return words


@cache
def word_pattern() -> re.Pattern[str]:
    """Matches each word of `words_of_fact` in a sentence, the longest first."""
    words = sorted(words_of_fact(), key=len, reverse=True)
    return re.compile("|".join(rf"\b{word}\b" if word.isascii() else word for word in words), re.IGNORECASE)


def _recase(sentence: str, rng: random.Random) -> str:
    sentence = sentence[0].upper() + sentence[1:] if rng.random() < 0.3 else sentence
    return sentence + "." if rng.random() < 0.2 else sentence
