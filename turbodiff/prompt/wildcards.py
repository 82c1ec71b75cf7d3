"""Wildcards of a prompt: `{red|blue} circle` takes one of the words, `__animals__` a line of wildcards/animals.txt.

Braces nest. The seed decides, so that the same prompt with the same seed is the same clip; a list may hold wildcards.
Braces without a bar are text.
"""

import random
import re
from collections.abc import Mapping, Sequence

from turbodiff.spec.errors import RequestError

NAMED = re.compile(r"__([\w-]{1,60}?)__")
BRACES = re.compile(r"\{([^{}]*)\}")  # with a bar asked for in here it takes quadratic time
MAX_CHOICES = 200  # of one prompt: lists that name each other never end
MAX_CHARS = 8000  # as many as a request takes


def has_wildcards(prompt: str) -> bool:
    """Whether a prompt has something to choose."""
    return _first(prompt) is not None


def choose(prompt: str, lists: Mapping[str, Sequence[str]], seed: int) -> str:
    """The prompt with every wildcard replaced by what the seed chooses, from the first to the last.

    Args:
        lists: name -> lines to choose from.

    Raises:
        RequestError: field `prompt`: no list of that name, nothing left, or lists that name each other without an end.
    """
    chance = random.Random(seed)
    for _ in range(MAX_CHOICES):
        found = _first(prompt) if len(prompt) <= MAX_CHARS else None
        if found is None and prompt.strip() and len(prompt) <= MAX_CHARS:
            return prompt
        if found is None:
            break
        if found.re is BRACES:
            words: Sequence[str] = found[1].split("|")
        elif not (words := lists.get(found[1], ())):
            raise RequestError(
                "no list of wildcards of that name", code="wildcard_missing", field="prompt", got=found[0],
                expected=", ".join(f"__{name}__" for name in sorted(lists)) or "0",
                try_instead=f"a file {found[1]}.txt with one choice a line, in the folder wildcards",
            )  # fmt: skip
        prompt = f"{prompt[: found.start()]}{chance.choice(words).strip()}{prompt[found.end() :]}"
    raise RequestError(
        "the wildcards leave no prompt, or one without an end", code="wildcard_endless", field="prompt",
        got=prompt[:80], expected=f"1..{MAX_CHARS}",
    )  # fmt: skip


def _first(prompt: str) -> re.Match[str] | None:
    """The first braces with a bar, innermost ones first, else the first name of a list."""
    return next((found for found in BRACES.finditer(prompt) if "|" in found[1]), None) or NAMED.search(prompt)
