"""Every format of the table does what formats.md says, and a folder of any mix of them is used as well as it can be."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.weights import formats
from turbodiff.models.image_encoder import make_image_encoder
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.models.vae import make_vae
from turbodiff.models.wan_dit import WanDiT
from turbodiff.plan.candidates import network_files
from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache, dit_config
from turbodiff.spec.errors import FileError
from turbodiff.spec.models import all_models
from turbodiff.spec.request import make_request
from turbodiff.weights import load, locate
from turbodiff.weights.fit import network_shapes

MIXED = (  # formats of one DiT for the mixes: most kinds that load, most that do not
    "Wan-AI .pth", "float16", "TurboWan safetensors", "TurboWan -quant .pth", "fp8 scaled by row, scale_weight [o, 1]",
    "fp8 in blocks of 64, weight_scale", "INT8 by row, LightX2V", "INT8, ComfyUI (one scale)", "GGUF Q8_0", "diffusers",
    "diffusers shards", "FastVideo's names", ".pth in generator_ema beside generator", "prefix model.diffusion_model.",
    "nvfp4", "mxfp8", "bitsandbytes nf4", "INT8 rotated (ConvRot)", "INT8 with scales that do not fit", "Wan VACE",
    "HQQ", "a LoRA", "an encrypted zip", "two thirds of a file", "a download of aria2", "a pipe", "an empty file",
    "a bare pickle", "GGUF of a million tensors",
)  # fmt: skip
NAMES = (  # of published files; what is in them is another matter
    "TurboWan2.1-T2V-1.3B-480P", "TurboWan2.1-T2V-1.3B-480P-quant", "wan2.1_t2v_1.3B_fp16",
    "Wan2_1-T2V-1_3B_fp8_e4m3fn", "Wan2.2-T2V-A14B-HighNoise-Q4_K_M", "wan2.2_i2v_low_noise_14B_fp8_scaled",
    "wan_2.1_vae", "umt5-xxl-enc-bf16", "Wan21_CausVid_14B_T2V_lora_rank32", "generator", "diffusion_pytorch_model",
    "dit t2v \u96ea",
)  # fmt: skip
FOLDERS = ("", "low_vram", "split_files/diffusion_models", "Wan2.2-Lightning/high_noise_model")


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
            format_.save(format_.make()[0], folder / str(place) / format_.file)
        yield folder


def place_of(made: Path, place: int, number: int, name: str, folder: Path) -> str:
    """Link a format of `made` into a folder under another name; returns the top of the path that it got."""
    (first, *beside) = sorted((made / str(place)).iterdir(), key=lambda path: len(path.name))
    stem = folder / f"{name}-{number}"
    if first.is_dir():  # shards, whose index names them
        shutil.copytree(first, stem, copy_function=os.link)
        return str(stem)
    ending = "".join(Path(formats.FORMATS[MIXED[place]].file).suffixes)
    for path in (first, *beside):
        os.link(path, f"{stem}{ending}{path.name.removeprefix(first.name)}")
    return f"{stem}{ending}"


@settings(  # not shrunk: that loads for minutes, and eight files are read as they are
    max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.generate)
)
@given(
    places=st.sets(st.integers(0, len(MIXED) - 1), min_size=1, max_size=8).map(sorted),
    names=st.lists(st.sampled_from(NAMES), min_size=8, max_size=8),
    folders=st.lists(st.sampled_from(FOLDERS), min_size=8, max_size=8),
)
def test_whatever_is_picked_from_a_mix_loads_and_nothing_good_is_passed_over(
    made: Path, places: list[int], names: list[str], folders: list[str]
) -> None:
    """The plan's choice and the worker's, for each wish about INT8, with a folder as people have it."""
    with tempfile.TemporaryDirectory(dir=made) as root, pytest.MonkeyPatch.context() as patched:
        patched.setenv("TURBODIFF_MODELS", root)
        for file in ("vae.safetensors", "umt5.safetensors", "spiece.model"):
            (Path(root) / file).symlink_to(formats.DEMO / file)
        tops = {}
        for number, (place, name, folder) in enumerate(zip(places, names, folders, strict=False)):
            (Path(root) / folder).mkdir(parents=True, exist_ok=True)
            tops[place_of(made, place, number, name, Path(root) / folder)] = place
        good = {place for place in places if not formats.FORMATS[MIXED[place]].code}
        found = locate.inventory()

        def told(paths: list[str]) -> set[int]:
            return {tops[top] for path in paths for top in tops if Path(path).is_relative_to(top)}

        dits = [file.path for file in found.files if (file.model, file.component) == ("demo", "dit")]
        assert told(dits) == good and len(dits) == len(good)
        assert told([one.path for one in found.passed_over]) == set(places) - good
        for wish in ("auto", "on", "off"):
            request = make_request({"prompt": "a red circle moves", "model": "demo", "seed": 1, "quant_linear": wish})
            planned = plan_request(request, Machine(cpu_count=2, ram_available_bytes=8 << 30), found)
            cache = ModelCache(Device.pick("cpu"))
            if not good:
                with pytest.raises(FileError, match="missing"):
                    cache.open(planned.request)
                continue
            cache.open(planned.request)
            assert network_files(planned.request, found) == (cache.files["dit"],)
            assert told([cache.files["dit"].path]) <= good
            assert all(value.device.type == "cpu" for value in cache.get_or_load("dit").state_dict().values())


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
