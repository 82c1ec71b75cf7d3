"""Advice on a prompt: keys and numbers for the page to word, and a rewrite where one click can do it.

Only what is likely to disappoint is mentioned, and nothing is ever blocked or threatened: a prompt cannot hang a
sampler of four fixed steps. Whether a sentence says that something moves is told by word lists, English and Chinese
(lint.toml); a doubt counts as motion, for advice that comes too often is not read.
"""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from turbodiff.prompt.tokens import TEXT_LEN
from turbodiff.prompt.weights import MAX_WEIGHT, MIN_WEIGHT, clean, find_groups, parse

MIN_WORDS, MIN_HAN = (
    5,
    5,
)  # 猫追逐蝴蝶, "a cat chases a butterfly" are sentences; less than this hardly says who does what where
_HAN = re.compile("[\u3400-\u9fff]")
_PARTS = re.compile(r"[,;，；、。.!?！？]+")
_THEN = re.compile(r"\b(?:then|after|afterwards|before|later|finally)\b|然后|接着|随后|再|最后|之后", re.IGNORECASE)
# "black and white", "up and down" are one thing; 温和, 柔和 are one word
_AND = re.compile(
    r"(?<!black)(?<!up)(?<!back)(?<!side)(?<!more)(?<!again)(?<!over)\s+and\s+(?!white\b|down\b|forth\b|more\b|again\b|over\b)"
    r"|(?<![温柔暖饱随祥平缓混谐中调总亲])(?:和|以及|还有)(?![平谐服风尚煦睦解气])",
    re.IGNORECASE,
)
_ZH_LENS = "镜头[^,，。]{0,4}"
_LENS = r"camera\W+(?:\w+\W+){0,2}?"
# Moves of the camera that cannot both be meant at one time
_OPPOSITES = (
    (
        rf"\bzoom\w*[ -]in\b|\b(?:push|dolly)\w*[ -]in\b|{_ZH_LENS}(?:推近|推进|拉近)|推近",
        rf"\bzoom\w*[ -]out\b|\b(?:pull|dolly)\w*[ -](?:out|back)\b|{_ZH_LENS}(?:拉远|拉开|后拉)|拉远",
    ),
    (
        rf"\bpan\w*\W+(?:to the )?left\b|{_LENS}left\b|{_ZH_LENS}左",
        rf"\bpan\w*\W+(?:to the )?right\b|{_LENS}right\b|{_ZH_LENS}右",
    ),
    (
        rf"\btilt\w*\W+up\b|{_LENS}up(?:wards?)?\b|{_ZH_LENS}[上升]",
        rf"\btilt\w*\W+down\b|{_LENS}down(?:wards?)?\b|{_ZH_LENS}[下降]",
    ),
    (
        r"\b(?:static|fixed|locked|still|stationary)\W+(?:camera|shot)\b|\btripod\b|固定镜头|固定机位|镜头(?:静止|固定)",
        r"\bhandheld\b|\b(?:zoom(?:s|ing)|panning|pans|orbiting|tracking shot)\b|手持"
        rf"|{_LENS}(?:mov|push|pull|orbit|track|follow|fl[iy])|{_ZH_LENS}(?:推|拉|摇|移|跟|环绕|旋转)",
    ),
)
_CAMERA = re.compile(
    r"\bcamera\b.{0,60}?\b(?:mov|pan|tilt|push|pull|zoom|orbit|circl|follow|track|dolly|rise|fall|fly|glid|rotat|sweep)\w*"
    r"|\b(?:pans|panning|zooms?|zooming|dolly|dollies|tracking shot|crane shot|fly-?through|orbit shot|time-?lapse)\b"
    r"|(?:镜头|运镜|视角|画面).{0,6}?(?:推|拉|摇|移|跟|升|降|旋转|环绕|靠近|远离|放大|缩小|变)|延时摄影|推近|拉远",
    re.IGNORECASE,
)
# Words that ask for a picture that stands still; a camera that stands still is no such wish
STILLNESS = re.compile(
    r"\b(?:motionless|unmoving|immobile|freeze[- ]frame|still[- ]life|nothing moves)\b"
    r"|\bwithout (?:any )?(?:motion|movement)\b"
    r"|\bno (?:motion|movement)\b|\bfrozen in (?:time|place|motion)\b"
    r"|\b(?:a|one) still (?:image|picture|photo\w*|frame)\b"
    r"|\b(?:stands?|standing|sits?|sitting|lies|lying|holds?|holding|stays?|staying|keeps?|remains?|perfectly|completely"
    r"|absolutely|totally|entirely) still\b"
    r"|(?<!镜头)(?<!机位)(?<!相机)(?:完全|保持|处于)?静止|(?<!镜头)(?<!机位)(?<!相机)不动|纹丝不动|定格|静物|凝固",
    re.IGNORECASE,
)

# Words that ask for a movement that ends
STOPPING = re.compile(
    r"\b(?:stop(?:s|ping|ped)?|halts?|comes? to (?:a )?(?:rest|stop|halt|standstill)|paus(?:e|es|ing)|freezes?|settles?"
    r"|lands?|sits? down|lies? down)\b|停下|停住|停在|停止|停顿|坐下|躺下|落定|落地",
    re.IGNORECASE,
)


class Advice(NamedTuple):
    """One chip: no_verb | flat_list | too_long | too_short | camera_contradicts | weight_range.

    `numbers` fill the page's sentence; `rewrite` is the prompt after one click, "" where that needs a person.
    """

    key: str
    numbers: dict[str, str | float]
    rewrite: str = ""


class WordLists(NamedTuple):
    """The lists of lint.toml; Chinese ones as patterns."""

    verbs: frozenset[str]  # of action and change, in their base form
    irregular: frozenset[str]
    nouns: frozenset[str]  # verbs that are nouns behind one of `before_nouns`
    before_nouns: frozenset[str]
    plurals: frozenset[str]
    still_ing: frozenset[str]
    zh_nouns: re.Pattern[str]
    zh_verbs: re.Pattern[str]


def lint(prompt: str, tokens: int | None = None, limit: int = TEXT_LEN) -> Iterator[Advice]:
    """What is likely to disappoint about a prompt as typed; nothing for an empty one.

    Args:
        tokens: its token count (`Tokenizer.count`), None where no tokenizer is at hand.
        limit: tokens that the encoder reads.
    """
    source = clean(prompt)
    text = parse(source).text
    if not text:
        return
    chinese = is_chinese(text)
    joints = len(_AND.findall(text))
    parts = [part for part in _PARTS.split(text) if part.strip()]
    moves = has_motion(text)
    is_list = joints >= 2 or (len(parts) >= 3 and not any(map(has_motion, parts)))
    rewrite = _AND.sub("，" if chinese else ", ", prompt) if is_list else prompt
    if not moves:
        rewrite = rewrite.rstrip(" ,，.。") + ("，镜头缓缓推近" if chinese else ", the camera slowly pushes in")
        yield Advice("no_verb", {}, rewrite)
    if is_list:
        yield Advice("flat_list", {"parts": max(len(parts), joints + 1)}, rewrite if joints else "")
    han, words = len(_HAN.findall(text)), len(re.findall(r"[^\W\d_]+", _HAN.sub(" ", text)))
    if han < MIN_HAN and words + han / 2 < MIN_WORDS:
        yield Advice("too_short", {"words": words + han})
    for pattern, opposite in () if _THEN.search(text) else _OPPOSITES:  # the first two that cannot both be meant
        one, other = (re.search(move, text, re.IGNORECASE) for move in (pattern, opposite))
        if one and other:
            # without the part between commas that holds the move; "" where that is the whole prompt
            pieces = re.split(r"(?<=[,，;；])", prompt)
            rewrites = ("".join(p for p in pieces if move[0] not in clean(p)).strip(" ,，;；") for move in (other, one))
            yield Advice("camera_contradicts", {"one": one[0], "other": other[0]}, max(rewrites, key=len))
            break
    if outside := [group.weight for group in find_groups(source) if not MIN_WEIGHT <= group.weight <= MAX_WEIGHT]:
        yield Advice("weight_range", {"got": outside[0], "low": MIN_WEIGHT, "high": MAX_WEIGHT})
    if tokens is not None and tokens > limit:
        yield Advice("too_long", {"tokens": tokens, "limit": limit, "over": tokens - limit})


def is_chinese(prompt: str) -> bool:
    """Whether a prompt is mostly Chinese: the Turbo checkpoints were trained on long English ones; say so once."""
    han = len(_HAN.findall(prompt))
    return han > len(re.findall(r"[A-Za-z]+", prompt))


def has_motion(text: str) -> bool:
    """Whether a clean prompt, or a part of one, names an action, a change or a camera move."""
    if _CAMERA.search(text):
        return True
    lists, before = _word_lists(), ""
    for word in re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower()):
        forms = {word}  # what the form may come from: chases -> chase, stopped -> stop, carries -> carry
        if word.endswith("s"):
            forms |= {word[:-1], word[:-2], word[:-3] + "y"}
        if word.endswith("ed"):
            forms |= {word[:-1], word[:-2], word[:-3], word[:-3] + "y"}
        bases = forms & lists.verbs
        is_noun = word in bases and word in lists.nouns and before in lists.before_nouns
        is_plural = word.endswith("s") and bool(bases & lists.plurals)
        is_verb = word in lists.irregular or (bool(bases) and not is_noun and not is_plural)
        if word not in lists.still_ing if word.endswith("ing") and len(word) > 4 else is_verb:
            return True
        before = word
    return bool(lists.zh_verbs.search(lists.zh_nouns.sub("", text)))


@cache
def _word_lists() -> WordLists:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    english = {name: frozenset(table[name].split()) for name in WordLists._fields if not name.startswith("zh_")}
    nouns, verbs = ("|".join(sorted(table[name].split(), key=len, reverse=True)) for name in ("zh_nouns", "zh_verbs"))
    # a verb, a character of action, or a verb with 着 that says more than standing or being dressed
    verbs += f"|[{table['zh_verb_characters']}]|[\u4e00-\u9fff](?<![{table['zh_still_before_zhe']}])着"
    return WordLists(**english, zh_nouns=re.compile(nouns), zh_verbs=re.compile(verbs))
