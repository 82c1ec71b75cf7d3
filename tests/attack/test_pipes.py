"""A pipe that nobody writes to, where a file of ours should be, is passed over: opening it would wait for ever."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from turbodiff.archive.clips import find_clip, sidecars
from turbodiff.diagnostics.downloads import MIRROR, Downloads
from turbodiff.diagnostics.support_bundle import support_bundle
from turbodiff.gpu import kernel_verdicts
from turbodiff.jobs.store import Store
from turbodiff.supervisor import recovery
from turbodiff.weights import storage
from webui.sessions import Sessions

CLIP = "2026-11-23/t2v_1_demo_20261123_003107.mp4"
READERS: dict[str, Callable[[Path], object]] = {
    CLIP: lambda folder: (list(sidecars(folder)), find_clip(folder, "a")),
    "sessions.json": lambda folder: Sessions("x", folder / "sessions.json"),
    "demo.json": lambda folder: Downloads(folder).of("demo"),
    MIRROR: lambda folder: Downloads(folder).mirror,
    kernel_verdicts.FILE: lambda folder: kernel_verdicts.kernels_of("x", (9, 0)),
    storage.MOVED: storage._moved_places,
}


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise AssertionError("it waits for whoever should write into the pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_the_place_of_a_file_is_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBODIFF_STATE", str(tmp_path))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    READERS[name](tmp_path)


def test_a_clip_that_is_a_pipe_stops_no_start_and_no_bug_report(tmp_path: Path) -> None:
    state, outputs = tmp_path / "state", tmp_path / "outputs"
    (outputs / CLIP).parent.mkdir(parents=True)
    os.mkfifo(outputs / CLIP)
    store = Store(state)
    recovery.rebuild(store, outputs, recovery.Report())
    assert support_bundle(store, tmp_path, outputs, tmp_path / "a.zip").is_file()
    store.close()
