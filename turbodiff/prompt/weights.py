"""The text that is read of a prompt, and its weights: (word:1.3), also （蝴蝶：1.5）.

Only an explicit number weighs; plain brackets are text. Nesting multiplies, a weight is held to 0.1-3, a backslash
before a bracket makes it text. The network gets ln(weight) on the cross-attention logits of the span's tokens, the
text encoder gets the text without the marks.
"""

import re
from itertools import groupby
from typing import NamedTuple

import ftfy

from turbodiff.spec.text import stream_safe, unescaped

MIN_WEIGHT, MAX_WEIGHT = 0.1, 3.0
_MAX_PRODUCT = 1e100  # of weights that are open: what is inside may weigh less again, but inf * 0 is no number
OPEN, CLOSE = "(（", ")）"
_TEXT = re.compile(r"\S")
_NUMBER = re.compile(r"[:：] ?([0-9]+\.?[0-9]*|\.[0-9]+) ?$")
_LONGEST_MARK = 16  # characters of colon, number and spaces


class Span(NamedTuple):
    """Characters start..end of the text weigh `weight` (never 1)."""

    start: int
    end: int
    weight: float


class WeightedPrompt(NamedTuple):
    """What the text encoder reads, and which characters of it weigh more or less. Spans are sorted, never overlap."""

    text: str
    spans: tuple[Span, ...] = ()


class Group(NamedTuple):
    """A weighted bracket in the source: brackets at `start` and `end`, the colon at `colon`."""

    start: int
    colon: int
    end: int
    weight: float


def clean(text: str) -> str:
    """Repaired Unicode (full-width marks become half-width), HTML entities undone twice, whitespace collapsed.

    As Wan cleans (TurboDiffusion rcm/utils/umt5.py, mode "whitespace"): a prompt means the same here. But marks without
    end on one letter are cut before letters are composed; ftfy, which composes, has to make marks of entities first.
    """
    plain = ftfy.fix_text(text, normalization=None)
    cut = stream_safe(plain)
    return " ".join(unescaped(unescaped(ftfy.fix_text(text if cut == plain else cut))).split())


def parse(source: str) -> WeightedPrompt:
    """A clean prompt -> its text and weights. Without brackets and backslashes the text is the source."""
    groups = find_groups(source)
    opening = {group.start: group.weight for group in groups}
    closing = {group.end for group in groups}
    marks = {index for group in groups for index in range(group.colon, group.end)}
    open_weights = [1.0]
    weighed: list[tuple[str, float]] = []  # the characters of the text with their weights
    for index, char in enumerate(source):
        if index in opening:
            open_weights.append(min(open_weights[-1] * opening[index], _MAX_PRODUCT))
        elif index in closing:
            open_weights.pop()
        elif index in marks or (char == "\\" and source[index + 1 : index + 2] in tuple(OPEN + CLOSE)):
            continue
        elif char != " " or (weighed and weighed[-1][0] != " "):  # the marks leave double spaces, also at the ends
            weighed.append((char, min(max(open_weights[-1], MIN_WEIGHT), MAX_WEIGHT)))
    if weighed and weighed[-1][0] == " ":
        weighed.pop()
    spans, start = [], 0
    for weight, run in groupby(weight for _, weight in weighed):
        end = start + len(list(run))
        spans += [Span(start, end, weight)] if weight != 1 else []
        start = end
    return WeightedPrompt("".join(char for char, _ in weighed), tuple(spans))


def find_groups(source: str) -> list[Group]:
    """The weighted brackets of a clean prompt, inner ones first; brackets behind a backslash are text."""
    groups: list[Group] = []
    opened: list[int] = []
    inner = 0  # where the innermost text begins: behind the last bracket
    for end, char in enumerate(source):
        if char not in OPEN + CLOSE or (end > 0 and source[end - 1] == "\\"):
            continue
        if char in OPEN:
            opened.append(end)
        elif opened:
            start, tail = opened.pop(), max(inner, end - _LONGEST_MARK)
            if found := _NUMBER.search(source[tail:end]):
                colon, number = tail + found.start(), found[1]
                # "16:9" and "10:30" are a ratio and a time: behind a digit, only a number with a point weighs
                is_ratio = source[colon - 1].isdigit() and "." not in number
                if not is_ratio and _TEXT.search(source, start + 1, colon):
                    groups.append(Group(start, colon, end, float(number)))
        inner = end + 1
    return groups
