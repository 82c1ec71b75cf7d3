"""How many launches a block of a network costs the host."""

import pytest

from scripts.block_launches import block_launches


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Not here: filling counts as a launch."""


@pytest.mark.parametrize(
    ("kind", "most"), [("dense", 21), ("sage", 26), ("sla", 28), ("sagesla", 31)], ids=lambda value: str(value)
)
def test_a_block_is_few_launches(kind, most):
    """56 with sagesla once: the means of blocks, the state's sums and the scales of values were torch's passes."""
    assert block_launches(kind, "bf16").total() <= most


def test_int8_tiles_add_two_launches_and_leave_no_pass_of_the_activation():
    names = block_launches("sagesla", "tiles")
    assert names.total() <= 33
    assert "gelu_" not in names and "_residual_add_kernel" not in names
