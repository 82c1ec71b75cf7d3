"""Whatever a person names that this user may not look at: one line that says so, no traceback."""

from pathlib import Path

import pytest

from tests.attack.other_users import another_users

# CLOSED is a folder of another user's
COMMANDS = {
    "an output": ("generate", "a red circle", "-o", "CLOSED/a.mp4"),
    "a picture": ("plan", "a red circle", "--model", "wan2.1-i2v-14b", "--image", "CLOSED/a.png"),
    "a LoRA": ("plan", "a red circle", "--lora", "CLOSED/a.safetensors"),
    "a queue": ("jobs", "list", "--state-dir", "CLOSED/state"),
    "a table": ("seeds", "import", "CLOSED/a.md", "--state-dir", "state"),
    "a bug report": ("support-bundle", "CLOSED/a.zip", "--state-dir", "state"),
    "weights": ("models", "verify", "CLOSED/a.safetensors"),
    "weights to convert": ("models", "quantize", "CLOSED/a.safetensors", "b.safetensors"),
    "samples": ("calibrate", "--state-dir", "CLOSED/state"),
}


@pytest.mark.usefixtures("ordinary_user")
@pytest.mark.parametrize("what", COMMANDS)
def test_what_is_closed_to_this_user_is_said_in_one_line(what, turbodiff, tmp_path: Path) -> None:
    another_users(Path.mkdir)(tmp_path / "closed")
    code, printed = turbodiff(*(word.replace("CLOSED", str(tmp_path / "closed")) for word in COMMANDS[what]))
    assert code == 2 and "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) == 1 and "ermission denied" in printed.err


@pytest.mark.usefixtures("ordinary_user")
def test_a_home_that_is_closed_to_this_user_is_said_in_one_line(turbodiff, tmp_path: Path, monkeypatch) -> None:
    another_users(Path.mkdir)(tmp_path / "closed")
    monkeypatch.setenv("HOME", str(tmp_path / "closed"))
    for name in ("XDG_STATE_HOME", "TURBODIFF_STATE"):
        monkeypatch.delenv(name, raising=False)
    code, printed = turbodiff("jobs", "list")
    assert code == 2 and "Traceback" not in printed.err and "ermission denied" in printed.err
