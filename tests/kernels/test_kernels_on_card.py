"""What `scripts/first_gpu_minutes` says of the attention loops of a card: numbers, and times beside the model's."""

import pytest
import torch
import triton
from turbodiff_kernels.sage import kernel as sage

from scripts import kernels_on_card
from scripts.sass import Code
from scripts.step_model import CARDS, SHAPES
from tests.kernels.test_aot import printed

LAUNCHED = """
from unittest import mock
import torch
from triton.runtime.jit import JITFunction
from scripts.kernel_launches import record_calls
from scripts.kernels_on_card import attention
from scripts.step_model import SHAPES
from turbodiff_kernels.selfcheck import Inputs
started, named = [], []
def run(kernel, *args, grid, warmup, **options):
    started.append(kernel.__name__)
    assert len(grid) > 1 and options["num_warps"]
def twice(name, start):
    named.append(name)
    start(), start()
with mock.patch.object(JITFunction, "run", run):
    calls = attention(90, Inputs(torch.device("meta"), torch.bfloat16), SHAPES["14B 480p"])
    found = [launch.name for launch in record_calls(90, calls, twice).values()]
assert set(found) == set(named), (found, named)
print(*started)
"""


@pytest.mark.aot
def test_every_launch_of_attention_can_be_timed_under_its_name():
    kernels = printed(LAUNCHED).split()
    assert kernels[::2] == kernels[1::2], "each twice"
    loops = ["attend_kernel"] * 2 + ["attend_hopper_kernel"] * 2 * (triton.__version__ >= "3.7")
    assert [name for name in kernels[::2] if "attend" in name] == loops


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(kernels_on_card, "BATCHES", (2,))
    monkeypatch.setattr(kernels_on_card, "LENGTHS", (1, 65))


def test_loops_that_are_right_are_within_their_bound(short):
    found = kernels_on_card.numbers(torch.device("cpu"))
    assert found["wrong"] == []
    assert [*found["loops"]] == ["sage", "sagesla", "hopper sage", "hopper sagesla"]
    assert all(0 <= off < 0.1 for by_shape in found["loops"].values() for off in by_shape.values())


def test_a_loop_that_is_wrong_for_the_second_clip_is_named(short, monkeypatch):
    loop = sage.attend_hopper

    def wrong(q, k, v, out, *args, **more):
        loop(q, k, v, out, *args, **more)
        out[1] *= 1.25

    monkeypatch.setattr(sage, "attend_hopper", wrong)
    wrong_ones = kernels_on_card.numbers(torch.device("cpu"))["wrong"]
    assert wrong_ones == [f"hopper {kind} 2x{length}" for kind in ("sage", "sagesla") for length in (1, 65)]


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA H200", 90, "H200"), ("NVIDIA H100 80GB HBM3", 90, "H100"), ("NVIDIA GH200 480GB", 90, "H100"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100"), ("NVIDIA GeForce RTX 5090", 120, "5090"), ("NVIDIA B200", 100, ""),
    ],
)  # fmt: skip
def test_a_card_is_found_by_its_name_or_architecture(name, capability, expected):
    assert kernels_on_card.card_name(name, capability) == expected


def test_a_pass_takes_its_bytes_and_a_sparse_loop_its_share_of_the_blocks():
    card, shape = CARDS["H200"], SHAPES["14B 480p"]
    code = Code.nothing()._replace(instructions=100)
    row = kernels_on_card.Measured("sage: p", "", 32, 0, 0, 8, {}, 10**4, 10**9, code)
    copy_ms = 10**9 / card.copy_tb_s / 1e9
    assert copy_ms <= kernels_on_card.model_ms(row, card, shape) < 2 * copy_ms
    loop = code._replace(loop_instructions=50, loop_matrix={"QGMMA.64x128x32.F32.E4M3.E4M3": 8})
    loops = [
        row._replace(name=f"{kind}: attend_kernel", constants={"ROWS": 128, "DIM": 128}, code=loop)
        for kind in ("sage", "sagesla")
    ]
    dense_ms, sparse_ms = (kernels_on_card.model_ms(row, card, shape) for row in loops)
    assert dense_ms / sparse_ms == pytest.approx(10, rel=0.05)
