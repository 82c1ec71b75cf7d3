"""Every parser of other people's text takes linear time: twice the text takes at most 2.5 times as long."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from turbodiff.archive.seed_table import Row, decode_table, read_table, write_table
from turbodiff.diagnostics.logs import log_line
from turbodiff.prompt.weights import clean, parse
from turbodiff.prompt.wildcards import choose, has_wildcards
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import read_event
from turbodiff.spec.request import make_request
from turbodiff.spec.text import is_blank, printable
from webui import form

MOST, TRIES = 2.5, 12
QUICK_S = 0.004  # below it the clock says little, and nothing is slow
MAX_CPU_S = 2.0

Text = Callable[[int], Any]


def decoded(data: bytes) -> object:
    return decode_table(data, "seeds.md")


PARSERS: dict[str, tuple[int, Text, Callable[[Any], object]]] = {
    "seeds: backslashes": (200_000, lambda n: f"|{chr(92) * n}|a|b|c|d|e|", read_table),
    "seeds: bars": (200_000, lambda n: "|" * n, read_table),
    "seeds: escaped bars": (100_000, lambda n: "|" + "\\|" * n, read_table),
    "seeds: lines": (10_000, lambda n: "| a | 1 | m | r | | |\n" * n, read_table),
    "seeds: rules": (20_000, lambda n: "|---|---|\n" * n, read_table),
    "seeds: blanks": (500_000, lambda n: "|" + " " * n + "|", read_table),
    "seeds: odd bytes": (100_000, lambda n: b"\xff\xfe|" * n, decoded),
    "seeds: GB 18030": (4_000, lambda n: ("| 提示词 | 1 | m | r | | |\n" * n).encode("gb18030"), decoded),
    "seeds: written": (20_000, lambda n: [Row("a|\\\n", "1", "m", "r")] * n, write_table),
    "prompt: brackets": (8_000, lambda n: "(" * n, lambda text: parse(clean(text))),
    "prompt: nested weights": (8_000, lambda n: "(a" * n + ":1.1)" * n, lambda text: parse(clean(text))),
    "prompt: open weights": (8_000, lambda n: "(a:" * n, lambda text: parse(clean(text))),
    "prompt: escapes": (8_000, lambda n: "\\(" * n, lambda text: parse(clean(text))),
    "prompt: a long entity": (1_000_000, lambda n: f"&#{'9' * n};", lambda text: parse(clean(text))),
    "prompt: entities of entities": (20_000, lambda n: "&amp;" * n, clean),
    "prompt: marks to sort": (4_000, lambda n: "a" + "\u0301\u0323" * n, clean),
    "prompt: entities of marks": (4_000, lambda n: "a" + "&#769;&#803;" * n, clean),
    "prompt: blank entities": (20_000, lambda n: "&#32;" * n, is_blank),
    "prompt: blank weights": (20_000, lambda n: "(" * n + ":1)" * n, is_blank),
    "prompt: an open blank": (100_000, lambda n: "( " + " " * n, is_blank),
    "prompt: open braces with bars": (8_000, lambda n: "{" + "|" * n, has_wildcards),
    "prompt: braces in a list": (
        40_000, lambda n: {"a": ["{" + "|" * n]}, lambda lists: choose("__a__", lists, 1),
    ),
    "request: prompt": (4_000, lambda n: {"prompt": "(" * n}, make_request),
    "request: size of digits": (1_000_000, lambda n: {"prompt": "x", "size": "9" * n + "x1"}, make_request),
    "request: size of x": (500_000, lambda n: {"prompt": "x", "size": "x" * n}, make_request),
    "request: seed": (1_000_000, lambda n: {"prompt": "x", "seed": "9" * n}, make_request),
    "request: steps": (1_000_000, lambda n: {"prompt": "x", "steps": "9" * n}, make_request),
    "request: pins": (100_000, lambda n: {"prompt": "x", "pinned": "a," * n}, make_request),
    "request: LoRAs": (50_000, lambda n: {"prompt": "x", "loras": [{"path": "/a"}] * n}, make_request),
    "form: LoRAs": (20_000, lambda n: json.dumps([{"name": "a", "strength": 1, "expert": "both"}] * n), form.loras),
    "form: brackets": (200_000, lambda n: "[" * n, form.loras),
    "log: secrets": (100_000, lambda n: "token=" * n, lambda text: log_line(text, "worker")),
    "log: addresses": (100_000, lambda n: "://" + "a:" * n, lambda text: log_line(text, "worker")),
    "log: colours": (100_000, lambda n: "\x1b[" + "0" * n, lambda text: log_line(text, "worker")),
    "terminal: controls": (50_000, lambda n: "\x1b" * n, printable),
    "events: brackets": (200_000, lambda n: '{"v":1,"type":"step","fields":' + "[" * n, read_event),
}  # fmt: skip


def cpu_s(parser: Callable[[Any], object], given: Any) -> float:
    """CPU seconds of one call; its own errors are an answer, any other fails the test."""
    start = time.process_time()
    try:
        parser(given)
    except TurbodiffError as error:
        assert len(str(error)) < 20_000
    except (ValueError, RecursionError):
        assert parser is read_event
    return time.process_time() - start


@pytest.mark.parametrize("name", PARSERS)
def test_twice_the_text_takes_at_most_two_and_a_half_times_as_long(name: str) -> None:
    size, make, parser = PARSERS[name]
    once, twice = make(size), make(2 * size)
    least_s = [float("inf"), float("inf")]  # of several tries: others compute beside us
    for _ in range(TRIES):
        for place, given in enumerate((once, twice)):
            least_s[place] = min(least_s[place], cpu_s(parser, given))
        if least_s[1] <= max(QUICK_S, MOST * least_s[0]):
            break
    assert least_s[1] <= max(QUICK_S, MOST * least_s[0]), least_s
    assert least_s[1] < MAX_CPU_S
