"""A real worker whose card is a ledger: the worker of a supervisor's test. TOY_CARD_BYTES is what the card really has,
TOY_SHOWN_BYTES what the driver says it has. No process survives its out-of-memory."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]

from tests.runtime.small_card import CardCache, card  # noqa: E402
from turbodiff.runtime import model_cache, replan, worker  # noqa: E402
from turbodiff.spec.request import Request  # noqa: E402


def main() -> int:
    models, run = CardCache(), worker.run
    model_cache.ModelCache = lambda device: models
    replan.machine_for = lambda command, device: card(int(os.environ["TOY_SHOWN_BYTES"]))

    def on_the_card(command, models, events, commands):
        models.warm(Request.model_validate(command["request"]))
        with models.insert(int(os.environ["TOY_CARD_BYTES"]), sound=False):
            run(command, models, events, commands)

    worker.run = on_the_card
    return worker.main()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
