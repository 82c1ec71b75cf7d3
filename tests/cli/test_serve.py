"""`turbodiff serve` from a strange folder, ended by the keyboard; nothing of the folder is imported."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.webui.conftest import answers, free_port

# not pkgutil.py and turbodiff.py: Python's own `-m` imports those, before a line of ours runs
SHADOWS = ("queue.py", "inspect.py", "re.py", "runpy.py", "typing.py", "webui.py", "gradio.py")


@pytest.mark.parametrize("module", ["turbodiff", "turbodiff.cli"])
def test_serve_imports_nothing_of_its_folder_and_ends_with_131_on_ctrl_backslash(tmp_path, module):
    for name in SHADOWS:
        (tmp_path / name).write_text("raise SystemExit('imported ' + __name__)")
    port = free_port()
    flags = ["serve", "--no-browser", "--port", str(port), "--state-dir", str(tmp_path / "state")]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags, "--outputs", "clips"],
            cwd=tmp_path, stdout=said, stderr=said, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGQUIT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        end_s = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}"):
            assert process.poll() is None and time.monotonic() < end_s, (tmp_path / "said").read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGQUIT)
        assert process.wait(60) == 131
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "said").read_text()
    assert "ERROR" not in text and "Traceback" not in text
    assert not [found for found in psutil.process_iter(["cwd"]) if found.info["cwd"] == str(tmp_path)]
    assert not list(tmp_path.glob("core*"))
