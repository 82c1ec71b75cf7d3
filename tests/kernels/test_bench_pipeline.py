"""The pipeline bench runs every contender on the same weights, and never passes off a figure that was not measured."""

import json

import pytest
import torch

from scripts import bench_pipeline
from tests.kernels import stub_turbodiffusion
from tests.kernels.test_bench import forget_modules


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_nothing_is_measured_and_it_says_so(capsys):
    assert bench_pipeline.main(["--stage", "dit"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == "No CUDA device: nothing was measured."
    assert json.loads(last) == {"bench": "pipeline", "measured": False, "reason": "no CUDA device"}


@pytest.mark.parametrize(("stage", "contenders"), [("dit", 7), ("vae", 3), ("text", 2)])
def test_every_contender_of_a_stage_runs_at_toy_size(stage, contenders, capsys, monkeypatch):
    monkeypatch.delenv("TURBODIFF_KERNELS", raising=False)
    assert bench_pipeline.main(["--dry", "--stage", stage]) == 0
    report = last_line(capsys)
    (job,) = report["jobs"]
    assert report["measured"] is False
    assert len(job["timings"]) == contenders
    for timing in job["timings"]:
        assert not timing["error"], timing
        exact = timing["name"] in ("diffusers", "turbodiff", "turbodiff dense", "turbodiff, tiled")
        assert timing["relative_l2"] < (1e-4 if exact else 1.0), timing


def test_turbodiffusions_own_network_is_a_contender_given_its_path(capsys, tmp_path, monkeypatch):
    forget_modules(monkeypatch, "SLA", "rcm", "rcm.networks", "rcm.networks.wan2pt1")
    path = stub_turbodiffusion.make(tmp_path)
    assert bench_pipeline.main(["--dry", "--stage", "dit", "--turbodiffusion", path]) == 0
    timings = {timing["name"]: timing for timing in last_line(capsys)["jobs"][0]["timings"]}
    assert timings["TurboDiffusion original"]["relative_l2"] < 1e-5
    assert not timings["TurboDiffusion sla"]["error"], "its projections are those of our weights"
    assert "Install SpargeAttn first" in timings["TurboDiffusion sagesla"]["error"]


def test_what_stands_in_for_flash_attns_rotary_is_our_own_rotation():
    from turbodiff_kernels.norm.reference import rms_norm_rope

    x, angles = torch.randn(2, 7, 3, 64), torch.randn(7, 32)
    x = torch.nn.functional.rms_norm(x.flatten(2), (192,), eps=0)
    got = bench_pipeline._rotary(x.unflatten(-1, (3, 64)), angles.cos(), angles.sin())
    assert torch.allclose(got.flatten(2), rms_norm_rope(x, torch.ones(192), angles.cos(), angles.sin(), 0), atol=1e-5)


def test_a_module_that_is_not_there_is_named_and_gets_no_time(capsys, tmp_path, monkeypatch):
    forget_modules(monkeypatch, "SLA", "rcm", "rcm.networks", "rcm.networks.wan2pt1")
    assert bench_pipeline.main(["--dry", "--stage", "dit", "--turbodiffusion", str(tmp_path)]) == 0
    timings = {timing["name"]: timing for timing in last_line(capsys)["jobs"][0]["timings"]}
    assert timings["TurboDiffusion sagesla"]["error"].startswith("ModuleNotFoundError")
    assert timings["TurboDiffusion sagesla"]["rounds"] == 0 and not timings["turbodiff dense"]["error"]


def test_work_of_a_step_is_that_of_its_products():
    """Wan 1.3B, 32,760 tokens: 6 d^2 + 2 d f weights a token, and L^2 scores and sums."""
    flop = bench_pipeline.step_flop(bench_pipeline.MODELS["1.3b"], 32760)
    assert flop == pytest.approx(30 * (2 * 32760 * (6 * 1536**2 + 2 * 1536 * 8960) + 4 * 32760**2 * 1536), rel=0.02)
