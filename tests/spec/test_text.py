import sys
import unicodedata

import pytest

from turbodiff.prompt.weights import clean
from turbodiff.spec.errors import RequestError
from turbodiff.spec.request import make_request
from turbodiff.spec.text import printable

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


def test_every_character_that_steers_a_terminal_is_written_as_its_escape() -> None:
    for letter in map(chr, range(sys.maxunicode + 1)):
        steers = unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in "\t\u200c\u200d"
        shown = printable(letter)
        assert (shown != letter) is steers and (not steers or (shown.isascii() and shown[0] == "\\")), ascii(letter)


@pytest.mark.parametrize("text", ["樱花\u3000树下", "👩\u200d🚀", "a\u00a0b", "می\u200cخواهم", "C:\\new", ""])
def test_what_people_write_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text
