import pytest

from turbodiff.spec.errors import RequestError
from turbodiff.spec.shapes import (
    MAX_PATCHES,
    RESOLUTIONS,
    VideoShape,
    adaptive_size,
    check_size,
    is_frame_count,
    latent_frames,
    named_size,
    nearest_frame_counts,
    pixel_frames,
    table_size,
)


@pytest.mark.parametrize(
    ("resolution", "aspect", "tokens"),
    [
        ("480p", "16:9", 32760),
        ("480p", "1:1", 33600),
        ("480p", "4:3", 25200),
        ("720p", "16:9", 75600),
        ("720p", "1:1", 75600),
        ("720p", "4:3", 56700),
    ],
)
def test_tokens_of_81_frames_are_those_of_the_reference(resolution, aspect, tokens):
    width, height = table_size(resolution, aspect)
    assert VideoShape(81, height, width).latent.tokens == tokens


@pytest.mark.parametrize(
    ("picture", "area", "size"),
    [
        ((1920, 1080), 1280 * 720, (1280, 720)),
        ((1024, 1024), 1280 * 720, (960, 960)),
        ((4032, 3024), 1280 * 720, (1104, 832)),
        ((2048, 858), 1280 * 720, (1488, 624)),
        ((832, 1216), 1280 * 720, (800, 1168)),
        ((1920, 1080), 832 * 480, (848, 480)),
        ((1024, 1024), 832 * 480, (624, 624)),
        ((832, 1216), 832 * 480, (528, 768)),
    ],
)
def test_adaptive_size_rounds_as_the_reference_does(picture, area, size):
    assert adaptive_size(*picture, area) == size


def test_adaptive_size_keeps_a_very_wide_picture_within_the_patch_limit():
    width, height = adaptive_size(5000, 1000, 1280 * 720)
    assert (width, height) == (MAX_PATCHES * 16, 432)
    check_size(width, height)


def test_frames_and_latent_frames_are_inverse():
    for frames in range(1, 200):
        if is_frame_count(frames):
            assert pixel_frames(latent_frames(frames)) == frames


@pytest.mark.parametrize(("frames", "near"), [(80, (77, 81)), (2, (1, 5)), (82, (81, 85)), (0, (1, 5))])
def test_nearest_frame_counts_bracket_the_wish(frames, near):
    assert nearest_frame_counts(frames) == near
    assert all(map(is_frame_count, near))


@pytest.mark.parametrize("size", [(833, 480), (832, 481), (8, 480), (0, 0), (4096, 480)])
def test_a_size_that_the_network_cannot_take_names_the_nearest_that_it_can(size):
    with pytest.raises(RequestError) as caught:
        check_size(*size)
    assert caught.value.field == "size"
    width, height = map(int, caught.value.try_instead.split()[-1].split("x"))
    check_size(width, height)


def test_every_size_of_the_table_is_legal_and_known_by_name():
    for resolution, by_aspect in RESOLUTIONS.items():
        for aspect, size in by_aspect.items():
            check_size(*size)
            assert named_size(*size) == (resolution, aspect)
