"""What the compiler makes of the kernels, and what a model says of it: registers, spills, shared memory, blocks a
multiprocessor, matrix instructions, plain loads, instructions a tile, share of the card's peak, time of a step.

    scripts/bench_static.py                      all architectures; needs no GPU, some minutes
    scripts/bench_static.py --arch 90 --card H200
    scripts/bench_static.py --write              the figures become the new budget (kernels/budget.toml)

The assumptions about cards stand in one table, scripts/step_model.py. Speeds are predictions, not measurements.
"""

import argparse
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import triton  # noqa: E402
from turbodiff_kernels.backend import HOPPER  # noqa: E402

from scripts import step_model  # noqa: E402
from scripts.kernel_launches import Measured, as_json, measure, record  # noqa: E402
from scripts.step_model import CARDS, Card  # noqa: E402

ARCHS = (80, 86, 89, 90, 100, 120)
BUDGET = ROOT / "kernels" / "budget.toml"
WORSE = 0.03  # more than this above the budget is a loss
SCALARS = 4  # a loop may load so many numbers that are not part of a tile: the block's index, its scales
FIGURES = ("registers", "shared_bytes", "instructions", "loop_instructions")


def figures(row: Measured) -> dict[str, int]:
    """The figures of a launch that the budget holds."""
    counted = row.code.instructions, row.code.loop_instructions - row.code.optional_instructions
    return dict(zip(FIGURES, (row.registers, row.shared_bytes, *counted), strict=True))


def narrow_loads(row: Measured) -> str:
    """What a matrix loop loads in less than 16 bytes a thread, beside a few scalars; "" where there is none."""
    if not row.code.loop_matrix:
        return ""
    loads = sum(count for size, count in row.code.loads.items() if int(size) < 16)
    copies = sum(count for size, count in row.code.copies.items() if int(size) < 16)
    return f"{loads} plain loads and {copies} copies below 16 bytes" if loads + copies > SCALARS else ""


def losses(rows: Iterable[Measured], arch: int, budget: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """What is worse than the budget by more than 3 %, spills, does not compile or loads narrowly."""
    found = []
    for row in rows:
        what = f"sm_{arch} {row.name}"
        if row.error:
            found.append(f"{what}: {row.error}")
            continue
        if row.spilled_bytes:
            found.append(f"{what}: spills {row.spilled_bytes} bytes")
        if narrow := narrow_loads(row):
            found.append(f"{what}: {narrow}")
        held = budget.get(f"sm_{arch}", {}).get(row.name)
        if held is None:
            found.append(f"{what}: has no budget; scripts/bench_static.py --write")
            continue
        for name, value in figures(row).items():
            if value > held[name] * (1 + WORSE):
                found.append(f"{what}: {name} {value}, budget {held[name]}")
    return found


def read_budget() -> tuple[str, dict[str, dict[str, dict[str, int]]]]:
    """The Triton that the budget was written with, and the figures by architecture and launch."""
    content = tomllib.loads(BUDGET.read_text("utf-8"))
    return content.pop("triton"), content


def write_budget(rows: dict[int, list[Measured]]) -> None:
    """The figures of these rows; those of other architectures stay."""
    kept = read_budget()[1] if BUDGET.exists() else {}
    kept |= {f"sm_{arch}": {row.name: figures(row) for row in some} for arch, some in rows.items()}
    lines = ["# Written by scripts/bench_static.py --write, held by tests/kernels/test_aot.py."]
    lines.append(f'triton = "{triton.__version__}"')
    for arch, launches in sorted(kept.items(), key=lambda item: int(item[0][3:])):
        lines += ["", f"[{arch}]"]
        for name, held in launches.items():
            lines.append(f'"{name}" = {{ {", ".join(f"{key} = {value}" for key, value in held.items())} }}')
    BUDGET.write_text("\n".join(lines) + "\n", "utf-8")


def table(arch: int, rows: list[Measured], cards: dict[str, Card]) -> Iterator[str]:
    """One line a launch, and the model's word for each card of the architecture."""
    yield f"sm_{arch:<47} regs spill  shared warps  code  loop loads<16  matrix" + "".join(
        f"  {name}" for name in cards
    )
    for row in rows:
        if row.error:
            yield f"{row.name:<50} failed: {row.error[-60:]}"
            continue
        numbers = figures(row)
        narrow = sum(count for size, count in row.code.loads.items() if int(size) < 16)
        text = (
            f"{row.name:<50} {row.registers:4} {row.spilled_bytes:5} {row.shared_bytes:7} {row.warps:5} "
            f"{numbers['instructions']:5} {numbers['loop_instructions']:5} {narrow:8}  {' '.join(row.code.loop_matrix)}"
        )
        yield text + "".join(f"  {name}: {word(row, card)}" for name, card in cards.items())


def word(row: Measured, card: Card) -> str:
    """What the model says of one launch on one card."""
    blocks = step_model.blocks_an_sm(row, card)
    if row.code.loop_matrix and "_state_kernel" not in row.name:
        rate = step_model.matrix_rate(row, card)
        return f"{rate.share:.0%} of peak, {rate.tflops:.0f} TFLOP/s, {blocks} an SM"
    return f"{step_model.copy_share(row, card):.0%} of copy, {blocks} an SM"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS)
    parser.add_argument("--card", action="append", choices=CARDS)
    parser.add_argument("--json", action="store_true", help="one line of JSON a launch, nothing else")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    measured: dict[int, list[Measured]] = {}
    for arch in options.arch or ARCHS:
        measured[arch] = [measure(launch, arch) for launch in record(arch).values()]
        if options.json:
            print(*(as_json(row) for row in measured[arch]), sep="\n", flush=True)
            continue
        cards = {n: c for n, c in CARDS.items() if c.arch == arch and (not options.card or n in options.card)}
        print(*table(arch, measured[arch], cards), "", sep="\n", flush=True)
    if options.write:
        write_budget(measured)
    if not options.json:
        print(*steps(measured, options.card), sep="\n")
    return 0


def steps(measured: dict[int, list[Measured]], names: list[str] | None) -> Iterator[str]:
    """The model's steps for the cards whose architecture was compiled, and the peers that it is held to."""
    yield "published peers:  " + "   ".join(
        f"{p.card} {step_model.peer_tflops(p):.0f} of {p.published_tflops:.0f} TFLOP/s" for p in step_model.PEERS
    )
    yield "predicted ms of a step, top-k 0.1; gain of the attention operation over torch's dense attention"
    for name, card in CARDS.items():
        if card.arch not in measured or (names and name not in names):
            continue
        rows = {row.name: row for row in measured[card.arch]}
        for size, shape in step_model.SHAPES.items():
            times = [
                f"{kind} {linear} {step_model.step_ms(rows, card, shape, kind, linear):.0f}"
                for kind in ("sla", "sagesla")
                for linear in step_model.LINEARS
            ]
            gains = [f"{kind} {step_model.sparse_gain(rows, card, shape, kind):.1f}x" for kind in ("sla", "sagesla")]
            yield f"{name:>5} {size:>9}:  " + "  ".join(times + gains)
            if card.arch == HOPPER:
                asked = (rows, card, shape, "sagesla")
                times = [f"{kind} {step_model.step_ms(*asked, kind, hopper=True):.0f}" for kind in step_model.LINEARS]
                gain = step_model.sparse_gain(*asked, hopper=True)
                yield f"{'':>15}   sagesla by the loop of Hopper, at best:  " + "  ".join([*times, f"{gain:.1f}x"])


if __name__ == "__main__":
    sys.exit(main())
