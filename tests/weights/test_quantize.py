"""quantize writes the published -quant layout from any layout, in little memory; a failure leaves nothing behind."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from turbodiff_kernels.quant import reference

from tests.weights import tiny
from tests.weights.test_load import forward, load
from turbodiff.models.wan_dit import WanDiT
from turbodiff.spec.errors import FileError
from turbodiff.weights.detect import open_checkpoint
from turbodiff.weights.quantize import quantize, quantize_band

SOURCES = [name for name in tiny.LAYOUTS if not name.endswith("quant")]


@pytest.mark.parametrize("layout", SOURCES)
def test_every_layout_becomes_the_same_quant_file(layout: str, tmp_path: Path) -> None:
    source = tiny.write(layout, tmp_path)
    target = quantize(source, tmp_path / "q.safetensors")
    checkpoint = open_checkpoint(target)
    assert (checkpoint.layout, checkpoint.quant) == ("turbowan-quant", True)
    model = load(target, sla=False)
    weight = load(source, sla=False).blocks[1].ffn[2].weight
    expected, scale = reference.quantize_tiles(weight)
    assert torch.equal(model.blocks[1].ffn[2].int8_weight, expected)
    assert torch.equal(model.blocks[1].ffn[2].scale, scale)


def test_keys_shapes_and_dtypes_are_those_of_the_published_files(tmp_path: Path) -> None:
    target = quantize(tiny.write("turbowan.pth", tmp_path), tmp_path / "q.safetensors")
    with torch.device("meta"):
        wanted = WanDiT(replace(tiny.CONFIG, quant_linear=True)).state_dict()
    tensors = open_checkpoint(target).header.tensors
    assert {name: info.shape for name, info in tensors.items()} == {n: tuple(v.shape) for n, v in wanted.items()}
    kinds = {name.removeprefix("blocks.0."): info.dtype for name, info in tensors.items()}
    assert kinds["self_attn.q.int8_weight"] == "I8"
    assert kinds["self_attn.q.scale"] == kinds["norm3.weight"] == kinds["modulation"] == "F32"
    assert kinds["self_attn.q.bias"] == kinds["head.head.weight"] == "BF16"


def test_the_quantised_model_is_close_to_the_original(tmp_path: Path) -> None:
    source = tiny.write("turbowan.pth", tmp_path)
    original, quantised = forward(load(source)), forward(load(quantize(source, tmp_path / "q.safetensors")))
    assert 0 < (original - quantised).norm() / original.norm() < 0.03


@pytest.mark.parametrize("shape", [(128, 256), (100, 130), (1, 7)])
def test_a_band_is_quantised_like_the_kernels_reference(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(shape) * torch.logspace(-6, 3, shape[1])
    rows[0, 0] = 0.5 * 128 / 127  # a tie after scaling, where the tile allows
    expected, scale = reference.quantize_tiles(rows)
    band, band_scale = quantize_band(rows)
    assert torch.equal(band, expected) and torch.equal(band_scale, scale[0])


def test_progress_ends_at_the_size_of_the_tensors(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = quantize(
        tiny.write("wan.pth", tmp_path), tmp_path / "q.safetensors", progress=lambda *numbers: seen.append(numbers)
    )
    assert seen[-1] == (open_checkpoint(target).header.nbytes,) * 2
    assert seen == sorted(seen)


@pytest.mark.parametrize("target", ["q.pth", "there.safetensors", "no/folder/q.safetensors"])
def test_a_target_that_cannot_be_written_leaves_nothing(target: str, tmp_path: Path) -> None:
    source = tiny.write("wan.pth", tmp_path)
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileError) as caught:
        quantize(source, tmp_path / target)
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious"


def test_a_quantised_source_and_a_broken_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="quantised already"):
        quantize(tiny.write("turbowan-quant", tmp_path), tmp_path / "q.safetensors")
    state = tiny.dit_state()
    del state["blocks.1.cross_attn.v.weight"]
    with pytest.raises(FileError, match=r"blocks\.1\.cross_attn\.v\.weight"):
        quantize(tiny.save_pth(state, tmp_path / "b.pth"), tmp_path / "q.safetensors")
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))


MEASURE = """
import sys
from turbodiff.weights.quantize import quantize
quantize(sys.argv[1], sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""  # ru_maxrss would count the memory of the process that started this one


@pytest.mark.slow
def test_memory_stays_within_three_of_the_largest_tensor_and_600_mb(tmp_path: Path) -> None:
    state = {}
    with torch.device("meta"):
        shapes = WanDiT(replace(tiny.CONFIG, dim=5120, ffn_dim=13824, num_heads=40, text_dim=4096)).state_dict()
    for name, value in shapes.items():
        state[name] = torch.zeros(value.shape, dtype=torch.bfloat16)
    largest = max(value.nbytes for value in state.values())
    source = tiny.save_pth(state, tmp_path / "a.pth")
    del state
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "q.safetensors")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert peak <= 3 * largest + 600e6, f"{peak / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB"
