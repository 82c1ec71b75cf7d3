"""A follower on a small card: host memory, counted by a ledger with a cap of so many bytes.

python -c "from tests.runtime import small_follower; small_follower.main(BYTES)" RANK RANKS STORE PARENT
"""

import sys

from tests.runtime.small_card import CardLedger
from turbodiff.runtime import follower


def main(cap_bytes: int) -> None:
    """What a follower does, on that card."""
    with CardLedger("cpu", cap_bytes=cap_bytes):
        follower.run(*sys.argv[1:])
