"""verify says what a file is and what is wrong with it."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.weights import tiny
from tests.weights.test_locate import hollow
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.models.wan_dit import WanDiT
from turbodiff.weights import keymaps, locate
from turbodiff.weights.locate import verify


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(locate, "bundled_root", lambda: tmp_path / "no-demo")


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("sla", [False, True])
def test_the_expected_names_are_those_of_the_network(quant: bool, sla: bool) -> None:
    with torch.device("meta"):
        state = WanDiT(replace(tiny.CONFIG, sla=sla, quant_linear=quant)).state_dict()
    assert keymaps.parameter_names("dit", 2, quant=quant, sla=sla) == set(state)


def test_the_expected_names_are_those_of_the_text_encoder() -> None:
    from tests.weights.test_components import TEXT

    with torch.device("meta"):
        state = make_text_encoder(TEXT).state_dict()
    assert keymaps.parameter_names("text_encoder", TEXT.num_layers) == set(state)


def test_a_published_file_is_reported_without_a_problem(tmp_path: Path) -> None:
    path = hollow("Wan2.1-1.3B", tmp_path / "a-480P-quant.pth", quant=True)
    report = verify(path, sha256=True)
    assert (report.component, report.layout, report.models) == ("dit", "turbowan-quant", ("wan2.1-1.3b",))
    assert (report.tensors, report.problems) == (1185, ())
    assert report.dtypes == {"BF16": 885, "I8": 300}
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_without_a_tensor_and_without_a_model_says_both(tmp_path: Path) -> None:
    state = tiny.dit_state()
    del state["blocks.1.norm3.bias"]
    report = verify(tiny.save_pth(state | {"blocks.0.k_img": torch.zeros(1)}, tmp_path / "a.pth"))
    assert [problem.split(",")[0] for problem in report.problems] == [
        "1 tensors are missing",
        "1 tensors have no place",
        "no model of configs/models has these sizes: {'dim': 128",
    ]
    assert "blocks.1.norm3.bias" in report.problems[0]


def test_a_folder_of_shards_is_one_checkpoint(tmp_path: Path) -> None:
    report = verify(tiny.write("diffusers shards", tmp_path), sha256=True)
    assert report.layout == "diffusers"
    assert len(report.sha256.split()) == 2
