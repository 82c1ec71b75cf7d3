"""The text encoder's levers on the demo's own encoder."""

import pytest
import torch

from turbodiff.runtime import text
from turbodiff.runtime.embeddings import text_key

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore:.*will be cast:UserWarning")

WORDS = "a red circle moves right"
CPU = torch.device("cpu")


@pytest.fixture
def rows(run_of):
    def read(**levers):
        run = run_of(levers)
        with torch.inference_mode(), run.shelf.text_encoder(run.plan) as encode:
            return encode(WORDS).rows

    return read


@pytest.fixture
def encoder(shelf, run_of):
    run_of()
    return shelf._keep("text_encoder", shelf._load_text_encoder)


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
        streamed = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    with torch.inference_mode():
        expected = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert (parts, here) == ({"meta"}, "cpu")  # between turns a layer is nowhere; the table of tokens never moves
    assert torch.equal(streamed, expected)
    assert {name: (id(value), value.data_ptr()) for name, value in encoder.named_parameters()} == before
    assert torch.equal(rows(), whole)


# measured on the demo's encoder: 0.005 and 0.09; a swap that reads the wrong weights gives about 1.4
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.02), ("nf4", 0.2)])
def test_fewer_bits_read_almost_the_same_and_the_full_weights_come_back(rows, dtype, bound):
    full = rows()
    small = rows(text_dtype=dtype)
    assert 0 < relative_error(small, full) < bound
    assert torch.equal(rows(), full)


def test_linears_are_really_small_while_they_read(encoder):
    with text.quantised(encoder, "nf4", CPU):
        block = encoder.encoder.block[0]
        assert block.layer[0].SelfAttention.q.weight.dtype == torch.uint8
        assert block.layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_rows_of_fewer_bits_are_cached_under_a_name_of_their_own(run_of):
    full, small = run_of(), run_of({"text_dtype": "int8"})
    names = {text_key(run.shelf.text_identity(run.plan), WORDS) for run in (full, small)}
    assert len(names) == 2


def test_a_table_of_two_names_is_one_table(encoder):
    tables = {encoder.shared.weight.data_ptr(), encoder.encoder.embed_tokens.weight.data_ptr()}
    assert len(tables) == 1
