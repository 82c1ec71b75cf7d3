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
from scripts.train_demo.captions import (
    Caption,
    chinese_paraphrase,
    english_paraphrase,
    training_captions,
    two_colours,
)
from scripts.train_demo.render import FRAMES, random_clip
from scripts.train_demo.train_vae import encode, encode_video, to_video
from scripts.train_demo.vae import WanVAE
from turbodiff.sampling.conditioning import picture_video

CHUNK = 128  # clips per file
ROWS = 40  # prompt rows kept per sentence, plus one row that stands for all the zero rows
TEXT_LEN = 512  # Wan: the network always sees 512 rows, zeros past the prompt
TRACE, TRACE_FRAMES = 3, 9  # latent frames and frames in which the encoder still feels a first picture
SENTENCES = 26  # per caption: half English, half Chinese, canonical ones twice, and two that name a second colour


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
        count = min(CHUNK, clips - number * CHUNK)
        while len(queue) < count:
            queue += order.sample(range(len(captions)), len(captions))
        chosen, queue = queue[:count], queue[count:]
        path = target / f"{number:04d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng(1000 + number)
        z = torch.cat([encode(vae, random_clip(captions[i], rng)[None]) for i in chosen])
        z = (z - mean.view(16, 1, 1)) / std.view(16, 1, 1)
        store.save(path, {"latents": z.transpose(1, 2).half(), "captions": torch.tensor(chosen)})


def cache_pictures(folder: Path, vae: WanVAE) -> None:
    """Beside every file of `cache_latents`, the latents of each clip's first frame as image to video is told it.

    The clips are rendered again from the same seeds. Two latent frames after the picture its trace is gone (a standard
    deviation of 0.02 over the clips), so the frames from there on are encoded once for each file. The last latent frame
    of a clip that is told its last picture, too, is `ends`.
    """
    statistics, captions, target = store.load(folder / "latent_statistics.pt"), training_captions(), folder / "pictures"
    assert statistics is not None, "the encoder must be frozen first"
    mean, std = statistics["mean"].view(16, 1, 1), statistics["std"].view(16, 1, 1)
    target.mkdir(exist_ok=True)

    def told(picture: Tensor, frames: int, last: Tensor | None = None) -> Tensor:
        raw = encode_video(vae, picture_video(picture, frames, last).transpose(1, 2))
        return ((raw - mean) / std).transpose(1, 2)

    for file in sorted((folder / "latents").glob("*.pt")):
        path, cached = target / file.name, store.load(file)
        if path.exists() or cached is None:
            continue
        rng = np.random.default_rng(1000 + int(file.stem))
        shown = [to_video(random_clip(captions[i], rng)[None]) for i in cached["captions"].tolist()]
        tail = told(shown[0][:, 0], FRAMES)[:, :, TRACE:]
        rows = [torch.cat((told(clip[:, 0], TRACE_FRAMES), tail), dim=2) for clip in shown]
        ends = [told(clip[:, 0], FRAMES, clip[:, -1])[:, :, -1:] for clip in shown]
        store.save(path, {"latents": torch.cat(rows).half(), "ends": torch.cat(ends).half()})


class Latents:
    """All cached latents so far; `refresh` picks up files that appeared since."""

    def __init__(self, folder: Path, pictures: bool = False) -> None:
        self.folder, self.files = folder, 0
        self.z, self.caption = torch.empty(0, 16, 5, 16, 16, dtype=torch.float16), torch.empty(0, dtype=torch.long)
        self.pictures = torch.empty_like(self.z) if pictures else None
        self.ends = torch.empty(0, 16, 1, 16, 16, dtype=torch.float16)
        self.refresh()

    def refresh(self) -> None:
        """Read new files, in order."""
        ending = "latents" if self.pictures is None else "pictures"  # the second cache follows the first
        files = sorted((self.folder / ending).glob("*.pt"))[self.files :]
        parts = [store.load(self.folder / "latents" / file.name) for file in files]
        self.files += len(files)
        if not parts:
            return
        self.z = torch.cat([self.z, *(p["latents"] for p in parts)])
        self.caption = torch.cat([self.caption, *(p["captions"] for p in parts)])
        if self.pictures is not None:
            cached = [store.load(file) for file in files]
            self.pictures = torch.cat([self.pictures, *(pictures["latents"] for pictures in cached)])
            self.ends = torch.cat([self.ends, *(pictures["ends"] for pictures in cached)])


def training_sentences(caption: Caption, rng: random.Random) -> list[str]:
    """SENTENCES ways to say `caption`."""
    half = SENTENCES // 2
    english = [caption.english] * 2 + [english_paraphrase(caption, rng) for _ in range(half - 3)]
    chinese = [caption.chinese] * 2 + [chinese_paraphrase(caption, rng) for _ in range(half - 3)]
    return english + chinese + [two_colours(caption, rng) for _ in range(2)]


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
