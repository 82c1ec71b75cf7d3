"""No file in a models folder stops the search, takes long, or takes much memory: it is passed over with a reason."""
# ruff: noqa: E501  the bombs are one line each

import io
import json
import os
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.weights import tiny
from tests.weights.test_damage import forged
from tests.weights.test_locate import hollow
from turbodiff.spec.errors import FileError
from turbodiff.weights import folders, locate, look
from turbodiff.weights.detect import detect, read_header

MUTATIONS = int(os.environ.get("TURBODIFF_MUTATIONS", "150"))
CPU_S, MEMORY_KIB = 2.0, 200 << 10


def text_key(name: str) -> bytes:
    return struct.pack("<I", len(name)) + name.encode()


DOUBLING = b"\x80\x02]q\x00" + b"".join(
    b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200)
)
BOMBS: dict[str, Callable[[Path], Path]] = {
    "doubling tuples as a key": lambda d: forged(d, DOUBLING + b"}h\xc8K\x01s."),
    "doubling tuples as a shape": lambda d: forged(
        d, b"ctorch._utils\n_rebuild_tensor_v2\n(((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI1\ntQ" + DOUBLING + b"h\xc8)tR."
    ),
    "doubling tuples called": lambda d: forged(d, b"ccollections\nOrderedDict\n" + DOUBLING + b"h\xc8R."),
    "sixty MB of None": lambda d: forged(d, b"(" + b"N" * 60_000_000 + b"t."),
    "fifteen MB of None": lambda d: forged(d, b"(" + b"N" * 15_000_000 + b"t."),
    "bytearray8": lambda d: forged(d, b"\x80\x05\x96" + struct.pack("<Q", 8 << 30) + b"."),
    "binbytes8": lambda d: forged(d, b"\x80\x05\x8e" + struct.pack("<Q", 8 << 30) + b"."),
    "long4": lambda d: forged(d, b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"."),
    "a long decimal": lambda d: forged(d, b"I" + b"9" * 60_000 + b"\n."),
    "shared wide shapes": lambda d: forged(
        d, b"(" + b"K\x01" * 100_000 + b"tq\x00" + b"ctorch._utils\n_rebuild_tensor_v2\nq\x010" + b"h\x01(NK\x00h\x00h\x00tR0" * 20_000 + b"N."
    ),
    "shared dicts in dicts": lambda d: forged(d, b"}q\x00" + b"".join(
        b"}q" + bytes([i]) + b"(" + b"".join(b"K" + bytes([k]) + b"h" + bytes([i - 1]) for k in range(200)) + b"u"
        for i in range(1, 100)) + b"."),
    "brackets": lambda d: st(d, b"[" * 15_000_000),
    "lists in a header": lambda d: st(d, b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
    "a header of numbers": lambda d: st(d, b'{"w":{"dtype":"F32","shape":[' + b"1," * 7_000_000 + b'1],"data_offsets":[0,4]}}'),
    "a header of tensors": lambda d: st(d, json.dumps(
        {f"w{i}": {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]} for i in range(120_000)}).encode()),
    "numbers of 4000 digits": lambda d: st(d, b'{"w":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 3000) + b'],"data_offsets":[0,4]}}'),
    "shapes as text": lambda d: st(d, b'{"w":{"dtype":"F32","shape":"' + b"9" * 15_000_000 + b'","data_offsets":[0,4]}}'),
    "a million tensors": lambda d: gg(d, struct.pack("<IQQ", 3, 1 << 20, 0) + (text_key8("a") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 200_000),
    "u64 shapes": lambda d: gg(d, struct.pack("<IQQ", 3, 1, 0) + text_key8("a") + struct.pack("<IQQQQIQ", 4, *[2**64 - 1] * 4, 0, 0)),
    "original shapes of text": lambda d: gg(
        d, struct.pack("<IQQ", 3, 1, 1) + text_key8("comfy.gguf.orig_shape.a") + struct.pack("<IIQ", 9, 8, 2) + text_key8("x") * 2
        + text_key8("a") + struct.pack("<IQIQ", 1, 4, 0, 0)),
    "a vocabulary of two million": lambda d: gg(d, struct.pack("<IQQ", 3, 0, 1) + text_key8("t") + struct.pack("<IIQ", 9, 8, 2_000_000) + bytes(16_000_000)),
    "arrays of arrays": lambda d: gg(d, struct.pack("<IQQ", 3, 0, 1) + text_key8("t") + struct.pack("<II", 9, 9) * 100_000),
    "alignment": lambda d: gg(d, struct.pack("<IQQ", 3, 0, 1) + text_key8("general.alignment") + struct.pack("<IQ", 10, 2**63)),
    "a zip of many names": lambda d: many_members(d),
    "an index of many shards": lambda d: put(d / "a.safetensors.index.json", json.dumps({"weight_map": {f"w{i}": f"{i}.safetensors" for i in range(60_000)}}).encode()),
}  # fmt: skip


def text_key8(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def st(folder: Path, text: bytes) -> Path:
    return put(folder / "a.safetensors", struct.pack("<Q", len(text)) + text + bytes(64))


def gg(folder: Path, text: bytes) -> Path:
    return put(folder / "a.gguf", b"GGUF" + text + bytes(64))


def many_members(folder: Path) -> Path:
    entry = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
    listed = b"".join(entry + f"{i:08d}".encode() for i in range(300_000))
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, len(listed), 30, 0)
    return put(folder / "a.pth", b"PK\x03\x04" + bytes(26) + listed + end)


def examined(path: Path) -> None:
    """Look at a file in a child; it must end within the limits and with a reason."""
    before = time.process_time()
    pid = os.fork()
    if pid == 0:
        good = False
        try:
            base = resource.getrusage(resource.RUSAGE_SELF)
            files, error, _ = locate._match(folders.Entry(path))
            used = resource.getrusage(resource.RUSAGE_SELF)
            good = not files and error is not None and len(str(error)) < 2000
            good &= used.ru_utime + used.ru_stime - base.ru_utime - base.ru_stime < CPU_S
            good &= used.ru_maxrss - base.ru_maxrss < MEMORY_KIB
        finally:
            os._exit(0 if good else 1)  # whatever was raised: a child that goes on would run all tests after this one
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert time.process_time() - before < CPU_S


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_passed_over_within_two_seconds_and_200_mib(bomb: str, tmp_path: Path) -> None:
    examined(BOMBS[bomb](tmp_path))


def seeds_of_mutations(folder: Path) -> list[bytes]:
    """Small files of each container."""
    state = {"blocks.0.ffn.0.weight": torch.zeros(4, 32), "patch_embedding.weight": torch.zeros(4, 4, 1, 2, 2)}
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    tiny.save_safetensors(state, folder / "a.safetensors")
    tiny.save_gguf(state, folder / "a.gguf")
    return [buffer.getvalue(), (folder / "a.safetensors").read_bytes(), (folder / "a.gguf").read_bytes()]


def test_mutated_files_never_raise_anything_but_their_error(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "b.pth"
    for seed in seeds_of_mutations(tmp_path):
        for _ in range(MUTATIONS):
            data = bytearray(seed)
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(len(data))
                if rng.random() < 0.2:
                    del data[at : at + rng.randint(1, 40)]
                else:
                    data[at : at + 1] = rng.randbytes(rng.choice((1, 1, 4, 8)))
            path.write_bytes(data)
            try:
                detect(read_header(path))
            except FileError as error:
                assert error.code and len(str(error)) < 3000


def test_version_99_and_lying_sizes_of_a_zip_are_one_error(tmp_path: Path) -> None:
    seed = seeds_of_mutations(tmp_path)[0]
    at = seed.find(b"PK\1\2")
    for offset, value in (
        (6, b"\x63\0"),
        (8, b"\1\0"),
        (10, b"\x08\0"),
        (20, b"\xff" * 4),
        (24, b"\xff" * 4),
        (42, b"\xff" * 4),
    ):
        path = put(tmp_path / "c.pth", seed[: at + offset] + value + seed[at + offset + len(value) :])
        with pytest.raises(FileError):
            read_header(path)


def test_a_folder_of_everything_is_searched_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "bundled_root", lambda: tmp_path / "none")
    hollow("Wan2.1-1.3B", tmp_path / "good.pth")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "dev.pth").symlink_to("/dev/zero")
    put(tmp_path / "a.pth", b"PK\x03\x04" + bytes(100))
    found = locate.inventory([tmp_path])
    assert [Path(file.path).name for file in found.files] == ["good.pth"]
    assert {Path(one.path).name for one in found.passed_over} == {
        "pipe.safetensors",
        "nowhere.gguf",
        "dev.pth",
        "folder.pth",
        "a.pth",
    }


def test_a_header_of_14b_takes_few_calls_a_tensor(tmp_path: Path) -> None:
    """50 ms for a header of 1,575 tensors; calls are counted, since others compute beside us."""
    path = hollow("Wan2.2-A14B", tmp_path / "x-high-noise.pth", quant=True)
    header = {}
    for name, info in read_header(path).tensors.items():
        header[name] = {
            "dtype": "I8" if "int8" in name else "F32" if name.endswith("scale") else "BF16",
            "shape": info.shape,
        }
    assert len(header) == 1575
    at = 0
    for entry in header.values():
        nbytes = torch.Size(entry["shape"]).numel() * {"I8": 1, "F32": 4, "BF16": 2}[entry["dtype"]]
        entry["data_offsets"] = [at, at + nbytes]
        at += nbytes
    text = json.dumps(header).encode()
    plain = put(tmp_path / "y-high-noise.safetensors", struct.pack("<Q", len(text)) + text)
    os.truncate(plain, 8 + len(text) + at)
    os.utime(plain)
    look.look.cache_clear()
    calls, before = Counter[str](), sys.getprofile()
    sys.setprofile(lambda _frame, event, _argument: calls.update([event]))
    try:
        files, error, _ = locate._match(folders.Entry(plain))
    finally:
        sys.setprofile(before)
    assert error is None and files[0].quant
    assert calls["call"] + calls["c_call"] <= 170 * len(header), calls
