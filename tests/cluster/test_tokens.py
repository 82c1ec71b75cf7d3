"""A head of real Ray that asks for a token: whoever has none, another one, or another version is told so in words."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from supervisor.bench import wait_until

from cluster.ray_nodes import PATIENCE_S, SETTINGS

pytest.importorskip("ray", reason="needs the extra `cluster`")
pytestmark = pytest.mark.cluster
RAY = (sys.executable, "-m", "ray.scripts.scripts")
HEAD = "--head --node-ip-address=127.0.0.1 --include-dashboard=false --disable-usage-stats --num-cpus=0 --block"
HEAD += " --no-monitor --include-log-monitor=false"


def refused(address: str, environment: dict[str, str]) -> dict[str, str]:
    """The last thing that a bridge says that wants to join with these variables."""
    argv = [sys.executable, "-P", "-m", "turbodiff.cluster.bridge", "--events-fd", "1", "--commands-fd", "0"]
    argv += ["--address", address, "--outputs", "/nowhere", "--run-id", "x"]
    done = subprocess.run(argv, env=environment, input=b"", stdout=subprocess.PIPE, timeout=PATIENCE_S)
    return dict([json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")][-1])


def has_raylet(pid: int) -> bool:
    """Whether a process has started a raylet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(child.name() == "raylet" for child in psutil.Process(pid).children())
    return False


def test_a_driver_without_the_token_of_the_head_or_of_another_version_is_told_so(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bare = {
        **os.environ,
        **SETTINGS,
        "RAY_NUM_REDIS_GET_RETRIES": "3",
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    token = {**bare, "RAY_AUTH_MODE": "token"}
    head = subprocess.Popen([*RAY, "start", f"--port={port}", *HEAD.split()], env={**token, "RAY_AUTH_TOKEN": "a" * 64})
    try:
        assert wait_until(lambda: any(one.laddr.port == port for one in psutil.net_connections("tcp")), PATIENCE_S)
        other = {**token, "RAY_AUTH_TOKEN": "b" * 64}
        newer = {**token, "RAY_AUTH_TOKEN": "a" * 64, "PYTHONPATH": f"{tmp_path}{os.pathsep}{bare['PYTHONPATH']}"}
        (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '99.0'\n")
        wrong = [(bare, "token"), (token, "token"), (other, "token"), (newer, "version")]
        with ThreadPoolExecutor(len(wrong)) as pool:  # most of it is waiting
            asking = [pool.submit(refused, f"127.0.0.1:{port}", environment) for environment, _ in wrong[:-1]]
            assert wait_until(lambda: has_raylet(head.pid), PATIENCE_S)  # before it starts the head says its version
            asking.append(pool.submit(refused, f"127.0.0.1:{port}", newer))
            said = [one.result() for one in asking]
        assert [(told["op"], told["why"]) for told in said] == [("refused", why) for _, why in wrong], said
        assert all(told["why"] in told["text"].lower() and "Traceback" not in told["text"] for told in said), said
        assert "99.0" in said[-1]["text"]
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        for process in (*children, psutil.Process(head.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(60)
