import pytest

from turbodiff.prompt.weights import clean
from turbodiff.spec.errors import RequestError
from turbodiff.spec.request import make_request

NOTHING = [
    "", " \t\n", "\ufeff", "\u200b\u200d\u2060", "\u00a0\u3000\u2003", "\x00\x07\x1b", "\u202e\u2066",
    "&nbsp;", "&amp;nbsp;",
    "&#160;&#x200B;", "&ZeroWidthSpace;", "\u00ad", "\u2028\u2029",
    "\u3164", "\u2800", "\ufe0f", "\u0301", "\ue000", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("prompt", NOTHING, ids=ascii)
def test_a_prompt_that_shows_nothing_is_an_empty_one(prompt: str) -> None:
    with pytest.raises(RequestError, match="a prompt is needed"):
        make_request({"prompt": prompt})


@pytest.mark.parametrize("prompt", ["猫", "a", "1", "🐈", "\ufeffa cat", "&lt;3", "e\u0301", "…"])
def test_a_prompt_that_shows_something_is_none(prompt: str) -> None:
    assert make_request({"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("entity", ["&#" + "9" * 5000 + ";", "&#x" + "f" * 5000, "&#" * 2500, "&" * 8000])
def test_entities_of_any_length_are_cleaned(entity: str) -> None:
    """Python refuses to make an int of more than 4,300 digits: a prompt of these was a ValueError."""
    assert clean(f"a cat {entity} runs").startswith("a cat ")
