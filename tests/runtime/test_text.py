"""The text encoder's levers on the demo's own encoder."""

import pytest
import torch
from accelerate import hooks

from turbodiff.gpu.host_memory import HostMemory
from turbodiff.memory_lab.dry_run import Ledger
from turbodiff.models.text_encoder import TextEncoder, encode, make_text_encoder
from turbodiff.runtime import model_cache, text
from turbodiff.runtime.text import TextCache
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GIB

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore:.*will be cast:UserWarning")

WORDS = "a red circle moves right"
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def rows(attempt_of):
    def read(**levers):
        attempt = attempt_of(levers)
        with torch.inference_mode(), attempt.models.text_encoder(attempt.plan) as encode:
            return encode(WORDS).rows

    return read


@pytest.fixture
def encoder(models, attempt_of):
    attempt_of()
    return models.get_or_load("text_encoder")


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("lever", ["streamed", "cpu", "cached"])
def test_where_the_encoder_sits_changes_no_bit(rows, lever):
    assert torch.equal(rows(text=lever), rows(text="resident"))


def test_layers_that_visit_the_device_give_the_same_bits_and_leave_the_encoder_as_it_was(rows, encoder):
    whole = rows()
    before = {name: (id(value), value.data_ptr()) for name, value in encoder.named_parameters()}
    ids = torch.tensor([[5, 9, 1]])
    with torch.inference_mode(), text.streamed(encoder, CPU):
        parts = {value.device.type for value in encoder.encoder.block.parameters()}
        here = encoder.shared.weight.device.type
        streamed = encoder(ids, torch.ones_like(ids))
    with torch.inference_mode():
        expected = encoder(ids, torch.ones_like(ids))
    assert (parts, here) == ({"meta"}, "cpu")  # between turns a layer is nowhere; the table of tokens never moves
    assert torch.equal(streamed, expected)
    assert {name: (id(value), value.data_ptr()) for name, value in encoder.named_parameters()} == before
    assert torch.equal(rows(), whole)


@pytest.fixture
def umt5_xxl():
    """Two layers of the real encoder in host memory that nobody touches: a dry run only moves it."""
    facts = find_model("wan2.1-1.3b").text_encoder.model_copy(update={"num_layers": 2, "vocab": 1024})
    with torch.device("meta"):
        return make_text_encoder(facts).to(torch.bfloat16).to_empty(device=CPU)


def test_a_streamed_umt5_xxl_takes_less_than_1_5_gib_of_the_device(umt5_xxl):
    ledger = Ledger("meta")
    with torch.inference_mode(), text.streamed(umt5_xxl, META), ledger:
        rows = torch.empty(1, 512, 4096, device=META, dtype=torch.bfloat16)
        umt5_xxl.encoder(rows, torch.ones(1, 512, device=META))
    layer_bytes = sum(weight.nbytes for weight in umt5_xxl.encoder.block[0].parameters())
    assert layer_bytes < ledger.peak_bytes < 1.5 * GIB  # one layer at a time, and what it computes
    assert umt5_xxl.encoder.block[0].layer[0].SelfAttention.q.weight.device == CPU


def test_a_layer_on_another_device_finds_all_of_its_inputs_there(umt5_xxl, monkeypatch):
    """Ids, mask and rows lie in host memory, weights on a device that refuses tensors of another: meta."""
    send = hooks.send_to_device

    def arrive(tensors, device, **more):
        back = isinstance(tensors, torch.Tensor) and tensors.is_meta and torch.device(device) == CPU
        if isinstance(tensors, tuple):
            return tuple(arrive(tensor, device, **more) for tensor in tensors)
        return torch.zeros(tensors.shape, dtype=tensors.dtype) if back else send(tensors, device, **more)

    monkeypatch.setattr(hooks, "send_to_device", arrive)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode(), text.streamed(umt5_xxl, META):
        rows = encode(umt5_xxl, ids, torch.ones_like(ids))
    assert (rows.device, rows.shape) == (CPU, (1, 512, 4096))


# measured on the demo's encoder: 0.005 and 0.09; a swap that reads the wrong weights gives about 1.4
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("nf4", 0.2)])
def test_fewer_bits_read_almost_the_same_and_the_full_weights_come_back(rows, dtype, bound):
    full = rows()
    small = rows(text_dtype=dtype)
    assert 0 < relative_error(small, full) < bound
    assert torch.equal(rows(), full)


def test_linears_are_really_small_while_they_read(encoder):
    with text.quantized(encoder, "nf4", CPU):
        block = encoder.encoder.block[0]
        assert block.layer[0].SelfAttention.q.weight.dtype == torch.uint8
        assert block.layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_rows_of_fewer_bits_are_cached_under_a_name_of_their_own(attempt_of, tmp_path):
    full, small = attempt_of(), attempt_of({"text_dtype": "int8"})
    keys = [attempt.models.encoder_key(attempt.plan) for attempt in (full, small)]
    assert len({TextCache(tmp_path, key, 512).path(WORDS) for key in keys}) == 2


def test_a_table_of_two_names_is_one_table(encoder):
    tables = {encoder.shared.weight.data_ptr(), encoder.encoder.embed_tokens.weight.data_ptr()}
    assert len(tables) == 1


@pytest.mark.parametrize(
    ("converted", "free_bytes", "stays"), [(True, 0, False), (True, 1 << 50, True), (False, 0, True)]
)
def test_a_converted_encoder_leaves_where_host_memory_is_short(attempt_of, monkeypatch, converted, free_bytes, stays):
    """A mapped one costs nothing to keep."""
    attempt = attempt_of()
    models, read = attempt.models, HostMemory(1 << 50, free_bytes)
    file = models.files["text_encoder"].model_copy(update={"converted": converted})
    monkeypatch.setitem(models.files, "text_encoder", file)
    monkeypatch.setattr(model_cache, "host_memory", lambda: read)
    with torch.inference_mode(), models.text_encoder(attempt.plan) as encode:
        assert encode(WORDS).rows.shape[1] == 512
    before = models.get_or_load("vae")
    assert any(isinstance(kept, TextEncoder) for kept in models._kept.values()) == stays
    assert models.get_or_load("vae") is before
