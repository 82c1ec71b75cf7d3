"""Text rows of prompts, kept on disk: a repeated prompt loads no encoder. Weights of words are not part of them."""

import contextlib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbodiff.spec.files import atomic_write


@dataclass(frozen=True)
class TextRows:
    """A prompt as the network reads it: `rows` [1, text_len, dim], those past its `tokens` zero, and its word weights.

    `bias` [1, 1, 1, text_len] is added to the logits of cross-attention, None where no word weighs more or less.
    """

    rows: Tensor
    tokens: int
    bias: Tensor | None = None


def text_key(encoder: str, text: str) -> str:
    """Name of a prompt's rows: which encoder file read which clean text."""
    return hashlib.sha256(f"{encoder}\n{text}".encode()).hexdigest()[:32]


def load_rows(folder: Path, key: str, text_len: int) -> TextRows | None:
    """Rows kept earlier, or None; a damaged file counts as none."""
    try:
        with safe_open(folder / f"{key}.safetensors", "pt") as file:
            return pad_rows(file.get_tensor("rows"), text_len)
    except (OSError, SafetensorError):
        return None


def keep_rows(folder: Path, key: str, text: TextRows) -> None:
    """Keep the rows of a prompt; a full disk costs only the shortcut."""
    with contextlib.suppress(OSError, SafetensorError), atomic_write(folder / f"{key}.safetensors") as part:
        save_file({"rows": text.rows[0, : text.tokens].contiguous()}, part)


def pad_rows(rows: Tensor, text_len: int) -> TextRows:
    """Rows of the tokens [n, dim] -> [1, text_len, dim] with zeros below (Wan2.1 attends to those, too)."""
    return TextRows(F.pad(rows, (0, 0, 0, text_len - len(rows)))[None], len(rows))


def weigh(text: TextRows, weights: Sequence[float]) -> TextRows:
    """The same rows with ln(weight) as a bias on the logits of each weighted token (design: prompt weights)."""
    if all(weight == 1 for weight in weights):
        return replace(text, bias=None)
    bias = torch.zeros(text.rows.shape[1])
    bias[: len(weights)] = torch.tensor([math.log(weight) for weight in weights[: text.rows.shape[1]]])
    return replace(text, bias=bias.view(1, 1, 1, -1))
