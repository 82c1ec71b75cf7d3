"""What many threads ask for at the same time is looked up once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from turbodiff.media import ffmpeg
from turbodiff.spec.cached import Once
from turbodiff.studio import Studio


def test_of_threads_that_ask_at_once_one_looks_and_the_others_wait_for_it() -> None:
    looked, all_here = list[int](), threading.Barrier(8)

    @Once
    def look(number: int) -> int:
        looked.append(number)
        threading.Event().wait(0.05)
        return number + 1

    def ask(_: int) -> int:
        all_here.wait()
        return look(1)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {2}
    assert looked == [1]
    look.cache_clear()
    assert look(1) == 2 and looked == [1, 1]


def test_what_fails_is_looked_up_again() -> None:
    left = [1, 0]

    @Once
    def look() -> float:
        return 1 / left.pop()

    with pytest.raises(ZeroDivisionError):
        look()
    assert look() == 1


def test_what_was_prepared_asks_ffmpeg_nothing_for_the_first_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = Studio(tmp_path / "state", tmp_path / "outputs")
    ffmpeg.h264_encoder.cache_clear()
    studio.serving.prepare()
    assert studio.jobs() == []
    monkeypatch.setattr(ffmpeg, "ffmpeg_path", None)
    assert studio.serving.submit([{"prompt": "x"}], "") == [1]
    studio.close()
