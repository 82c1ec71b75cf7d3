"""A neighbour that grows and shrinks while a clip is denoised: blocks leave the card and come back, no bit changes."""

import gc
import random
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from turbodiff_kernels.gemm import reference as gemm
from turbodiff_kernels.quant.reference import TILE, quantize_tiles

from tests.runtime.small_card import CARD, CardCache, CardLedger, card, write_toy
from tests.test_tiny import EventList, NoCommands
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.plan.planner import plan_request
from turbodiff.runtime import elastic
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.denoise import Network, denoise
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.offload import bytes_away, dit_on_device
from turbodiff.runtime.text import TextRows
from turbodiff.spec.errors import OutOfMemoryError
from turbodiff.spec.plan import Levers
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import inventory

MB = 10**6


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """What other tests left is not looked through whenever memory is given back."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


CONFIG = WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=7, text_dim=64)
FULL_CARD = "CUDA out of memory. Tried to allocate 2 MiB"


@pytest.mark.parametrize(("ffn_chunks", "text_keys"), [(1, "kept"), (2, "recomputed")])
@pytest.mark.parametrize("resident", [7, 3, 0])
def test_blocks_may_leave_and_come_back_between_any_two_blocks_with_the_same_bits(resident, ffn_chunks, text_keys):
    """And what is on the card is what the stream says."""
    torch.manual_seed(0)
    dit, ledger, chance = WanDiT(CONFIG).eval().requires_grad_(False), CardLedger("cpu"), random.Random(3)
    latents, rows = torch.randn(1, 16, 2, 4, 4), TextRows(torch.randn(1, 8, 64), 8)
    ledger.ignore(dit)
    plain = Levers(experts="streamed", blocks_resident=resident, ffn_chunks=ffn_chunks)
    changed = plain.model_copy(update={"text_keys": text_keys})

    class Restless:
        """Changes how many blocks stay before everything that is computed."""

        def __init__(self, blocks):
            self.blocks, self.sizes = blocks, set()

        def run(self, work):
            others = bytes_away([dit]) - self.here()
            self.blocks.resize(chance.randint(0, 7))
            assert bytes_away([dit]) - others == self.here()
            assert len(self.blocks.slots) <= 7 - self.blocks.resident
            self.sizes.add(self.blocks.resident)
            return work()

        def here(self):
            return self.blocks.resident * self.blocks.block_bytes

    def velocities(restless):
        levers = changed if restless else plain
        with torch.inference_mode(), ledger, dit_on_device(dit, CARD, levers) as blocks:
            restless = Restless(blocks) if restless else None
            placed = PlacedDit(dit, blocks, ())
            network = Network(placed, CARD, rows, levers=levers, elastic=restless)
            found = [network(latents, torch.full((1, 1), t)) for t in (900.0, 600.0, 300.0)]
            if restless:
                assert restless.sizes == set(range(8))
        assert bytes_away([dit]) == 0
        return found

    assert all(map(torch.equal, velocities(False), velocities(True)))


@pytest.fixture
def denoised(tmp_path, monkeypatch):
    """Denoise the toy on a card; returns (latents, events). `changes` are made to what is there before it begins."""
    write_toy(tmp_path / "toy", 4)
    monkeypatch.setenv("TURBODIFF_CONFIGS", str(tmp_path / "toy" / "configs"))
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "toy" / "models"))
    fixed = {"model": "toy", "steps": 2, "num_frames": 5, "seed": 7, "size": "64x64", "prompt": "a red circle"}
    models, rows = CardCache(), TextRows(torch.randn(1, 512, 128, generator=torch.Generator().manual_seed(1)), 8)

    def run(before=lambda number: None, shown=lambda events: None, total=40 * MB, **fields):
        request = make_request({**fixed, "quant_linear": "off", "pinned": "quant_linear,num_frames,size", **fields})
        plan, events = plan_request(request, card(total), inventory(), text_cached=True), EventList()
        models.warm(plan.request)
        places = (tmp_path / "outputs", tmp_path / "state")
        attempt = Attempt(1, 1, plan, *places, models, events, NoCommands, machine=card(total))
        with models.insert(None, lambda: shown(events)) as ledger:
            ledger.before = before
            latents = denoise(attempt, rows, None)
        run.allocations, run.plan = ledger._numbers, plan
        return latents, events

    return run


def of_the_network():
    """Whether what is being allocated is the network's, and not of the sampler: that would run out as ever."""
    frames = traceback.extract_stack()
    return {("elastic.py", "run"), ("offload.py", "resize")} & {
        (Path(f.filename).name, f.name) for f in frames
    } != set()


@pytest.mark.parametrize("fields", [{}, {"quant_linear": "on"}, {"guidance": 2.0}], ids=["plain", "int8", "guided"])
def test_an_allocation_that_fails_once_repeats_its_block_and_changes_no_bit(denoised, fields):
    undisturbed, events = denoised(**fields)
    assert not events.of("notice")
    for moment in range(1, denoised.allocations - 20, denoised.allocations // 12):
        failed = []

        def before(number, moment=moment, failed=failed):
            if number >= moment and not failed and of_the_network():
                failed.append(number)
                raise torch.OutOfMemoryError(FULL_CARD)

        latents, events = denoised(before, **fields)
        assert failed and torch.equal(latents, undisturbed), moment
        told = [notice.key for notice in events.of("notice")]
        assert told in (["block_repeated"], ["blocks_left"]), moment  # while computing, or while it was being placed
        assert all(notice.numbers["bytes"] > 0 for notice in events.of("notice"))


def test_where_no_block_is_left_to_leave_memory_that_ran_out_ends_the_attempt(denoised):
    tries = []

    def before(number):
        if number > 400:
            tries.append(number)
            raise torch.OutOfMemoryError(FULL_CARD)

    with pytest.raises(OutOfMemoryError) as caught:
        denoised(before)
    assert (caught.value.field, caught.value.code, caught.value.goes_on) == ("denoise", "oom", True)
    assert 2 <= len(tries) <= 5  # six blocks: 3, 1, 0 stay


def of_other_memory(error, denoised):
    def before(number):
        if number == 400:
            raise error

    with pytest.raises(OutOfMemoryError) as caught:
        denoised(before)
    return caught.value


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA driver error: out of memory"), MemoryError("bad")], ids=["driver", "host"]
)
def test_a_process_that_is_not_sound_repeats_nothing(denoised, error):
    assert not of_other_memory(error, denoised).goes_on


@pytest.fixture
def always(monkeypatch):
    """Free memory is asked for between any two blocks."""
    monkeypatch.setattr(elastic, "READ_EVERY_S", 0)


def after_readings(*budgets):
    """What the card shows, one budget for every reading; the last one stays."""
    left = list(budgets)
    return lambda events: left.pop(0) if len(left) > 1 else left[0]


def test_blocks_leave_when_less_is_free_and_come_back_when_it_stays_so(denoised, always):
    undisturbed, _ = denoised()
    much, less = 40 * MB, denoised.plan.peak_bytes * 8 // 10
    at_the_phase = (much, much)
    latents, events = denoised(shown=after_readings(*at_the_phase, much, less, less, much))
    left, back = events.of("notice")
    assert (left.key, back.key) == ("blocks_left", "blocks_back")
    assert left.numbers["bytes"] == back.numbers["bytes"] > 0
    assert left.numbers["resident"] < back.numbers["resident"] == back.numbers["blocks"] == 6
    assert torch.equal(latents, undisturbed)


def test_a_neighbour_that_comes_and_goes_all_the_time_moves_blocks_once(denoised, always):
    much, less = 40 * MB, denoised()[1] and denoised.plan.peak_bytes * 8 // 10
    _, events = denoised(shown=after_readings(much, much, *[less, much, much] * 40))
    assert [notice.key for notice in events.of("notice")] == ["blocks_left"]


def test_room_that_is_just_enough_brings_nothing_back(denoised, always):
    """Blocks come back only to where a plan would fit with ease."""
    denoised()
    peak = denoised.plan.peak_bytes
    _, events = denoised(shown=after_readings(peak, peak, peak * 8 // 10, int(peak * 1.05)))
    assert [notice.numbers["resident"] for notice in events.of("notice")][-1] < 6


def test_free_memory_is_asked_for_once_a_second_and_not_for_every_block(denoised, monkeypatch):
    asked, now_s = [], [0.0]
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now_s[0])
    denoised(shown=lambda events: asked.append(1) or 40 * MB)
    at_the_phase, once = 2, 1
    assert len(asked) == at_the_phase + once
    asked.clear()
    denoised(lambda number: now_s.__setitem__(0, now_s[0] + 0.01), shown=lambda events: asked.append(1) or 40 * MB)
    assert len(asked) - at_the_phase <= denoised.allocations / 100 + 1


def test_after_memory_ran_out_blocks_wait_longer_before_they_come_back(denoised, always):
    failures = iter([300, 500])
    at = [next(failures)]

    def before(number):
        if number == at[0]:
            at[0] = next(failures, 0)
            raise torch.OutOfMemoryError(FULL_CARD)

    undisturbed, _ = denoised(steps=4)
    latents, events = denoised(before, shown=partial(lambda budget, events: budget, 40 * MB), steps=4)
    keys = [notice.key for notice in events.of("notice")]
    assert keys[0] == "block_repeated" and keys.count("block_repeated") == 2 and "blocks_back" in keys
    assert torch.equal(latents, undisturbed)


def test_the_reference_of_an_int8_sum_needs_no_more_after_its_first_part():
    """Its parts are added one after the other; an out-of-memory between two would leave half of a sum."""

    def beside(tokens):
        ledger = CardLedger("meta")
        with torch.device("meta"), torch.inference_mode():
            x, gate, bias = torch.empty(1, tokens, 256, dtype=torch.bfloat16), torch.empty(1, 1, 256), torch.empty(256)
            rows, weight = quantize_tiles(torch.empty(tokens, 512)), quantize_tiles(torch.empty(256, 512))
            for tensor in (x, gate, bias, *rows, *weight):
                ledger.see(tensor)
            arguments = ledger.live_bytes
            with ledger:
                gemm.int8_linear_add_(x, gate, *rows, *weight, bias)
        return ledger.peak_bytes - arguments

    assert beside(3 * gemm.ROW_TILES * TILE) == beside(gemm.ROW_TILES * TILE)
