"""Prompt weights: only an explicit number weighs, everything else is text, and the text is what Wan would read."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbodiff.prompt.lint import lint
from turbodiff.prompt.weights import MAX_WEIGHT, MIN_WEIGHT, clean, parse


def read(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    weighted = parse(clean(prompt))
    return weighted.text, [(weighted.text[start:end], pytest.approx(weight)) for start, end, weight in weighted.spans]


@pytest.mark.parametrize(
    ("prompt", "text", "spans"),
    [
        ("a (red:1.5) blue circle", "a red blue circle", [("red", 1.5)]),
        ("（蝴蝶：1.5）在飞", "蝴蝶在飞", [("蝴蝶", 1.5)]),
        ("(关键词:1.3)、(蝴蝶:1.5)", "关键词、蝴蝶", [("关键词", 1.3), ("蝴蝶", 1.5)]),
        ("(a b:0.5) c", "a b c", [("a b", 0.5)]),
        ("( red :1.3 ) dot", "red dot", [("red ", 1.3)]),
        ("a ( red:1.3) b", "a red b", [("red", 1.3)]),
        ("(x:.5)(y:2.)", "xy", [("x", 0.5), ("y", 2.0)]),
        ("(x:1)", "x", []),
    ],
)
def test_an_explicit_number_weighs(prompt: str, text: str, spans: list[Any]) -> None:
    assert read(prompt) == (text, spans)


@pytest.mark.parametrize(
    "text", ["a (small) dog", "((a))", "(16:9) at (10:30)", "(:1.3)", "(a:1.3", "a:1.3)", "(a:b)", "(a:-1)", ":) (:"]
)
def test_plain_brackets_ratios_and_smileys_are_text(text: str) -> None:
    assert read(text) == (text, [])


def test_nesting_multiplies() -> None:
    assert read("((a:1.2) b:1.5)") == ("a b", [("a", 1.8), (" b", 1.5)])
    assert read("(a (b:1.3) c)") == ("(a b c)", [("b", 1.3)]), "plain brackets around a weight stay"


def test_a_weight_is_held_to_its_range() -> None:
    assert read("(a:9) (b:0)") == ("a b", [("a", MAX_WEIGHT), ("b", MIN_WEIGHT)])
    assert read("((a:2):2)") == ("a", [("a", MAX_WEIGHT)])
    for prompt, got in (("(a:9) (b:0) (c:1.3)", [9]), ("(c:1.3) (b:0)", [0]), ("(c:1.3)", [])):
        assert [chip.numbers["got"] for chip in lint(prompt) if chip.key == "weight_range"] == got


def test_weights_beyond_every_number_are_held_too_and_an_inner_one_still_counts() -> None:
    endless = "(" * 22 + "cat" + ":0)" + ":999999999999999)" * 21
    assert read(endless) == ("cat", [("cat", MIN_WEIGHT)])
    assert read("((a:0.5) b:4)") == ("a b", [("a", 2.0), (" b", MAX_WEIGHT)]), "held where it is told, not before"
    assert read("((a:0.000001):2000000)") == ("a", [("a", 2.0)])


def test_a_backslash_escapes_a_bracket() -> None:
    assert read(r"\(a:1.3\) b") == ("(a:1.3) b", [])
    assert read(r"(a \(b\):1.3)") == ("a (b)", [("a (b)", 1.3)])
    assert read(r"C:\x\y") == (r"C:\x\y", [])


def test_cleaning_is_that_of_wan() -> None:
    assert clean("  a \n\t b　c ") == "a b c"
    assert clean("&amp;lt;b&amp;gt; schÃ¶n") == "<b> schön", "entities undone twice, broken Unicode repaired"
    assert clean("猫，狗（鸟）") == "猫,狗(鸟)", "ftfy makes full-width marks half-width"


@given(st.text(st.sampled_from("ab 猫(（)）:：0123456789.\\\n"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_parses(prompt: str) -> None:
    source = clean(prompt)
    text, spans = parse(source)
    assert all(char in source for char in text)
    assert text == " ".join(text.split())
    edges = [edge for span in spans for edge in (span.start, span.end)]
    assert edges == sorted(edges) and all(0 <= edge <= len(text) for edge in edges)
    assert all(MIN_WEIGHT <= span.weight <= MAX_WEIGHT and span.weight != 1 and span.start < span.end for span in spans)


def test_eight_thousand_brackets_take_no_time() -> None:
    started_s = time.monotonic()
    parse("(" * 4000 + "a" + ":1.1)" * 800)
    assert time.monotonic() - started_s < 2


def test_letters_are_composed_and_marks_without_end_are_cut() -> None:
    assert clean("cafe\u0301 &#x65;&#769; Vie\u0302\u0323t") == "caf\u00e9 \u00e9 Vi\u1ec7t"
    assert clean("e" + "\u0301" * 100 + "nd") == "\u00e9" + "\u0301" * 29 + "nd"
    assert clean("\u0e01\u0e34\u0e48" * 40) == "\u0e01\u0e34\u0e48" * 40, "many letters, few marks on each"
