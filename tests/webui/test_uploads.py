"""Uploads take a bounded place, and what is needed stays."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from test_security import echo

from webui import uploads
from webui.uploads import UploadQuota, make_room


def put(folder: Path, name: str, age_s: float, nbytes: int = 100) -> Path:
    path = folder / name / "picture.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(nbytes))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_what_nobody_used_for_an_hour_goes_and_what_is_younger_stays(tmp_path: Path) -> None:
    old, young = put(tmp_path, "a", 3700), put(tmp_path, "b", 3000)
    assert make_room(tmp_path)
    assert not old.parent.exists() and young.exists()
    assert make_room(tmp_path / "nothing here")


def test_old_uploads_go_also_where_nobody_uploads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "SWEEP_S", 0.01)
    old, young, stopped = put(tmp_path, "a", 3700), put(tmp_path, "b", 60), threading.Event()
    sweeping = threading.Thread(target=uploads.sweep_until, args=(stopped, tmp_path))
    sweeping.start()
    end_s = time.monotonic() + 60
    while old.exists() and time.monotonic() < end_s:
        time.sleep(0.01)
    stopped.set()
    sweeping.join(60)
    assert not old.exists() and young.exists() and not sweeping.is_alive()


def test_what_is_younger_than_an_hour_is_never_taken_from_an_open_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", 250)
    files = [put(tmp_path, str(number), 60) for number in range(3)]
    assert not make_room(tmp_path, 1)
    assert all(file.exists() for file in files)


def answers(app: UploadQuota, bodies: list[bytes]) -> list[int]:
    """What uploads that are sent at once get."""

    async def together() -> list[int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as session:
            sent = (session.post("/gradio_api/upload", content=body) for body in bodies)
            return sorted(answer.status_code for answer in await asyncio.gather(*sent))

    with ThreadPoolExecutor(1) as beside:
        return beside.submit(asyncio.run, together()).result()


def test_uploads_under_way_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    quota = UploadQuota(echo, tmp_path)
    assert answers(quota, [bytes(900)]) == [200]
    assert answers(quota, [bytes(900)] * 3) == [200, 507, 507]
    put(tmp_path, "full", 60, 900)
    assert answers(quota, [bytes(200)]) == [507] and answers(quota, [bytes(50)]) == [200]
