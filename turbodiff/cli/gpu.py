"""`turbodiff gpu`: the cards, and who holds their memory."""

import json
import sys

from turbodiff.cli import flags


def gpu(as_json: flags.Json = False) -> None:
    """Show the GPUs, their memory and who holds it."""
    from turbodiff import studio
    from turbodiff.cli.show import machine_table
    from turbodiff.gpu.holders import holders
    from turbodiff.gpu.probe import machine_from, take_sample
    from turbodiff.supervisor import leftover_workers, memory

    store, sample = studio.history(), take_sample()
    ours = memory.worker_pids(store) if store is not None else frozenset[int]()
    left = {found.pid for found in leftover_workers.leftovers(studio.state_folder())} - ours
    machine, held = machine_from(sample, ours), holders(sample, ours, left)
    if as_json:
        told = [card.model_dump(mode="json") for card in held]
        sys.stdout.write(json.dumps({**machine.model_dump(mode="json"), "holders": told}) + "\n")
    else:
        machine_table(machine, held)
