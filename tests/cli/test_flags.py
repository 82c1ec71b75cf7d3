"""Flags that are more than a word."""

import json
import os
import re
import subprocess
import sys

import pytest

from turbodiff.cli.flags import FLAGS, read_lora
from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import all_models
from turbodiff.spec.request import Request, make_request


@pytest.mark.parametrize(
    ("ending", "fields"),
    [
        ("", {}),
        (":0.8", {"strength": 0.8}),
        (":-1", {"strength": -1.0}),
        (":high", {"expert": "high"}),
        (":.5:low", {"strength": 0.5, "expert": "low"}),
    ],
)
def test_a_lora_is_a_path_a_strength_and_an_expert(tmp_path, monkeypatch, ending, fields):
    (tmp_path / "style:1.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    read = read_lora(f"style:1.safetensors{ending}")
    assert read == {"path": str(tmp_path / "style:1.safetensors"), **fields}
    assert make_request({"prompt": "x", "loras": [read]}).loras[0].path == read["path"]


def test_a_lora_that_is_not_there_is_an_error_of_its_field(tmp_path):
    with pytest.raises(RequestError) as caught:
        read_lora(str(tmp_path / "no.safetensors:0.5"))
    assert caught.value.field == "lora" and "no.safetensors: No such file" in caught.value.got


def test_a_strength_out_of_range_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(RequestError) as caught:
        make_request({"prompt": "x", "loras": [read_lora(f"{tmp_path}/a:9")]})
    assert caught.value.field == "loras"


def test_every_field_of_a_request_has_a_flag_and_every_flag_is_a_field():
    # the argument, the model's, the size's, the page's, of `turbodiff extend` and its rows in the queue, of a grid
    derived = {"kind", "prompt", "width", "height", "nonce", "continues", "after", "grid"}
    assert set(FLAGS) == set(Request.model_fields) - derived | {"size", "ode"}


def test_a_locale_of_ascii_takes_no_letter_from_a_prompt(tmp_path):
    """LC_ALL=C without Python's UTF-8 mode hands each byte on as a surrogate."""
    where = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "turbodiff.cli", "plan", "红色的圆 moves", "--model", "demo", "--json"]
    done = subprocess.run(command, env=where, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["request"]["prompt"] == "红色的圆 moves"


def test_every_help_that_names_models_names_all_of_them(turbodiff, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    named = [spec.display_name for spec in all_models() if not spec.bundled]
    pages = [["models", name] for name in ("pull", "pause", "cancel", "delete", "move")]
    for page in [["plan"], ["generate"], ["calibrate"], *pages]:
        code, said = turbodiff(*page, "--help")
        assert code == 0
        told = re.sub(r"[\s│]+", " ", said.out)
        assert not [name for name in named if name not in told], page


def test_help_answers_where_the_table_of_models_cannot_be_read(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.toml").write_text("name = ")
    where = {**os.environ, "TURBODIFF_CONFIGS": str(tmp_path)}
    command = [sys.executable, "-m", "turbodiff.cli", "models", "pull"]
    shown = subprocess.run([*command, "--help"], env=where, capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "turbodiff models list" in shown.stdout
    told = subprocess.run([*command, "14B"], env=where, capture_output=True, text=True, check=False)
    assert told.returncode == 2 and "broken.toml" in told.stderr and "Traceback" not in told.stderr
