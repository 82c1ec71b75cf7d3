"""GGUF headers are read without the library; its blocks become numbers with it."""

import struct
import sys
from pathlib import Path

import pytest
import torch

from tests.weights import tiny
from tests.weights.test_load import load
from turbodiff.spec.errors import FileError
from turbodiff.weights.detect import open_checkpoint, read_header
from turbodiff.weights.quantize import quantize


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny.save_gguf(tiny.wan(tiny.dit_state()), tmp_path / "a.gguf")


def test_layout_sizes_and_the_fifth_axis_are_told_from_the_header(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert (checkpoint.layout, checkpoint.numbers["in_dim"]) == ("wan-gguf", 16)
    assert checkpoint.info("patch_embedding.weight").shape == (128, 16, 1, 2, 2)
    assert checkpoint.info("blocks.0.ffn.0.weight").dtype == "GGUF_Q8_0"
    assert checkpoint.info("blocks.0.ffn.0.weight").nbytes == 256 * 128 // 32 * 34


def test_blocks_become_numbers(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    expected = tiny.dit_state()
    model = load(path, sla=False)
    assert torch.equal(model.head.head.weight, expected["head.head.weight"])
    weight = model.blocks[1].self_attn.q.weight
    assert 0 < (weight - expected["blocks.1.self_attn.q.weight"]).abs().max() < 0.002
    quantised = load(quantize(path, tmp_path / "q.safetensors"), sla=False)
    layer = quantised.blocks[1].self_attn.q
    assert (layer.int8_weight * layer.scale - weight).abs().max() <= layer.scale.max()


def test_without_the_library_the_error_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FileError) as caught:
        load(path, sla=False)
    assert caught.value.code == "gguf_missing"
    assert "turbodiff[gguf]" in caught.value.try_instead


@pytest.mark.parametrize(
    ("at", "value", "code"),
    [
        (4, struct.pack("<I", 9), "file_damaged"),
        (8, struct.pack("<Q", 1 << 40), "file_bomb"),
        (16, struct.pack("<Q", 1 << 19), "file_bomb"),
        (24, struct.pack("<Q", 1 << 62), "file_damaged"),
        (24, b"\xff" * 20, "file_damaged"),
    ],
)
def test_a_damaged_header_is_one_clear_error(at: int, value: bytes, code: str, path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)
    with pytest.raises(FileError) as caught:
        read_header(path)
    assert (caught.value.code, str(path) in caught.value.field) == (code, True)


@pytest.mark.parametrize(("damage", "code"), [("drop", "key_missing"), ("reshape", "key_shape")])
def test_a_damaged_tensor_is_named(damage: str, code: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    state = tiny.wan(tiny.dit_state())
    if damage == "drop":
        del state["blocks.1.ffn.0.bias"]
    else:
        state["blocks.1.ffn.0.bias"] = torch.zeros(7)
    with pytest.raises(FileError) as caught:
        load(tiny.save_gguf(state, tmp_path / "a.gguf"), sla=False)
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert "blocks.1.ffn.0.bias" in caught.value.field


def test_a_kind_of_number_that_nobody_knows_names_its_tensor(path: Path) -> None:
    data = path.read_bytes()
    name = tiny.gguf_text("blocks.1.ffn.0.bias")
    kind = data.index(name) + len(name) + 4 + 8  # one axis, its size, then the kind
    path.write_bytes(data[:kind] + struct.pack("<I", 999) + data[kind + 4 :])
    with pytest.raises(FileError) as caught:
        read_header(path)
    assert caught.value.code == "key_dtype" and "blocks.1.ffn.0.bias" in caught.value.field


def test_a_file_cut_short_names_a_tensor(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(FileError) as caught:
        read_header(path)
    assert caught.value.code == "file_truncated"
    assert "blocks" in caught.value.field or "head" in caught.value.field
