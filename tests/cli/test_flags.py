"""Flags that are more than a word."""

import json
import os
import subprocess
import sys

import pytest

from turbodiff.cli.flags import FLAGS, read_lora
from turbodiff.spec.errors import RequestError
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
    derived = {"kind", "prompt", "width", "height", "nonce"}  # the argument, the model's, the size's, the page's
    assert set(FLAGS) == set(Request.model_fields) - derived | {"size", "ode"}


def test_a_locale_of_ascii_takes_no_letter_from_a_prompt(tmp_path):
    """LC_ALL=C without Python's UTF-8 mode hands each byte on as a surrogate."""
    where = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "turbodiff.cli", "plan", "红色的圆 moves", "--model", "demo", "--json"]
    done = subprocess.run(command, env=where, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["request"]["prompt"] == "红色的圆 moves"
