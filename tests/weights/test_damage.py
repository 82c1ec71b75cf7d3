"""A damaged or foreign file gives one clear error with exit code 2: never a traceback, never a call, never a guess."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.weights import tiny
from tests.weights.test_load import load
from turbodiff.spec.errors import FileError
from turbodiff.weights.detect import read_header

State = dict[str, Tensor]
SINGLE = [name for name in tiny.LAYOUTS if name != "turbowan wrapped"]


def failure(path: Path) -> FileError:
    with pytest.raises(FileError) as caught:
        load(path)
    assert caught.value.exit_code == 2
    assert str(path.parent.parent if path.is_dir() else path.parent) in caught.value.field
    return caught.value


def one_file(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[0] if path.is_dir() else path


def truncate(path: Path) -> None:
    file = one_file(path)
    os.truncate(file, file.stat().st_size * 2 // 3)


def garbage(path: Path) -> None:
    with one_file(path).open("r+b") as file:
        file.write(os.urandom(64))


def rewrite(layout: str, path: Path, change: Callable[[State, str], None]) -> None:
    make, save, _, _ = tiny.LAYOUTS[layout]
    state = dict(make())
    change(state, next(name for name in state if "blocks.1" in name and "ffn" in name and name.endswith("bias")))
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    save(state, path)


def drop(state: State, name: str) -> None:
    del state[name]


def reshape(state: State, name: str) -> None:
    state[name] = torch.zeros(7)


def retype(state: State, name: str) -> None:
    state[name] = state[name].to(torch.int64)


@pytest.mark.parametrize("layout", SINGLE)
@pytest.mark.parametrize("how", [truncate, garbage], ids=lambda f: f.__name__)
def test_damaged_bytes(layout: str, how: Callable[[Path], None], tmp_path: Path) -> None:
    path = tiny.write(layout, tmp_path)
    how(path)
    assert failure(path).code in {"file_truncated", "file_damaged", "file_foreign"}


@pytest.mark.parametrize("layout", SINGLE)
@pytest.mark.parametrize(
    ("change", "code"),
    [(drop, "key_missing"), (reshape, "key_shape"), (retype, "key_dtype")],
    ids=lambda x: str(x)[:12],
)
def test_damaged_tensors(layout: str, change: Callable[[State, str], None], code: str, tmp_path: Path) -> None:
    path = tiny.write(layout, tmp_path)
    rewrite(layout, path, change)
    error = failure(path)
    assert error.code == code
    assert "blocks.1." in error.field and "bias" in error.field
    assert error.got and error.expected and error.try_instead


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("layout", SINGLE)
def test_zeros_where_nothing_arrived_are_said_at_loading(layout: str, share: float, tmp_path: Path) -> None:
    """A downloader that allocates the whole file first leaves a sound header before them; the clip would be grey."""

    def empty(state: State, _: str) -> None:
        for name in list(state)[int(share * len(state)) :]:
            state[name] = torch.zeros_like(state[name])

    path = tmp_path / tiny.LAYOUTS[layout][2]
    rewrite(layout, path, empty)
    assert failure(path).code == "file_zeros"


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    state = tiny.dit_state() | {"vace_blocks.0.norm3.weight": torch.zeros(2)}
    error = failure(tiny.save_safetensors(state, tmp_path / "a.safetensors"))
    assert (error.code, "Wan VACE" in error.what) == ("key_unexpected", True)


class Boom:
    def __init__(self, call: tuple[object, ...]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch {}",)),
        (eval, ("open('{}', 'w')",)),
        (torch.load, ("{}",)),
        (getattr, ("a", "b")),
        (print, ()),
    ],
    ids=["system", "eval", "torch.load", "getattr", "print"],
)
def test_a_malicious_pickle_is_refused_before_anything_runs(
    call: tuple[Callable[..., object], tuple[str, ...]], tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    state = tiny.dit_state() | {"x": Boom((call[0], tuple(text.format(trap) for text in call[1])))}
    torch.save(state, tmp_path / "a.pth")
    error = failure(tmp_path / "a.pth")
    assert error.code == "file_unsafe"
    assert not trap.exists()


def forged(tmp_path: Path, text: bytes) -> Path:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", text)
        archive.writestr("a/data/0", b"\0" * 64)
    return path


def tensor(shape: str, stride: str = "(I1\nt", key: str = "0", numel: int = 16, offset: int = 0) -> bytes:
    """A pickle {"w": tensor} written by hand."""
    storage = f"(Vstorage\nctorch\nFloatStorage\nV{key}\nVcpu\nI{numel}\ntQ"
    view = f"({storage}I{offset}\n{shape}{stride}I00\nccollections\nOrderedDict\n(tRtR"
    return f"(dVw\nctorch._utils\n_rebuild_tensor_v2\n{view}s.".encode()


@pytest.mark.parametrize(
    "text",
    [
        tensor("(I17\nt"),
        tensor("(I16\nt", offset=1),
        tensor("(I-1\nt"),
        tensor("(I4\nI4\nt"),
        tensor("(I4\nt", stride="(I1000\nt"),
        tensor("(I4\nt", key="../../etc/passwd"),
        tensor("(I99999999999999999999999\nt"),
        tensor("Vlarge\n"),
        b"cturbodiff.weights.pth\nread\n(V/etc/passwd\ntR.",
        b"ccollections\nOrderedDict\n)R}Vclear\nI1\nsb.",
        b"\x80\x02]q\xff",
        b"r\xff\xff\xff\x7f" * 3,
        b"I1\nr\xff\xff\xff\x7f.",
        b"(" * 100_000,
        b"]" + b"2\x85" * 60 + b"\x85.",
        b"",
    ],
)
def test_a_forged_pickle_reads_nothing_outside_its_tensors(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        read_header(forged(tmp_path, text))
    assert caught.value.code.startswith(("file_", "key_"))


def test_the_handwritten_pickle_is_right_where_it_is_in_bounds(tmp_path: Path) -> None:
    info = read_header(forged(tmp_path, tensor("(I4\nI4\nt", stride="(I4\nI1\nt"))).tensors["w"]
    assert (info.shape, info.nbytes, info.stride) == ((4, 4), 64, None)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({"w": GOOD | {"data_offsets": [0, 1 << 60]}}, "file_damaged"),
        ({"w": GOOD | {"shape": [1 << 40], "data_offsets": [0, 4 << 40]}}, "file_truncated"),
        ({"w": GOOD | {"data_offsets": [8, 0]}}, "file_damaged"),
        ({"w": GOOD | {"data_offsets": [-8, 0]}}, "file_damaged"),
        ({"w": GOOD | {"shape": [2.0]}}, "file_damaged"),
        ({"w": GOOD | {"shape": [True, 2]}}, "file_damaged"),
        ({"w": GOOD | {"dtype": "F4"}}, "key_dtype"),
        ({"w": GOOD | {"dtype": ["F32"]}}, "key_dtype"),
        ({"w": GOOD, "v": GOOD}, "file_damaged"),
        ({"w": 3}, "file_damaged"),
        ([1], "file_damaged"),
        ({}, "file_damaged"),
    ],
)
def test_a_forged_header_is_refused(header: object, code: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(FileError) as caught:
        read_header(path)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 28000000000\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><title>404</title></html>", "a web page"),
        (pickle.dumps({"a": 1}, 2) + b"\0" * 20, "bare pickle"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "a picture"),
        (b"\xff" * 50, "not a safetensors"),
        (struct.pack("<Q", 90) + b"{", "cut short"),
        (struct.pack("<Q", 20) + b"[" * 20, "not JSON"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}' + b"\0" * 9, "not JSON"),
    ],
)
def test_files_of_another_kind_are_called_by_their_name(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert what in failure(path).what


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = tiny.write("diffusers shards", tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = failure(folder)
    assert (error.code, error.got, error.expected) == ("file_missing", "1 of 2", "model-00002-of-00002.safetensors")


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../a.safetensors"}}))
    assert failure(index).code == "file_damaged"


def test_a_lora_and_another_network_are_called_by_their_name(tmp_path: Path) -> None:
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}
    assert "LoRA" in failure(tiny.save_safetensors(lora, tmp_path / "l.safetensors")).got
    flux = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}
    assert "FLUX" in failure(tiny.save_safetensors(flux, tmp_path / "f.safetensors")).got


def test_a_folder_that_cannot_be_read_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert failure(tmp_path / "nothing.pth").code == "file_missing"
    (tmp_path / "empty").mkdir()
    assert failure(tmp_path / "empty").code == "file_missing"


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    text = json.dumps({"w": GOOD}).encode().ljust(length)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text + b"\0" * 8)
    assert read_header(path).tensors["w"].shape == (2,)
