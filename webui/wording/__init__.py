"""Every sentence of the page, in English and Chinese, side by side: `key = ["English", "中文"]` per TOML file.

Contents: words. What the command line says, too, is in turbodiff/spec/wording. Never here: markup, decisions.
Used by: webui.
"""

import time
from functools import cache
from pathlib import Path

from turbodiff.spec import wording as shared
from turbodiff.spec.wording import LANGUAGES, language_of

__all__ = ["LANGUAGES", "Words", "catalogue", "language_of"]


@cache
def catalogue() -> shared.Sentences:
    """Every sentence as "file.key" -> (English, Chinese)."""
    return {**shared.shared_catalogue(), **shared.read_sentences(Path(__file__).parent)}


class Words(shared.Words):
    """The sentences in one language; call it with a key and the numbers of the sentence."""

    @property
    def sentences(self) -> shared.Sentences:
        """Where the keys are looked up: the page's own words beside those about plans."""
        return catalogue()

    def clock(self, at_s: float) -> str:
        """Unix seconds as the time of the day here, "" for 0."""
        return time.strftime("%H:%M", time.localtime(at_s)) if at_s else ""

    def ago(self, value_s: float) -> str:
        """How long ago, coarsely."""
        for unit_s, key in ((86400, "unit.d_ago"), (3600, "unit.h_ago"), (60, "unit.min_ago")):
            if value_s >= unit_s:
                return self(key, n=int(value_s // unit_s))
        return self("unit.now")
