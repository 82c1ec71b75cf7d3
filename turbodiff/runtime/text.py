"""The text encoder at work: where its weights sit while it reads, and in how many bits.

resident: all of it on the device. streamed: the token table stays in host memory and each layer visits the device for
its turn (accelerate). cpu: all of it in host memory; so does "cached" where the cache turns out to lack a text, since
the plan then has no room for an encoder. int8 and nf4 (bitsandbytes) replace linears for the time of reading: they are
smaller, so they are never streamed, and their rows differ a little from those of the full weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from turbodiff.runtime import offload
from turbodiff.spec.plan import Levers

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

CPU = torch.device("cpu")


@contextmanager
def seated(
    encoder: "UMT5EncoderModel", levers: Levers, device: torch.device, *, stay: bool = False
) -> Iterator[torch.device]:
    """The encoder ready to read, inside the block; yields the device where its token ids belong.

    With `stay` a resident encoder remains on the device.
    """
    if levers.text in ("cpu", "cached"):
        device = CPU
    if levers.text_dtype != "bf16":
        with quantised(encoder, levers.text_dtype, device):
            yield device
    elif levers.text == "streamed" and device != CPU:
        with offload.placed(encoder, CPU), streamed(encoder, device):
            yield CPU
    else:
        with offload.placed(encoder, device, stay=stay):
            yield device


@contextmanager
def streamed(encoder: "UMT5EncoderModel", device: torch.device) -> Iterator[None]:
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
        for module, parameters in own:  # the very parameters of before, which residency knows by identity
            module._parameters.update(parameters)
        offload.free_cached(device)


@contextmanager
def quantised(encoder: "UMT5EncoderModel", dtype: str, device: torch.device) -> Iterator[None]:
    """The linears of the layers in int8 or nf4, on the device; the full weights stay in host memory and come back.

    The last linear of each feed-forward keeps its dtype: its activations exceed float16, in which bitsandbytes works.
    """
    make = QUANTISERS[dtype]
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
            setattr(parent, name, offload.moved(make(child), device))
        with offload.placed(nn.ModuleList(leaves), device):
            yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
        offload.free_cached(device)


def to_int8(linear: nn.Linear) -> nn.Module:
    """LLM.int8() without outliers (arXiv 2208.07339): one scale per row; quantised when it is moved to a device."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        layer = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return layer


def to_nf4(linear: nn.Linear) -> nn.Module:
    """NormalFloat in 4 bits (arXiv 2305.14314), 64 values to a scale; quantised when it is moved to a device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return layer


QUANTISERS: dict[str, Callable[[nn.Linear], nn.Module]] = {"int8": to_int8, "nf4": to_nf4}
