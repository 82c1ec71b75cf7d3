"""The contact sheet of a grid: it comes with the last clip, holds every one in its place, and fails no job."""

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from turbodiff.archive.clips import read_sidecar
from turbodiff.archive.grid_sheets import cells_of, note_cell, sweep_notes
from turbodiff.gpu.probe import machine_now
from turbodiff.media.contact_sheet import LABEL_PX, SPACE_PX
from turbodiff.media.joining import read_frames
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.runtime.grid import cell_done
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.pipeline import generate
from turbodiff.spec.errors import RequestError
from turbodiff.spec.grids import grid_requests
from turbodiff.spec.request import make_request
from turbodiff.studio.longer_clips import continuing_fields
from turbodiff.weights.locate import inventory

ASKED = {"prompt": "a red circle moves right on a black background", "steps": 1}


class NeverStop:
    cancelled: frozenset[int] = frozenset()
    decode_now: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All clips of a grid of seeds and lengths; events of each, and the folder."""
    folder, models, events = tmp_path_factory.mktemp("grid"), ModelCache(Device.pick("cpu")), []
    for number, fields in enumerate(grid_requests(ASKED, ("seed", "1,2"), ("num_frames", "1,5")), 1):
        plan = plan_request(make_request(fields), machine_now(), inventory())
        told = []
        generate(Attempt(number, 1, plan, folder, folder / "state", models, told.append, NeverStop))
        events.append([event.key for event in told if event.type == "notice"])
    return events, folder


def test_the_sheet_comes_with_the_last_clip_and_with_no_other(run):
    events, folder = run
    assert [("grid_done" in keys) for keys in events] == [False, False, False, True]
    assert len(list(folder.rglob("grid_*.mp4"))) == 1
    assert not list((folder / "state" / "grids").iterdir())


def test_every_clip_is_in_its_place_and_a_shorter_one_stays(run):
    _, folder = run
    sheet = next(folder.rglob("grid_*.mp4"))
    sidecar = read_sidecar(sheet)
    frames = np.concatenate(list(read_frames(sheet)))
    assert sidecar.frames == len(frames) == 5 and sidecar.tags == ("grid",) and sidecar.note == "seed × num_frames"
    for path in folder.rglob("t2v_*.mp4"):
        cell = read_sidecar(path).request.grid
        top, left = LABEL_PX + cell.row * (128 + SPACE_PX), LABEL_PX + cell.column * (128 + SPACE_PX)
        last = list(read_frames(path))[-1][0].astype(int)
        shown = frames[-1, top : top + 128, left : left + 128].astype(int)
        assert np.abs(shown - last).mean() < 3
    labels = frames[0, :LABEL_PX]
    assert labels.max() > 150


def test_a_sheet_is_not_continued(run):
    sheet = next(run[1].rglob("grid_*.mp4"))
    with pytest.raises(RequestError, match="continued"):
        continuing_fields({"prompt": "on", "continues": str(sheet)}, inventory())


def test_a_lost_clip_fails_no_job(run):
    _, folder = run
    fields = grid_requests(ASKED, ("seed", "1"), ("num_frames", "1,5"))
    models, told = ModelCache(Device.pick("cpu")), []
    for number, one in enumerate(fields, 10):
        plan = plan_request(make_request(one), machine_now(), inventory())
        result = generate(Attempt(number, 1, plan, folder, folder / "state", models, told.append, NeverStop))
        if number == 10:
            Path(result.path).unlink()
    assert [event.key for event in told if event.type == "notice"] == ["grid_failed"]


def test_a_machine_that_has_no_library_of_its_own_leaves_the_sheet_to_the_one_that_has(tmp_path):
    fields = grid_requests({**ASKED, "num_frames": 1}, ("seed", "1"), ("steps", "1"))
    plan, told = plan_request(make_request(fields[0]), machine_now(), inventory()), []
    models = ModelCache(Device.pick("cpu"))
    attempt = Attempt(1, 1, plan, tmp_path, tmp_path / "state", models, told.append, NeverStop, away=True)
    assert read_sidecar(Path(generate(attempt).path)).request.grid is not None
    assert not list(tmp_path.rglob("grid_*")) and not (tmp_path / "state" / "grids").exists()


def cells(count):
    fields = grid_requests(ASKED, ("seed", [*range(count)]), ("steps", "1"))
    return [make_request(one).grid for one in fields]


def pipe(note):
    note.unlink()
    os.mkfifo(note)


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: note.write_bytes(b""), lambda note: note.write_bytes(b"\xff"), pipe, Path.unlink,
        lambda note: note.write_bytes(b"/a\0b\nx\ny\n"), lambda note: note.write_bytes(b"x" * 100_000),
    ],
)  # fmt: skip
def test_a_note_that_cannot_be_read_is_as_if_its_cell_had_not_been_made(damage, tmp_path):
    first, second = cells(2)
    folder = tmp_path / "grids" / first.id
    assert note_cell(tmp_path, first, tmp_path / "0.mp4") is None
    damage(folder / "0.0")
    for stray in ("0.0~", "1x.2y", "7.7", "00.0"):
        (folder / stray).write_text("/a\nx\ny\n")
    assert note_cell(tmp_path, second, tmp_path / "1.mp4") is None
    assert [*cells_of(folder, first)] == [(1, 0)]
    assert (whole := note_cell(tmp_path, first, tmp_path / "0.mp4")) is not None
    assert cells_of(whole, first)[0, 0] == (tmp_path / "0.mp4", "seed 0", "steps 1")


def test_what_a_killed_maker_of_a_sheet_left_is_taken_up_by_the_next_cell_and_swept_after_a_month(tmp_path):
    first, second = cells(2)
    note_cell(tmp_path, first, tmp_path / "0.mp4")
    whole = note_cell(tmp_path, second, tmp_path / "1.mp4")
    assert note_cell(tmp_path, second, tmp_path / "2.mp4") == whole, "its maker is gone"
    assert [note.clip.name for note in cells_of(whole, first).values()] == ["0.mp4", "2.mp4"]
    held = os.open(whole, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as one that makes the sheet holds it
    assert note_cell(tmp_path, second, tmp_path / "3.mp4") is None and len(cells_of(whole, first)) == 2
    os.close(held)
    sweep_notes(tmp_path)
    assert whole.is_dir()
    os.utime(whole, (1, 1))
    sweep_notes(tmp_path)
    assert not whole.exists() and whole.with_suffix("").is_dir()


def test_whatever_fails_costs_the_sheet_alone(tmp_path):
    fields = grid_requests({**ASKED, "num_frames": 1}, ("seed", "1"), ("steps", "1"))
    plan, told = plan_request(make_request(fields[0]), machine_now(), inventory()), []
    attempt = Attempt(1, 1, plan, tmp_path, tmp_path / "state", ModelCache(Device.pick("cpu")), told.append, NeverStop)
    cell_done(attempt, tmp_path / "two\nlines.mp4")
    cell_done(attempt, tmp_path / "gone.mp4")
    assert [event.key for event in told] == ["grid_failed", "grid_failed"]
