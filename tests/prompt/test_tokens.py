"""Tokens without torch: the count that people see, and the tokens that a weighted word became."""

import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from turbodiff.prompt.tokens import Tokenizer, token_weights
from turbodiff.prompt.weights import parse
from turbodiff.spec.errors import FileError

CORPUS = ["a red blue circle moves right on black", "一个红色的圆形向右移动 蝴蝶"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with UMT5's special ids and byte fallback, trained in a blink."""
    folder = tmp_path_factory.mktemp("tokenizer")
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 20), model_writer=file, vocab_size=330, hard_vocab_limit=False,
            byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
    return Tokenizer(folder)


def weighed(tokenizer: Tokenizer, prompt: str) -> dict[float, str]:
    """weight -> the characters of all tokens that have it."""
    weighted = parse(prompt)
    found: dict[float, str] = {}
    tokens = tokenizer.tokens(weighted.text)
    for token, weight in zip(tokens, token_weights(tokenizer, weighted), strict=True):
        found[weight] = found.get(weight, "") + weighted.text[token.start : token.end].strip()
    return found


def test_the_tokens_of_the_weighted_word_weigh(tokenizer: Tokenizer) -> None:
    assert weighed(tokenizer, "a (red:1.5) circle")[1.5] == "red"
    found = weighed(tokenizer, "a (red:1.5) (circle:0.5)")
    assert (found[1.5], found[0.5]) == ("red", "circle")


def test_every_byte_of_an_unknown_character_weighs(tokenizer: Tokenizer) -> None:
    assert weighed(tokenizer, "a (😀:2) circle")[2] == "😀" * 4


def test_without_weights_every_token_weighs_one(tokenizer: Tokenizer) -> None:
    assert set(weighed(tokenizer, "a red (small) circle")) == {1.0}
    assert set(weighed(tokenizer, "")) == {1.0}


def test_the_end_mark_stays_when_a_long_prompt_is_cut(tokenizer: Tokenizer) -> None:
    prompt = "red " * 600
    assert tokenizer.count(prompt) > 512
    ids = [token.id for token in tokenizer.tokens(prompt)]
    assert (len(ids), ids[-1]) == (512, 1)
    short = tokenizer.tokens("a red circle")
    assert short[-1].id == 1 and tokenizer.count("a red circle") == len(short)
    assert len(token_weights(tokenizer, parse("(" + prompt + ":2)"))) == 512


def test_a_missing_or_foreign_tokenizer_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="missing"):
        Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(FileError, match="sentencepiece"):
        Tokenizer(tmp_path)


def test_the_room_needs_no_torch() -> None:
    code = "import sys, turbodiff.prompt.tokens, turbodiff.prompt.weights; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
