"""Scores the demo through the product, from the pixels of the finished files alone.

    python scripts/evaluate_demo.py --count 60
    python scripts/evaluate_demo.py --count 200 --steps 2 --attention sla --topk 0.5
    python scripts/evaluate_demo.py --versus "--quant-linear on"      # the same captions and seeds, twice
    python scripts/evaluate_demo.py --model demo-i2v --versus "--boundary 0.5"   # handoff against high expert alone

Every field of a request is a flag here too. The captions were never trained on; odd ones are asked in Chinese. Prints
a table and, as its last line, one JSON object. Image to video is given the first frame of a clip nobody trained on.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from scripts.train_demo.captions import Caption, held_out_captions  # noqa: E402
from scripts.train_demo.render import random_clip  # noqa: E402
from scripts.train_demo.scoring import FIELDS, flicker, psnr, score  # noqa: E402

SHEET_FRAMES = (0, 5, 11, 16)
PICTURE_MARKS = ("first_psnr", "flicker")


class NeverStop:
    """Commands of somebody who lets every clip run."""

    cancelled: frozenset[int] = frozenset()
    decode_now: frozenset[int] = frozenset()


class Product:
    """The pipeline in this process, warm between clips."""

    def __init__(self, device: str, folder: Path) -> None:
        from turbodiff.runtime.device import Device
        from turbodiff.runtime.model_cache import ModelCache

        self.folder, self.models = folder, ModelCache(Device.pick(device))

    def clip(self, fields: dict[str, Any]) -> np.ndarray:
        """Generate one clip and read its file back: uint8 [F, H, W, 3]."""
        from turbodiff.gpu.probe import machine_now
        from turbodiff.plan.planner import plan_request
        from turbodiff.runtime.attempt import Attempt
        from turbodiff.runtime.pipeline import generate
        from turbodiff.spec.request import make_request
        from turbodiff.weights.locate import inventory, with_loras

        request = make_request(fields).seeded()
        plan = plan_request(request, machine_now(), with_loras(inventory(), request.loras))
        output = self.folder / "clip.mp4"
        output.unlink(missing_ok=True)
        places = (self.folder, self.folder / "state")
        generate(Attempt(1, 1, plan, *places, self.models, lambda *_, **__: None, NeverStop, output))
        return read_frames(output, plan.request.width, plan.request.height)


def read_frames(path: Path, width: int, height: int) -> np.ndarray:
    """All frames of a video file, uint8 [F, H, W, 3]."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def chosen_captions(count: int) -> list[tuple[Caption, str]]:
    """`count` held-out captions in a fixed random order with the sentence to ask, English and Chinese in turn."""
    captions = held_out_captions()
    random.Random(17).shuffle(captions)
    picked = [captions[i % len(captions)] for i in range(count)]
    # A caption that comes a second time is asked in the other language.
    return [
        (c, c.english if (i % len(captions) + i // len(captions)) % 2 == 0 else c.chinese) for i, c in enumerate(picked)
    ]


def evaluate(
    product: Product, fields: dict[str, Any], count: int, first_seed: int, sheet: Path | None
) -> dict[str, Any]:
    """Generate and score; percentages per field, English and Chinese apart, seconds per clip.

    Image to video also: dB of the first frame against the picture, and flicker in 8-bit levels, means over the clips.
    """
    marks: list[dict[str, Any]] = []
    rows, started = [], time.monotonic()
    with_picture = fields.get("model") == "demo-i2v"
    for i, (caption, sentence) in enumerate(chosen_captions(count)):
        seed = first_seed + i
        request = {"model": "demo", **fields, "prompt": sentence, "seed": seed}
        picture = random_clip(caption, np.random.default_rng(10_000 + seed))[0]
        if with_picture:
            Image.fromarray(picture).save(product.folder / "picture.png")
            request["image"] = str(product.folder / "picture.png")
        frames = product.clip(request)
        marks.append({**score(frames, caption), "zh": sentence == caption.chinese})
        marks[-1] |= {"first_psnr": psnr(frames[0], picture), "flicker": flicker(frames)} if with_picture else {}
        rows.append(frames[[min(f, len(frames) - 1) for f in SHEET_FRAMES]])
    if sheet:
        write_sheet(rows[:12], sheet)
    return summary(fields, marks, (time.monotonic() - started) / count)


def summary(fields: dict[str, Any], marks: list[dict[str, Any]], s_per_clip: float) -> dict[str, Any]:
    """Means over the clips."""
    result: dict[str, Any] = {"settings": fields, "count": len(marks), "s_per_clip": round(s_per_clip, 2)}
    for name in FIELDS:
        result[name] = percent([m[name] for m in marks])
    for language, zh in (("english", False), ("chinese", True)):
        result[language] = percent([m[name] for m in marks if m["zh"] == zh for name in FIELDS])
    result["mean"] = round(float(np.mean([result[name] for name in FIELDS])), 1)
    for name in PICTURE_MARKS:
        if name in marks[0]:
            result[name] = round(float(np.mean([m[name] for m in marks])), 2)
    return result


def percent(values: list[bool]) -> float:
    """Share of true values, 0 to 100."""
    return round(100 * float(np.mean(values)), 1) if values else 0.0


def write_sheet(rows: list[np.ndarray], path: Path) -> None:
    """A contact sheet, two clips a row, four frames each."""
    strips = [np.concatenate(list(frames), axis=1) for frames in rows]
    strips += [np.zeros_like(strips[0])] * (len(strips) % 2)
    lines = [np.concatenate(strips[i : i + 2], axis=1) for i in range(0, len(strips), 2)]
    Image.fromarray(np.concatenate(lines, axis=0)).save(path)


def parse_fields(words: list[str]) -> dict[str, Any]:
    """`--steps 2 --ode --topk=0.5` as request fields; a flag without a value is true."""
    fields: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            fields[name] = value or True
        elif name:
            fields[name], name = word, ""
        else:
            raise SystemExit(f"{word!r} belongs to no flag")
    return fields


def table(results: list[dict[str, Any]]) -> str:
    """One line per setting, columns per field."""
    columns = [*FIELDS, "mean", "english", "chinese", *(n for n in PICTURE_MARKS if n in results[0]), "s_per_clip"]
    lines = ["".join(f"{c:>12}" for c in columns) + "  settings"]
    for result in results:
        settings = " ".join(f"{k}={v}" for k, v in result["settings"].items()) or "default"
        lines.append("".join(f"{result[c]:>12}" for c in columns) + f"  {settings}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="held-out captions (60)")
    parser.add_argument("--first-seed", type=int, default=0, help="clip i has seed first-seed + i")
    parser.add_argument(
        "--versus", default="", help="flags of a second setting, in one string; pairs captions and seeds"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first twelve clips to this PNG")
    args, rest = parser.parse_known_args()
    fields = parse_fields(rest)
    with tempfile.TemporaryDirectory() as folder:
        product = Product(args.device, Path(folder))
        results = [evaluate(product, fields, args.count, args.first_seed, args.sheet)]
        if args.versus:
            other = fields | parse_fields(shlex.split(args.versus))
            results.append(evaluate(product, other, args.count, args.first_seed, None))
    print(table(results))
    line: dict[str, Any] = {"results": results}
    if len(results) == 2:
        names = [name for name in (*FIELDS, "mean", *PICTURE_MARKS) if name in results[0]]
        line["paired_change"] = {name: round(results[1][name] - results[0][name], 2) for name in names}
    print(json.dumps(line))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    main()
