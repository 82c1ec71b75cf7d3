"""Text as people paste it: what shows nothing, what a terminal may see, entities that no parser should meet."""

import html
import re
import unicodedata

# Letters and symbols of Unicode that are drawn as nothing: Hangul fillers, the blank Braille pattern, the place of a
# picture that was not pasted, blanks between hieroglyphs, a note without its head
FILLERS = frozenset("\u115f\u1160\u3164\uffa0\u2800\ufffc\U00013441\U00013442\U0001d159")
# What is left of a weighted bracket around nothing (prompt/weights.py)
_WEIGHED_NOTHING = re.compile(r"[(（]\s*[:：] ?[0-9.]+ ?[)）]")
# Python makes an int of the digits of a numeric entity, which takes quadratic time and fails from 4,300 digits on;
# the largest code point has seven
_LONG_ENTITY = re.compile(r"&#(?:[0-9]{9,}|[xX][0-9a-fA-F]{9,});?")


# Control and format characters, lone surrogates, ends of lines: they move a terminal's cursor, colour it, turn what
# follows around (CVE-2021-42574) or forge a line. Joiners are part of emoji and of Persian and Indian words
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
JOINERS = frozenset("\t\u200c\u200d")
# Normalising sorts the marks on a letter, which takes quadratic time; Unicode's own bound for texts in streams, which
# no word of any language comes near (UAX #15, Stream-Safe Text Format)
MAX_MARKS = 30


def printable(text: str) -> str:
    """The text as one line that a terminal or a log may show: what would not be seen is written as its escape."""
    if text.isprintable():
        return text
    hidden = (unicodedata.category(letter) in HIDDEN and letter not in JOINERS for letter in text)
    pairs = zip(text, hidden, strict=True)
    return "".join(letter.encode("unicode_escape").decode() if escape else letter for letter, escape in pairs)


def whole(text: str) -> str:
    """The text with "?" for half a surrogate pair: what JSON and names of files can hold, and no encoding has."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def unescaped(text: str) -> str:
    """The text with its HTML entities undone; numbers beyond Unicode become U+FFFD, as `html.unescape` does."""
    return html.unescape(_LONG_ENTITY.sub("\N{REPLACEMENT CHARACTER}", text))


def stream_safe(text: str) -> str:
    """The text without the marks on a letter that are behind its first MAX_MARKS."""
    if text.isascii():
        return text
    kept, marks = list[str](), 0
    for letter in text:
        marks = marks + 1 if unicodedata.combining(letter) else 0
        if marks <= MAX_MARKS:
            kept.append(letter)
    return "".join(kept)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: blanks of any kind, marks that have no width, control characters, the HTML entities
    of these, which the cleaning of prompts undoes twice, and a weight of any of them (prompt/weights.py)."""
    shown = "".join(
        character
        for character in unescaped(unescaped(text))
        if unicodedata.category(character)[0] in "LNPS" and character not in FILLERS
    )
    return not _WEIGHED_NOTHING.sub("", shown)
