"""Cleaning as Wan does it (TurboDiffusion rcm/utils/umt5.py, mode "whitespace"): a prompt means the same here."""

import html

import ftfy


def clean(text: str) -> str:
    """Repaired Unicode (full-width marks become half-width), HTML entities undone twice, whitespace collapsed."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
