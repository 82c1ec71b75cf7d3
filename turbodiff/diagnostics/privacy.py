"""What a bug report leaves out: a person's own texts, however a log or a record spells them.

Two nets, since neither holds alone. A value that stands where a prompt stands is left out whatever it says: that holds
when the queue that knew the prompts is lost. A line that shares a run of letters with a known text is left out
wherever it stands and however it was escaped, cut off or put into an error.
"""

import html
import re
import urllib.parse
from collections.abc import Iterable

WINDOW, WINDOW_CJK = 12, 4  # letters in a row that only a copy of the text has; a Chinese word has two
STRIDE = 4  # each 15 letters of a text hold a window that is looked for
MAX_CHARS = 4_000_000  # of known texts, the first ones count
OWN_KEYS = frozenset(("prompt", "negative_prompt", "image", "end_image", "note", "rating", "raw", "title"))
# what follows to the end of the line is the value of a field, of ours or in an error of a library
OWN_VALUE = re.compile(
    r"(?i)\b(negative_prompt|prompt|image|end_image|note|input_value)(['\"]?\s*(?:[=:]\s*|(?=['\"])|\s(?=['\"])))['\"]?.*",
    re.S,
)
ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|[nrt])")
HEAD = re.compile(r"\S+ \[[A-Z]+\] \S+(?: j\d+)? ")  # of a log line: when, level, who
WORD = re.compile(r"\w+")


def letters_of(text: str) -> str:
    """Letters and digits alone, as any spelling of a text keeps them."""
    return "".join(filter(str.isalnum, text.casefold()))


def spellings(text: str) -> list[str]:
    """A text, and what it says where its characters are escaped as Python, JSON, HTML or an address do."""
    found = [text]
    if "\\" in text:
        found.append(ESCAPE.sub(_unescaped, text))
    if "&" in text:
        found.append(html.unescape(text))
    if "%" in text or "+" in text:
        found.append(urllib.parse.unquote_plus(text))
    return found


def _unescaped(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3]
    code = int(digits, 16) if digits else 32
    return chr(code) if code < 0x110000 else " "


class OwnTexts:
    """The known texts of people, ready to be found in others.

    Args:
        texts: prompts, notes, names of pictures; the newest first.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._windows: set[str] = set()
        self._short: dict[str, list[list[str]]] = {}  # by their first word
        left = MAX_CHARS
        for text in dict.fromkeys(texts):
            letters = letters_of(text)
            if (left := left - len(letters)) < 0:
                break
            ends = range(0, max(1, len(letters) - WINDOW + 1), STRIDE)
            self._windows |= {letters[at : at + WINDOW] for at in ends if len(letters) >= WINDOW}
            chinese = {letters[at : at + WINDOW_CJK] for at in range(len(letters) - WINDOW_CJK + 1)}
            self._windows |= {window for window in chinese if not any(map(str.isascii, window))}
            words = WORD.findall(text.casefold())
            if words and len(letters) < WINDOW + STRIDE - 1:
                self._short.setdefault(words[0], []).append(words)

    def is_in(self, text: str) -> bool:
        """Whether a text holds a piece of one of these."""
        for spelling in spellings(text):
            letters = letters_of(spelling)
            for at in range(len(letters)):
                if letters[at : at + WINDOW] in self._windows or letters[at : at + WINDOW_CJK] in self._windows:
                    return True
        return False

    def without(self, line: str) -> str:
        """One line without them: its head stays, and what was left out is said."""
        line = OWN_VALUE.sub(r"\1 <left out>", line)
        head = HEAD.match(line)
        start = head.end() if head else 0
        if self.is_in(line[start:]):
            return f"{line[:start]}<a line with a person's own words is left out>"
        return self._without_short(line) if self._short else line

    def _without_short(self, line: str) -> str:
        found = list(WORD.finditer(line))
        words, out, at, end = [match[0].casefold() for match in found], [], 0, 0
        while at < len(words):
            fits = [text for text in self._short.get(words[at], ()) if words[at : at + len(text)] == text]
            if fits:
                n_words = max(map(len, fits))
                out += [line[end : found[at].start()], "<left out>"]
                end = found[at + n_words - 1].end()
                at += n_words
            else:
                at += 1
        return "".join([*out, line[end:]])

    def without_values(self, value: object) -> object:
        """A JSON value without them: what stands under a name of theirs goes whatever it says."""
        if isinstance(value, dict):
            return {
                str(self.without_values(name)): f"<{len(str(one))} characters>"
                if name in OWN_KEYS and one
                else self.without_values(one)
                for name, one in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.without_values(one) for one in value]
        return self.without(value) if isinstance(value, str) else value
