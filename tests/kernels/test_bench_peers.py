"""Peers run on the same tensors in one process; one that is not installed is named, one that fails says why."""

import importlib
import json

import torch

from scripts import bench_peers, bench_timing

STUB = """
def sageattn(q, k, v, tensor_layout, is_causal):
    raise RuntimeError("no kernel for this card")
"""


def test_every_part_runs_at_toy_size_and_says_who_is_missing(capsys, monkeypatch, tmp_path):
    (tmp_path / "sageattention.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delenv("TURBODIFF_KERNELS", raising=False)
    assert bench_peers.main(["--toy", "--rounds", "1", "--json"]) == 0
    about, *parts = map(json.loads, capsys.readouterr().out.splitlines())
    assert "sageattention" not in about["missing"] and "diffusers" not in about["missing"]
    assert [part["part"] for part in parts] == list(bench_peers.PARTS)
    for part in parts:
        first, *others = part["contenders"]
        assert first["name"] == "diffusers" and first["ratio"] == 1 and others, part
        for row in others:
            error = "RuntimeError: no kernel for this card" if row["name"] == "sageattention" else None
            assert row.get("error") == error and ("ratio" in row) == (error is None), row


def test_our_block_and_diffusers_compute_the_same_from_the_same_tensors():
    with torch.inference_mode():
        calls = bench_peers.Bench(bench_peers.bench_pipeline.TINY, torch.device("cpu"), torch.float32).block()
        theirs, ours = (call() for call in calls.values())
    assert bench_timing.relative_l2(ours, theirs) < 1e-5
