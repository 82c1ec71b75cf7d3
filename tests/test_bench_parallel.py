"""`scripts/bench_parallel.py`: its table is the plan's own prediction."""

import pytest

from scripts import bench_parallel
from tests.plan.machines import disk, gpu, machine
from turbodiff.plan.links import link_of
from turbodiff.plan.planner import plan_request
from turbodiff.plan.roofline import speed_of
from turbodiff.plan.shared_clip import MIN_SPEEDUP, shared
from turbodiff.plan.weight_sizes import weights_of
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GB
from turbodiff.spec.request import make_request


def rows(link_gb_s, *parts):
    """Rows of the table as words, by (model, size, cards, what is sent)."""
    _, head, *lines = bench_parallel.table(link_gb_s * GB, *parts)
    assert head.split()[:7] == ["model", "size", "cards", "sent", "GB/pass", "s/pass", "s"]
    words = [line.split() for line in lines]
    return {(one[0], one[1], int(one[2]), one[3]): one[4:] for one in words}


def test_every_row_is_what_the_plan_predicts_of_the_same_parts():
    found = rows(40, 24.0, 6.0, 1.5, 4)
    cards = {name: sorted({key[2] for key in found if key[0] == name}) for name in bench_parallel.MODELS}
    assert cards == {"wan2.1-1.3b": [2, 3, 4, 6], "wan2.1-14b": [2, 4, 5, 8], "wan2.2-t2v-a14b": [2, 4, 5, 8]}
    for (name, size, ranks, sent), row in found.items():
        tokens, width = bench_parallel.SIZES[size]
        exchange = "full" if sent == "bf16" else "int8"
        parts = {"split_s": 24.0, "strips_s": 6.0, "serial_s": 1.5, "forwards": 4, "link_bytes_s": 40 * GB}
        told = shared(find_model(name).dit, tokens, ranks, width=width, exchange=exchange, **parts)
        figures = told.sent_bytes / GB, told.exchange_s, told.seconds, told.speedup, told.efficiency, told.side_by_side
        assert [float(word) for word in row[:6]] == pytest.approx(figures, abs=0.051), (name, size, ranks)
        assert told.exchange_s >= told.sent_bytes / (40 * GB)
        assert ("not" in row) == (told.speedup < MIN_SPEEDUP)


def test_the_seconds_of_the_transformer_are_those_of_a_plan_for_two_cards():
    """Of which each card copies all weights, and which counts whole tiles of tokens."""
    here = machine(*[gpu(80, index=index, name="NVIDIA H100 80GB HBM3") for index in range(2)])
    fields = {"prompt": "a cat", "model": "wan2.1-14b", "resolution": "720p"}
    speed = speed_of(here.gpus[0], None)
    copied_s = weights_of(find_model("wan2.1-14b"), False, 2).dit / speed.pcie_bytes_s
    for sent, exchange in (("bf16", "full"), ("int8", "int8")):
        asked = [make_request({**fields, "exchange": exchange, "cards": cards}) for cards in (1, 2)]
        plans = [plan_request(one, here, disk(), policy="never", loaded={"dit"}) for one in asked]
        alone_s, both_s = (phase.seconds for plan in plans for phase in plan.phases if phase.name == "denoise")
        link_gb_s = link_of(here.gpus[0], 2).bytes_s / GB
        parts = alone_s - copied_s, 0.0, copied_s, plans[0].request.steps, speed.memory_bytes_s
        row = rows(link_gb_s, *parts)["wan2.1-14b", "720p", 2, sent]
        assert float(row[2]) == pytest.approx(both_s, rel=0.01, abs=0.05)
