"""The bench script runs, compares what it says, and never passes off a figure that was not measured on a GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import bench_kernels, bench_timing
from scripts.bench_timing import Clock, Job, measure, table
from tests.kernels import stub_turbodiffusion


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_measured_and_it_says_so(capsys):
    assert bench_kernels.main([]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "No CUDA device: nothing was measured."
    assert json.loads(last)["measured"] is False


@pytest.mark.parametrize("group", bench_kernels.GROUPS)
def test_every_contender_runs_at_toy_size_and_agrees(group, capsys):
    assert bench_kernels.main(["--dry", "--only", group]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["measured"] is False
    for job in report["jobs"]:
        for timing in job["timings"]:
            assert not timing["error"], timing
            assert timing["relative_l2"] is None or timing["relative_l2"] < 0.05


def forget_modules(monkeypatch, *names):
    """A stub must not stay importable for other tests."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


def test_turbodiffusions_own_attention_is_a_contender_given_its_path(capsys, tmp_path, monkeypatch):
    forget_modules(monkeypatch, "SLA")
    path = stub_turbodiffusion.make(tmp_path)
    assert bench_kernels.main(["--dry", "--only", "attention", "--turbodiffusion", path]) == 0
    (job,) = [job for job in json.loads(capsys.readouterr().out.splitlines()[-1])["jobs"] if "error" in job["job"]]
    timings = {timing["name"]: timing for timing in job["timings"]}
    assert timings["TurboDiffusion sla"]["relative_l2"] < 1e-3
    assert timings["TurboDiffusion sagesla"]["error"] == "AssertionError: Install SpargeAttn first to enable SageSLA."


def test_a_report_is_kept_after_each_job_so_that_a_limit_costs_one_job_only(tmp_path, monkeypatch):
    """As on a card: the machine stops in the middle of the second job."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = bench_timing.flags("", rounds=1).parse_args(["--dry", "--results", str(tmp_path / "new")])
    options.dry = False
    monkeypatch.setattr(bench_timing, "ceilings", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(bench_timing, "_has_card", lambda: True)

    def jobs(_device):
        yield Job("first", {"a": lambda: torch.ones(3)}, traffic_bytes=1.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_timing.run("kernels", options, jobs)
    (kept,) = (tmp_path / "new").glob("*_kernels.json")
    assert [job["job"] for job in json.loads(kept.read_text())["jobs"]] == ["first"]


@pytest.mark.parametrize("script", ["bench_kernels", "bench_pipeline"])
def test_a_bare_machine_can_start_it(script):
    """torch, triton and transformers, but none of what the page and the requests need."""
    missing = {"pydantic", "gradio", "imageio", "imageio_ffmpeg", "typer", "rich", "psutil", "pynvml", "diffusers"}
    code = (
        f"import sys\nfor name in {sorted(missing)}: sys.modules[name] = None\n"
        f"from scripts import {script}\nprint({script}.main.__doc__)"
    )
    root = Path(bench_kernels.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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
