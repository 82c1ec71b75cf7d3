"""Several processes that share one network give its velocity: bit for bit in float32, and controls show a fault."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from turbodiff.spec.shapes import INT8_TILE, token_shares

ROOT = Path(__file__).parents[2]
KINDS = ("dense", "sage", "sla", "sagesla")
EXACT = [*KINDS, "groups of heads", "int8 tiles", "int8 tokens", "picture", "batch of two"]


@pytest.fixture(scope="module", params=[2, 3])
def measured(request, tmp_path_factory):
    """Every case of `parallel_rank` on so many processes, all in one start of them."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    command = [sys.executable, "-m", "tests.models.parallel_rank"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(request.param), str(store)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for rank in range(request.param)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * request.param
    return json.loads(said[0])


def test_the_velocity_is_that_of_one_process_bit_for_bit(measured):
    assert {name: measured[name] for name in EXACT} == dict.fromkeys(EXACT, 0.0)


def test_strips_of_a_picture_are_the_picture_and_in_tiles_what_tiles_make_of_it(measured):
    assert measured.get("decode", 0.0) == measured.get("encode", 0.0) == 0.0
    # other tiles, other sizes of convolutions: the bound of tests/models/test_vae.py for any tiles
    assert max(measured.get("decode in tiles", 0.0), measured.get("encode in tiles", 0.0)) < 1e-4


def test_controls_that_must_fail_do(measured):
    assert all(value > 1e-6 for name, value in measured.items() if name.startswith("control"))


def test_bf16_differs_by_less_than_bf16_itself_costs(measured):
    for kind in KINDS:
        assert measured[f"{kind} bf16"] <= measured[f"{kind} bf16 rounding"], kind


def test_an_int8_exchange_costs_less_than_a_thousandth(measured):
    for kind in KINDS:
        assert 0 < measured[f"{kind} int8 exchange"] < 1e-3, kind


@pytest.mark.parametrize("tokens", [385, 1025, 32760, 75600])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_are_whole_tiles_that_cover_all_tokens_and_differ_by_one_tile(tokens, ranks):
    shares = token_shares(tokens, ranks)
    assert sum(shares) == tokens and len(shares) == ranks and min(shares) > 0
    assert all(share % INT8_TILE == 0 for share in shares[:-1])
    assert max(shares) - min(shares) < 2 * INT8_TILE
