"""Trains the demo models from nothing and writes the bundle: `python -m scripts.train_demo --folder DIR`.

Every stage keeps a checkpoint in DIR and does nothing when it is done already, so the same command continues after a
stop. A DiT step takes about 1.8 s on one CPU core; `--clips 1408 --dit-steps 3450` is about what the bundled weights
had. `--device cuda` moves VAE and DiTs to a graphics card, on the same code path.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from scripts.train_demo import (  # noqa: E402
    dataset,
    distill,
    export,
    store,
    text,
    train_dit,
    train_i2v,
    train_lora,
    train_vae,
)
from scripts.train_demo.curve import draw_curves  # noqa: E402


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints, caches and logs")
    parser.add_argument("--bundle", type=Path, default=ROOT / "turbodiff" / "demo", help="where the weights go")
    parser.add_argument("--clips", type=int, default=6000, help="rendered clips in the latent cache")
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--vae-steps", type=int, nargs=3, default=[1600, 400, 800], help="frames, clips, decoder alone")
    parser.add_argument("--dit-steps", type=int, default=12000)
    parser.add_argument("--i2v-steps", type=int, default=2000, help="of each expert")
    parser.add_argument("--distill-steps", type=int, default=0, help="consistency steps after flow matching")
    parser.add_argument("--lora-steps", type=int, default=120, help="of the LoRA that turns shapes yellow")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the DiT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-compile", action="store_true", help="where torch.compile finds no C++ compiler")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """All stages in order; `words` are the command line's."""
    args = parse(words)
    for folder in (args.folder, args.bundle):
        folder.mkdir(parents=True, exist_ok=True)
    store.set_up_cpu(args.threads)
    _, encoder = text.train(args.folder, args.text_steps)
    export.export_text(args.folder, args.bundle, encoder)
    vae = train_vae.train(args.folder, train_vae.Plan(*args.vae_steps), 1.2e-3, args.device)
    export.export_vae(args.folder, args.bundle)
    dataset.cache_latents(args.folder, vae, args.clips)
    dataset.cache_pictures(args.folder, vae)
    settings = train_dit.Settings(args.dit_steps, args.lr, 0.35, args.threads, not args.no_compile, args.device)
    average = train_dit.train(args.folder, settings)
    if args.distill_steps:
        average = distill.distil(
            args.folder, replace(settings, steps=args.distill_steps, lr=args.lr / 10, cooldown=0.5)
        )
    export.export_dit(average, args.bundle)
    for expert in ("high", "low"):
        short = replace(settings, steps=args.i2v_steps, lr=0.75 * args.lr, cooldown=0.45)
        export.export_expert(train_dit.train(args.folder, short, train_i2v.task(expert)), args.bundle, expert)
    yellow = args.folder / "yellow_lora.safetensors"
    train_lora.train(args.folder, args.bundle / "dit_t2v.safetensors", yellow, args.lora_steps, 4e-3, args.device)
    draw_curves(args.folder, args.folder / "curves.png")


if __name__ == "__main__":
    main()
