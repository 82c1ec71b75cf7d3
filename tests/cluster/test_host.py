"""What runs on a node, without Ray."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from supervisor.bench import SCRIPTED, request, scripted, wait_until

from cluster.conftest import FarBench
from turbodiff.archive.clips import read_sidecar
from turbodiff.cluster.host import SCRATCH, GpuHost
from turbodiff.gpu.process_identity import start_ticks
from turbodiff.media.tags import read_settings_tag
from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import plan_request
from turbodiff.spec.events import RunCommand
from turbodiff.spec.files import sha256_of
from turbodiff.spec.request import Request
from turbodiff.supervisor.worker_process import WORKER
from turbodiff.weights.locate import inventory

TESTS = Path(__file__).parents[1]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nodes of this test keep their scratch."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def host() -> Iterator[GpuHost]:
    made = GpuHost("run", WORKER, None)
    yield made
    made.end()


def test_the_scratch_and_the_worker_of_an_actor_that_was_killed_go_at_the_next_start(scratch: Path) -> None:
    code = (
        f"import sys, time; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]\n"
        "from supervisor.bench import SCRIPTED; from turbodiff.cluster.host import GpuHost\n"
        "host = GpuHost('run', SCRIPTED, None); print(host.worker.pid, flush=True); time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    worker = int(first.stdout.readline())
    (old,) = scratch.glob(f"{SCRATCH}*")
    own, ticks = os.getpid(), start_ticks(os.getpid())
    alike = scratch / f"{SCRATCH}{os.getuid()}-{own}-{(ticks or 0) + 1}-x"  # another process had our number before
    alike.mkdir()
    beside = GpuHost("run", SCRIPTED, None)
    assert old.exists() and beside.scratch.exists() and not alike.exists()  # one that runs keeps its own
    first.send_signal(signal.SIGKILL)
    first.wait()
    after = GpuHost("run", SCRIPTED, None)
    assert not old.exists() and beside.scratch.exists() and wait_until(lambda: start_ticks(worker) is None, 30)
    after.end()
    beside.end()
    assert not list(scratch.iterdir())


def picture_job(folder: Path, asked: Callable[..., Request], **fields: Any) -> tuple[Path, RunCommand]:
    picture = folder / "start.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    wish = asked(model="demo-i2v", image=str(picture), **fields)
    plan = plan_request(wish, Machine(), inventory())
    return picture, RunCommand(request=plan.request, plan=plan, outputs=folder, state=folder)


def test_tags_sidecar_and_plans_of_a_node_name_the_picture_as_the_person_did(
    scratch: Path, tmp_path: Path, host: GpuHost
) -> None:
    picture, command = picture_job(tmp_path, lambda **more: request("a red circle", num_frames=5, seed=3, **more))
    data = picture.read_bytes()
    there = host.put(sha256_of(picture), ".png", 0, data, len(data))
    assert Path(there).is_relative_to(scratch)
    heard: list[str] = []
    host.send(command.model_dump(mode="json"), {str(picture): there})
    deadline = time.monotonic() + 300
    while not any('"result"' in line or '"error"' in line for line in heard) and time.monotonic() < deadline:
        heard += host.pump(1.0)["events"]
    assert not [line for line in heard if there in line]
    (clip,) = host.outputs.glob("2*/*.mp4")
    tags = read_settings_tag(clip)
    assert tags["request"]["image"] == tags["plan"]["request"]["image"] == str(picture)  # type: ignore[index,call-overload]
    assert str(scratch) not in clip.read_bytes().decode("latin-1")
    sidecar = read_sidecar(clip)
    assert sidecar.request.image == str(picture) and sidecar.plan and sidecar.plan.request.image == str(picture)


def test_a_second_node_finds_the_picture_of_a_job_that_a_first_one_had_planned(bench: FarBench, tmp_path: Path) -> None:
    script = ({"die": "SIGKILL"}, {"steps": 1})
    picture, command = picture_job(tmp_path, lambda **more: scripted(*script, **more))
    job = bench.store.submit(command.request, command.plan)
    bench.turn_until(lambda: bench.store.job(job).over)
    done = bench.store.job(job)
    assert (done.state, done.attempt) == ("done", 2), bench.log_text()
    assert done.plan is not None and done.plan.request.image == str(picture)
