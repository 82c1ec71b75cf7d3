import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from supervisor.bench import wait_until
from turbodiff.gpu.process_identity import boot_id, start_ticks
from turbodiff.spec.environment import RUN_ID
from turbodiff.supervisor.ownership import (
    Identity,
    StateLock,
    end_leftover_workers,
    end_worker,
    folder_identity,
    is_ours,
    leftover_workers,
    remember_worker,
    worker_file,
)

RUN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"], env={**os.environ, RUN_ID: RUN})
    # the environment is the child's own only after its exec
    assert wait_until(lambda: RUN.encode() in Path(f"/proc/{child.pid}/environ").read_bytes(), 2.0)
    yield child
    child.kill()
    child.wait()


def identity(pid: int, state: Path | None = None) -> Identity:
    folder = folder_identity(state) if state else ""
    return Identity(pid, start_ticks(pid) or 0, boot_id(), os.getuid(), RUN, folder)


def test_fault_4_a_leftover_worker_is_recognised_and_ended(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    remember_worker(tmp_path, 0, sleeper.pid, RUN)
    assert [found.pid for found in leftover_workers(tmp_path)] == [sleeper.pid]
    assert end_leftover_workers(tmp_path) == ([sleeper.pid], [])
    assert sleeper.wait(1) == -9
    assert not worker_file(tmp_path, 0).exists()


@pytest.mark.parametrize(
    "change", [{"start_ticks": 1}, {"boot_id": "another boot"}, {"uid": 12345}, {"run_id": "f" * 32}]
)
def test_fault_4_one_difference_and_it_is_somebody_elses(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], change: dict[str, object]
) -> None:
    other = replace(identity(sleeper.pid, tmp_path), **change)  # type: ignore[arg-type]
    worker_file(tmp_path, 0).write_text(json.dumps(asdict(other)))
    assert not is_ours(other)
    assert not end_worker(other)
    assert end_leftover_workers(tmp_path) == ([], [])
    assert sleeper.poll() is None


def test_a_copied_state_folder_ends_nobody(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    lock = StateLock(original)
    remember_worker(original, 0, sleeper.pid, RUN)
    shutil.copytree(original, copy)
    lock.close()
    other = StateLock(copy)
    assert leftover_workers(copy) == [] and end_leftover_workers(copy) == ([], [])
    other.close()
    assert sleeper.poll() is None
    assert [found.pid for found in leftover_workers(original)] == [sleeper.pid]


def test_a_worker_whose_supervisor_lives_is_no_leftover(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "60"]) as supervisor:
        ticks = start_ticks(supervisor.pid) or 0
        kept = replace(identity(sleeper.pid, tmp_path), supervisor_pid=supervisor.pid, supervisor_ticks=ticks)
        worker_file(tmp_path, 0).write_text(json.dumps(asdict(kept)))
        assert leftover_workers(tmp_path) == [] and not end_worker(kept)
        supervisor.kill()
    assert [found.pid for found in leftover_workers(tmp_path)] == [sleeper.pid]
    assert end_leftover_workers(tmp_path) == ([sleeper.pid], [])


@pytest.mark.parametrize(
    "pid",
    [0, 1, os.getpid(), os.getppid(), 2**22 + 1],
    ids=["nobody", "init", "ourselves", "parent", "unused"],  # the same in every process of a parallel run
)
def test_fault_76_init_ourselves_our_parent_and_nobody_are_never_signalled(pid: int) -> None:
    assert not is_ours(Identity(pid, start_ticks(pid) or 0, boot_id(), os.getuid(), RUN))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "null"])
def test_a_damaged_note_is_removed_and_harms_nobody(tmp_path: Path, text: str) -> None:
    worker_file(tmp_path, 0).write_text(text)
    assert leftover_workers(tmp_path) == []
    assert end_leftover_workers(tmp_path) == ([], [])
    assert not worker_file(tmp_path, 0).exists()
