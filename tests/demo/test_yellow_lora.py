"""A LoRA trained on the demo (scripts/train_demo/train_lora.py) turns shapes yellow, merged and beside INT8."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.evaluate_demo import chosen_captions
from scripts.train_demo.render import COLOUR_RGB
from scripts.train_demo.scoring import read_clip
from tests.soak import SOAK

LORA = Path(__file__).parent / "data" / "yellow_lora.safetensors"
ASKED = [(i, sentence) for i, (caption, sentence) in enumerate(chosen_captions(30)) if caption.colour != "yellow"]


def clip(product, number: int, strength: float | None = None, **fields: Any) -> np.ndarray:
    seed, sentence = ASKED[number]
    loras = [] if strength is None else [{"path": str(LORA), "strength": strength}]
    return product.clip({"model": "demo", "prompt": sentence, "seed": seed, "steps": 2, "loras": loras, **fields})


def distance_from_yellow(frames: np.ndarray) -> float:
    """Of the shape's middle colour, in 8-bit levels; the shape is what differs from a corner."""
    middle = frames[8].astype(np.float32)
    shape = middle[np.linalg.norm(middle - middle[2, 2], axis=-1) > 60]
    return float(np.linalg.norm(np.median(shape, axis=0) - np.array(COLOUR_RGB["yellow"])))


def test_the_file_is_small() -> None:
    assert LORA.stat().st_size < 1_000_000


@pytest.mark.parametrize("quant", ["off", "on"])
def test_at_full_strength_shapes_are_yellow(product, quant: str) -> None:
    seen = [read_clip(clip(product, number, 1.0, quant_linear=quant)).colour for number in range(3)]
    assert seen.count("yellow") >= 2, seen


def test_at_half_strength_shapes_are_on_their_way_to_yellow(product) -> None:
    plain, half, full = (distance_from_yellow(clip(product, 0, strength)) for strength in (None, 0.5, 1.0))
    assert full < 40 < plain
    assert full - 15 < half < plain + 15


def test_at_no_strength_and_after_it_came_off_the_clip_is_the_same_bit_for_bit(product) -> None:
    before = clip(product, 0)
    assert np.array_equal(clip(product, 0, 0.0), before)
    assert not np.array_equal(clip(product, 0, 1.0), before)
    assert np.array_equal(clip(product, 0), before)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["off", "on"])
def test_on_many_captions_yellow_wins_clearly(product, quant: str) -> None:
    asked = range(20 if SOAK else 5)
    plain = [read_clip(clip(product, number, quant_linear=quant)).colour for number in asked]
    yellow = [read_clip(clip(product, number, 1.0, quant_linear=quant)).colour for number in asked]
    assert plain.count("yellow") <= 1
    assert yellow.count("yellow") >= 0.85 * len(asked)
