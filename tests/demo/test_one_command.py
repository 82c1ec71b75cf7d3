"""One command trains everything: here with so few steps that nothing is learnt, but every stage runs and fits."""

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from scripts.train_demo import __main__ as command
from scripts.train_demo import distill, train_dit, train_lora, train_vae
from turbodiff.models import attention
from turbodiff.spec.models import find_model
from turbodiff.weights.locate import inventory

TINY = (
    "--clips 16 --text-steps 2 --vae-steps 1 1 1 --dit-steps 2 --distill-steps 2 --i2v-steps 2 --lora-steps 2"
    " --threads 1 --no-compile"
)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Small batches in float32: a CPU without instructions for bfloat16 would take half an hour."""
    monkeypatch.setattr(attention, "_sdpa", attention._sdpa)  # training swaps it for the process
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setattr(torch, "autocast", lambda *device_and_dtype, **enabled: nullcontext())
    monkeypatch.setattr(train_vae, "latent_statistics", partial(train_vae.latent_statistics, clips=4))
    monkeypatch.setattr(train_vae, "FRAME_BATCH", 4)
    for trainer in (train_dit, distill, train_lora):
        monkeypatch.setattr(trainer, "BATCH", 2)


@pytest.mark.slow
def test_one_command_trains_writes_and_continues(tmp_path, quick) -> None:
    words = ["--folder", str(tmp_path / "work"), "--bundle", str(tmp_path / "bundle"), *TINY.split()]
    command.main(words)
    found = inventory([tmp_path / "bundle"])
    for name in ("demo", "demo-i2v"):
        needed = {file.component for file in find_model(name).files}
        assert needed == {file.component for file in found.files if file.model == name and str(tmp_path) in file.path}
    assert all(value.isfinite().all() for value in load_file(tmp_path / "work" / "yellow_lora.safetensors").values())
    before = (tmp_path / "bundle" / "dit_t2v.safetensors").read_bytes()
    command.main(words)  # everything is done already
    assert (tmp_path / "bundle" / "dit_t2v.safetensors").read_bytes() == before


def test_logs_become_a_picture(tmp_path) -> None:
    for name in ("dit", "i2v_high"):
        lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (20, 40, 60)]
        (tmp_path / f"{name}_log.jsonl").write_text("\n".join(lines))
    command.draw_curves(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0
