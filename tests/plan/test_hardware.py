import pytest

from turbodiff.plan.hardware import read_machine
from turbodiff.spec.errors import FileError
from turbodiff.spec.numbers import GIB


def test_a_machine_file_may_speak_gib(tmp_path):
    path = tmp_path / "m.toml"
    path.write_text('ram_total_gib = 32\nram_available_gib = 24.5\n[[gpus]]\nname = "RTX 3060"\ntotal_gib = 11.6\n')
    found = read_machine(path)
    assert found.pretended
    assert found.ram_available_bytes == int(24.5 * GIB)
    assert found.gpus[0].free_bytes == found.gpus[0].total_bytes == round(11.6 * GIB)
    assert found.gpu_state == "ok"


def test_a_machine_file_may_be_json(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"gpus": [{"total_gib": 8}, {"total_gib": 16, "free_gib": 3}], "cpu_count": 8}')
    assert [card.index for card in read_machine(path).gpus] == [0, 1]


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("gpus = [", "machine_syntax", "m.toml"),
        ('gpus = "many"', "machine_syntax", "m.toml"),
        ("wings = 2", "machine_key", "wings"),
        ("[[gpus]]\nmemory = 8", "machine_key", "gpus.0.memory"),
        ('ram_total_gib = "much"', "machine_syntax", "m.toml"),
    ],
)
def test_a_bad_machine_file_says_where(tmp_path, text, code, names):
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(FileError) as error:
        read_machine(path)
    assert error.value.code == code
    assert names in error.value.field


def test_a_missing_machine_file_is_an_error_of_ours(tmp_path):
    with pytest.raises(FileError):
        read_machine(tmp_path / "none.toml")
