"""The README's table of what each size of card runs: `python scripts/tier_table.py` prints it, a test compares it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from turbodiff.plan.hardware import Machine, pretend
from turbodiff.plan.planner import plan_request
from turbodiff.spec.errors import DoesNotFitError
from turbodiff.spec.models import Inventory, Kind
from turbodiff.spec.numbers import GIB, gib, seconds
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import make_request

TABLE_GB = (8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 141)
TABLE_RAM_BYTES = 64 * GIB
TABLE_MODELS: dict[Kind, str] = {"t2v": "wan2.1-14b", "i2v": "wan2.2-a14b"}
SHOWN_SHARE = 0.955  # of the nameplate that a card shows as total memory: 8 GB cards show 7.6 GiB


def table_plan(gb: float, kind: Kind, ram_bytes: int = TABLE_RAM_BYTES) -> Plan | DoesNotFitError:
    """The plan for the dearest wish (largest model, 720p, 81 frames) on a card of `gb` GB nameplate."""
    machine = Machine(ram_total_bytes=ram_bytes, ram_available_bytes=round(0.9 * ram_bytes), cpu_count=16)
    image = "cat.jpg" if kind == "i2v" else ""
    fields = {"prompt": "a cat chases a butterfly", "model": TABLE_MODELS[kind], "image": image}
    try:
        return plan_request(make_request(fields), pretend(machine, gb * SHOWN_SHARE), Inventory())
    except DoesNotFitError as error:
        return error


def tier_table() -> str:
    """Markdown for the README: what runs on each size of card when the wish is the largest model at 720p, 81 frames.

    Seconds are predictions for a typical card of that size with weights read from an NVMe disk, not measurements.
    """
    head = ("card", "kind", "what runs", "peak", "blocks on the card", "text encoder", "VAE", "predicted")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(_row(gb, kind) for gb in TABLE_GB for kind in TABLE_MODELS)])


def _row(gb: float, kind: Kind) -> str:
    plan = table_plan(gb, kind)
    if isinstance(plan, DoesNotFitError):
        return f"| {gb:g} GB | {kind} | nothing: {plan.what} | | | | | |"
    request, levers = plan.request, plan.levers
    int8 = " int8" if request.quant_linear == "on" else ""
    what = f"{request.spec.display_name} {request.resolution} {request.num_frames} frames{int8}"
    blocks = f"{levers.blocks_resident} of {request.spec.dit.num_layers}" if levers.experts == "streamed" else "all"
    if levers.experts == "swapped":
        blocks = "all, one expert at a time"
    cells = (f"{gb:g} GB", kind, what, gib(plan.peak_bytes), blocks, levers.text, levers.vae, seconds(plan.seconds))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(tier_table())
