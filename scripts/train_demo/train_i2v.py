"""Trains the two experts of image to video (Wan2.2: they hand over at time 0.9).

The high-noise expert begins as the text-to-video network, which has never seen a picture, and learns the times from
the boundary up; the low-noise expert begins as the high-noise one, which copies pictures already, and learns the rest.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from scripts.train_demo import store
from scripts.train_demo.sample import times
from scripts.train_demo.train_dit import CONFIG, Task, command_line, settings_of, train
from turbodiff.spec.shapes import CONDITION_CHANNELS, LATENT_CHANNELS

I2V_CONFIG = replace(CONFIG, in_dim=LATENT_CHANNELS + CONDITION_CHANNELS)
SIGMA_MAX = 200.0  # TurboDiffusion, image to video
BOUNDARY = 0.9
ELSEWHERE = 0.1  # share of times outside an expert's own range: another boundary must not break it
SCHEDULE = tuple(times(4, SIGMA_MAX)[:4])


def expert_times(count: int, high: bool) -> Tensor:
    """Times [B]: half exactly those of the schedule on this side of the boundary, the rest anywhere on this side."""
    own = torch.tensor([t for t in SCHEDULE if (t >= BOUNDARY) == high])
    low, top = (BOUNDARY, SCHEDULE[0]) if high else (0.0, BOUNDARY)
    anywhere = low + (top - low) * torch.rand(count).sqrt()  # rather noisy than clean
    pick = torch.rand(count)
    t = torch.where(pick < 0.55, own[torch.randint(len(own), (count,))], anywhere)
    return torch.where(pick > 1 - ELSEWHERE, SCHEDULE[0] * torch.rand(count), t)


def task(expert: str, start: str = "") -> Task:
    """What the "high" or the "low" expert learns; the low one begins where the high one ended."""
    start = start or ("dit" if expert == "high" else "i2v_high")
    draw = partial(expert_times, high=expert == "high")
    own = tuple(t for t in SCHEDULE if (t >= BOUNDARY) == (expert == "high"))
    return Task(f"i2v_{expert}", I2V_CONFIG, draw, own, pictures=True, start=start)


def main() -> None:
    """Command line: `python -m scripts.train_demo.train_i2v --folder DIR --expert high`."""
    parser = command_line(500, 1.5e-3, 0.45)
    parser.add_argument("--expert", choices=("high", "low"), nargs="+", default=["high", "low"])
    args = parser.parse_args()
    store.set_up_cpu(args.threads)
    for expert in args.expert:
        train(args.folder, settings_of(args), task(expert, args.start))


if __name__ == "__main__":
    main()
