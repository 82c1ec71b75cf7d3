#!/usr/bin/env python
"""What several cards gain on one clip: a prediction by model and size, and the rate of an all-to-all on this machine.

    scripts/bench_parallel.py --link-gb-s 40 --seconds 24      # predicted, from a given rate and one card's seconds
    scripts/bench_parallel.py --measure 2                      # the rate among 2 processes: NCCL on GPUs, else gloo

The table is a prediction (turbodiff/plan/shared_clip.py), whatever the rate came from.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping

import torch

from turbodiff.cli.link_rate import link_rate
from turbodiff.gpu.probe import visible_name
from turbodiff.plan.links import possible_ranks
from turbodiff.plan.shared_clip import MEMORY_BYTES_S, shared
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GB
from turbodiff.spec.request import MAX_CARDS, Exchange

MODELS = ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-t2v-a14b")
EXCHANGES: Mapping[Exchange, str] = {"full": "bf16", "int8": "int8"}
SIZES = {"480p": (32760, 104), "720p": (75600, 160)}  # tokens of 81 frames, width in latent pixels


def table(
    link_bytes_s: float, denoise_s: float, vae_s: float, serial_s: float, steps: int,
    memory_bytes_s: float = MEMORY_BYTES_S,
) -> Iterator[str]:  # fmt: skip
    """Lines: what the exchange takes, seconds, efficiency, and clips that as many cards make at once meanwhile, for
    every number of cards that divides."""
    parts = f"denoise {denoise_s:g} s, VAE {vae_s:g} s, rest {serial_s:g} s"
    yield f"predicted, {link_bytes_s / GB:g} GB/s a card, {parts}, {steps} passes; a pass: what one card sends"
    heads = f"{'cards':>6}{'sent':>6}{'GB/pass':>9}{'s/pass':>8}{'s':>8}{'x':>6}{'eff.':>6}"
    yield f"{'model':18}{'size':6}{heads}  side by side"
    for name in MODELS:
        dit = find_model(name).dit
        for size, (tokens, width) in SIZES.items():
            for ranks in reversed(possible_ranks(dit.num_heads, tokens, MAX_CARDS)):
                for exchange, word in EXCHANGES.items():
                    got = shared(
                        dit, tokens, ranks, split_s=denoise_s, strips_s=vae_s, width=width, serial_s=serial_s,
                        forwards=steps, link_bytes_s=link_bytes_s, exchange=exchange, memory_bytes_s=memory_bytes_s,
                    )  # fmt: skip
                    row = f"{name:18}{size:6}{ranks:6}{word:>6}{got.sent_bytes / GB:9.2f}{got.exchange_s:8.3f}"
                    row += f"{got.seconds:8.1f}{got.speedup:6.2f}{got.efficiency:6.2f}  {got.side_by_side:.2f} clips"
                    yield row if got.helps else f"{row}  not offered"


def measure(ranks: int) -> float:
    """Bytes that one process sends a second in an all-to-all among so many of this machine, each on the card of its
    number where there are as many, else on the CPU."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = [visible_name(rank, devices) if cards >= ranks else "" for rank in range(ranks)]
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
    memory_gb_s = MEMORY_BYTES_S / GB
    parser.add_argument("--memory-gb-s", type=float, default=memory_gb_s, help="of a card: INT8 is packed in it")
    args = parser.parse_args()
    link_bytes_s = measure(args.measure) if args.measure else args.link_gb_s * GB
    memory_bytes_s = args.memory_gb_s * GB
    for line in table(link_bytes_s, args.seconds, args.vae_seconds, args.rest_seconds, args.steps, memory_bytes_s):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
