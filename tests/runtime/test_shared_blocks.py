"""Blocks that are spread over the processes of a clip: the same bits, and on each card no more than the plan says."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.models.rank_processes import said_by
from tests.plan.test_shared_clip import costs_of
from tests.runtime.small_card import CARD, CardLedger
from turbodiff.models.parallel import SequenceParallel
from turbodiff.plan.streaming import streamed
from turbodiff.runtime.shared_blocks import SharedBlocks


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_network_whose_blocks_are_spread_is_that_of_one_process_bit_for_bit(ranks, tmp_path):
    """Of a block that another process has, none but that one ever reads a byte: here it is wrong everywhere else."""
    found = said_by("tests.runtime.blocks_rank", ranks, tmp_path)
    (control,) = [name for name in found if name.startswith("control")]
    assert found.pop(control) > 1e-3
    assert len(found) == 8 and found == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize("resident, on_cards", [(0, 40), (0, 24), (10, 30), (0, 0)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_card_holds_of_the_blocks_what_the_plan_says(ranks, resident, on_cards):
    """With a process group that sends nothing."""
    costs = costs_of("wan2.1-14b", ranks)
    small = [torch.nn.Linear(96, 64, dtype=torch.bfloat16) for _ in range(costs.spec.dit.num_layers)]
    blocks = torch.nn.ModuleList(small)  # blocks are counted, not what they hold
    dist.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())
    try:
        ledger = CardLedger("cpu")
        ledger.ignore(blocks)
        with ledger, SharedBlocks(
            blocks, CARD, resident, on_cards=on_cards, parallel=SequenceParallel(1, ranks)
        ) as stream:  # fmt: skip
            for _ in range(2):
                for index in range(len(stream)):
                    assert stream[index].weight.shape == (64, 96)
            beside_bytes = stream.beside_bytes
    finally:
        dist.destroy_process_group()
    planned = streamed(costs, resident, 1.0, locked=None, shared=on_cards, host_bytes=0)
    assert ledger.peak_bytes == planned.on_card * (96 * 64 * 2 + 512), "its bias takes a grain"
    assert beside_bytes == (planned.on_card - resident) * stream.block_bytes
