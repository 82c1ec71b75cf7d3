import pytest

from turbodiff.spec.errors import FileError
from turbodiff.spec.models import ModelSpec, all_models, configs_folder, read_toml


def test_an_unknown_key_names_file_and_key(tmp_path):
    text = (configs_folder() / "models" / "demo.toml").read_text("utf-8").replace("num_heads", "heads")
    path = tmp_path / "demo.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(FileError) as caught:
        read_toml(path, ModelSpec)
    assert "demo.toml" in caught.value.field and "dit." in caught.value.field


def test_a_broken_file_is_one_clear_error(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("name = ")
    with pytest.raises(FileError, match="TOML"):
        read_toml(path, ModelSpec)


def test_every_network_has_heads_of_128_channels_in_tiles_of_128():
    for spec in all_models():
        assert spec.dit.head_dim == 128
        assert spec.dit.dim % 128 == spec.dit.ffn_dim % 128 == 0
        assert spec.dit.in_dim == (36 if spec.kind == "i2v" else 16)


def test_every_component_that_a_model_needs_is_listed():
    for spec in all_models():
        dits = {"dit_high", "dit_low"} if spec.two_experts else {"dit"}
        eyes = {"image_encoder"} if spec.image_encoder else set()
        assert {file.component for file in spec.files} == dits | eyes | {"vae", "text_encoder", "tokenizer"}
        assert spec.dit.image_dim == (spec.image_encoder.dim if spec.image_encoder else 0)
