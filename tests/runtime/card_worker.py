"""A real worker whose card is a ledger: the worker of a supervisor's test. TOY_CARD_BYTES is what the card really has,
TOY_SHOWN_BYTES what the driver says it has."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]

from tests.runtime.small_card import CardShelf, card  # noqa: E402
from turbodiff.runtime import model_cache, replan, worker  # noqa: E402
from turbodiff.spec.request import Request  # noqa: E402


def main() -> int:
    kept, run = CardShelf(), worker.run
    model_cache.ModelCache = lambda device: kept
    replan.machine_of = lambda order, device: card(int(os.environ["TOY_SHOWN_BYTES"]))

    def on_the_card(order, warm, pipe, orders):
        warm.warm(Request.model_validate(order["request"]))
        with warm.insert(int(os.environ["TOY_CARD_BYTES"])):
            run(order, warm, pipe, orders)

    worker.run = on_the_card
    return worker.main()


if __name__ == "__main__":
    worker.leave(main())
