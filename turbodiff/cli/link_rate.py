"""What cards of one kind send a second in an all-to-all among them, for `turbodiff calibrate --quick`."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from turbodiff.spec.errors import not_started

if TYPE_CHECKING:
    from turbodiff.plan.hardware import GpuFacts, Machine

LINK = (sys.executable, "-P", "-m", "turbodiff.memory_lab.link")
LINK_S = 45.0  # for one number of cards, the starts of Python and torch included
NUMBERS = (2, 4, 8)  # of cards among which it is measured


def link_rates(gpu: "GpuFacts", machine: "Machine") -> tuple[tuple[int, float], ...]:
    """(cards, bytes a second of each of them) for the cards of the machine that are like this one; () where it is the
    only one, or nothing came of it."""
    from turbodiff.gpu.probe import visible_name
    from turbodiff.supervisor.worker_process import new_run_id, worker_environment

    alike = [one for one in machine.usable_gpus if one.name == gpu.name and not one.mig]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [one.uuid or visible_name(one.index, shown) for one in alike]
    environments = [worker_environment(new_run_id(), name, machine.allocator) for name in names]
    found = [(number, link_rate(environments[:number])) for number in NUMBERS if number <= len(alike)]
    return tuple([(number, rate) for number, rate in found if rate is not None])


def link_rate(environments: Sequence[Mapping[str, str]]) -> float | None:
    """Bytes that one of as many processes sends a second, each in its own environment; None where that failed.

    Raises:
        TurbodiffError: code not_started.
    """
    ranks, until_s = len(environments), time.monotonic() + LINK_S
    with tempfile.TemporaryDirectory(prefix="turbodiff-link-") as folder:
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank, environment in enumerate(environments):
                command = [*LINK, str(rank), str(ranks), str(Path(folder) / "store")]
                processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            with suppress(subprocess.TimeoutExpired, ValueError, KeyError):
                said, _ = processes[0].communicate(timeout=max(0.0, until_s - time.monotonic()))
                return float(json.loads(said.splitlines()[-1] if said else "{}")["bytes_s"])
        except OSError as error:
            raise not_started(LINK[0], error) from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
    return None
