"""Files are found by what they hold, wherever they lie and whatever they are called."""

import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from tests.weights import formats, tiny
from turbodiff.models.wan_dit import WanConfig, WanDiT
from turbodiff.plan.candidates import network_files
from turbodiff.prompt.tokens import Tokenizer
from turbodiff.spec.errors import FileError
from turbodiff.spec.models import FoundFile, Inventory, find_model
from turbodiff.spec.request import make_request
from turbodiff.weights import experts, folders, locate
from turbodiff.weights.lora_facts import lora_facts
from webui.wording import Words

PUBLISHED = {  # width, ffn, heads, layers, channels in and out
    "Wan2.1-1.3B": (1536, 8960, 12, 30, 16),
    "Wan2.1-14B": (5120, 13824, 40, 40, 16),
    "Wan2.2-A14B": (5120, 13824, 40, 40, 36),
    "Wan2.2 TI2V-5B": (3072, 14336, 24, 30, 48, 48),
    "Wan2.1 Fun-InP 1.3B": (1536, 8960, 12, 30, 36),
    "Wan Fun-Control": (5120, 13824, 40, 40, 48),
    "Wan2.2 Fun-Control": (5120, 13824, 40, 40, 52),
}


def hollow(model: str, path: Path, *, quant: bool = False, plain: bool = False) -> Path:
    """A .pth with every key and shape of the published file and one byte a storage: strides of zero."""
    with torch.device("meta"):
        state = WanDiT(WanConfig(*PUBLISHED[model], sla=not plain, quant_linear=quant)).state_dict()
    values = {torch.int8: torch.zeros(1, dtype=torch.int8), torch.float32: torch.zeros(1, dtype=torch.bfloat16)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: values[value.dtype].expand(value.shape) for name, value in state.items()}, path)
    return path


def places(found: tuple[FoundFile, ...]) -> list[tuple[str, str, bool, str, str]]:
    return [(file.model, file.component, file.quant, file.resolution, Path(file.path).name) for file in found]


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(locate, "bundled_root", lambda: tmp_path / "no-demo")


def test_searching_downloading_and_verifying_need_no_torch() -> None:
    code = (
        "import sys; from turbodiff.weights import download, locate; found = locate.inventory();"
        "[locate.verify(file.path) for file in found.files if file.component == 'vae']; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_a_model_is_told_by_shapes_and_turbo_comes_before_plain(tmp_path: Path) -> None:
    hollow("Wan2.1-1.3B", tmp_path / "a.pth", plain=True)
    hollow("Wan2.1-1.3B", tmp_path / "deep" / "er" / "b-480P.pth")
    hollow("Wan2.1-1.3B", tmp_path / "c-480P-quant.pth", quant=True)
    found = locate.inventory([tmp_path])
    assert places(found.files) == [
        ("wan2.1-1.3b", "dit", False, "480p", "b-480P.pth"),
        ("wan2.1-1.3b", "dit", True, "480p", "c-480P-quant.pth"),
        ("wan2.1-1.3b", "dit", False, "", "a.pth"),
    ]
    assert found.of("wan2.1-1.3b", "dit", quant=True).path.endswith("c-480P-quant.pth")


def test_the_experts_of_a14b_are_told_by_name_or_folder(tmp_path: Path) -> None:
    hollow("Wan2.2-A14B", tmp_path / "x-high-720P.pth")
    hollow("Wan2.2-A14B", tmp_path / "low_noise_model" / "x.pth")
    hollow("Wan2.2-A14B", tmp_path / "unnamed.pth")
    assert places(locate.inventory([tmp_path]).files) == [
        ("wan2.2-a14b", "dit_high", False, "720p", "x-high-720P.pth"),
        ("wan2.2-a14b", "dit_low", False, "", "x.pth"),
    ]


def test_foreign_and_damaged_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!doctype html><p>404")
    (tmp_path / "half.pth").write_bytes(hollow("Wan2.1-1.3B", tmp_path / "whole.pth").read_bytes()[:9000])
    tiny.write("wan.safetensors", tmp_path)
    assert [Path(file.path).name for file in locate.inventory([tmp_path, tmp_path / "nowhere"]).files] == ["whole.pth"]


def test_a_changed_file_is_looked_at_again(tmp_path: Path) -> None:
    path = hollow("Wan2.1-1.3B", tmp_path / "a.pth")
    assert not locate.inventory([tmp_path]).files[0].quant
    hollow("Wan2.1-1.3B", path, quant=True)
    assert locate.inventory([tmp_path]).files[0].quant


def test_every_missing_file_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locate.ROOTS_VARIABLE, str(tmp_path))
    hollow("Wan2.1-1.3B", tmp_path / "a.pth")
    with pytest.raises(FileError) as caught:
        locate.resolve_files("Wan2.1-1.3B", locate.inventory())
    error = caught.value
    assert error.exit_code == 2
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model"):
        assert f"{name} (Wan-AI/Wan2.1-T2V-1.3B)" in error.expected
    assert "TurboWan2.1" not in error.expected, "the DiT is there"
    assert str(tmp_path) in error.expected
    assert "pull wan2.1-1.3b" in error.try_instead


def test_a_file_in_a_search_root_comes_before_the_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "bundled_root", lambda: tmp_path / "bundled")
    hollow("Wan2.1-1.3B", tmp_path / "bundled" / "a.pth")
    hollow("Wan2.1-1.3B", tmp_path / "mine" / "b.pth", plain=True)
    files = locate.inventory([tmp_path / "mine"]).files
    assert [Path(file.path).name for file in files] == ["b.pth", "a.pth"]


def test_roots_are_searched_in_the_order_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locate.ROOTS_VARIABLE, f"{tmp_path / 'b'}:{tmp_path / 'a'}")
    assert locate.model_roots()[:2] == (tmp_path / "b", tmp_path / "a")
    for folder in "ab":
        hollow("Wan2.1-1.3B", tmp_path / folder / "x.pth")
    assert Path(locate.inventory().of("wan2.1-1.3b", "dit").path).parent.name == "b"


def test_the_hugging_face_cache_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv(locate.ROOTS_VARIABLE, str(tmp_path / "nothing"))
    file = find_model("Wan2.1-1.3B").files[0]
    repo = tmp_path / f"models--{file.repo.replace('/', '--')}"
    hollow("Wan2.1-1.3B", repo / "snapshots" / "abc" / file.names[0])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    assert Path(locate.inventory().of("wan2.1-1.3b", "dit").path).name == file.names[0]


@pytest.mark.parametrize(("size", "model"), [(4_548_313, "Wan2.1-1.3B"), (250_000, "demo")])
def test_a_tokenizer_belongs_to_the_vocabulary_it_has_room_for(size: int, model: str, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\n" * size)
    found = locate.inventory([tmp_path])
    assert found.of(find_model(model).name, "tokenizer")
    assert bool(found.of("demo", "tokenizer")) != bool(found.of("wan2.1-1.3b", "tokenizer"))


def fourteen(name: str, resolution: str, quant: bool = False, sla: bool = True) -> FoundFile:
    return FoundFile(
        model="wan2.1-14b", component="dit", path=name, bytes=1, quant=quant, sla=sla, resolution=resolution
    )


def others() -> list[FoundFile]:
    names = ("vae", "text_encoder", "tokenizer")
    return [FoundFile(model="wan2.1-14b", component=name, path=name, bytes=1) for name in names]


def taken(found, size, quant_linear="auto"):
    """The network that a clip of the 14B model is made with."""
    request = make_request({"prompt": "x", "model": "Wan2.1-14B", "size": size, "quant_linear": quant_linear})
    return network_files(request, found)[0].path


@pytest.mark.parametrize(
    ("size", "quant", "expected"),
    [
        ("832x480", "off", "480"), ("1280x720", "off", "720"), ("640x480", "off", "480"), ("960x720", "off", "720"),
        ("832x480", "on", "480-quant"), ("1280x720", "on", "480-quant"),
    ],
)  # fmt: skip
def test_of_two_checkpoints_the_one_that_was_distilled_at_the_resolution_is_taken(size, quant, expected) -> None:
    dits = [fourteen("720", "720p"), fourteen("480", "480p"), fourteen("480-quant", "480p", quant=True)]
    plain = fourteen("plain-480p", "480p", sla=False)
    assert taken(Inventory(files=(*dits, plain, *others())), size, quant) == expected


def test_a_distilled_file_for_another_resolution_goes_before_a_plain_one() -> None:
    found = Inventory(files=(fourteen("720", "720p"), fourteen("plain", "480p", sla=False), *others()))
    assert taken(found, "832x480") == "720"


def test_every_missing_file_is_named_with_its_own_repository(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        locate.resolve_files("Wan2.1-14B", Inventory(files=tuple(others())))
    for size in ("480P", "720P"):
        name = f"TurboWan2.1-T2V-14B-{size}"
        assert f"{name}.pth | {name}-quant.pth (TurboDiffusion/{name})" in caught.value.expected


def test_loras_are_found_by_folder_and_the_first_root_wins(tmp_path: Path) -> None:
    for path in ("a/loras/style.safetensors", "a/loras/wan/motion.safetensors", "b/loras/style.safetensors"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    (tmp_path / "a" / "loras" / "readme.txt").write_text("x")
    found = locate.find_loras((tmp_path / "a", tmp_path / "b", tmp_path / "missing"))
    assert [file.name for file in found] == ["style.safetensors", "wan/motion.safetensors"]
    assert found[0].path == tmp_path / "a" / "loras" / "style.safetensors"


def test_what_no_model_uses_is_listed_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!doctype html><p>404")
    hollow("Wan2.2-A14B", tmp_path / "unnamed.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "x-00001-of-00006.safetensors").write_bytes(b"\0" * 20)
    with zipfile.ZipFile(tmp_path / "strange.pth", "w") as archive:
        archive.writestr("a.txt", "x")
    tiny.write("wan.safetensors", tmp_path)
    told = {Path(one.path).name: (one.code, one.got) for one in locate.inventory([tmp_path]).passed_over}
    assert told["page.safetensors"] == ("file_foreign", "a web page")
    assert told["unnamed.pth"] == ("expert_unknown", "unnamed.pth")
    assert told["pipe.pth"] == ("file_foreign", "it is a named pipe")
    assert told["x-00001-of-00006.safetensors"][0] == "index_missing"
    assert told["strange.pth"][0] == "file_foreign"
    assert told["a.safetensors"][0] == "no_model" and "dim 128" in told["a.safetensors"][1]


def test_a_name_that_is_no_utf8_is_passed_over_and_the_inventory_can_be_told(tmp_path: Path) -> None:
    for folder, name in (("upscalers", b"\xff.pth"), ("loras", b"\xff.safetensors"), (".", b"\xff.safetensors")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / os.fsdecode(name)).write_bytes(b"x" * 20)
    for number in range(300):
        (tmp_path / "upscalers" / f"{number:03}.pth").touch()
    found = locate.inventory([tmp_path])
    assert Inventory.model_validate_json(found.model_dump_json()) == found
    assert not found.loras and len(found.networks) == 300
    assert [one.code for one in found.passed_over] == ["folder_name"]
    with pytest.raises(FileError) as caught:
        found.network("upscaler", "misspelt.pth")
    assert caught.value.expected.startswith("000.pth, 001.pth") and len(caught.value.expected) < 100


@pytest.mark.parametrize("model", ["Wan2.2 TI2V-5B", "Wan2.1 Fun-InP 1.3B", "Wan Fun-Control", "Wan2.2 Fun-Control"])
def test_a_relative_in_its_published_size_is_named(model: str, tmp_path: Path) -> None:
    hollow(model, tmp_path / "wan2.2_high_noise.pth", plain=True)
    (one,) = locate.inventory([tmp_path]).passed_over
    assert (one.code, one.got) == ("no_model", model)


def test_a_person_says_which_expert_a_file_is(tmp_path: Path) -> None:
    path = hollow("Wan2.2-A14B", tmp_path / "unnamed.pth")
    beside = experts.tell(path, "low")
    assert beside == tmp_path / "unnamed.pth.toml"
    assert places(locate.inventory([tmp_path]).files) == [("wan2.2-a14b", "dit_low", False, "", "unnamed.pth")]
    experts.tell(path, "high")
    assert places(locate.inventory([tmp_path]).files)[0][1] == "dit_high"
    assert beside.read_text() == 'expert = "high"\n'


def test_what_a_person_says_is_followed_or_refused_with_the_reason(tmp_path: Path) -> None:
    twin = hollow("Wan2.2-A14B", tmp_path / "unnamed.pth")
    either = hollow("Wan2.1-14B", tmp_path / "wan2.2_high_noise.pth", plain=True)
    alone = hollow("Wan2.1-1.3B", tmp_path / "small.pth")
    vae = Path(shutil.copy(Path(locate.__file__).resolve().parents[1] / "demo" / "vae.safetensors", tmp_path))
    page = tmp_path / "page.pth"
    page.write_text("<!doctype html><p>404")
    for path, side, code in (
        (twin, "single", "expert_of_two"), (alone, "high", "expert_of_none"), (vae, "low", "expert_of_none"),
        (vae, "single", "expert_of_none"), (page, "high", "file_foreign"),
        (tmp_path / "none.pth", "low", "file_missing"),
    ):  # fmt: skip
        with pytest.raises(FileError) as refused:
            locate.tell_expert(path, side)
        assert refused.value.code == code and not path.with_name(path.name + ".toml").exists()
        assert str(path) in refused.value.field
    locate.tell_expert(twin, "low")
    locate.tell_expert(either, "single")
    locate.tell_expert(alone, "single")
    found = {(Path(file.path).name, file.component) for file in locate.inventory([tmp_path]).files}
    assert {("unnamed.pth", "dit_low"), ("wan2.2_high_noise.pth", "dit"), ("small.pth", "dit")} <= found


def test_a_word_written_by_hand_that_cannot_be_followed_is_listed_with_the_reason(tmp_path: Path) -> None:
    path = hollow("Wan2.2-A14B", tmp_path / "unnamed.pth")
    (tmp_path / "unnamed.pth.toml").write_text('expert = "single"')
    (one,) = locate.inventory([tmp_path]).passed_over
    assert (one.path, one.code) == (str(path), "expert_of_two")
    for lang in ("en", "zh"):
        assert "Wan2.2" in Words(lang).passed_over(one) and "--expert high" in Words(lang).passed_over(one)


def test_a_lora_can_be_told_and_untold_its_expert(tmp_path: Path) -> None:
    path = tmp_path / "style_high_noise.safetensors"
    save_file({f"blocks.0.self_attn.q.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}, path)
    for side, proposed in (("low", "low"), ("single", "")):
        locate.tell_expert(path, side)
        assert lora_facts(path).expert == proposed
        os.utime(path, (len(side), len(side)))  # facts are read again when the file changes


def test_the_tokenizer_inside_comfys_text_encoder_is_used_where_there_is_no_other(tmp_path: Path) -> None:
    spiece = Path(locate.__file__).resolve().parents[1] / "demo" / "spiece.model"
    state, _ = formats.umt5_comfy()
    formats.safetensors(state, tmp_path / "umt5_fp8.safetensors")
    found = locate.inventory([tmp_path])
    inside = found.of("demo", "tokenizer")
    assert inside is not None and inside.path.endswith("umt5_fp8.safetensors")
    assert inside.bytes == spiece.stat().st_size
    ids = [locate.open_tokenizer(inside).tokens("a red circle"), Tokenizer(spiece).tokens("a red circle")]
    assert ids[0] == ids[1]
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    assert locate.inventory([tmp_path]).of("demo", "tokenizer").path.endswith("spiece.model")


@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize(
    ("repo", "name"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B", "diffusion_pytorch_model.pth"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "transformer/model.pth"),
        ("Comfy-Org/Wan_2.1_ComfyUI_repackaged", "split_files/diffusion_models/wan2.1.pth"),
        ("Kijai/WanVideo_comfy", "Wan2_1-T2V-1_3B.pth"),
        ("QuantStack/Wan2.1-T2V", "x.pth"),
        ("city96/Wan2.1-T2V-gguf", "x.pth"),
    ],
)
def test_repositories_of_the_cache_are_searched_by_content(
    repo: str, name: str, main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("SOMEWHERE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HOME", "$SOMEWHERE/home")
    monkeypatch.setenv(locate.ROOTS_VARIABLE, str(tmp_path / "nothing"))
    folder = tmp_path / "hf" / "home" / "hub" / f"models--{repo.replace('/', '--')}"
    blob = hollow("Wan2.1-1.3B", folder / "blobs" / "abc.pth", plain=True)
    link = folder / "snapshots" / "0123" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    (link.parent / "foreign.safetensors").write_bytes(b"x" * 50)
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123\n")
    found = locate.inventory()
    assert found.of("wan2.1-1.3b", "dit").path == str(link)
    assert not [one for one in found.passed_over if "hf" in one.path], "what others keep there is not told"


def test_linked_folders_and_loras_behind_links_are_found(tmp_path: Path) -> None:
    hollow("Wan2.1-1.3B", tmp_path / "disk" / "models" / "A.PTH".lower())
    (tmp_path / "root" / "loras").mkdir(parents=True)
    (tmp_path / "root" / "big").symlink_to(tmp_path / "disk" / "models")
    (tmp_path / "disk" / "styles").mkdir()
    (tmp_path / "disk" / "styles" / "s.SFT").write_bytes(b"x")
    (tmp_path / "root" / "loras" / "linked").symlink_to(tmp_path / "disk" / "styles")
    found = locate.inventory([tmp_path / "root"])
    assert [Path(file.path).name for file in found.files] == ["a.pth"]
    assert [lora.name for lora in locate.find_loras((tmp_path / "root",))] == ["linked/s.SFT"]


def test_parts_of_a_checkpoint_are_not_listed_beside_it(tmp_path: Path) -> None:
    """LightX2V's blocks are called block_0.safetensors, not -00001-of-00002."""
    formats.shards(formats.plain()[0], tmp_path / "split")
    index = tmp_path / "split" / "model.safetensors.index.json"
    text = index.read_text()
    for place, part in enumerate(sorted((tmp_path / "split").glob("*-of-*"))):
        text = text.replace(part.name, f"block_{place}.safetensors")
        part.rename(part.with_name(f"block_{place}.safetensors"))
    index.write_text(text)
    found = locate.inventory([tmp_path])
    assert [Path(file.path).name for file in found.files if file.model == "demo"] == [index.name]
    assert found.passed_over == ()


def passed_over(root: Path) -> dict[str, tuple[str, str]]:
    """By path below the root: the code of the reason and what was got."""
    found = locate.inventory([root]).passed_over
    assert len({one.path for one in found}) == len(found)
    return {str(Path(one.path).relative_to(root)): (one.code, one.got) for one in found}


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_folders_that_are_not_searched_are_one_line_each_with_their_reason(tmp_path: Path) -> None:
    for n in range(40):
        touched(tmp_path / ".hidden" / "deep" / f"{n:02}.safetensors")
        touched(tmp_path / "1/2/3/4/5/6/7" / f"{n:02}.pth")
        touched(tmp_path / "other" / "loras" / f"{n:02}.safetensors")
    touched(tmp_path / ".model.gguf")
    (tmp_path / "x.safetensors").mkdir()
    touched(tmp_path / "LoRA" / "a.safetensors")
    assert passed_over(tmp_path) == {
        ".hidden": ("folder_hidden", "deep/00.safetensors"),
        ".model.gguf": ("folder_hidden", ".model.gguf"),
        "1/2/3/4/5/6": ("folder_deep", "7/00.pth"),
        "LoRA": ("folder_loras", "a.safetensors"),
        "other/loras": ("folder_loras", "00.safetensors"),
        "x.safetensors": ("folder_folder", ""),
    }


def test_what_holds_no_weights_or_is_of_another_program_is_no_matter(tmp_path: Path) -> None:
    for place in (".git/x.pth", ".cache/huggingface/x.pth", ".venv/lib/x.pth", ".Trash-1000/files/x.pth"):
        touched(tmp_path / place)
    for place in (".config/a.json", "1/2/3/4/5/6/7/read.me", "._a.safetensors", ".a.pth.7.part", "loras/._b.pth"):
        touched(tmp_path / place)
    (tmp_path / "1/2/3/4/5/again").symlink_to(tmp_path)
    hollow("Wan2.1-1.3B", tmp_path / "y.safetensors" / "a.pth")
    assert passed_over(tmp_path) == {}
    assert locate.inventory([tmp_path]).of("wan2.1-1.3b", "dit") is not None, "a folder called so is searched"


def test_a_folder_that_cannot_be_read_and_a_root_of_too_many_names_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "theirs":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert passed_over(tmp_path) == {"theirs": ("folder_unreadable", "Permission denied")}
    monkeypatch.setattr(folders, "MAX_ENTRIES", 3)
    for name in ("a", "b", "c"):
        touched(tmp_path / name)
    assert passed_over(tmp_path) == {".": ("folder_many", "3")}
    (tmp_path / "c").unlink()
    assert passed_over(tmp_path) == {"theirs": ("folder_unreadable", "Permission denied")}


def test_every_reason_is_said_in_both_languages(tmp_path: Path) -> None:
    for why in get_args(folders.Why)[1:]:
        error = folders.not_searched(folders.Entry(tmp_path / "a", why, "b.pth"))
        told = {language: Words(language).error(error.fields()) for language in ("en", "zh")}
        assert error.try_instead and "{" not in "".join(told.values())
        assert re.search("[\u4e00-\u9fff]", told["zh"]) and not re.search("[\u4e00-\u9fff]", told["en"])
