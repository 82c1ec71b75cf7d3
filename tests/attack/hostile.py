"""Generators of hostile inputs, seeded: the same number gives the same input on every machine."""

import io
import json
import math
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from turbodiff.spec.request import make_request

NASTY_TEXT = (
    "",
    "\0",
    "\ud800",
    "a\udfffb",
    "\u202etxt.exe",
    "\x1b[2J",
    "../" * 50,
    "x" * 100_000,
    "☃" * 999,
    "|\\|",
    "\n" * 99,
)
NASTY_NUMBERS = (
    math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, -(10**400), 2**63, -(2**63), 2**53, -1, 0, 0.5, True, 1e-320,
)  # fmt: skip
NASTY = (
    None,
    *NASTY_TEXT,
    *NASTY_NUMBERS,
    [],
    {},
    [1, "x"],
    {"a": {"b": [None]}},
    ["x"] * 3000,
    {f"k{i}": i for i in range(3000)},
)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def sidecar() -> dict[str, Any]:
    """What a sound sidecar holds."""
    request = make_request({"prompt": "a red circle moves right", "seed": 1, "loras": [{"path": "/a.safetensors"}]})
    return {
        "v": 1, "created": "2026-11-23T00:31:07+00:00", "job": 3, "attempt": 1,
        "request": json.loads(request.model_dump_json()), "plan": {"request": {}, "phases": [{"name": "denoise"}]},
        "ran": {"attention": "dense", "cudnn": 1, "weights": {"dit": "a.safetensors"}}, "versions": {"torch": "2.8"},
        "sha256": "0" * 64, "frames": 17, "width": 128, "height": 128, "fps": 16, "warnings": ["frozen"],
        "measured": {"seconds": 1.0, "peak_bytes": 5, "phase_seconds": {"denoise": 1.0}}, "rating": "★★★", "note": "",
    }  # fmt: skip


def mutated(rng: random.Random, value: Any, share: float = 0.08) -> Any:
    """The JSON value with some of its parts replaced, removed, doubled or nested."""
    if rng.random() < share:
        return nested(rng.choice((3, 40, 900))) if rng.random() < 0.1 else rng.choice(NASTY)
    if isinstance(value, dict):
        kept = {key: mutated(rng, one, share) for key, one in value.items() if rng.random() > share / 4}
        if rng.random() < share:
            kept[rng.choice(NASTY_TEXT)] = rng.choice(NASTY)
        return kept
    if isinstance(value, list):
        return [mutated(rng, one, share) for one in value for _ in range(1 + (rng.random() < share))]
    return value


def flipped(rng: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, cut out, or the end cut off."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(found) or 1)
        how = rng.random()
        if how < 0.15:
            del found[at : at + rng.randint(1, 40)]
        elif how < 0.2:
            del found[at:]
        else:
            found[at : at + 1] = rng.randbytes(rng.choice((1, 1, 4, 8)))
    return bytes(found)


def sidecar_text(rng: random.Random) -> bytes:
    """A sidecar's file: mistyped parts, now and then damaged bytes or brackets without end."""
    if rng.random() < 0.02:
        return b"[" * rng.choice((5_000, 200_000))
    text = json.dumps(mutated(rng, sidecar())).encode("utf-8", "surrogatepass")
    return flipped(rng, text) if rng.random() < 0.2 else text


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body


def mp4_with_tag(text: bytes) -> bytes:
    """An mp4's boxes with one tag `turbodiff`, as media/tags.py reads them."""
    keys = box(b"keys", bytes(8) + box(b"mdta", b"turbodiff"))
    values = box(b"ilst", box(struct.pack(">I", 1), box(b"data", bytes(8) + text)))
    meta = box(b"meta", bytes(4) + box(b"hdlr", bytes(24)) + keys + values)
    return box(b"ftyp", b"isom" + bytes(8)) + box(b"moov", box(b"udta", meta))


def mp4(rng: random.Random) -> bytes:
    """An mp4 whose tag is hostile, whose boxes are damaged, or of far too many boxes."""
    data = mp4_with_tag(sidecar_text(rng))
    if rng.random() < 0.02:
        many = box(rng.choice((b"meta", b"free", b"udta")), b"") * 300_000
        return box(b"ftyp", b"isom" + bytes(8)) + box(b"moov", rng.choice((many, box(b"udta", many))))
    return flipped(rng, data) if rng.random() < 0.5 else data


def request_fields(rng: random.Random) -> dict[str, Any]:
    """The fields of a request, some of them of a wrong type."""
    fields = {
        **sidecar()["request"],
        "size": "128x128",
        "aspect_ratio": "1:1",
        "num_steps": 4,
        "sla_topk": 0.1,
        "ode": False,
    }
    names = rng.sample(sorted(fields), rng.randint(1, 10))
    found = {name: fields[name] for name in names} | {"prompt": "x"}
    changed = mutated(rng, found, 0.3)
    return changed if isinstance(changed, dict) else {"prompt": changed}


def seed_table(rng: random.Random) -> bytes:
    """A seed table with odd cells in some encoding, then damaged."""
    cells = [rng.choice((*NASTY_TEXT[:5], "猫", "42", "\\", "|", "---")) for _ in range(rng.randint(1, 60))]
    lines = ["| 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |", "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells[i : i + 6])} |" for i in range(0, len(cells), 6)]
    text = rng.choice(("\n", "\r\n", "\r")).join(lines)
    data = text.encode(rng.choice(("utf-8", "utf-16", "gb18030", "utf-32")), "replace")
    return flipped(rng, data) if rng.random() < 0.5 else data


def event_line(rng: random.Random) -> bytes:
    """A line of a worker that is no worker of ours."""
    step = {"i": 1, "n": 4, "t": 0.5, "expert": "single", "dt_s": 1.0, "eta_s": 3.0}
    kind = rng.choice(("step", "phase", "result", "plan", "error", "notice", "beat", "hello", "wait", "preview"))
    line = {"v": 1, "job": 1, "attempt": 1, "type": kind, "t_s": 1.0, "fields": rng.choice((step, sidecar()))}
    text = json.dumps(mutated(rng, line)).encode("utf-8", "surrogatepass")
    return flipped(rng, text) if rng.random() < 0.3 else text


def torch_zip(rng: random.Random, pickle: bytes, damage: Callable[[random.Random, bytes], bytes] = flipped) -> bytes:
    """A torch file whose pickle is damaged, or the whole of which is."""
    buffer, inside = io.BytesIO(), rng.random() < 0.7
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", damage(rng, pickle) if inside else pickle)
        archive.writestr("a/data/0", bytes(512))
    return buffer.getvalue() if inside else damage(rng, buffer.getvalue())


def safetensors(rng: random.Random, sound: bytes) -> bytes:
    """A safetensors file with mistyped or far too much in its header, a lying length, or damaged bytes."""
    how = rng.random()
    if how < 0.3:
        return flipped(rng, sound)
    length = struct.unpack("<Q", sound[:8])[0]
    header = json.loads(sound[8 : 8 + length])
    many = {f"w{number}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for number in range(2000)}
    text = json.dumps(mutated(rng, header | (many if how < 0.35 else {}), 0.1)).encode("utf-8", "surrogatepass")
    if how < 0.5:
        text = rng.choice(
            (b"[" * 100_000, text * 2, text[:-1], b"\xff" + text, text.replace(b"[", b"[9" + b"9" * 4000 + b",", 1))
        )
    told = rng.choice((len(text), len(text), len(text) + 1, 0, 2**63, 2**64 - 1, 100_000_001))
    return struct.pack("<Q", told) + text + sound[8 + length :][: rng.choice((0, 10, 10**6))]


def gguf(rng: random.Random, sound: bytes) -> bytes:
    """A GGUF file with lying counts and lengths, deep arrays, odd types, or damaged bytes."""
    if rng.random() < 0.4:
        return flipped(rng, sound)
    numbers = (0, 1, 2, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1)

    def text() -> bytes:
        name = rng.choice((b"a", b"general.alignment", b"comfy.gguf.orig_shape.a", b"\xff\xfe", b"x" * 70_000))
        return struct.pack("<Q", rng.choice((len(name), len(name), *numbers[4:]))) + name

    def value(depth: int = 0) -> bytes:
        kind = rng.choice((*range(14), 99))
        if kind == 9:
            inner = rng.choice((4, 8, 9, 10))
            count = rng.choice((0, 1, 3, *numbers[3:]))
            return struct.pack("<IIQ", 9, inner, count) + (value(depth + 1) if depth < 200 else b"")
        if kind == 8:
            return struct.pack("<I", 8) + text()
        return struct.pack("<I", kind) + rng.randbytes(8)

    pairs = b"".join(text() + value() for _ in range(rng.randint(0, 6)))
    tensors = b"".join(
        text()
        + struct.pack("<I", n_dims := rng.choice((0, 1, 2, 4, 5, 99, 2**31)))
        + b"".join(struct.pack("<Q", rng.choice(numbers)) for _ in range(min(n_dims, 9)))
        + struct.pack("<IQ", rng.choice((0, 1, 8, 12, 999)), rng.choice(numbers))
        for _ in range(rng.randint(0, 6))
    )
    counts = [rng.choice((1, 2, 6, *numbers)) for _ in range(2)]
    return b"GGUF" + struct.pack("<IQQ", rng.choice((3, 3, 3, 1, 2, 99)), *counts) + pairs + tensors + bytes(64)


def odd_zip(rng: random.Random, _: bytes = b"") -> bytes:
    """A zip that lies: encrypted, of version 99, sizes and places that are not so, names that are no UTF-8 or paths."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name in rng.sample(
            ("a/data.pkl", "a/version", "../../x", "/etc/x", "a/data/0", "b/data.pkl"), rng.randint(1, 5)
        ):
            archive.writestr(name, rng.choice((b"\x80\x02}q\x00.", b"\x80\x02.", b"", bytes(5000))))
    data = bytearray(buffer.getvalue())
    for mark, fields in ((b"PK\x03\x04", (4, 6, 8, 18, 22, 26, 28)), (b"PK\x01\x02", (6, 8, 10, 20, 24, 28, 30, 42))):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0 and rng.random() < 0.7:
            place = at + rng.choice(fields)
            data[place : place + 2] = rng.choice((b"\x01\x00", b"\x63\x00", b"\xff\xff", b"\x00\x08", rng.randbytes(2)))
    return flipped(rng, bytes(data)) if rng.random() < 0.3 else bytes(data)


def picture(rng: random.Random) -> bytes:
    """A PNG, JPEG, WebP or GIF with hostile chunks, lying sizes or damaged bytes."""
    kind = rng.choice(("PNG", "PNG", "JPEG", "WEBP", "GIF"))
    mode = "P" if kind == "GIF" else rng.choice(("RGB", "L"))
    sound, buffer = Image.new(mode, (rng.randint(16, 200), rng.randint(16, 200)), rng.randint(0, 200)), io.BytesIO()
    sound.save(buffer, kind)
    data = buffer.getvalue()
    if kind == "PNG" and rng.random() < 0.6:

        def chunk(name: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

        packed = zlib.compress(bytes(rng.choice((10, 1 << 16, 30 << 20))), 9)
        bodies = (b"", b"x\0\0" + packed, b"Raw profile type exif\0\0" + packed, rng.randbytes(40), b"\xff" * 5000)
        names = (
            b"iCCP",
            b"eXIf",
            b"zTXt",
            b"iTXt",
            b"tEXt",
            b"gAMA",
            b"cHRM",
            b"cICP",
            b"acTL",
            b"fcTL",
            b"IHDR",
            b"PLTE",
        )
        extra = b"".join(chunk(rng.choice(names), rng.choice(bodies)) for _ in range(rng.randint(1, 6)))
        data = data[:33] + extra * rng.choice((1, 1, 50)) + data[33:]
        if rng.random() < 0.3:
            size = (rng.choice((0, 1, 17, 8000, 2**31 - 1)), rng.choice((0, 1, 17, 8000, 2**31 - 1)))
            data = (
                data[:8]
                + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, rng.choice((0, 2, 3, 6, 7)), 0, 0, 0))
                + data[33:]
            )
    return flipped(rng, data) if rng.random() < 0.5 else data
