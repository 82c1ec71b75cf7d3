"""Files that flags name and that are none: a pipe nobody writes to, a socket, a device, a folder."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from turbodiff.spec.files import NotAFileError, check_file, open_file
from turbodiff.weights.locate import bundled_root

PROMPT = "a red circle moves right on a black background"
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {  # as they are typed; FILE is what is none
    "machine": ["plan", PROMPT, "--machine", "FILE"],
    "image": ["plan", PROMPT, "--model", "Wan2.2-A14B", "--image", "FILE"],
    "lora": ["plan", PROMPT, "--lora", "FILE"],
    "seeds": ["seeds", "import", "FILE", "--state-dir", "state"],
    "verify": ["models", "verify", "FILE"],
    "tell": ["models", "tell", "FILE", "--expert", "high"],
    "quantize": ["models", "quantize", "FILE", "out.safetensors"],
    "quantized": ["models", "quantize", str(bundled_root() / "dit_t2v.safetensors"), "FILE"],
    "bundle": ["support-bundle", "FILE", "--state-dir", "state"],
    "output": ["generate", PROMPT, "-o", "FILE"],
    "outputs": ["generate", PROMPT, "--outputs", "FILE"],
    "state": ["jobs", "list", "--state-dir", "FILE"],
    "calibrate": ["calibrate", "--list", "--state-dir", "FILE"],
    "root": ["models", "pull", "Wan2.1-1.3B", "--root", "FILE"],
}
FOLDERS = ("outputs", "state", "calibrate", "root")  # flags that name a folder
KINDS = ("pipe", "socket", "device", "folder")


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Makes one of `KINDS` in the folder that the commands run in, under a name that any flag takes."""
    monkeypatch.chdir(tmp_path)

    def make(kind: str) -> Path:
        path = tmp_path / "odd.safetensors"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path.relative_to(tmp_path)))
        elif kind == "device":
            path.symlink_to("/dev/full")  # writing to it fails, reading from it never ends
        else:
            path.mkdir()
        return path

    return make


def assert_one_line(code, text, kind, name):
    assert code not in (0, None), name
    (line,) = [line for line in text.splitlines() if not line.startswith("[INFO]")]
    assert "Traceback" not in text and not re.search("[Nn]o such|does not exist", line), line
    assert "odd.safetensors" in line or "/dev/full" in line
    if name not in FOLDERS:
        assert re.search(f"{kind}|plain file|exists already|is a folder|no weights in this folder", line), line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_file_is_one_line_and_no_hang(odd, turbodiff, tmp_path, monkeypatch, name, kind):
    if kind == "folder" and name in FOLDERS:
        pytest.skip("a folder is right here")
    path = odd(kind)
    code, told = turbodiff(*(str(path) if part == "FILE" else part for part in COMMANDS[name]))
    assert_one_line(code, told.err, kind, name)
    assert path.exists() and not path.is_file(), "it stands where it stood"


@pytest.mark.parametrize("kind", KINDS)
def test_a_password_file_that_is_none_is_one_line(odd, tmp_path, kind):
    command = [sys.executable, str(ROOT / "webui" / "app.py"), "--no-browser", "--password-file", str(odd(kind))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert_one_line(done.returncode, done.stderr, kind, "password")


def test_a_link_to_a_file_is_one_and_a_missing_one_says_so(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    with open_file(tmp_path / "link") as file:
        assert file.read() == b"abc"
    check_file(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAFileError, match="named pipe"):
        open_file(tmp_path / "pipe")
