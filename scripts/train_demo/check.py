"""Scores a training checkpoint on held-out captions without the product: `python -m scripts.train_demo.check`."""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scripts.train_demo import store, text
from scripts.train_demo.captions import Caption, held_out_captions
from scripts.train_demo.dataset import context_bias, embed
from scripts.train_demo.sample import decode, sample
from scripts.train_demo.scoring import FIELDS, score
from scripts.train_demo.train_dit import CONFIG
from scripts.train_demo.vae import WanVAE
from turbodiff.models.wan_dit import WanDiT


def test_captions(count: int) -> list[Caption]:
    """`count` held-out captions in a fixed random order, starting over when they run out."""
    captions = held_out_captions()
    random.Random(17).shuffle(captions)
    return [captions[i % len(captions)] for i in range(count)]


def load_model(folder: Path, name: str) -> tuple[WanDiT, int]:
    """The averaged weights of a checkpoint as a bfloat16 model, and its step."""
    state = store.load(folder / name)
    assert state is not None, f"{folder / name} does not exist"
    model = WanDiT(CONFIG)
    model.load_state_dict(state["average"])
    return model.bfloat16().eval().requires_grad_(False), state["step"]


def contact_sheet(clips: list[np.ndarray], path: Path) -> None:
    """One row per clip, five frames each."""
    rows = [np.concatenate(list(clip[[0, 4, 8, 12, 16]]), axis=1) for clip in clips]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--name", default="dit.pt")
    parser.add_argument("--steps", type=int, nargs="+", default=[4])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--batch", type=int, default=10)
    args = parser.parse_args()
    store.set_up_cpu(1)
    model, step = load_model(args.folder, args.name)
    vae = WanVAE()
    vae.load_state_dict((store.load(args.folder / "vae.pt") or {})["model"])
    processor, encoder = text.train(args.folder)
    captions = test_captions(args.count)
    sentences = [c.english if i % 2 == 0 else c.chinese for i, c in enumerate(captions)]
    rows, counts = embed(processor, encoder, sentences)
    for steps in args.steps:
        started, marks, clips = time.time(), [], []
        for start in range(0, args.count, args.batch):
            part = slice(start, min(args.count, start + args.batch))
            seeds = list(range(part.start, part.stop))
            clips += list(decode(vae, sample(model, rows[part], context_bias(counts[part]), steps, seeds)).numpy())
        marks = [score(clip, caption) for clip, caption in zip(clips, captions, strict=True)]
        means = {f: round(100 * float(np.mean([m[f] for m in marks])), 1) for f in FIELDS}
        contact_sheet(clips[:10], args.folder / f"sheet_{steps}.png")
        line = {"step": step, "steps": steps, "count": args.count, **means, "s": round(time.time() - started)}
        print(json.dumps(line), flush=True)
        with (args.folder / "status.txt").open("a") as file:
            file.write(json.dumps({**line, "utc": time.strftime("%H:%M", time.gmtime())}) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
