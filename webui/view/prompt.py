"""Prompt help: what the lint says as chips, the token count, and the word to those who write in Chinese."""

from dataclasses import dataclass

from turbodiff.prompt.lint import is_chinese, lint
from turbodiff.spec.models import ModelSpec
from webui.wording import Words


@dataclass(frozen=True)
class PromptChip:
    """One piece of advice; `rewrite` is the prompt after one click, "" where that needs a person."""

    key: str
    sentence: str
    tip: str
    rewrite: str


@dataclass(frozen=True)
class PromptHelp:
    """What is shown under the prompt."""

    chips: tuple[PromptChip, ...]
    tokens: str
    chinese: bool


def prompt_help(prompt: str, tokens: int | None, spec: ModelSpec, words: Words) -> PromptHelp:
    """Advice for a prompt; the demo's grammar is its own, so it gets no rewrite and no word on length."""
    found = [advice for advice in lint(prompt, tokens) if not (spec.bundled and advice.key in ("too_short", "no_verb"))]
    chips = tuple(
        PromptChip(
            advice.key,
            words(f"lint.{advice.key}", **advice.numbers),
            words(f"lint.{advice.key}_tip"),
            "" if spec.bundled else advice.rewrite,
        )
        for advice in found
    )
    count = words("create.tokens", n=tokens) if tokens is not None and prompt.strip() else ""
    return PromptHelp(chips, count, spec.turbo and not spec.bundled and is_chinese(prompt))
