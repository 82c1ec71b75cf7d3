"""The rows that a prompt becomes: the text encoder at work, their cache on disk, and the weights of words.

Where the encoder's weights sit while it reads: resident: all of it on the device. streamed: the token table stays in
host memory and each layer visits the device for its turn (accelerate). cpu: all of it in host memory; so does "cached"
where the cache turns out to lack a text, since the plan then has no room for an encoder. int8 and nf4 (bitsandbytes)
replace linears for the time of reading: they are smaller, so they are never streamed, and their rows differ a little
from those of the full weights.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from turbodiff.models.text_encoder import TextEncoder
from turbodiff.runtime import offload
from turbodiff.spec.files import atomic_write, check_file, check_own_folder, make_folder
from turbodiff.spec.plan import Levers

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TextRows:
    """A prompt as the network reads it: `rows` [1, text_len, dim], those past its `tokens` zero, and its word weights.

    `bias` [1, 1, 1, text_len] is added to the logits of cross-attention, None where no word weighs more or less.
    """

    rows: Tensor
    tokens: int
    bias: Tensor | None = None

    @classmethod
    def padded(cls, rows: Tensor, text_len: int) -> "TextRows":
        """Rows of the tokens [n, dim] -> [1, text_len, dim] with zeros below (Wan2.1 attends to those, too)."""
        return cls(F.pad(rows, (0, 0, 0, text_len - len(rows)))[None], len(rows))

    def weighted(self, weights: Sequence[float]) -> "TextRows":
        """The same rows with ln(weight) as a bias on the logits of each weighted token (design: prompt weights)."""
        if all(weight == 1 for weight in weights):
            return replace(self, bias=None)
        bias = torch.zeros(self.rows.shape[1])
        bias[: len(weights)] = torch.tensor([math.log(weight) for weight in weights[: self.rows.shape[1]]])
        return replace(self, bias=bias.view(1, 1, 1, -1))


class TextCache:
    """Text rows in a folder, without the weights of words: a repeated prompt loads no encoder.

    `encoder` names the file that read them and its bits; rows of another encoder are other rows.
    """

    def __init__(self, folder: Path, encoder: str, text_len: int) -> None:
        self._folder, self._encoder, self._text_len = folder, encoder, text_len

    def path(self, text: str) -> Path:
        """The file of a clean text's rows."""
        key = hashlib.sha256(f"{self._encoder}\n{text}".encode()).hexdigest()[:32]
        return self._folder / f"{key}.safetensors"

    def load(self, text: str) -> TextRows | None:
        """Rows kept earlier, or None; a damaged file counts as none."""
        try:
            check_own_folder(self._folder)
            check_file(self.path(text))  # a pipe would wait for its writer
            with safe_open(self.path(text), "pt") as file:
                return TextRows.padded(file.get_tensor("rows"), self._text_len)
        except (OSError, SafetensorError):
            return None

    def save(self, text: str, rows: TextRows) -> None:
        """Keep the rows of a text; on a full disk they are not kept."""
        with contextlib.suppress(OSError, SafetensorError):
            make_folder(self._folder, ours=True, link=False)
            with atomic_write(self.path(text)) as part:
                save_file({"rows": rows.rows[0, : rows.tokens].contiguous()}, part)


@contextmanager
def encoder_on_device(
    encoder: TextEncoder, levers: Levers, device: torch.device, *, stay: bool = False
) -> Iterator[torch.device]:
    """The encoder ready to read, inside the block; yields the device where its token ids belong.

    With `stay` a resident encoder remains on the device.
    """
    if levers.text in ("cpu", "cached"):
        device = CPU
    if levers.text_dtype != "bf16":
        with quantized(encoder, levers.text_dtype, device):
            yield device
    elif levers.text == "streamed" and device != CPU:
        with offload.on_device(encoder, CPU), streamed(encoder, device):
            yield CPU
    else:
        with offload.on_device(encoder, device, stay=stay):
            yield device


@contextmanager
def streamed(encoder: TextEncoder, device: torch.device) -> Iterator[None]:
    """Layers come to the device one at a time and leave again; ids go in and rows come out in host memory."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    layers = [*encoder.encoder.block, encoder.encoder.final_layer_norm]
    own = [(module, dict(module._parameters)) for layer in layers for module in layer.modules()]
    try:
        for layer in layers:  # whole: what a layer adds to its input must lie where its input lies
            weights = {name: tensor.data for name, tensor in layer.named_parameters()}
            whole = {"offload": True, "place_submodules": True, "weights_map": weights}
            add_hook_to_module(layer, AlignDevicesHook(device, io_same_device=True, **whole))
        yield
    finally:
        for layer in layers:
            remove_hook_from_module(layer, recurse=True)
        for module, parameters in own:  # the very parameters of before, which carry their host copies
            module._parameters.update(parameters)
        offload.free_cached(device)


@contextmanager
def quantized(encoder: TextEncoder, dtype: str, device: torch.device) -> Iterator[None]:
    """The linears of the layers in int8 or nf4, on the device; the full weights stay in host memory and come back.

    int8 is LLM.int8() without outliers (arXiv 2208.07339): one scale per row. nf4 is NormalFloat in 4 bits (arXiv
    2305.14314), 64 values to a scale. Both are quantised when they are moved to a device. The last linear of each
    feed-forward keeps its dtype: its activations exceed float16, in which bitsandbytes works.
    """
    from bitsandbytes.nn import modules as bits

    places = [
        (parent, name, child)
        for parent in encoder.encoder.block.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name != "wo"
    ]
    swapped = {id(child) for _, _, child in places}
    leaves = [leaf for leaf in encoder.modules() if leaf._parameters and id(leaf) not in swapped]
    try:
        for parent, name, child in places:
            size, weight = (child.in_features, child.out_features, False), child.weight
            small: nn.Linear
            if dtype == "int8":
                with torch.device("meta"):
                    small = bits.Linear8bitLt(*size, has_fp16_weights=False)
                small.weight = bits.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                with torch.device("meta"):
                    small = bits.Linear4bit(*size, compute_dtype=weight.dtype, quant_type="nf4")  # type: ignore[no-untyped-call]
                small.weight = bits.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
            setattr(parent, name, offload.to_device(small, device))
        with offload.on_device(nn.ModuleList(leaves), device):
            yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
        offload.free_cached(device)
