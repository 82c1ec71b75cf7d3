"""`turbodiff gpu`: the cards, and who holds their memory."""

import json
import sys

from turbodiff.cli import flags


def gpu(as_json: flags.Json = False) -> None:
    """Show the GPUs, their memory and who holds it."""
    from turbodiff.cli.show import machine_table
    from turbodiff.studio import Studio

    machine, held = Studio().cards_now()
    if as_json:
        told = [card.model_dump(mode="json") for card in held]
        sys.stdout.write(json.dumps({**machine.model_dump(mode="json"), "holders": told}) + "\n")
    else:
        machine_table(machine, held)
