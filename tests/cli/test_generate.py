"""`turbodiff generate` as a person types it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from turbodiff.archive.disk import check_output
from turbodiff.gpu.process_identity import process_mark
from turbodiff.weights.locate import bundled_root

TURBODIFF = [sys.executable, "-m", "turbodiff.cli"]
APP = Path(__file__).resolve().parents[2] / "webui" / "app.py"
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


def test_a_first_clip_imports_neither_transformers_nor_the_compiler_of_torch(tmp_path, monkeypatch):
    """Each takes over a second; torch imports its compiler for normal numbers and divisions of meta tensors."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    done = turbodiff("generate", PROMPT, "--frames", "5", "--steps", "1", "-o", "out.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"turbodiff.runtime.pipeline", "torch"} <= imported
    assert not imported & {"transformers", "diffusers", "torch._dynamo", "sympy", "triton"}


def test_a_clip_from_the_shell_with_its_events_as_json(tmp_path):
    done = turbodiff(
        "generate", PROMPT, "--seed", "3", "--frames", "5", "--steps", "1", "--json", "-o", "out.mp4", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["type"] == "result" and events[-1]["fields"]["path"] == str(tmp_path / "out.mp4")
    assert {"plan", "phase", "step", "result"} <= {event["type"] for event in events}
    assert sorted(path.name for path in everything(tmp_path)) == ["out.mp4", "out.mp4.json"]


TYPED = (signal.SIGINT, signal.SIGQUIT)  # to everybody in the terminal's group


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)],
)
def test_a_signal_ends_with_its_code_and_leaves_no_half_file(tmp_path, number, code):
    process = subprocess.Popen(
        [*TURBODIFF, "generate", PROMPT, "--sampler", "unipc", "--steps", "100", "-o", "out.mp4"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    for line in process.stderr:
        if "denoising" in line:
            break
    os.killpg(process.pid, number) if number in TYPED else os.kill(process.pid, number)
    process.communicate(timeout=240)
    assert process.returncode == code
    time.sleep(0.2)
    assert not everything(tmp_path)
    alive = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(tmp_path)]
    assert not alive, "the worker went, too"


def test_a_hang_up_that_nohup_ignores_ends_nothing(tmp_path):
    process = subprocess.Popen(
        [*TURBODIFF, "generate", PROMPT, "--frames", "5", "--steps", "1", "-o", "out.mp4"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    for line in process.stderr:
        if "denoising" in line:
            break
    os.kill(process.pid, signal.SIGHUP)
    process.communicate(timeout=240)
    assert process.returncode == 0 and (tmp_path / "out.mp4").exists()


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [tmp_path / f".out.{gone.pid}.partial.mp4", tmp_path / f".out.{gone.pid}.partial.mp4.json"]
    kept = [tmp_path / f".out.{os.getpid()}.partial.mp4", tmp_path / ".mine.partial.mp4", tmp_path / "a.1.partial.mp4"]
    fresh = tmp_path / f".new.{gone.pid}.partial.mp4"
    for path in (*left, *kept, fresh):
        path.write_bytes(b"half")
        if path != fresh:
            os.utime(path, (1, 1))
    check_output(tmp_path / "next.mp4", 16, 16, 1)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, fresh])


WRITES = """
import sys, time
from pathlib import Path
from turbodiff.archive.clips import partial_path
made = partial_path(Path("x"), 1, 0, Path(sys.argv[1]))
made.write_bytes(b"half")
print(made, flush=True)
time.sleep(600)
"""


def test_what_a_process_left_that_is_certainly_dead_goes_at_once(tmp_path):
    """Killed a moment ago: its number, its start, this boot and this PID namespace are in the name."""
    writer = subprocess.Popen([sys.executable, "-c", WRITES, tmp_path / "out.mp4"], stdout=subprocess.PIPE, text=True)
    partial = Path(writer.stdout.readline().strip())
    check_output(tmp_path / "next.mp4", 16, 16, 1)
    assert partial.exists(), "its writer lives"
    writer.kill()
    writer.wait()
    pid, ticks, place = process_mark(os.getpid()).split("-")
    reused = tmp_path / f".out.{pid}-{int(ticks) - 100}-{place}.partial.mp4.json"  # of an earlier process of our number
    mine = tmp_path / f".out.{process_mark(os.getpid())}.partial.mp4"
    elsewhere = tmp_path / f".out.{writer.pid}-{ticks}-{'0' * 16}.partial.mp4"  # another boot, machine or container
    old = tmp_path / f".old.{writer.pid}-{ticks}-{'0' * 16}.partial.mp4"
    for path in (reused, mine, elsewhere, old):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    check_output(tmp_path / "next.mp4", 16, 16, 1)
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere])


def test_a_partial_file_of_another_pid_namespace_is_not_judged_by_its_number(tmp_path):
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", WRITES, str(tmp_path / "out.mp4")]
    if shutil.which("unshare") is None or subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("no right to make a PID namespace")
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    partial = Path(writer.stdout.readline().strip())
    try:
        check_output(tmp_path / "next.mp4", 16, 16, 1)
        assert partial.exists() and partial.name.startswith(".out.1-")  # pid 1 in there, alive out here, too
        os.utime(partial, (1, 1))
        check_output(tmp_path / "next.mp4", 16, 16, 1)
        assert partial.exists()
    finally:
        for child in psutil.Process(writer.pid).children(recursive=True):
            child.kill()
        writer.wait()


def test_modules_of_the_folder_it_is_started_in_are_not_imported(tmp_path):
    for name in ("queue", "inspect", "typing", "typer", "signal", "json"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name}')")
    for path in ("", ":", f"{tmp_path}:", "."):
        environment = {**os.environ, "PYTHONPATH": path + (":" if path else "") + os.environ.get("PYTHONPATH", "")}
        for command in ([*TURBODIFF, "plan", PROMPT], [sys.executable, APP, "--help"]):
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, (path, command, done.stderr[-300:])


@pytest.mark.parametrize("shell", ["{} >&-", "{} 2>&-", "{} <&-", "{} >&- 2>&- <&-", "{} | head -c 10", "{} | true"])
def test_closed_and_broken_streams_end_cleanly(tmp_path, shell):
    command = shell.format(" ".join(map(shlex.quote, [*map(str, TURBODIFF), "plan", PROMPT])))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*TURBODIFF, "plan", PROMPT], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and "error: the output cannot be written: No space left on device\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_answers_without_the_heavy_libraries(tmp_path):
    code = """
import sys
from turbodiff.cli import main
sys.argv = ["turbodiff", "--help"]
try:
    main()
except SystemExit:
    sys.exit(bool({"torch", "diffusers", "gradio", "transformers", "ray"} & set(sys.modules)))
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
