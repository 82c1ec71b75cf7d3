"""The demo's tokenizer and its tiny UMT5: every token row learns to spell the whole caption in a fixed code.

The code makes the text easy to follow for a small DiT, and it is the same for a sentence, its paraphrases and its
Chinese twin. An attribute that a sentence does not name is coded as zeros.
"""

import io
import random
import time
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from scripts.train_demo import store
from scripts.train_demo.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Caption, paraphrase, training_captions

DIM, HEADS, LAYERS, FFN = 128, 2, 3, 256
PAD, EOS = 0, 1
_CODE = 24  # rows of the code per attribute; 4 x 24 of the 128 channels, the rest is free
_WORDS = (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
_OPENINGS = ("", "", "", "", "", "a video of ", "animation: ", "一段视频:")


def train_tokenizer(path: Path) -> None:
    """Write a sentencepiece model with mT5's special ids and byte fallback, so that any text has tokens."""
    rng = random.Random(0)
    sentences = [paraphrase(caption, rng) for caption in training_captions() for _ in range(12)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=512,
        hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, pad_id=PAD, eos_id=EOS, unk_id=2, bos_id=-1,
        normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def tokenize(processor: sentencepiece.SentencePieceProcessor, sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both [B, L], with `</s>` at the end of each sentence."""
    rows = [[*processor.encode(sentence), EOS] for sentence in sentences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def new_encoder(vocab: int) -> UMT5EncoderModel:
    """A fresh encoder; the architecture is UMT5's, only smaller."""
    config = UMT5Config(
        vocab_size=vocab, d_model=DIM, d_kv=DIM // HEADS, d_ff=FFN, num_layers=LAYERS, num_heads=HEADS,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def codes() -> list[Tensor]:
    """One fixed +-1 code per word of each attribute: four tensors [words, 24]."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 2, (len(words), _CODE), generator=generator).float() * 2 - 1 for words in _WORDS]


def caption_code(caption: Caption, known: tuple[bool, ...] = (True,) * 4) -> Tensor:
    """The 96 channels that every token row of a sentence for `caption` should carry."""
    values = (caption.colour, caption.shape, caption.motion, caption.background)
    parts = [
        table[words.index(value)] if knows else torch.zeros(_CODE)
        for table, words, value, knows in zip(codes(), _WORDS, values, known, strict=True)
    ]
    return torch.cat(parts)


def partial_sentence(caption: Caption, rng: random.Random) -> tuple[str, tuple[bool, ...]]:
    """A sentence that leaves something out, and which of the four attributes it names."""
    choices = (
        (f"a {caption.colour} {caption.shape}", (True, True, False, False)),
        (f"a {caption.shape} {caption.motion}", (False, True, True, False)),
        (f"a {caption.colour} {caption.shape} {caption.motion}", (True, True, True, False)),
        (f"a {caption.colour} {caption.shape} on a {caption.background} background", (True, True, False, True)),
        ("", (False,) * 4),
    )
    return rng.choice(choices)


def _batch(captions: list[Caption], size: int, rng: random.Random) -> tuple[list[str], Tensor]:
    sentences, targets = [], []
    for _ in range(size):
        caption, known = rng.choice(captions), (True,) * 4
        sentence = rng.choice(_OPENINGS) + paraphrase(caption, rng)
        if rng.random() < 0.1:
            sentence, known = partial_sentence(caption, rng)
        sentences.append(sentence)
        targets.append(caption_code(caption, known))
    return sentences, torch.stack(targets)


def train(
    folder: Path, steps: int = 1500, size: int = 48
) -> tuple[sentencepiece.SentencePieceProcessor, UMT5EncoderModel]:
    """Tokenizer and encoder, trained (or loaded) in `folder`; the encoder is frozen after this."""
    if not (folder / "spiece.model").exists():
        train_tokenizer(folder / "spiece.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    torch.manual_seed(1)
    encoder = new_encoder(processor.vocab_size())
    if state := store.load(folder / "umt5.pt"):
        encoder.load_state_dict(state["model"])
        return processor, encoder.eval()
    with torch.no_grad():
        encoder.shared.weight.mul_(0.3)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.05)
    rng, captions, started = random.Random(0), training_captions(), time.time()
    for step in range(1, steps + 1):
        sentences, target = _batch(captions, size, rng)
        ids, mask = tokenize(processor, sentences)
        rows = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[..., : 4 * _CODE]
        error = ((rows - target[:, None]).square().mean(-1) * mask).sum() / mask.sum()
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
    """The four words whose codes are nearest to the mean of token rows [L, DIM]; for checks."""
    parts = rows.mean(0)[: 4 * _CODE].split(_CODE)
    return [words[int((table @ part).argmax())] for table, words, part in zip(codes(), _WORDS, parts, strict=True)]
