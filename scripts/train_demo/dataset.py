"""Caches for the DiT: latents of rendered clips, and text rows of every way to say a caption."""

import math
import random
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from transformers import UMT5EncoderModel

from scripts.train_demo import store, text
from scripts.train_demo.captions import Caption, chinese_paraphrase, english_paraphrase, training_captions
from scripts.train_demo.render import random_clip
from scripts.train_demo.train_vae import encode
from scripts.train_demo.vae import WanVAE

CHUNK = 128  # clips per file
ROWS = 40  # prompt rows kept per sentence, plus one row that stands for all the zero rows
TEXT_LEN = 512  # Wan: the network always sees 512 rows, zeros past the prompt
SENTENCES = 24  # per caption: half English, half Chinese; the first of each half is canonical


def cache_latents(folder: Path, vae: WanVAE, clips: int) -> None:
    """Render and encode clips into numbered files of CHUNK; each has standardised latents and caption indices.

    The first files hold every caption in a random order before any comes twice.
    """
    statistics = store.load(folder / "latent_statistics.pt")
    assert statistics is not None, "the encoder must be frozen first"
    mean, std = statistics["mean"], statistics["std"]
    captions, target = training_captions(), folder / "latents"
    target.mkdir(exist_ok=True)
    order = random.Random(3)
    queue: list[int] = []
    for number in range(math.ceil(clips / CHUNK)):
        while len(queue) < CHUNK:
            queue += order.sample(range(len(captions)), len(captions))
        chosen, queue = queue[:CHUNK], queue[CHUNK:]
        path = target / f"{number:04d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng(1000 + number)
        z = torch.cat([encode(vae, random_clip(captions[i], rng)[None]) for i in chosen])
        z = (z - mean.view(16, 1, 1)) / std.view(16, 1, 1)
        store.save(path, {"latents": z.transpose(1, 2).half(), "captions": torch.tensor(chosen)})


class Latents:
    """All cached latents so far; `refresh` picks up files that appeared since."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder / "latents", 0
        self.z, self.caption = torch.empty(0, 16, 5, 16, 16, dtype=torch.float16), torch.empty(0, dtype=torch.long)
        self.refresh()

    def refresh(self) -> None:
        """Read new files, in order."""
        files = sorted(self.folder.glob("*.pt"))[self.files :]
        parts = [store.load(file) for file in files]
        self.files += len(files)
        if parts:
            self.z = torch.cat([self.z, *(p["latents"] for p in parts)])
            self.caption = torch.cat([self.caption, *(p["captions"] for p in parts)])


def training_sentences(caption: Caption, rng: random.Random) -> list[str]:
    """SENTENCES ways to say `caption`."""
    half = SENTENCES // 2
    english = [caption.english] * 2 + [english_paraphrase(caption, rng) for _ in range(half - 2)]
    return english + [caption.chinese] * 2 + [chinese_paraphrase(caption, rng) for _ in range(half - 2)]


def embed(
    processor: sentencepiece.SentencePieceProcessor, encoder: UMT5EncoderModel, sentences: list[str]
) -> tuple[Tensor, Tensor]:
    """Rows float16 [B, ROWS + 1, DIM], zeros past the prompt, and their true counts [B]."""
    rows, counts = [], []
    for start in range(0, len(sentences), 64):
        ids, mask = text.tokenize(processor, sentences[start : start + 64])
        with torch.no_grad():
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        padded = torch.zeros(len(hidden), ROWS + 1, text.DIM, dtype=torch.float16)
        padded[:, : hidden.shape[1]] = hidden[:, :ROWS].half()
        rows.append(padded)
        counts.append(mask.sum(1).clamp(max=ROWS))
    return torch.cat(rows), torch.cat(counts)


def context_bias(counts: Tensor) -> Tensor:
    """Logit bias [B, 1, 1, ROWS + 1] that makes one zero row count as the 512 - n zero rows of the real input.

    exp(logit + ln k) is k equal terms of a softmax; rows between the prompt and the last are switched off.
    """
    row = torch.arange(ROWS + 1)[None]
    bias = torch.where(row < counts[:, None], 0.0, -1e4)
    bias[:, -1] = torch.log(TEXT_LEN - counts.float())
    return bias[:, None, None]


def cache_text(folder: Path) -> dict[str, Tensor]:
    """Text rows of all training sentences (built once): `rows` [captions * SENTENCES, ...], `counts`, and `empty`."""
    path = folder / "text_cache.pt"
    if state := store.load(path):
        return state
    processor, encoder = text.train(folder)
    rng = random.Random(11)
    sentences = [s for caption in training_captions() for s in training_sentences(caption, rng)]
    rows, counts = embed(processor, encoder, sentences)
    empty, empty_count = embed(processor, encoder, [""])
    state = {"rows": rows, "counts": counts, "empty": empty, "empty_count": empty_count}
    store.save(path, state)
    return state
