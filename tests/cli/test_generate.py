"""`turbodiff generate` as a person types it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from turbodiff.weights.locate import bundled_root

TURBODIFF = [sys.executable, "-m", "turbodiff.cli"]
PROMPT = "a red circle moves right on a black background"


def turbodiff(*args, cwd):
    return subprocess.run([*TURBODIFF, *args], capture_output=True, text=True, cwd=cwd, timeout=240)


def everything(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (["--frames", "80"], "num_frames"),
        (["--steps", "9"], "steps"),
        (["--size", "833x480", "--model", "Wan2.1-1.3B"], "size"),
        (["--model", "Wan9"], "model"),
        (["--seed", "x"], "seed"),
        (["-o", "missing/folder/out.mp4"], "output"),
        (["-o", "."], "output"),
        (["-o", "/proc/out.mp4"], "output"),
        (["--model", "Wan2.1-1.3B"], "model"),
        (["--device", "cuda:99"], "device"),
    ],
)
def test_bad_input_names_its_field_and_leaves_nothing_behind(args, field, tmp_path):
    done = turbodiff("generate", PROMPT, *args, cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: {field}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not everything(tmp_path)


def test_a_wall_of_text_is_refused_by_name(tmp_path):
    done = turbodiff("generate", "word " * 5000, cwd=tmp_path)
    assert done.returncode == 2 and "error: prompt" in done.stderr and not everything(tmp_path)


def test_a_pretended_card_plans_the_clip_and_the_real_device_runs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TURBODIFF_PRETEND_VRAM", "12")
    done = turbodiff("generate", PROMPT, "--frames", "5", "--steps", "1", "-o", "out.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.mp4").exists()


def test_a_clip_from_the_shell_with_its_events_as_json(tmp_path):
    done = turbodiff(
        "generate", PROMPT, "--seed", "3", "--frames", "5", "--steps", "1", "--json", "-o", "out.mp4", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["type"] == "result" and events[-1]["fields"]["path"] == str(tmp_path / "out.mp4")
    assert {"plan", "phase", "step", "result"} <= {event["type"] for event in events}
    assert sorted(path.name for path in everything(tmp_path)) == ["out.mp4", "out.mp4.json"]


def test_ctrl_c_ends_with_130_and_leaves_no_half_file(tmp_path):
    process = subprocess.Popen(
        [*TURBODIFF, "generate", PROMPT, "--sampler", "unipc", "--steps", "100", "-o", "out.mp4"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    for line in process.stderr:
        if "denoising" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    time.sleep(0.2)
    assert not everything(tmp_path)


def test_help_answers_without_the_heavy_libraries(tmp_path):
    code = """
import sys
from turbodiff.cli import main
sys.argv = ["turbodiff", "--help"]
try:
    main()
except SystemExit:
    sys.exit(bool({"torch", "diffusers", "gradio", "transformers"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path).returncode == 0


LOOKS = [
    ["plan", PROMPT],
    ["plan", PROMPT, "--json"],
    ["plan", PROMPT, "--model", "14B", "--pretend-vram", "12"],
    ["gpu"],
    ["models", "list"],
    ["models", "verify", str(bundled_root() / "vae.safetensors")],
]


@pytest.mark.parametrize("command", LOOKS)
def test_commands_that_only_look_leave_nothing_behind(command, tmp_path):
    done = turbodiff(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not everything(tmp_path)


def test_doctor_names_the_torch_line_and_what_is_not_needed(tmp_path):
    done = turbodiff("doctor", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["pip_line"].startswith("pip install")
    assert {"torch", "triton", "driver", "GPU", "ffmpeg", "SageAttention", "SpargeAttn"} <= set(report["found"])
    assert any("sparselinear" in note for note in report["notes"])
