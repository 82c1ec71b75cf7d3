"""How much a run tries: `scripts/test soak` takes the large samples, every other run a smaller share of the same."""

import os

SOAK = bool(os.environ.get("TURBODIFF_SOAK"))
