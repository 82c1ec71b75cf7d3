"""Prompt weights: (word:1.3), also （蝴蝶：1.5）.

Only an explicit number weighs; plain brackets are text. Nesting multiplies, a weight is held to 0.1-3, a backslash
before a bracket makes it text. The network gets ln(weight) on the cross-attention logits of the span's tokens, the
text encoder gets the text without the marks.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

MIN_WEIGHT, MAX_WEIGHT = 0.1, 3.0
OPEN, CLOSE = "(（", ")）"
_NUMBER = re.compile(r"[:：] ?([0-9]+\.?[0-9]*|\.[0-9]+) ?$")
_LONGEST_MARK = 16  # characters of colon, number and spaces

Weighed = list[tuple[str, float]]  # characters with their weights


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


def parse(source: str) -> WeightedPrompt:
    """A clean prompt (see `clean`) -> its text and weights. Without brackets and backslashes the text is the source."""
    weighed = _collapsed(_weighed(source))
    return WeightedPrompt("".join(char for char, _ in weighed), tuple(_spans(weighed)))


def weights_out_of_range(source: str) -> list[float]:
    """The numbers in a clean prompt that are held to 0.1-3."""
    return [group.weight for group in _groups(source) if not MIN_WEIGHT <= group.weight <= MAX_WEIGHT]


def _groups(source: str) -> list[Group]:
    groups: list[Group] = []
    opened: list[int] = []
    inner = 0  # where the innermost text begins: behind the last bracket
    for index, char in enumerate(source):
        if char not in OPEN + CLOSE or _escaped(source, index):
            continue
        if char in OPEN:
            opened.append(index)
        elif opened:
            start = opened.pop()
            groups += _group(source, start, inner, index)
        inner = index + 1
    return groups


def _group(source: str, start: int, inner: int, end: int) -> list[Group]:
    tail = max(inner, end - _LONGEST_MARK)
    found = _NUMBER.search(source[tail:end])
    if not found:
        return []
    colon, number = tail + found.start(), found[1]
    # "16:9" and "10:30" are a ratio and a time: behind a digit, only a number with a point weighs
    is_ratio = source[colon - 1].isdigit() and "." not in number
    is_empty = not source[start + 1 : colon].strip()
    return [] if is_ratio or is_empty else [Group(start, colon, end, float(number))]


def _escaped(source: str, index: int) -> bool:
    return index > 0 and source[index - 1] == "\\"


def _weighed(source: str) -> Weighed:
    groups = _groups(source)
    opening = {group.start: group.weight for group in groups}
    closing = {group.end for group in groups}
    marks = {index for group in groups for index in range(group.colon, group.end)}
    weights, weighed = [1.0], []
    for index, char in enumerate(source):
        if index in opening:
            weights.append(weights[-1] * opening[index])
        elif index in closing:
            weights.pop()
        elif index not in marks and not (char == "\\" and source[index + 1 : index + 2] in tuple(OPEN + CLOSE)):
            weighed.append((char, min(max(weights[-1], MIN_WEIGHT), MAX_WEIGHT)))
    return weighed


def _collapsed(weighed: Weighed) -> Weighed:
    """Without the spaces that the marks leave double, or at the ends."""
    kept: Weighed = []
    for char, weight in weighed:
        if char != " " or (kept and kept[-1][0] != " "):
            kept.append((char, weight))
    return kept[:-1] if kept and kept[-1][0] == " " else kept


def _spans(weighed: Weighed) -> Iterator[Span]:
    start = 0
    for weight, run in groupby(weight for _, weight in weighed):
        end = start + len(list(run))
        if weight != 1:
            yield Span(start, end, weight)
        start = end
