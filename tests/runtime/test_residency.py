import pytest
import torch
from torch import nn

from turbodiff.models.attention import AttentionPlan
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.runtime.embeddings import TextRows
from turbodiff.runtime.network import Network
from turbodiff.runtime.residency import BlockStream, arrivals, placed
from turbodiff.spec.plan import Levers

CPU = torch.device("cpu")
CONFIG = WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=4, text_dim=64)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return WanDiT(CONFIG).eval().requires_grad_(False)


def velocity(dit, levers):
    torch.manual_seed(1)
    latents, text = torch.randn(1, 16, 2, 4, 4, dtype=torch.float64).float(), torch.randn(1, 8, 64)
    network = Network(dit, CPU, AttentionPlan(), levers)
    with torch.inference_mode(), network.placed(stay=False):
        network.begin(TextRows(text, 8), None)
        return [network(latents, torch.full((1, 1), t)) for t in (900.0, 500.0)]


@pytest.mark.parametrize("resident", [0, 1, 2, 4])
def test_streamed_blocks_give_the_same_bits(dit, resident):
    whole = velocity(dit, Levers())
    streamed = velocity(dit, Levers(experts="streamed", blocks_resident=resident))
    assert all(torch.equal(a, b) for a, b in zip(whole, streamed, strict=True))


def test_a_stream_holds_two_slots_beside_the_resident_blocks():
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    with BlockStream(blocks, CPU, resident=2) as stream:
        seen = list(stream)
    assert len({id(block) for block in seen}) == 4
    assert len(seen) == 6


def test_a_placed_network_comes_back_to_its_host_copy():
    layer = nn.Linear(2, 2)
    before = layer.weight.data_ptr()
    with placed(layer, CPU):
        pass
    assert layer.weight.data_ptr() == before


def test_two_names_for_one_tensor_take_its_memory_once():
    table, other = torch.zeros(3, 4), torch.zeros(3, 4)
    first, again, another = arrivals([table, table.view(3, 4), other], torch.device("meta"))
    assert first is again and another is not first
