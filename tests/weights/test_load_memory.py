"""What loading takes of host memory, measured: the result and one tensor, whatever the file holds its numbers in."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from tests.weights import tiny
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.spec.models import TextFacts

SIZES = WanConfig(dim=1024, ffn_dim=4096, num_heads=8, num_layers=3, text_dim=64, freq_dim=64, sla=False)
TEXT = TextFacts(
    vocab=2048, dim=512, dim_attn=512, dim_ffn=2048, num_heads=8, num_layers=6, num_buckets=32, text_len=64
)  # fmt: skip
ALLOWED_BYTES = 56 << 20  # bands at work, what malloc keeps; 51 MiB were seen once on a busy machine

MEASURE = """
import ctypes, gc, json, sys
from importlib.util import find_spec
from pathlib import Path
import torch
from tests.weights import test_load_memory as here
from turbodiff.models.linear import int8_layers
from turbodiff.weights.load import load_into
from turbodiff.weights.detect import open_checkpoint

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def load(path, kind, small):
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        module = here.network(checkpoint.component, small)
    load_into(module, checkpoint, dtype=torch.bfloat16, become=int8_layers(module) if kind == "int8" else {})
    return module

for line in sys.stdin:
    kind, small, large = json.loads(line)
    load(small, kind, True)  # whatever is imported and set up on the way
    module = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew, proc(5)
    module = load(large, kind, False)
    peak = status("VmHWM") - before
    tensors = [*module.parameters(), *module.buffers()]
    largest = max(2 * t.numel() for t in tensors)
    print(json.dumps((peak, sum({t.data_ptr(): t.nbytes for t in tensors}.values()), largest)), flush=True)
"""


def network(component: str, small: bool) -> torch.nn.Module:
    """The network of the test, or one as small as it gets."""
    if component == "dit":
        return WanDiT(replace(SIZES, num_layers=1, dim=128, ffn_dim=256, num_heads=1) if small else SIZES)
    return make_text_encoder(TEXT.model_copy(update={"num_layers": 1, "vocab": 64} if small else {}))


def state_of(component: str, small: bool) -> dict[str, Tensor]:
    """Its parameters, each a small constant."""
    state = network(component, small).state_dict()
    return {name: torch.full_like(value, 0.05) for name, value in state.items()}


def fp8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix as float8 with a scale, as ComfyUI writes it."""
    result = dict(state)
    for name, value in state.items():
        if value.ndim == 2 and ("blocks." in name or ".block." in name) and "relative" not in name:
            result[name] = (value / 0.5).to(torch.float8_e4m3fn)
            result[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.5)
    return result


def all_in(dtype: torch.dtype) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Every parameter in one dtype."""
    return lambda state: {name: value.to(dtype) for name, value in state.items()}


FORMS = {
    "fp8 to INT8": ("dit", fp8, "int8"),
    "bf16 to INT8": ("dit", all_in(torch.bfloat16), "int8"),
    "fp32 to bf16": ("dit", all_in(torch.float32), "plain"),
    "fp16 UMT5 to bf16": ("text_encoder", all_in(torch.float16), "plain"),
    "GGUF to INT8": ("dit", None, "int8"),
}


def saved(form: str, small: bool, folder: Path) -> str:
    """The file of a form."""
    component, write, _ = FORMS[form]
    state = state_of(component, small)
    state.pop("encoder.embed_tokens.weight", None)
    name = f"{form} {small}"
    if write is None:
        return str(tiny.save_gguf(state, folder / f"{name}.gguf"))
    return str(tiny.save_safetensors(write(state), folder / f"{name}.safetensors"))


def test_loading_holds_the_result_and_one_tensor(tmp_path: Path) -> None:
    forms = [form for form in FORMS if "GGUF" not in form or find_spec("gguf")]
    asked = [[FORMS[form][2], saved(form, True, tmp_path), saved(form, False, tmp_path)] for form in forms]
    lines = "".join(json.dumps(line) + "\n" for line in asked)
    command = [sys.executable, "-c", MEASURE]
    ran = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    for form, line in zip(forms, ran.stdout.splitlines(), strict=True):
        peak, result, largest = json.loads(line)
        assert peak <= result + largest + ALLOWED_BYTES, f"{form}: {peak >> 20}, {result >> 20} + {largest >> 20} MiB"
        print(f"{form}: peak {peak >> 20} MiB, result {result >> 20}, largest tensor {largest >> 20}")
