"""What torch's caching allocator loses to blocks of unlike size: memory of the driver that it holds beside tensors.

Shares are read off a replay of the real modules' allocations (memory_lab/replay.py): the smallest cap under which a
phase still runs, less its live bytes, at its worst over models, sizes, frames, attention kinds, INT8 and levers.
`scripts/bench_guard.py --replay` prints the margin that is left.
"""

import math
from typing import Literal, NamedTuple

from turbodiff.plan.hardware import Allocator

Kind = Literal["text", "picture", "denoise", "vae"]


class Slack(NamedTuple):
    """Shares of a phase's activations, by kind, and of its weights; of the picture encoder's, whose matrices of 3 MiB
    leave a fifth of fixed segments of 20 MiB unused."""

    text: float
    denoise: float
    vae: float
    weights: float
    picture_weights: float


# limited: fixed segments whose large blocks are never split, what our workers use where expandable segments fail;
# native: torch's own default, in which a small tensor that stays (a block's text) takes a piece of a large block
SLACK: dict[Allocator, Slack] = {
    "expandable": Slack(text=0.05, denoise=0.06, vae=0.16, weights=0.0, picture_weights=0.0),
    "limited": Slack(text=0.15, denoise=0.1, vae=0.14, weights=0.04, picture_weights=0.1),
    "native": Slack(text=0.2, denoise=0.6, vae=0.3, weights=0.05, picture_weights=0.1),
}


def slack_bytes(mode: Allocator, kind: Kind, activations: int, weights: float = 0) -> int:
    """Bytes that the allocator holds beside a phase's tensors at its worst moment."""
    slack = SLACK[mode]
    share = {"text": slack.text, "picture": slack.text, "denoise": slack.denoise, "vae": slack.vae}[kind]
    return math.ceil(share * activations + (slack.picture_weights if kind == "picture" else slack.weights) * weights)
