"""Advice on a prompt: keys and numbers for the page to word, and a rewrite where one click can do it.

Only what is likely to disappoint is mentioned, and nothing is ever blocked or threatened: a prompt cannot hang a
sampler of four fixed steps.
"""

import re
from typing import Any, NamedTuple

from turbodiff.prompt.clean import clean
from turbodiff.prompt.motion import has_motion
from turbodiff.prompt.tokens import TEXT_LEN
from turbodiff.prompt.weights import MAX_WEIGHT, MIN_WEIGHT, parse, weights_out_of_range

MIN_WORDS, MIN_HAN = 5, 8  # less than this hardly says who does what where
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


class Advice(NamedTuple):
    """One chip: no_verb | flat_list | too_long | too_short | camera_contradicts | weight_range.

    `numbers` fill the page's sentence; `rewrite` is the prompt after one click, "" where that needs a person.
    """

    key: str
    numbers: dict[str, Any]
    rewrite: str = ""


def lint(prompt: str, tokens: int | None = None, limit: int = TEXT_LEN) -> list[Advice]:
    """What is likely to disappoint about a prompt as typed; nothing for an empty one.

    Args:
        tokens: its token count (`Tokenizer.count`), None where no tokenizer is at hand.
        limit: tokens that the encoder reads.
    """
    source = clean(prompt)
    text = parse(source).text
    if not text:
        return []
    advice = [_no_verb(prompt, text), _flat_list(prompt, text), _too_short(text), _camera(prompt, text), _range(source)]
    if tokens is not None and tokens > limit:
        advice.append(Advice("too_long", {"tokens": tokens, "limit": limit, "over": tokens - limit}))
    return [one for one in advice if one]


def is_chinese(prompt: str) -> bool:
    """Whether a prompt is mostly Chinese: the Turbo checkpoints were trained on long English ones; say so once."""
    han = len(_HAN.findall(prompt))
    return han > len(re.findall(r"[A-Za-z]+", prompt))


def _no_verb(prompt: str, text: str) -> Advice | None:
    if has_motion(text):
        return None
    camera = "，镜头缓缓推近" if is_chinese(text) else ", the camera slowly pushes in"
    return Advice("no_verb", {}, prompt.rstrip(" ,，.。") + camera)


def _flat_list(prompt: str, text: str) -> Advice | None:
    joints = len(_AND.findall(text))
    parts = [part for part in _PARTS.split(text) if part.strip()]
    if joints < 2 and (len(parts) < 3 or any(map(has_motion, parts))):
        return None
    rewrite = _AND.sub("，" if is_chinese(text) else ", ", prompt) if joints else ""
    return Advice("flat_list", {"parts": max(len(parts), joints + 1)}, rewrite)


def _too_short(text: str) -> Advice | None:
    han, words = len(_HAN.findall(text)), len(re.findall(r"[^\W\d_]+", _HAN.sub(" ", text)))
    return Advice("too_short", {"words": words + han}) if han < MIN_HAN and words + han / 2 < MIN_WORDS else None


def _camera(prompt: str, text: str) -> Advice | None:
    if _THEN.search(text):
        return None
    for pattern, opposite in _OPPOSITES:
        one, other = (re.search(move, text, re.IGNORECASE) for move in (pattern, opposite))
        if one and other:
            rewrites = (_without(prompt, other[0]), _without(prompt, one[0]))
            return Advice("camera_contradicts", {"one": one[0], "other": other[0]}, max(rewrites, key=len))
    return None


def _without(prompt: str, words: str) -> str:
    """The prompt without the part between commas that holds `words`, "" where that part is the whole prompt."""
    kept = [part for part in re.split(r"(?<=[,，;；])", prompt) if words not in clean(part)]
    return "".join(kept).strip(" ,，;；")


def _range(source: str) -> Advice | None:
    outside = weights_out_of_range(source)
    return Advice("weight_range", {"got": outside[0], "low": MIN_WEIGHT, "high": MAX_WEIGHT}) if outside else None
