"""Wildcards: the seed chooses, braces nest, lists name lists, and nothing goes on for ever."""

import pytest

from turbodiff.prompt.wildcards import choose, has_wildcards
from turbodiff.spec.errors import RequestError

LISTS = {"animals": ["cat", "狗"], "thing": ["a __animals__", "{red|blue} ball"], "loop": ["__loop__ __loop__"]}


@pytest.mark.parametrize(
    ("prompt", "possible"),
    [
        ("a {red|blue} circle", {"a red circle", "a blue circle"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("__animals__ runs", {"cat runs", "狗 runs"}),
        ("see __thing__", {"see a cat", "see a 狗", "see red ball", "see blue ball"}),
        ("a{|very} b", {"a b", "avery b"}),
    ],
)
def test_every_choice_comes_and_the_seed_decides(prompt, possible):
    assert {choose(prompt, LISTS, seed) for seed in range(60)} == possible
    assert all(choose(prompt, LISTS, seed) == choose(prompt, LISTS, seed) for seed in range(5))


@pytest.mark.parametrize("prompt", ["plain", '{"steps": 1}', "a {b} c", "__", "snake_case", "a | b", "}{", "{|"])
def test_other_braces_bars_and_underscores_are_text(prompt):
    assert not has_wildcards(prompt) and choose(prompt, LISTS, 1) == prompt


@pytest.mark.parametrize("prompt", ["__nothing__", "__loop__", "{|}", "{ | }", "{x|" * 5000 + "y" + "}" * 5000])
def test_what_leads_nowhere_is_an_error_of_the_prompt(prompt):
    with pytest.raises(RequestError) as refused:
        [choose(prompt, LISTS, seed) for seed in range(20)]
    assert refused.value.field == "prompt"
