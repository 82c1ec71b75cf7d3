"""What a continuation takes over from its clip, the requests of a storyboard, `turbodiff extend` and `export`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.media.clips import shapes, write
from turbodiff.archive.clips import sidecar_path
from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import plan_request
from turbodiff.spec.clips import Sidecar
from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import Inventory, find_model
from turbodiff.spec.request import Segment, make_request
from turbodiff.studio import Studio
from turbodiff.studio.longer_clips import continuing_fields, continuing_model, storyboard_requests

HERE = Inventory()
DEMO = {"prompt": "a red circle moves right", "model": "demo", "num_frames": 17, "pinned": ["model"]}


def rows(*seconds: float) -> list[Segment]:
    return [Segment(f"segment {number}", length, number) for number, length in enumerate(seconds, 2)]


def board(fields: dict[str, object], *seconds: float) -> list[dict[str, object]]:
    first = plan_request(make_request(fields), Machine(), HERE)
    return storyboard_requests(fields, rows(*seconds), first)


@pytest.mark.parametrize(
    ("of", "by"),
    [
        ("demo", "demo-i2v"),
        ("demo-i2v", "demo-i2v"),
        ("wan2.1-14b", "wan2.2-a14b"),
        ("wan2.1-i2v-14b", "wan2.1-i2v-14b"),
    ],
)
def test_a_clip_goes_on_with_a_model_that_starts_from_a_picture(of: str, by: str) -> None:
    assert continuing_model(find_model(of), HERE).name == by


def test_a_continuation_has_the_size_and_rate_of_its_clip_and_no_picture(tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4", shapes(3), fps=12)
    asked = {"prompt": "on", "model": "demo", "continues": str(tmp_path / "clip.mp4"), "image": "x.png", "fps": 24}
    fields = continuing_fields({**asked, "resolution": "720p", "steps": 50}, HERE)
    request = make_request(fields)
    assert (request.model, request.width, request.height, request.fps) == ("demo-i2v", 128, 128, 12)
    assert not request.image and request.steps != 50  # those of a text model mean nothing to it


def test_what_a_person_says_beside_a_clip_counts_for_the_model_that_goes_on(tmp_path: Path) -> None:
    """`turbodiff extend CLIP PROMPT --steps 2` names no model: the clip's own, or the one that can, takes the steps."""
    made = Sidecar(request=make_request(DEMO))
    write(tmp_path / "clip.mp4", shapes(3))
    sidecar_path(tmp_path / "clip.mp4").write_text(made.model_dump_json())
    told = {"prompt": "on", "continues": str(tmp_path / "clip.mp4"), "steps": "2", "sampler": "ode", "sigma_max": "90"}
    request = make_request(continuing_fields(told, HERE))
    assert (request.model, request.steps, request.sampler, request.sigma_max) == ("demo-i2v", 2, "ode", 90)


def test_each_segment_waits_for_the_one_before_and_has_its_size() -> None:
    many = board(DEMO, 1.0, 0.25)
    made = [make_request(continuing_fields(fields, HERE)) for fields in many]
    assert [request.model for request in made] == ["demo", "demo-i2v", "demo-i2v"]
    assert [request.after for request in made] == ["", made[0].nonce, made[1].nonce]
    assert [request.num_frames for request in made] == [17, 17, 5]  # of which one is in the clip before it
    assert {(request.width, request.height, request.fps) for request in made} == {(128, 128, 16)}
    assert "size" in made[1].pinned and len({request.nonce for request in made}) == 3


@pytest.mark.parametrize(("seconds", "got"), [((0.0,), 2), ((1.0, -1.0), 3), ((1e9,), 2), ((1.0,) * 20, 21)])
def test_a_storyboard_without_a_length_or_with_too_many_rows_is_refused(seconds: tuple[float, ...], got: int) -> None:
    with pytest.raises(RequestError) as error:
        board(DEMO, *seconds)
    assert error.value.field == "storyboard" and error.value.got == str(got)


@pytest.mark.parametrize(("model", "code"), [("demo", "image_unused"), ("demo-i2v", None)])
def test_only_a_model_that_starts_from_a_picture_continues(model: str, code: str | None) -> None:
    fields = {"prompt": "on", "model": model, "after": "a"}
    if code is None:
        assert make_request(fields).continued
    else:
        with pytest.raises(RequestError, match="from text only"):
            make_request(fields)


def test_extend_names_what_is_wrong_with_its_clip(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(bytes(64))
    for name in ("clip.mp4", "none.mp4"):
        argv = [sys.executable, "-m", "turbodiff", "extend", str(tmp_path / name), "it moves on", "--model", "demo"]
        ran = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
        assert ran.returncode == 2 and "continue" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


@pytest.mark.parametrize("after", ["own", "nobody"])
def test_a_job_that_would_wait_for_itself_or_for_nobody_is_refused(tmp_path: Path, after: str) -> None:
    studio = Studio(tmp_path / "state", tmp_path / "outputs")
    with pytest.raises(RequestError) as refused:
        studio.submit({"prompt": "on", "model": "demo-i2v", "nonce": "own", "after": after})
    assert (refused.value.code, refused.value.field) == ("after_unknown", "after")
    first, second = studio.submit_all(
        [{**DEMO, "nonce": "own"}, {"prompt": "on", "model": "demo-i2v", "nonce": "next", "after": "own"}]
    )
    assert studio.job(second).request.after == studio.job(first).request.nonce


def test_the_clip_that_is_gone_on_from_is_never_the_output(tmp_path: Path) -> None:
    """Under any of its names: the help says that it stays as it is."""
    clip = tmp_path / "a clip.mp4"
    write(clip, shapes(3))
    sidecar_path(clip).write_text(Sidecar(request=make_request(DEMO)).model_dump_json())
    (tmp_path / "link.mp4").symlink_to(clip)
    before = clip.read_bytes()
    for output in (clip, tmp_path / "." / "link.mp4"):
        argv = [sys.executable, "-m", "turbodiff", "extend", str(clip), "a red circle", "-o", str(output)]
        told = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert told.returncode == 2 and "would be replaced" in told.stderr, told.stderr
    assert clip.read_bytes() == before


@pytest.mark.parametrize("name", ["out.avi", "out.jpg", "out"])
def test_an_export_under_an_ending_of_no_format_is_refused(tmp_path: Path, name: str) -> None:
    clip = tmp_path / "clip.mp4"
    write(clip, shapes(3))
    argv = [sys.executable, "-m", "turbodiff", "export", str(clip), "-o", name]
    told = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert told.returncode == 2 and ".webm" in told.stderr, told.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
