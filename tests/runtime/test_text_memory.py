"""What an encoder of fewer bits takes of host memory, measured: it is made from the mapped file a linear at a time."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.plan.weight_sizes import encoder_bytes
from turbodiff.spec.models import TextFacts

FACTS = TextFacts(
    vocab=512, dim=1024, dim_attn=1024, dim_ffn=4096, num_heads=8, num_layers=6, num_buckets=32, text_len=64
)  # fmt: skip
ALLOWED_BYTES = 48 << 20  # what importing on the way, a linear at work and malloc keep

MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from tests.runtime.test_text_memory import FACTS
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.runtime import text
from turbodiff.weights.load import load_into

def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what a linear at work left free; on a card that is the card's memory
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def load(facts, path):
    with torch.device("meta"):
        encoder = make_text_encoder(facts)
    return load_into(encoder, path, dtype=torch.bfloat16).module

large, cpu = Path(sys.argv[1]), torch.device("cpu")
with text.quantized(make_text_encoder(FACTS.model_copy(update={"num_layers": 1, "dim_ffn": 64})), "nf4", cpu):
    pass  # whatever is imported and set up on the way
encoder = load(FACTS, large)
before, found = anonymous(), {"bf16": anonymous()}
for dtype in ("int8", "nf4"):
    with text.quantized(encoder, dtype, cpu):
        found[dtype] = anonymous() - before
        head = encoder.encoder.block[0].layer[0].SelfAttention.q.weight
        assert head.element_size() == 1, head.dtype
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "umt5.safetensors"
    encoder = make_text_encoder(FACTS).to(torch.bfloat16)
    state = {name: value.clone().contiguous() for name, value in encoder.state_dict().items() if "embed_" not in name}
    save_file(state, path)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_full_weights_stay_in_the_file_while_few_bits_are_made(measured, dtype):
    linears = 2 * FACTS.num_layers * (4 * FACTS.dim * FACTS.dim_attn + 2 * FACTS.dim * FACTS.dim_ffn)
    small = encoder_bytes(FACTS, dtype, 2) - encoder_bytes(FACTS, "bf16", 2) + linears  # of the layers that are swapped
    assert linears > 2 * ALLOWED_BYTES  # full weights beside them would be seen
    assert 0.9 * small < measured[dtype] < small + ALLOWED_BYTES
