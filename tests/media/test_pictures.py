"""What a person sees of a picture before it runs."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.media.clips import shapes, write
from turbodiff.media.pictures import PREVIEW_SIDE, frame, look, preview
from turbodiff.spec.errors import FileError


@pytest.fixture
def portrait(tmp_path):
    pixels = np.full((400, 300, 3), (200, 180, 160), np.uint8)
    pixels[100:300, 80:220] = (230, 190, 160)
    Image.fromarray(pixels).save(tmp_path / "portrait.png")
    return tmp_path / "portrait.png"


def test_a_portrait_proposes_the_calm_boundary_with_its_reason(portrait):
    seen = look(portrait)
    assert (seen.width, seen.height) == (300, 400)
    assert (seen.boundary, seen.sampler, seen.key) == (0.7, "sde", "advice_plain_background")


def test_the_preview_has_the_shape_of_the_clip_and_follows_the_file(portrait):
    small = Image.open(io.BytesIO(preview(portrait, 720, 1280, "crop")))
    assert small.format == "JPEG"
    assert max(small.size) == PREVIEW_SIDE and abs(small.width / small.height - 720 / 1280) < 0.01
    before = preview(portrait, 128, 128, "stretch")
    Image.new("RGB", (300, 400), "navy").save(portrait)
    assert preview(portrait, 128, 128, "stretch") != before


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "x.png").write_text("not a picture")
    for call in (lambda: look(tmp_path / "x.png"), lambda: preview(tmp_path / "no.png", 64, 64, "pad")):
        with pytest.raises(FileError) as caught:
            call()
        assert caught.value.field == "image"


def test_a_frame_of_a_clip_is_that_frame(tmp_path):
    frames = shapes(9)
    write(tmp_path / "clip.mp4", frames)
    made = frame(tmp_path / "clip.mp4", 6, tmp_path / "frames")
    got = np.asarray(Image.open(made).convert("RGB"), np.int16)
    errors = [np.abs(got - other.astype(np.int16)).mean() for other in frames]
    assert int(np.argmin(errors)) == 6
    with pytest.raises(FileError, match="no such frame"):
        frame(tmp_path / "clip.mp4", 99, tmp_path / "frames")
