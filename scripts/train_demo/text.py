"""The demo's tokenizer and its tiny UMT5: a token row learns the fixed code of the fact that its own word names.

The code makes the text easy to follow for a small DiT, and it is the same for a word, its paraphrases and its Chinese
twin. Rows of words that name nothing are zeros, so a prompt weight on a word moves that word's fact and no other.
"""

import io
import random
import re
import time
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from scripts.train_demo import store
from scripts.train_demo.captions import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Caption,
    paraphrase,
    training_captions,
    two_colours,
    word_pattern,
    words_of_fact,
)

DIM, HEADS, LAYERS, FFN = 128, 2, 3, 256
PAD, EOS = 0, 1
VOCAB = 512  # rows of the embedding; the tokenizer has fewer pieces, as Wan's own has
_CODE = 24  # channels of the code per attribute; the last 32 of the 128 stay zero
_LOUD = 2.0  # of a code's channels, against zeros elsewhere
_WORDS = (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
_OPENINGS = ("", "", "", "", "", "a video of ", "animation: ", "一段视频:")


def train_tokenizer(path: Path) -> None:
    """Write a sentencepiece model with mT5's special ids and byte fallback, so that any text has tokens.

    Every fact's word is one piece: a longer one would blur which row a prompt weight is for.
    """
    rng = random.Random(0)
    captions = training_captions() * 12
    sentences = [rng.choice(_OPENINGS) + _bare(paraphrase(caption, rng), rng) for caption in captions]
    words = ["\u2581" + form if form.isascii() else form for word in words_of_fact() for form in {word, word.title()}]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=VOCAB,
        hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, pad_id=PAD, eos_id=EOS, unk_id=2, bos_id=-1,
        normalization_rule_name="nmt_nfkc", user_defined_symbols=sorted(words), num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def _bare(sentence: str, rng: random.Random) -> str:
    """Sometimes the English sentence without its first article: "Red circle moves up"."""
    bare = re.sub(r"^(a|the|one) ", "", sentence, flags=re.IGNORECASE)
    return bare[:1].upper() + bare[1:] if bare != sentence and rng.random() < 0.1 else sentence


def tokenize(processor: sentencepiece.SentencePieceProcessor, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [B, L], with `</s>` at the end of each sentence."""
    rows = [[*processor.encode(sentence), EOS] for sentence in sentences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def new_encoder() -> UMT5EncoderModel:
    """A fresh encoder; the architecture is UMT5's, only smaller."""
    config = UMT5Config(
        vocab_size=VOCAB, d_model=DIM, d_kv=DIM // HEADS, d_ff=FFN, num_layers=LAYERS, num_heads=HEADS,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def codes() -> list[Tensor]:
    """One fixed +-1 code per word of each attribute: four tensors [words, 24]."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 2, (len(words), _CODE), generator=generator).float() * 2 - 1 for words in _WORDS]


def fact_table() -> Tensor:
    """What a row carries, by fact [1 + all words, DIM]: row 0 is for a token that names nothing."""
    table = torch.zeros(1 + sum(map(len, _WORDS)), DIM)
    first = 1
    for attribute, code in enumerate(codes()):
        table[first : first + len(code), attribute * _CODE : (attribute + 1) * _CODE] = _LOUD * code
        first += len(code)
    return table


def token_facts(processor: sentencepiece.SentencePieceProcessor, sentence: str, longest: int) -> list[int]:
    """The row of `fact_table` for each token of the sentence, zeros up to `longest`."""
    facts = [0] * len(sentence)
    starts = [sum(map(len, _WORDS[:i])) + 1 for i in range(len(_WORDS))]
    for match in word_pattern().finditer(sentence):
        attribute, value = words_of_fact()[match[0].lower()]
        facts[match.start() : match.end()] = [starts[attribute] + _WORDS[attribute].index(value)] * len(match[0])
    offsets = processor.encode(sentence, return_type="offset_mapping")["offsets"] if sentence else []
    row = [max(facts[start:end], default=0) for start, end in offsets]
    return row + [0] * (longest - len(row))


def partial_sentence(caption: Caption, rng: random.Random) -> str:
    """A sentence that leaves something out."""
    choices = (
        f"a {caption.colour} {caption.shape}",
        f"a {caption.shape} {caption.motion}",
        f"a {caption.colour} {caption.shape} {caption.motion}",
        f"a {caption.colour} {caption.shape} on a {caption.background} background",
        "",
    )
    return rng.choice(choices)


def _sentence(captions: list[Caption], rng: random.Random) -> str:
    caption, kind = rng.choice(captions), rng.random()
    if kind < 0.1:
        return partial_sentence(caption, rng)
    if kind < 0.35:
        return rng.choice(_OPENINGS) + two_colours(caption, rng)
    if kind < 0.45:  # two things in one sentence: each row still carries its own word's fact
        return f"{paraphrase(caption, rng)}{rng.choice((' and ', '和', '. '))}{paraphrase(rng.choice(captions), rng)}"
    return rng.choice(_OPENINGS) + _bare(paraphrase(caption, rng), rng)


def train(
    folder: Path, steps: int = 1000, size: int = 48
) -> tuple[sentencepiece.SentencePieceProcessor, UMT5EncoderModel]:
    """Tokenizer and encoder, trained (or loaded) in `folder`; the encoder is frozen after this."""
    if not (folder / "spiece.model").exists():
        train_tokenizer(folder / "spiece.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    torch.manual_seed(1)
    encoder = new_encoder()
    if state := store.load(folder / "umt5.pt"):
        encoder.load_state_dict(state["model"])
        return processor, encoder.eval()
    with torch.no_grad():
        encoder.shared.weight.mul_(0.3)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.05)
    rng, captions, table, started = random.Random(0), training_captions(), fact_table(), time.time()
    for step in range(1, steps + 1):
        sentences = [_sentence(captions, rng) for _ in range(size)]
        ids, mask = tokenize(processor, sentences)
        target = table[torch.tensor([token_facts(processor, sentence, ids.shape[1]) for sentence in sentences])]
        rows = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        error = ((rows - target).square().mean(-1) * mask).sum() / mask.sum()
        optimiser.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            store.log(folder / "umt5_log.jsonl", step=step, loss=error.item(), s=time.time() - started)
    store.save(folder / "umt5.pt", {"model": encoder.state_dict()})
    return processor, encoder.eval()


def words_of(rows: Tensor) -> list[str]:
    """The four words whose codes the token rows [L, DIM] carry most of; for checks."""
    parts = rows.sum(0)[: 4 * _CODE].split(_CODE)
    return [words[int((table @ part).argmax())] for table, words, part in zip(codes(), _WORDS, parts, strict=True)]
