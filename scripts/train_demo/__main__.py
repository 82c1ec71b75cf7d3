"""Trains the demo model from nothing and writes the bundle: `python -m scripts.train_demo --folder DIR`.

Every stage keeps a checkpoint in DIR and does nothing when it is done already, so the same command continues after a
stop. A DiT step takes about 1.8 s on one CPU core; `--dit-steps 2650 --clips 1408` is
what the bundled weights had.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from scripts.train_demo import dataset, export, store, text, train_dit, train_vae  # noqa: E402
from scripts.train_demo.curve import draw_curves  # noqa: E402


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoints, caches and logs")
    parser.add_argument("--bundle", type=Path, default=ROOT / "turbodiff" / "demo", help="where the weights go")
    parser.add_argument("--clips", type=int, default=6000, help="rendered clips in the latent cache")
    parser.add_argument("--dit-steps", type=int, default=12000)
    parser.add_argument("--lr", type=float, default=2e-3, help="of the DiT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="where torch.compile finds no C++ compiler")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    store.set_up_cpu(args.threads)
    _, encoder = text.train(args.folder)
    vae = train_vae.train(args.folder, train_vae.Plan(frames=1600, joint=400, decoder=800), lr=1.2e-3)
    dataset.cache_latents(args.folder, vae, args.clips)
    dit = train_dit.Settings(args.dit_steps, args.lr, 0.35, args.threads, not args.no_compile)
    average = train_dit.train(args.folder, dit)
    export.export_text(args.folder, args.bundle, encoder)
    export.export_vae(args.folder, args.bundle)
    export.export_dit(average, args.bundle)
    draw_curves(args.folder, args.folder / "curves.png")


if __name__ == "__main__":
    main()
