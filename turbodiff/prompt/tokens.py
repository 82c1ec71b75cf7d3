"""Text -> UMT5 tokens with sentencepiece alone, and which tokens a weighted word became."""

import math
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from turbodiff.prompt.weights import WeightedPrompt
from turbodiff.spec.errors import FileError

TEXT_LEN = 512  # rows of the text embedding, the end mark included (Wan2.1)


class Token(NamedTuple):
    """One token: its id and the characters start..end it came from (empty for the end mark)."""

    id: int
    start: int
    end: int


class Tokenizer:
    """The tokenizer of UMT5 without torch or transformers.

    Args:
        path: the sentencepiece file (spiece.model), or a folder that holds it.
        model: what is in the file, where it lies inside another one.

    Raises:
        FileError: missing or not a sentencepiece model.
    """

    def __init__(self, path: Path, model: bytes | None = None) -> None:
        names = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
        files = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
        if not files:
            raise FileError(
                "the tokenizer is missing", code="tokenizer_missing", field="tokenizer", got=path.name,
                expected="spiece.model",
            )  # fmt: skip
        try:
            given = {"model_file": str(files[0])} if model is None else {"model_proto": model}
            self._pieces = sentencepiece.SentencePieceProcessor(**given)
        except (RuntimeError, OSError) as error:
            raise FileError(
                "not a sentencepiece model", code="tokenizer_broken", field=files[0].name,
                got=str(error).splitlines()[0][:120], expected="UMT5's spiece.model",
            ) from None  # fmt: skip

    def tokens(self, text: str, limit: int = TEXT_LEN) -> list[Token]:
        """The tokens of a clean text, cut so that the end mark is within `limit`, as the encoder sees them."""
        found = self._pieces.encode(text, return_type="offset_mapping")
        tokens = list(map(Token, found["ids"], *zip(*found["offsets"], strict=True))) if found["ids"] else []
        for index in range(len(tokens) - 2, -1, -1):
            # of tokens that are single bytes of a character only the last carries its range: give it to all of them
            if tokens[index].start == tokens[index].end and tokens[index + 1].start == tokens[index].start:
                tokens[index] = tokens[index]._replace(end=tokens[index + 1].end)
        return [*tokens[: limit - 1], Token(self._pieces.eos_id(), len(text), len(text))]

    def count(self, text: str) -> int:
        """How many tokens a clean text has with its end mark, uncut: over 512 the encoder drops the rest."""
        return len(self._pieces.encode(text, out_type=int)) + 1


def token_weights(tokenizer: Tokenizer, prompt: WeightedPrompt, limit: int = TEXT_LEN) -> list[float]:
    """The weight of each token of `tokenizer.tokens(prompt.text)`: that of the span its characters are in, else 1.

    A token that straddles the end of a span takes the weight furthest from 1; spaces do not count.
    """
    weights = [1.0] * len(prompt.text)
    for span in prompt.spans:
        weights[span.start : span.end] = [span.weight] * (span.end - span.start)
    strongest = []
    for token in tokenizer.tokens(prompt.text, limit):
        places = [place for place in range(token.start, token.end) if not prompt.text[place].isspace()]
        inside = [weights[place] for place in places]
        strongest.append(max(inside, key=lambda weight: abs(math.log(weight)), default=1.0))
    return strongest
