"""Several processes that share one network give its velocity: bit for bit in float32, and controls show a fault."""

import fcntl
import json
import os

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.rank_processes import said_by
from turbodiff.models.parallel import SequenceParallel
from turbodiff.spec.shapes import INT8_TILE, token_shares

aten = torch.ops.aten

KINDS = ("dense", "sage", "sla", "sagesla")
GROUPED = [f"{kind} groups of heads" for kind in KINDS]
EXACT = [*KINDS, *GROUPED, "int8 tiles", "int8 tokens", "picture", "condition, int8 tiles", "batch of two"]


@pytest.fixture(scope="module", params=[2, 3])
def measured(request, tmp_path_factory):
    """Every case of `parallel_rank` on so many processes, in one start of them for all workers of a parallel run."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    said = shared / f"parallel_rank_{request.param}.json"
    with said.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            folder = tmp_path_factory.mktemp("ranks")
            said.write_text(json.dumps(said_by("tests.models.parallel_rank", request.param, folder)))
    return json.loads(said.read_text())


def test_the_velocity_is_that_of_one_process_bit_for_bit(measured):
    assert {name: measured[name] for name in EXACT} == dict.fromkeys(EXACT, 0.0)


def test_strips_of_a_picture_are_the_picture_and_in_tiles_what_tiles_make_of_it(measured):
    assert measured.get("decode", 0.0) == measured.get("encode", 0.0) == 0.0
    # other tiles, other sizes of convolutions: the bound of tests/models/test_vae.py for any tiles
    assert max(measured.get("decode in tiles", 0.0), measured.get("encode in tiles", 0.0)) < 1e-4


def test_controls_that_must_fail_do(measured):
    assert all(value > 1e-6 for name, value in measured.items() if name.startswith("control"))


def test_bf16_differs_by_what_another_number_of_rows_gives_in_one_process(measured):
    """Also where every linear layer rounds by its number of rows, as on GPUs; most CPUs do not."""
    for kind in KINDS:
        assert measured[f"{kind} bf16"] <= min(
            1.5 * measured[f"{kind} bf16 in rows"], measured[f"{kind} bf16 rounding"]
        )
    for kind in ("dense", "sagesla"):
        assert 0 < measured[f"{kind} bf16, rounded by rows"] <= 1.5 * measured[f"{kind} bf16 in rows, rounded by rows"]


def test_an_int8_exchange_costs_less_than_a_thousandth(measured):
    for name in (*[f"{kind} int8 exchange" for kind in KINDS], "int8 exchange beside a loud head"):
        assert 0 < measured[name] < 1e-3, name
    assert measured["too coarse: int8 exchange with a scale per token"] > 1e-3


class Copies(TorchDispatchMode):
    """Counts the elements that are copied."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.copy_, aten.clone, aten.cat, aten._to_copy):
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("head_groups", [1, 2])
def test_an_exchange_copies_what_it_sends_and_what_it_gives_once(head_groups):
    """q, k and v lie by token and leave by rank, the result is put by token; what attention gives leaves as it lies.
    With a process group that sends nothing."""
    ranks, tokens, heads, width = 2, 512, 4, 128
    share = torch.empty(1, tokens // ranks, heads * width)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with Copies() as copies:
            parallel = SequenceParallel(0, ranks, head_groups=head_groups)
            parallel.attend(lambda q, k, v: torch.empty_like(q), share.clone(), share, share, heads, tokens)
    finally:
        dist.destroy_process_group()
    assert copies.elements - share.numel() == 4 * share.numel(), "q, k, v and the result"


@pytest.mark.parametrize("tokens", [385, 1025, 32760, 75600])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_are_whole_tiles_that_cover_all_tokens_and_differ_by_one_tile(tokens, ranks):
    shares = token_shares(tokens, ranks)
    assert sum(shares) == tokens and len(shares) == ranks and min(shares) > 0
    assert all(share % INT8_TILE == 0 for share in shares[:-1])
    assert max(shares) - min(shares) < 2 * INT8_TILE
