"""Rows 40 and 41 of the fault table: a clip without a place is known before the work, not after it."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from supervisor.bench import Bench, request
from turbodiff.archive import disk
from turbodiff.archive.disk import check_place
from turbodiff.media import ffmpeg
from turbodiff.spec.errors import OutputError
from turbodiff.studio import Studio

MIB = 1 << 20


def test_a_killed_runs_temporary_files_go_and_what_is_being_written_stays(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "0"]) as gone:
        gone.wait()
    old = [tmp_path / ".partial" / f"7.1.{pid}.mp4{more}" for pid in (gone.pid, os.getpid()) for more in ("", ".json")]
    fresh, other = tmp_path / ".partial" / f"8.1.{gone.pid}.mp4", tmp_path / ".partial" / "mine.mp4"
    fresh.parent.mkdir()
    for path in (*old, fresh, other):
        path.touch()
    for path in (*old, other):
        os.utime(path, (time.time() - 120,) * 2)
    disk.remove_left(tmp_path)
    assert [path.exists() for path in (*old, fresh, other)] == [False, False, True, True, True, True]
    disk.remove_left(tmp_path / "nothing here")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes by the first folder name that is part of the path; change them at will."""
    free: dict[str, int] = {}

    def free_bytes(folder: Path) -> int | None:
        return next((left for name, left in free.items() if name in folder.parts), None)

    monkeypatch.setattr(disk, "free_bytes", free_bytes)
    return free


@pytest.mark.parametrize("which", ["outputs", "state"])
def test_fault_40_a_job_without_room_is_parked_before_the_work_and_the_queue_waits(
    bench: Bench, full: dict[str, int], which: str
) -> None:
    bench.turn_until(lambda: bench.slot.free)
    full[which] = 900 * MIB
    first, second = (bench.store.submit(request()) for _ in range(2))
    bench.turn_until(lambda: bench.store.job(first).state == "parked")
    for _ in range(10):
        bench.supervisor.tick(0.01)
    parked, waiting = bench.store.job(first), bench.store.job(second)
    assert parked.error is not None and parked.error.code == "disk_full"
    assert parked.error.got.startswith("0.9 GiB free for") and parked.error.try_instead
    assert waiting.state == "queued" and bench.store.events(first) == []
    assert "too little room" in bench.run_log_text() and "the queue waits" in bench.log_text()
    full[which] = 5000 * MIB
    bench.turn_until(lambda: bench.store.job(second).state == "done")
    again = bench.store.retry(first)
    bench.turn_until(lambda: bench.store.job(again).over)
    assert bench.store.job(again).state == "done" and "the queue goes on" in bench.log_text()


def test_fault_41_outputs_that_take_no_file_park_the_job_before_the_work(bench: Bench) -> None:
    bench.turn_until(lambda: bench.slot.free)
    blocked = bench.outputs
    shutil.rmtree(blocked, ignore_errors=True)
    blocked.write_text("a file where the folder should be")
    job = bench.run(request())
    assert job.state == "parked" and job.error is not None and job.error.code == "output_unwritable"
    assert bench.store.events(job.id) == []
    blocked.unlink()
    assert bench.run(request()).state == "done"


def test_fault_41_what_stands_for_the_folder_of_unfinished_clips_is_put_beside_it(bench: Bench) -> None:
    bench.outputs.mkdir(exist_ok=True)
    shutil.rmtree(bench.outputs / ".partial", ignore_errors=True)
    (bench.outputs / ".partial").write_text("mine")
    assert bench.run(request()).state == "done"
    assert [path.read_text() for path in bench.outputs.glob(".partial-replaced-*")] == ["mine"]


def test_fault_78_a_job_that_nothing_can_encode_is_parked_before_the_work(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.turn_until(lambda: bench.slot.free)
    monkeypatch.setattr(ffmpeg, "ffmpeg_path", lambda: str(tmp_path / "no such program"))
    ffmpeg.h264_encoder.cache_clear()
    job = bench.run(request())
    assert job.state == "parked" and job.error is not None and job.error.code == "ffmpeg_missing"
    monkeypatch.undo()
    bench.store.retry(job.id)
    bench.turn_until(lambda: bench.store.job(job.id).over)


def test_fault_40_a_large_clip_needs_more_room_than_a_small_one(tmp_path: Path, full: dict[str, int]) -> None:
    full[tmp_path.name] = 1050 * MIB
    check_place(tmp_path, tmp_path, 128, 128, 17)
    with pytest.raises(OutputError) as caught:
        check_place(tmp_path, tmp_path, 1280, 720, 81)
    assert caught.value.expected == "at least 1.1 GiB"


def test_fault_40_the_page_and_the_shell_hear_of_it_at_once(tmp_path: Path, full: dict[str, int]) -> None:
    full["outputs"] = 10 * MIB
    studio = Studio(tmp_path / "state", tmp_path / "outputs")
    fields = {"prompt": "a red circle moves right"}
    with pytest.raises(OutputError, match="too little room"):
        studio.submit(fields)
    assert studio.jobs() == []
    with pytest.raises(OutputError, match="too little room"):
        studio.generate(fields, output=None, on_event=lambda _: None)
    studio.close()


def test_the_room_of_a_folder_that_does_not_exist_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    found = disk.free_bytes(tmp_path / "not" / "yet")
    assert found is not None and found > 0
