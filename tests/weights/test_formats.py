"""Every format of the table does what formats.md says, and a folder of any mix of them is used as well as it can be."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.weights import formats
from turbodiff.models.image_encoder import make_image_encoder
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.models.vae import make_vae
from turbodiff.models.wan_dit import WanDiT
from turbodiff.runtime.model_cache import dit_config
from turbodiff.spec.models import all_models
from turbodiff.weights import load, locate
from turbodiff.weights.fit import network_shapes

MIXED = (  # formats of one DiT for the mixes: most kinds that load, most that do not
    "Wan-AI .pth", "float16", "TurboWan safetensors", "TurboWan -quant .pth", "fp8 scaled by row, scale_weight [o, 1]",
    "fp8 in blocks of 64, weight_scale", "INT8 by row, LightX2V", "INT8, ComfyUI (one scale)", "GGUF Q8_0", "diffusers",
    "nvfp4", "mxfp8", "bitsandbytes nf4", "INT8 rotated (ConvRot)", "INT8 with scales that do not fit", "Wan VACE",
    "a LoRA", "an encrypted zip", "two thirds of a file", "a download of aria2", "a pipe", "GGUF of a million tensors",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))
    pytest.importorskip("gguf")


def lines() -> dict[str, str]:
    """The rows of formats.md by the format's name."""
    rows = [line.strip("| ").split(" | ", 1) for line in formats.TABLE.read_text("utf-8").splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_format_does_what_the_table_says(name: str) -> None:
    with formats.lone_demo() as folder:
        row = formats.row(formats.FORMATS[name], folder)
    assert " | ".join(part.replace("|", "/") for part in row) == lines()[name]


def test_the_table_has_every_format_and_no_other() -> None:
    assert set(lines()) == {"format", *formats.FORMATS}
    assert len(formats.FORMATS) >= 60


@pytest.mark.parametrize(
    "name",
    [
        "Wan-AI .pth", "Wan-AI safetensors", "diffusers", "TurboWan -quant .pth", "float16", "float32", "GGUF Q8_0",
        "INT8 by row, LightX2V", "fp8 scaled by row, scale_weight [o, 1]",
    ],
)  # fmt: skip
def test_converted_is_what_loading_makes_instead_of_mapping(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts such weights as host memory, those that stay the file itself not."""
    monkeypatch.setattr(load, "COPIED_BYTES", 0)  # small tensors are copied for another reason
    format_ = formats.FORMATS[name]
    with formats.lone_demo() as folder:
        format_.save(format_.make()[0], folder / format_.file)
        (found,), _ = formats.look(folder)
        values = list(formats.make_module("dit", folder / format_.file, torch.bfloat16).state_dict().values())
        made_bytes = sum(value.nbytes for value in values if value.untyped_storage().resizable())
        assert found.converted == (made_bytes > sum(value.nbytes for value in values) / 2)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """The formats of MIXED, each in a folder of its own."""
    pytest.importorskip("gguf")
    with formats.lone_demo() as folder:
        for place, name in enumerate(MIXED):
            format_ = formats.FORMATS[name]
            (folder / str(place)).mkdir()
            format_.save(format_.make()[0], folder / str(place) / f"{place}-{format_.file}")
        yield folder


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.sets(st.integers(0, len(MIXED) - 1), min_size=1, max_size=8))
def test_whatever_is_picked_from_a_mix_loads_and_nothing_good_is_passed_over(made: Path, chosen: set[int]) -> None:
    roots = [made / str(place) for place in sorted(chosen)]
    found = locate.inventory(roots)
    good = {place for place in chosen if not formats.FORMATS[MIXED[place]].code}
    files = [file for file in found.files if (file.model, file.component) == ("demo", "dit")]
    assert {int(Path(file.path).parent.name) for file in files} == good
    assert {int(Path(one.path).parent.name) for one in found.passed_over} == chosen - good
    for quant in (None, True, False):
        if picked := found.of("demo", "dit", quant):
            formats.make_module("dit", Path(picked.path))
    assert bool(found.of("demo", "dit")) == bool(good)


@pytest.mark.parametrize("spec", all_models(), ids=lambda spec: spec.name)
def test_the_search_knows_the_shapes_that_the_modules_have(spec) -> None:
    with torch.device("meta"):
        modules = {("vae", False, False): make_vae(**spec.vae.model_dump())}
        modules["text_encoder", False, False] = make_text_encoder(spec.text_encoder)
        if spec.image_encoder:
            modules["image_encoder", False, False] = make_image_encoder(spec.image_encoder)
        for quant in (False, True):
            for sla in (False, True):
                modules["dit", quant, sla] = WanDiT(dit_config(spec, sla=sla, quant_linear=quant))
    for key, module in modules.items():
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        assert network_shapes(spec, *key) == shapes, key
