import sys
import unicodedata

import pytest

from turbodiff.prompt.weights import clean
from turbodiff.spec.errors import RequestError
from turbodiff.spec.request import make_request
from turbodiff.spec.text import is_blank, printable

NOTHING = [
    "", " \t\n", "\ufeff", "\u200b\u200d\u2060", "\u00a0\u3000\u2003", "\x00\x07\x1b", "\u202e\u2066",
    "&nbsp;", "&amp;nbsp;",
    "&#160;&#x200B;", "&ZeroWidthSpace;", "\u00ad", "\u2028\u2029",
    "\u3164", "\u2800", "\ufe0f", "\u0301", "\ue000", "\ud800",
    "&#8203;", "&zwnj;&zwj;", "&amp;zwnj;", "&shy;", "&#xAD;", "&lrm;&rlm;", "&NoBreak;", "&ensp;&emsp;&thinsp;",
    "\u00ad\u200d\ufe0f", "\U000e0063\U000e0061\U000e0074", "\ufffc",
    "\U00013441", "\U0001d159", "\u180e", "\u17b4", "\u034f",
    "(\u200b:1.3)", "（\u3164：1.5）", "(&zwnj;:.5) (\u2800:2)",
]  # fmt: skip


@pytest.mark.parametrize("prompt", NOTHING, ids=ascii)
def test_a_prompt_that_shows_nothing_is_an_empty_one(prompt: str) -> None:
    with pytest.raises(RequestError, match="a prompt is needed"):
        make_request({"prompt": prompt})


# Default_Ignorable_Code_Point of Unicode 16 (DerivedCoreProperties.txt), first and last of each range
IGNORABLE = (
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip


@pytest.mark.parametrize("form", ["{}", "&#{:d};", "&#x{:x};", "({}:1.2)"])
def test_no_character_that_unicode_says_to_ignore_is_a_prompt(form: str) -> None:
    for first, last in IGNORABLE:
        for code in range(first, last + 1):
            assert is_blank(form.format(code if "#" in form else chr(code))), hex(code)


@pytest.mark.parametrize(
    "prompt", ["!", "()", "（）", ":1.3", "(a:1.3)", "(猫：0.8)", "❤\ufe0f", "👨\u200d👩\u200d👧", "クッ\u3099"]
)
def test_punctuation_weights_and_joined_emoji_show_something(prompt: str) -> None:
    assert make_request({"prompt": prompt}).prompt == prompt


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
