"""Thousands of random requests on random machines: does every plan keep what tests/plan/test_properties.py claims?

    python scripts/bench_plans.py --count 30000             every claim about each, and how long a plan takes
    python scripts/bench_plans.py --count 3000 --seed 7     others

Prints each claim that broke with what it broke on, at most ten; the last line is JSON. A plan is timed cold, in CPU
time of this process: run it on an idle core for a figure that means something. 1 if any claim broke.
"""

import argparse
import json
import random
import sys
import time
import warnings
from pathlib import Path

from hypothesis.errors import HypothesisDeprecationWarning, UnsatisfiedAssumption

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.plan import test_properties as claims  # noqa: E402
from tests.plan.machines import ask, converted, disk, gpu, machine  # noqa: E402
from turbodiff.plan.hardware import Machine  # noqa: E402
from turbodiff.plan.planner import plan_request  # noqa: E402
from turbodiff.spec.errors import DoesNotFitError  # noqa: E402
from turbodiff.spec.models import Inventory, all_models  # noqa: E402
from turbodiff.spec.numbers import GIB  # noqa: E402
from turbodiff.spec.request import Request  # noqa: E402

OF_A_MACHINE = (
    claims.test_a_plan_is_never_over_budget,
    claims.test_pins_are_kept_and_nothing_is_raised,
    claims.test_a_plan_applied_to_itself_changes_nothing,
    claims.test_a_choice_is_never_slower_and_not_better_than_one_that_was_skipped,
    claims.test_every_refusal_names_a_release_that_fits_or_shows_that_none_does,
)
MODELS = [spec.name for spec in all_models() if spec.turbo]
DISKS = (
    *(disk(), disk("wan2.1-14b", "wan2.2-a14b"), disk(quant=(True,)), disk(quant=(False,)), disk("demo")),
    *(converted(disk(), room_gib) for room_gib in (None, 20, 200)),
)
CARDS = (
    "NVIDIA GeForce RTX 4090",
    "NVIDIA GeForce RTX 3060",
    "NVIDIA H200",
    "NVIDIA H20",
    "NVIDIA RTX A6000",
    "NVIDIA L4",
)
PINS = ("model", "resolution", "num_frames", "quant_linear")
SHOWN = 10


def some_request(rng: random.Random) -> Request:
    """A legal request, its wishes pinned or not."""
    model = rng.choice(MODELS)
    pinned = {name for name in PINS if rng.random() < 0.25}
    if "demo" in model:
        return ask(model, num_frames=rng.choice([5, 9, 17]), pinned=pinned)
    named = {"resolution": rng.choice(["480p", "720p"]), "aspect": rng.choice(["16:9", "9:16", "1:1"])}
    size = named if rng.random() < 0.5 else {"size": f"{16 * rng.randint(16, 90)}x{16 * rng.randint(16, 90)}"}
    return ask(
        model, **size, pinned=pinned, num_frames=rng.choice([5, 17, 49, 57, 81, 121, 161]), steps=rng.randint(1, 4),
        quant_linear=rng.choice(["auto", "on", "off"]),
        attention=rng.choice(["auto", "dense", "sage", "sla", "sagesla"]),
    )  # fmt: skip


def some_machine(rng: random.Random) -> Machine:
    """A machine with a card of any size, of a few kinds, more or less in use, or without one."""
    ram_gib = rng.choice([None, rng.uniform(2, 200), rng.uniform(8, 64)])
    if rng.random() < 0.1:
        return machine(ram_gib=ram_gib)
    total = rng.choice([rng.uniform(1, 8), rng.uniform(2, 150)])
    used = rng.choice([0.0, rng.uniform(0, 0.9)]) * total
    card = gpu(
        total, name=rng.choice(CARDS), free_bytes=round((total - used) * GIB), used_bytes=round(used * GIB),
        pcie_bytes_s=rng.choice([None, 1e9, 25e9]),
    )  # fmt: skip
    facts = {"allocator": rng.choice([None, "limited", "native"]), "bitsandbytes": rng.choice([None, True])}
    return machine(card, ram_gib=ram_gib, pinned_limit_bytes=rng.choice([None, GIB]), **facts)


def broken_claims(rng: random.Random, request: Request, where: Machine, inventory: Inventory) -> list[str]:
    """Names of the claims that do not hold."""
    trials = [(claim, (request, where, inventory)) for claim in OF_A_MACHINE]
    if where.gpus:
        total, more = (where.gpus[0].total_bytes or 0) / GIB, rng.uniform(0, 40)
        trials += [
            (claims.test_more_memory_never_gives_a_worse_choice, (request, total, more, inventory, None)),
            (claims.test_the_same_choice_is_never_slower_with_more_memory, (request, total, more)),
        ]
    broken = []
    for claim, values in trials:
        try:
            claim.hypothesis.inner_test(*values)
        except UnsatisfiedAssumption:
            continue
        except AssertionError as error:
            broken.append(f"{claim.__name__} {values} {error}")
    return broken


def main() -> int:
    """Try as many as the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    warnings.simplefilter("ignore", HypothesisDeprecationWarning)  # `assume` where hypothesis does not run
    rng, plan_ms, broken, refused = random.Random(flags.seed), list[float](), list[str](), 0
    for _ in range(flags.count):
        request, where, inventory = some_request(rng), some_machine(rng), rng.choice(DISKS)
        start_s = time.process_time()
        try:
            plan_request(request, where, inventory)
        except DoesNotFitError:
            refused += 1
        plan_ms.append(1000 * (time.process_time() - start_s))
        for found in broken_claims(rng, request, where, inventory):
            broken.append(found)
            if len(broken) <= SHOWN:
                print(found, flush=True)
    plan_ms.sort()
    shares = {f"p{100 * share:g}_ms": round(plan_ms[int(share * (len(plan_ms) - 1))], 2) for share in (0.5, 0.95, 0.99)}
    counts = {"plans": flags.count, "refused": refused, "broken": len(broken)}
    print(json.dumps({**counts, **shares, "most_ms": round(plan_ms[-1], 2)}))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
