#!/usr/bin/env python
"""What several cards gain on one clip: a prediction by model and size, and the rate of an all-to-all on this machine.

    scripts/bench_parallel.py --link-gb-s 40 --seconds 24      # predicted, from a given rate and one card's seconds
    scripts/bench_parallel.py --measure 2                      # the rate among 2 processes: NCCL on GPUs, else gloo

The table is a prediction (turbodiff/plan/shared_clip.py), whatever the rate came from.
"""

import argparse
import os
import sys

import torch

from turbodiff.cli.link_rate import link_rate
from turbodiff.plan.links import possible_ranks
from turbodiff.plan.shared_clip import INT8_BYTES, shared
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GB

MODELS = ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-t2v-a14b")
SIZES = {"480p": (32760, 104), "720p": (75600, 160)}  # tokens of 81 frames, width in latent pixels


def table(link_bytes_s: float, denoise_s: float, vae_s: float, serial_s: float, steps: int) -> None:
    """Print seconds, efficiency and when clips side by side are better, for every number of cards that divides."""
    say = sys.stdout.write
    say(
        f"predicted, {link_bytes_s / GB:g} GB/s a card, denoise {denoise_s:g} s, VAE {vae_s:g} s, rest {serial_s:g} s\n"
    )
    say(f"{'model':18}{'size':6}{'cards':>6}{'exchange':>10}{'GB/pass':>9}{'s':>8}{'x':>6}{'eff.':>6}  side by side\n")
    for name in MODELS:
        dit = find_model(name).dit
        for size, (tokens, width) in SIZES.items():
            for ranks in reversed(possible_ranks(dit.num_heads, tokens, 8)):
                for word, element_bytes in (("bf16", 2), ("int8", INT8_BYTES)):
                    got = shared(
                        dit, tokens, ranks, split_s=denoise_s, strips_s=vae_s, width=width, serial_s=serial_s,
                        forwards=steps, link_bytes_s=link_bytes_s, element_bytes=element_bytes,
                    )  # fmt: skip
                    offered = "" if got.helps else "  not offered"
                    say(
                        f"{name:18}{size:6}{ranks:6}{word:>10}{got.sent_bytes / GB:9.1f}{got.seconds:8.1f}"
                        f"{got.speedup:6.2f}{got.efficiency:6.2f}  {got.side_by_side:.2f} clips{offered}\n"
                    )


def measure(ranks: int) -> float:
    """Bytes that one process sends a second in an all-to-all among so many of this machine, each on the card of its
    number where there are as many, else on the CPU."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shown = [str(rank) if cards >= ranks else "" for rank in range(ranks)]
    rate = link_rate([{**os.environ, "CUDA_VISIBLE_DEVICES": card} for card in shown])
    if rate is None:
        sys.exit(f"{ranks} processes could not send to each other")
    return rate


def main() -> None:
    """Measure where it was asked for, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, metavar="PROCESSES", help="measure the rate among so many processes")
    parser.add_argument("--link-gb-s", type=float, default=40.0, help="one card's rate in an all-to-all")
    parser.add_argument("--seconds", type=float, default=24.0, help="of the transformer on one card")
    parser.add_argument("--vae-seconds", type=float, default=6.0)
    parser.add_argument("--rest-seconds", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=4, help="forward passes")
    args = parser.parse_args()
    link_bytes_s = measure(args.measure) if args.measure else args.link_gb_s * GB
    table(link_bytes_s, args.seconds, args.vae_seconds, args.rest_seconds, args.steps)


if __name__ == "__main__":
    main()
