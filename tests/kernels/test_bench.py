"""The bench script runs, compares what it says, and never passes off a figure that was not measured on a GPU."""

import json
import math

import pytest
import torch

from scripts import bench_kernels
from scripts.bench_timing import Clock, Job, measure, table


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_measured_and_it_says_so(capsys):
    assert bench_kernels.main([]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "No CUDA device: nothing was measured."
    assert json.loads(last)["measured"] is False


@pytest.mark.parametrize("group", ["channel_norm", "attention"])
def test_every_contender_runs_at_toy_size_and_agrees(group, capsys):
    assert bench_kernels.main(["--smoke", "--only", group]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["measured"] is False
    for job in report["jobs"]:
        for timing in job["timings"]:
            assert not timing["error"], timing
            assert timing["relative_l2"] is None or timing["relative_l2"] < 0.05


def test_a_contender_that_cannot_run_is_listed_without_a_time():
    def missing():
        raise ImportError("no module named flash")

    job = Job("sum", {"ours": lambda: torch.ones(3).sum(), "theirs": missing}, traffic_bytes=12.0)
    ours, theirs = measure(job, Clock(torch.device("cpu")), rounds=3, warmup=0)
    assert ours.rounds == 3
    assert theirs.rounds == 0
    assert "not run: ImportError: no module named flash" in table(job, [ours, theirs], 1.0, 1.0)


def test_contenders_take_turns():
    turns = []
    job = Job("turns", {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, traffic_bytes=1.0)
    timings = measure(job, Clock(torch.device("cpu")), rounds=2, warmup=1)
    assert turns[-6:] == ["a", "b"] * 3
    assert all(t.low_ms <= t.median_ms <= t.high_ms and math.isfinite(t.best_ms) for t in timings)
