"""Which LoRA files a form can offer."""

from turbodiff.weights.lora_files import find_loras


def test_loras_are_found_by_folder_and_the_first_root_wins(tmp_path):
    for path in ("a/loras/style.safetensors", "a/loras/wan/motion.safetensors", "b/loras/style.safetensors"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    (tmp_path / "a" / "loras" / "readme.txt").write_text("x")
    found = find_loras((tmp_path / "a", tmp_path / "b", tmp_path / "missing"))
    assert [file.name for file in found] == ["style.safetensors", "wan/motion.safetensors"]
    assert found[0].path == tmp_path / "a" / "loras" / "style.safetensors"
