import weakref

import pytest
import torch
from torch import nn

from tests.runtime.small_card import CARD, CardLedger
from turbodiff.memory_lab.dry_run import GRAIN_BYTES
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.runtime import offload
from turbodiff.runtime.denoise import Network
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.offload import (
    BlockStream,
    bytes_away,
    dit_on_device,
    on_device,
    page_lock,
    share_parameters,
    to_host,
)
from turbodiff.runtime.text import TextRows
from turbodiff.spec.plan import Levers

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIG = WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=4, text_dim=64)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return WanDiT(CONFIG).eval().requires_grad_(False)


def velocity(dit, levers):
    torch.manual_seed(1)
    latents, text = torch.randn(1, 16, 2, 4, 4, dtype=torch.float64).float(), torch.randn(1, 8, 64)
    with torch.inference_mode(), dit_on_device(dit, CPU, levers) as blocks:
        network = Network(PlacedDit(dit, blocks, ()), CPU, TextRows(text, 8))
        return [network(latents, torch.full((1, 1), t)) for t in (900.0, 500.0)]


@pytest.mark.parametrize("resident", [0, 1, 2, 4])
def test_streamed_blocks_give_the_same_bits(dit, resident):
    whole = velocity(dit, Levers())
    streamed = velocity(dit, Levers(experts="streamed", blocks_resident=resident))
    assert all(torch.equal(a, b) for a, b in zip(whole, streamed, strict=True))


def test_page_locked_copies_of_a_mapped_network_go_with_its_stream_and_the_bits_stay(dit, tmp_path):
    """One expert's page-locked copies must be gone before the next one's are made; plain memory stands in for them."""
    mapped = share_parameters(dit)
    for index, (name, parameter) in enumerate(dit.blocks.named_parameters()):
        file = tmp_path / f"{index}.bin"
        file.write_bytes(parameter.detach().numpy().tobytes())
        storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
        data = torch.empty(0).set_(storage[:], 0, parameter.shape)
        owner, _, leaf = name.rpartition(".")
        setattr(mapped.blocks.get_submodule(owner), leaf, nn.Parameter(data, requires_grad=False))
    pieces = []

    def make(n_bytes):
        pieces.append(torch.empty(n_bytes, dtype=torch.uint8))
        return pieces[-1]

    homes = [parameter.data_ptr() for parameter in mapped.blocks.parameters()]
    whole = velocity(mapped, Levers())
    page_lock(mapped.blocks, make)
    assert pieces and not set(homes) & {parameter.data_ptr() for parameter in mapped.blocks.parameters()}
    held = [weakref.ref(piece.untyped_storage()) for piece in pieces]
    pieces.clear()
    streamed = velocity(mapped, Levers(experts="streamed"))
    assert all(torch.equal(a, b) for a, b in zip(whole, streamed, strict=True))
    with BlockStream(mapped.blocks, CPU, 0, keep=False):
        pass
    assert [parameter.data_ptr() for parameter in mapped.blocks.parameters()] == homes
    assert all(storage() is None for storage in held)
    again = velocity(mapped, Levers(experts="streamed"))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_swapped_networks_give_the_same_bits(dit):
    whole = velocity(dit, Levers())
    swapped = velocity(dit, Levers(experts="swapped"))
    assert all(torch.equal(a, b) for a, b in zip(whole, swapped, strict=True))


def peak_bytes(dit, levers):
    """Most bytes on a card over two evaluations; what is moved to "cpu:0" is copied, and the copies count."""
    ledger = CardLedger("cpu")
    text, latents, time = torch.zeros(1, 8, 64), torch.zeros(1, 16, 2, 4, 4), torch.full((1, 1), 900.0)
    ledger.ignore(dit)
    with torch.inference_mode(), ledger, dit_on_device(dit, CARD, levers) as blocks:
        network = Network(PlacedDit(dit, blocks, ()), CARD, TextRows(text, 8))
        for _ in range(2):
            network(latents, time)
    return ledger.peak_bytes


@pytest.mark.parametrize("resident", [0, 1, 2, 4])
def test_a_stream_never_holds_more_than_two_blocks_beside_the_resident_ones(dit, resident):
    block = sum(rounded(tensor) for tensor in dit.blocks[0].parameters())
    everything = sum(rounded(tensor) for tensor in dit.parameters())
    rest = everything - len(dit.blocks) * block
    work = peak_bytes(dit, Levers()) - everything
    streamed = peak_bytes(dit, Levers(experts="streamed", blocks_resident=resident))
    slots = min(2, len(dit.blocks) - resident)
    assert work > 0
    assert streamed - work <= (resident + slots) * block + rest
    assert streamed - work > (resident + slots - 1) * block + rest  # and no fewer: the next is on its way


def rounded(tensor):
    return -(-tensor.nbytes // GRAIN_BYTES) * GRAIN_BYTES


def test_page_locked_memory_in_powers_of_two_wastes_little():
    """The blocks of Wan2.1-14B one tensor at a time would take 1.5 times their bytes."""
    dim, ffn_dim = 5120, 13824
    shapes = 8 * [(dim, dim)] + [(ffn_dim, dim), (dim, ffn_dim)] + 16 * [(dim,)] + [(6, dim)]
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device=META) for _ in range(40) for shape in shapes]
    network = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
    asked = []

    def make(n_bytes):
        asked.append(n_bytes)
        return torch.empty(n_bytes, dtype=torch.uint8, device=META)

    needed = sum(tensor.nbytes for tensor in tensors)
    page_lock([network], make)
    assert [moved.shape for moved in network] == [tensor.shape for tensor in tensors]
    assert all(n_bytes & (n_bytes - 1) == 0 for n_bytes in asked)
    assert needed <= sum(asked) < 1.08 * needed
    alone = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors)
    assert alone > 1.5 * needed


def test_tensors_in_one_arena_keep_their_values_and_do_not_overlap():
    torch.manual_seed(2)
    tensors = [torch.randn(5, 3), torch.randint(-9, 9, (7,), dtype=torch.int8), torch.randn(2, 2, dtype=torch.float64)]
    tensors.append(torch.zeros(3))
    kept = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
    page_lock([kept], lambda n_bytes: torch.empty(n_bytes, dtype=torch.uint8))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, tensors, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == 1


def test_what_an_earlier_job_left_on_the_device_goes_home(dit):
    at_home, ledger = [tensor.data_ptr() for tensor in dit.parameters()], CardLedger("cpu")
    ledger.ignore(dit)
    with ledger:
        with on_device(dit, CARD, stay=True):
            pass
        here_bytes = bytes_away([dit])
        assert ledger.live_bytes >= here_bytes == sum(tensor.nbytes for tensor in dit.parameters())
        assert to_host([dit], CARD) == here_bytes
        assert to_host([dit], CARD) == bytes_away([dit]) == 0
    assert ledger.live_bytes == 0
    assert [tensor.data_ptr() for tensor in dit.parameters()] == at_home


def test_a_stream_holds_two_slots_beside_the_resident_blocks():
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
    with BlockStream(blocks, CPU, resident=2) as stream:
        seen = [stream[index] for index in range(len(stream))]
    assert len({id(block) for block in seen}) == 4
    assert len(seen) == 6


def test_a_placed_network_comes_back_to_its_host_copy():
    layer = nn.Linear(2, 2)
    before = layer.weight.data_ptr()
    with on_device(layer, CPU):
        pass
    assert layer.weight.data_ptr() == before


def test_two_names_for_one_tensor_take_its_memory_once():
    table, other = torch.zeros(64, 4), torch.zeros(64, 4)
    module, ledger = nn.Module(), CardLedger("cpu")
    for name, tensor in (("first", table), ("again", table.view(64, 4)), ("another", other)):
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    ledger.ignore(module)
    with ledger, on_device(module, CARD):
        assert module.first.data_ptr() == module.again.data_ptr() != module.another.data_ptr()
        assert ledger.live_bytes == 2 * table.nbytes


def refused(*given, **how):
    """Page-locked memory of a host that has no more of it, as WSL2 after some hundred MiB."""
    raise RuntimeError("CUDA error: out of memory")


def test_a_host_that_page_locks_nothing_streams_from_memory_as_it_is(dit):
    homes = [parameter.data_ptr() for parameter in dit.blocks.parameters()]
    whole = velocity(dit, Levers())
    page_lock(dit.blocks, refused)
    assert [parameter.data_ptr() for parameter in dit.blocks.parameters()] == homes
    assert all(map(torch.equal, whole, velocity(dit, Levers(experts="streamed"))))


def test_small_tensors_travel_without_page_locked_memory_where_there_is_none(monkeypatch):
    """Blocks may have taken all that the host grants: noise, timesteps and pictures would have ended the clip."""
    card, tensor, real = torch.device("cuda"), torch.arange(4.0), torch.empty
    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    monkeypatch.setattr(
        torch, "empty", lambda *given, **how: (refused if how.get("pin_memory") else real)(*given, **how)
    )
    monkeypatch.setattr(offload, "to_device", lambda tensor, device: (tensor, device))
    assert offload.sent(tensor, card) == (tensor, card)
    assert torch.equal(offload.leaving(tensor, card)(), tensor)


def test_a_host_that_refuses_a_large_arena_still_locks_what_it_grants():
    """As under WSL2: 4 MiB may be locked in all, and the first request is for more."""
    network = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))  # 1 MiB each
    before = [layer.weight.detach().clone() for layer in network]
    granted = []

    def make(n_bytes):
        if sum(granted) + n_bytes > 4 << 20:
            raise RuntimeError("CUDA error: out of memory")
        granted.append(n_bytes)
        return torch.empty(n_bytes, dtype=torch.uint8)

    page_lock([network], make)
    assert sum(granted) == 4 << 20
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(network, before, strict=True))
