"""Writes the checkpoints of a training folder from the bundle: `python -m scripts.train_demo.from_bundle --folder DIR`.

For a fine-tuning of weights whose training folder is gone. The VAE and the text encoder come back as they are bundled,
the experts of image to video as `i2v_high_bundled` and `i2v_low_bundled`, which `train_i2v --start` takes:

    python -m scripts.train_demo.from_bundle --folder DIR --clips 1024
    python -m scripts.train_demo.train_i2v --folder DIR --expert high --start i2v_high_bundled --steps 300 --lr 1e-3
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from scripts.train_demo import dataset, store
from scripts.train_demo.export import umt5_weights
from scripts.train_demo.text import new_encoder
from scripts.train_demo.vae import WanVAE
from turbodiff.models.vae_modules import LATENTS_MEAN, LATENTS_STD
from turbodiff.weights.load import scaled

BUNDLE = Path(__file__).resolve().parents[2] / "turbodiff" / "demo"


def expert_weights(path: Path) -> dict[str, Tensor]:
    """An expert of the bundle in float32; its INT8 linears are multiplied out."""
    weights = {name: value.float() for name, value in load_file(path).items()}
    for name in [name for name in weights if name.endswith(".int8_weight")]:
        data, scale = weights.pop(name), weights.pop(name.replace(".int8_weight", ".scale"))
        weights[name.replace(".int8_weight", ".weight")] = scaled(data, scale)
    return weights


def restore(folder: Path, bundle: Path = BUNDLE) -> WanVAE:
    """Write the checkpoints; returns the VAE."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle / "spiece.model", folder / "spiece.model")
    encoder, bundled = new_encoder(), load_file(bundle / "umt5.safetensors")
    with torch.no_grad():
        for name, parameter in umt5_weights(encoder).items():  # views of the encoder's own parameters
            parameter.copy_(bundled[name])
    store.save(folder / "umt5.pt", {"model": encoder.state_dict()})
    vae = WanVAE()
    vae.load_state_dict({name: value.float() for name, value in load_file(bundle / "vae.safetensors").items()})
    store.save(folder / "latent_statistics.pt", {"mean": torch.tensor(LATENTS_MEAN), "std": torch.tensor(LATENTS_STD)})
    for expert in ("high", "low"):
        weights = expert_weights(bundle / f"dit_i2v_{expert}.safetensors")
        store.save(folder / f"i2v_{expert}_bundled.pt", {"average": weights})
    return vae


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=1024, help="rendered clips in the latent cache")
    args = parser.parse_args()
    store.set_up_cpu(1)
    vae = restore(args.folder)
    dataset.cache_latents(args.folder, vae, args.clips)
    dataset.cache_pictures(args.folder, vae)
    dataset.cache_text(args.folder)


if __name__ == "__main__":
    main()
