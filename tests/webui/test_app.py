"""`python webui/app.py` from anywhere, with any Python, and what it says when it cannot start."""

import ast
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.sources import syntax_tree
from tests.webui.conftest import answers, free_port
from turbodiff.spec.errors import PortInUseError, RequestError
from turbodiff.spec.page_flags import page_parser
from webui.app import check

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "webui" / "app.py"


def start(*flags, cwd, python=sys.executable, **environment):
    command = [str(python), str(APP), *flags]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_a_taken_port_names_its_holder_and_exits_with_4(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = start("--no-browser", "--port", str(port), "--state-dir", str(tmp_path / "state"), cwd=tmp_path)
    assert done.returncode == 4
    assert f"(pid {os.getpid()})" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "state").exists()


def test_a_free_port_is_fine_and_a_taken_one_says_what_to_try():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        holder.listen()
        with pytest.raises(PortInUseError) as caught:
            check(page_parser().parse_args(["--port", str(port)]))
    assert caught.value.try_instead == f"--port {port + 1}"
    check(page_parser().parse_args(["--port", str(port)]))


def test_listening_needs_a_password(monkeypatch):
    monkeypatch.delenv("TURBODIFF_PASSWORD", raising=False)
    with pytest.raises(RequestError, match="password"):
        check(page_parser().parse_args(["--listen"]))
    assert page_parser().parse_args([]).listen == "127.0.0.1"


def test_no_process_shows_the_password_in_its_command_line(tmp_path):
    word, port = "correct horse battery", free_port()
    flags = ["--password", word, "--no-browser", "--port", str(port)]
    flags += ["--state-dir", str(tmp_path / "state"), "--outputs", str(tmp_path / "outputs")]
    started = subprocess.Popen(
        [sys.executable, str(APP), *flags], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end_s = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}"):
            assert started.poll() is None and time.monotonic() < end_s
            time.sleep(0.2)
        family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
        assert len(family) > 1
        assert not [line for process in family if word in (line := " ".join(process.cmdline()))]
        headers = {"authorization": f"Bearer {word}"}
        codes = [
            httpx.get(f"http://127.0.0.1:{port}/config", headers=h, timeout=180).status_code for h in ({}, headers)
        ]
        assert codes == [401, 200]
    finally:
        started.terminate()
        started.wait(180)


def test_it_starts_from_another_folder_with_another_python(tmp_path):
    venv = ROOT / ".venv" / "bin" / "python"
    if Path(sys.executable).resolve() != venv.resolve() and not venv.exists():
        pytest.skip("no .venv here")
    other = Path(sys.base_prefix) / "bin" / "python3"
    done = start("--help", cwd=tmp_path, python=other)
    assert done.returncode == 0, done.stderr
    assert "--listen" in done.stdout


def test_without_an_installation_there_is_one_clear_line(tmp_path):
    copy = tmp_path / "webui"
    copy.mkdir()
    (copy / "app.py").write_text(APP.read_text("utf-8"), "utf-8")
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(copy / "app.py")], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["turbodiff is not installed for this Python: run scripts/start once"]


@pytest.mark.parametrize("hidden", ["venv", "target"])
def test_a_venv_of_another_user_is_one_line(hidden):
    """Below a folder that only its owner may enter, or a link to such a one: what `sudo scripts/start` leaves."""
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("no setpriv, to be another user than root")
    with tempfile.TemporaryDirectory() as folder:
        root, closed = Path(folder), Path(folder) / "closed"
        (root / "webui").mkdir()
        shutil.copy(APP, root / "webui")
        (closed / "bin").mkdir(parents=True)
        (closed / "bin" / "python").symlink_to(sys.executable)
        if hidden == "venv":
            closed.rename(root / ".venv")
            closed = root / ".venv"
        else:
            (root / ".venv").symlink_to(closed)
        for path in (root, root / "webui"):
            path.chmod(0o755)
        (root / "webui" / "app.py").chmod(0o644)
        closed.chmod(0)
        other = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"] if os.getuid() == 0 else []
        python = Path(sys.base_prefix) / "bin" / "python3"
        try:
            command = [*other, python, root / "webui" / "app.py", "--help"]
            done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
        finally:
            closed.chmod(0o700)
    if "setpriv" in done.stderr:
        pytest.skip(f"that user may not run {python}: {done.stderr[-200:]}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert ".venv/bin/python cannot be run by this user (Permission denied)" in line and "scripts/start" in line


@pytest.mark.parametrize("venv", ["loop", "dangling", "file", "empty"])
def test_a_venv_that_is_none_is_one_line(tmp_path, venv):
    (tmp_path / "webui").mkdir()
    shutil.copy(APP, tmp_path / "webui")
    own = tmp_path / ".venv"
    if venv == "loop":
        own.symlink_to(own)
    elif venv == "file":
        own.touch()
    else:
        (own / "bin").mkdir(parents=True)
        if venv == "dangling":
            (own / "bin" / "python").symlink_to("/nowhere/python")
    command = [sys.executable, "-S", "-I", str(tmp_path / "webui" / "app.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "scripts/start" in line


def test_the_launcher_imports_nothing_but_the_standard_library_at_first():
    tree = syntax_tree(APP)
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_no_module_of_the_page_shadows_the_standard_library():
    own = {path.stem for path in (ROOT / "webui").iterdir()} - {"__init__", "__pycache__"}
    assert not own & set(sys.stdlib_module_names)


def test_agents_need_one_more_package_and_it_is_named(monkeypatch):
    monkeypatch.setattr("turbodiff.spec.page_flags.find_spec", lambda name: None)
    with pytest.raises(RequestError) as caught:
        check(page_parser().parse_args(["--mcp", "--port", "0"]))
    assert caught.value.code == "mcp_missing" and "turbodiff[mcp]" in caught.value.try_instead
