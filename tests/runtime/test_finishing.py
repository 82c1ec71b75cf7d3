"""A clip with its last phases: planned, measured, recorded, and verified as every other; upscalers of other people."""

import numpy as np
import pytest
import torch

from turbodiff.archive.clips import read_sidecar
from turbodiff.gpu.probe import machine_now
from turbodiff.media.finishing import RawFrames
from turbodiff.media.joining import clip_format, tail_of
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.runtime.finishing import MOST_NETWORK_BYTES, enlarged_by, finished, open_upscaler, tiled
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.pipeline import generate
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.request import Segment, make_request
from turbodiff.studio.longer_clips import continuing_fields, storyboard_requests
from turbodiff.weights.load import tensors_of
from turbodiff.weights.locate import inventory

ASKED = {
    "prompt": "a red circle moves right on a black background", "seed": 1, "steps": 1, "num_frames": 5,
    "smooth_fps": 30, "upscale": 2,
}  # fmt: skip


class NeverStop:
    cancelled: frozenset[int] = frozenset()
    decode_now: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished clip, its events and its folder."""
    folder, events = tmp_path_factory.mktemp("finished"), []
    plan = plan_request(make_request(ASKED), machine_now(), inventory())
    models = ModelCache(Device.pick("cpu"))
    result = generate(Attempt(1, 1, plan, folder, folder / "state", models, events.append, NeverStop))
    return result, events, folder


def test_the_file_has_the_rate_and_the_size_that_were_asked_for(made):
    result, _, _ = made
    assert (result.frames, result.width, result.height, result.fps) == (9, 256, 256, 30)


def test_its_last_phases_are_planned_told_measured_and_recorded(made):
    _, events, folder = made
    clip = next(folder.rglob("*.mp4"))
    sidecar = read_sidecar(clip)
    planned = [phase.name for phase in sidecar.plan.phases]
    assert planned[-4:] == ["vae_decode", "interpolate", "upscale", "write"]
    assert {"interpolate", "upscale"} <= set(sidecar.measured.phase_seconds)
    assert {event.type for event in events} >= {"phase", "progress"}
    assert (sidecar.width, sidecar.fps, sidecar.frames) == (256, 30, tail_of(clip).frames)
    assert sidecar.request.smooth_fps == 30 and clip_format(clip) == (256, 256, 30)
    assert not list(folder.rglob("*.interpolate")) and not list(folder.rglob("*.upscale"))


def test_a_finished_clip_is_not_continued_and_a_storyboard_is_finished_at_its_end(made):
    clip = next(made[2].rglob("*.mp4"))
    with pytest.raises(RequestError, match="finished clip"):
        continuing_fields({"prompt": "on", "continues": str(clip)}, inventory())
    first = plan_request(make_request({**ASKED, "smooth_fps": 0, "upscale": 1}), machine_now(), inventory())
    rows = [Segment("a red circle moves left", 0.25), Segment("a red circle moves up", 0.25)]
    many = storyboard_requests(ASKED, rows, first)
    assert [row.get("smooth_fps", 0) for row in many] == [0, 0, 30]


def test_an_upscaler_that_is_not_there_says_where_it_belongs():
    with pytest.raises(FileError, match="upscalers"):
        plan_request(make_request({**ASKED, "upscaler": "none.pth"}), machine_now(), inventory())
    with pytest.raises(RequestError):
        make_request({**ASKED, "upscaler": "../../etc/passwd"})


def test_tiles_with_margins_are_the_whole_picture():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 5, padding=2), torch.nn.PixelShuffle(2))
    picture = torch.rand(1, 3, 300, 270)
    with torch.inference_mode():
        assert torch.allclose(tiled(network, picture, 2), network(picture), atol=1e-5)


def test_a_network_that_spandrel_knows_enlarges_frames(tmp_path):
    pytest.importorskip("spandrel")
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    torch.save({"params_ema": RRDBNet(3, 3, num_filters=16, num_blocks=1, scale=4).state_dict()}, tmp_path / "x4.pth")
    raw = RawFrames.spill(tmp_path / "raw", [np.full((2, 32, 48, 3), 100, np.uint8)], 48, 32, 16)
    for times in (2, 4):
        frames = list(enlarged_by(tmp_path / "x4.pth", raw, times, Device.pick("cpu"), lambda *_: None))
        assert [frame.shape for frame in frames] == [(1, 32 * times, 48 * times, 3)] * 2


def test_a_file_that_is_no_upscaler_is_refused_by_name(tmp_path):
    pytest.importorskip("spandrel")
    (tmp_path / "bad.pth").write_bytes(b"x" * 100)
    with pytest.raises(FileError, match="bad"):
        open_upscaler(tmp_path / "bad.pth", Device.pick("cpu"))


def test_a_file_of_more_than_any_upscaler_is_refused_before_its_tensors_are_read(tmp_path):
    """8 MiB of a .pth say so by many names of one tensor."""
    torch.save(dict.fromkeys(map(str, range(130)), torch.zeros(1 << 21)), tmp_path / "huge.pth")
    with pytest.raises(FileError, match="larger than those of any such network"):
        tensors_of(tmp_path / "huge.pth", MOST_NETWORK_BYTES)


def test_a_network_that_went_after_its_job_was_accepted_is_missing_and_nothing_else_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pth").write_bytes(b"of somebody else")
    plan = plan_request(make_request(ASKED), machine_now(), inventory())
    plan = plan.model_copy(update={"request": plan.request.model_copy(update={"upscaler": "mine.pth"})})
    models = ModelCache(Device.pick("cpu"))
    attempt = Attempt(1, 1, plan, tmp_path, tmp_path / "state", models, print, NeverStop)
    raw = RawFrames.spill(tmp_path / "raw", [np.zeros((1, 8, 8, 3), np.uint8)], 8, 8, 16)
    with pytest.raises(FileError) as caught:
        finished(attempt, "upscale", raw)
    assert (caught.value.code, caught.value.got) == ("upscaler_missing", "mine.pth")
