"""Clips that look wrong are named, good ones never."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media.clips import grain, shapes
from turbodiff.gpu.probe import machine_now
from turbodiff.media.fingerprints import Bytes, fingerprint_rgb
from turbodiff.media.verify import quality_warnings
from turbodiff.plan.hardware import only
from turbodiff.plan.planner import plan_request
from turbodiff.prompt.lint import STILLNESS
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import inventory

RNG = np.random.default_rng(11)


def found(clip: Bytes, picture: Bytes | None = None, prompt: str = "") -> tuple[str, ...]:
    start = fingerprint_rgb(picture) if picture is not None else None
    return tuple(quality_warnings([fingerprint_rgb(frame) for frame in clip], start, prompt))


def noisy(clip: Bytes, frames: int, sigma: float, cell: int = 8) -> Bytes:
    """Blotches of the size of a latent pixel over the first frames."""
    _, height, width, _ = clip.shape
    made = clip.astype(float)
    for frame in made[:frames]:
        cells = RNG.normal(0, sigma, (height // cell, width // cell, 3))
        frame += np.stack([_blown_up(cells[..., c], width, height) for c in range(3)], axis=-1)
    return np.clip(made, 0, 255).astype(np.uint8)


def _blown_up(cells: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(cells.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))


def panorama(frames: int, width: int, height: int, calm_end: bool) -> Bytes:
    """A camera that pans over foliage, into a clear sky where it ends calm."""
    wide = width + 8 * frames
    field = RNG.integers(40, 200, (height // 4, wide // 4, 3), dtype=np.uint8)
    world = np.asarray(Image.fromarray(field).resize((wide, height), Image.Resampling.BICUBIC)).copy()
    if calm_end:
        world[:, width + 2 * frames :] = (120, 160, 220)
    return np.stack([world[:, 8 * i : 8 * i + width] for i in range(frames)])


def dot(frames: int, levels: int = 60) -> Bytes:
    """A bird far away: 10 x 10 pixels of a 480p sky."""
    clip = np.full((frames, 480, 832, 3), 140, np.uint8)
    for index, frame in enumerate(clip):
        frame[200:210, 300 + 4 * index : 310 + 4 * index] = 140 - levels
    return clip


def sunset(frames: int) -> Bytes:
    """Nothing but the light changes."""
    ramp = np.linspace(180, 90, frames)[:, None, None, None]
    return np.broadcast_to(ramp, (frames, 64, 64, 3)).astype(np.uint8)


GOOD = {
    "shapes": lambda: shapes(17),
    "film grain": lambda: grain(9, 416, 240),
    "foliage": lambda: panorama(17, 320, 192, calm_end=False),
    "foliage, then sky": lambda: panorama(17, 320, 192, calm_end=True),
    "a bird far away": lambda: dot(9),
    "sunset": lambda: sunset(17),
    "five frames": lambda: shapes(5),
    "one frame": lambda: shapes(1),
    "sixteen pixels": lambda: shapes(9, 16, 16),
}


@pytest.mark.parametrize("name", GOOD)
def test_fault_35_a_good_clip_has_no_flaw(name: str) -> None:
    clip = GOOD[name]()
    assert found(clip) == ()
    assert found(clip, picture=clip[0]) == ()


def test_fault_35_a_clip_that_never_changes_is_frozen_unless_that_was_asked_for() -> None:
    clip = shapes(1).repeat(17, axis=0)
    assert found(clip) == ("frozen",)
    flicker = np.clip(clip + RNG.normal(0, 3, clip.shape), 0, 255).astype(np.uint8)  # what a decoder adds
    assert found(flicker, prompt="a red circle") == ("frozen",)
    assert found(clip, prompt="a statue stands still in the rain") == ()
    assert found(np.zeros_like(clip)) == ("black", "frozen")


def stopped(clip: Bytes, at: int, flicker: float = 0.0) -> Bytes:
    """The clip with its frame `at` held to the end, and what a decoder's flicker adds."""
    held = np.concatenate((clip[:at], clip[at - 1 : at].repeat(len(clip) - at, axis=0)))
    return np.clip(held + RNG.normal(0, flicker, held.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("frames", [9, 17, 81])
@pytest.mark.parametrize("ground", ["shapes", "foliage"])
def test_a_clip_that_stops_moving_halfway_is_flagged_and_a_short_rest_is_not(frames: int, ground: str) -> None:
    clip = shapes(frames) if ground == "shapes" else panorama(frames, 320, 192, calm_end=False)
    assert found(stopped(clip, frames // 2)) == ("stops_halfway",)
    assert found(stopped(clip, frames // 2), prompt="the bird lands and stays on the branch") == ()
    assert found(stopped(clip, frames - frames // 5)) == ()
    assert found(clip) == found(clip[::-1]) == ()


@pytest.mark.parametrize("frames", [9, 17, 81])
def test_of_a_bird_far_away_nobody_can_tell_whether_it_stopped(frames: int) -> None:
    assert found(dot(frames)) == found(stopped(dot(frames), frames - 2)) == ()


@pytest.mark.parametrize("flicker", [1.0, 3.0])
def test_a_decoders_flicker_is_no_movement(flicker: float) -> None:
    assert found(stopped(shapes(17), 8, flicker)) == ("stops_halfway",)
    assert found(stopped(shapes(17), 17, flicker)) == ()


def test_a_movement_that_begins_late_or_slows_down_does_not_stop() -> None:
    late = stopped(shapes(17), 8)[::-1]
    assert found(late) == ()
    slow = shapes(33)[[round(32 * (1 - (1 - i / 16) ** 2)) for i in range(17)]]  # comes to rest gently
    assert found(slow) == ()


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("ground", ["shapes", "foliage"])
def test_fault_35_noise_in_the_first_quarter_is_seen(frames: int, ground: str) -> None:
    clip = shapes(17) if ground == "shapes" else panorama(17, 320, 192, calm_end=False) // 4 + 90
    assert found(noisy(clip, frames, sigma=40)) == ("noisy_start",)
    assert found(noisy(clip, 17, sigma=40)) == (), "noise everywhere is the look of the clip"


def test_fault_35_a_first_frame_is_held_against_its_picture() -> None:
    clip = noisy(shapes(17), 17, sigma=40)  # noise to the end: only the picture can tell
    assert found(clip, picture=shapes(17)[0]) == ("noisy_start",)
    picture = panorama(1, 320, 192, calm_end=False)[0]
    blurred = (picture.astype(int) + np.roll(picture, 1, 0) + np.roll(picture, 1, 1)) // 3  # what a VAE loses
    brighter = np.clip(blurred + 12, 0, 255).astype(np.uint8)
    assert found(np.stack([brighter, np.roll(brighter, 40, 1)]), picture=picture) == ()


@pytest.mark.parametrize(
    ("prompt", "still"),
    [
        ("a still life with apples", True),
        ("the knight stands perfectly still", True),
        ("a lake, no movement, frozen in time", True),
        ("一只静止的鸟,纹丝不动", True),
        ("人物保持不动", True),
        ("a cat runs, static camera, locked shot", False),
        ("the sea, still camera, waves roll", False),
        ("it is still raining on the frozen lake", False),
        ("猫追逐蝴蝶,镜头静止", False),
        ("镜头不动,樱花飘落", False),
        ("a red circle moves right", False),
    ],
)
def test_who_asks_for_stillness_says_so_in_words(prompt: str, still: bool) -> None:
    assert bool(STILLNESS.search(prompt)) is still


@pytest.mark.slow
def test_fault_35_noise_left_in_the_demos_latents_is_seen_and_the_clean_clip_is_good(tmp_path: Path) -> None:
    """The same clip through the demo's VAE, clean and with noise in the first latent frame."""
    torch = pytest.importorskip("torch")
    from scripts.train_demo.captions import held_out_captions
    from scripts.train_demo.render import random_clip
    from turbodiff.models import vae as driver
    from turbodiff.runtime.attempt import Attempt
    from turbodiff.runtime.device import Device
    from turbodiff.runtime.model_cache import ModelCache
    from turbodiff.runtime.pipeline import decode

    request = make_request({"prompt": "a red circle moves right on a black background", "seed": 1}).seeded()
    models, plan = ModelCache(Device.pick("cpu")), plan_request(request, only(machine_now(), "cpu"), inventory())
    attempt = Attempt(1, 1, plan, tmp_path, tmp_path, models, lambda *_, **__: None, None)  # type: ignore[arg-type]
    models.open(request)
    clip = random_clip(held_out_captions()[3], np.random.default_rng(5))
    video = torch.from_numpy(np.array(clip)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.inference_mode(), models.on_device("vae", plan) as vae:
        latents = driver.encode(vae, video, tile=None)
    clean = np.concatenate(list(decode(attempt, latents)))
    assert found(clean) == () == found(clean, picture=clip[0])
    latents = latents.clone()
    latents[:, :, :1] += 1.5 * torch.randn(latents[:, :, :1].shape, generator=torch.Generator().manual_seed(0))
    noisy_start = np.concatenate(list(decode(attempt, latents)))
    assert found(noisy_start) == ("noisy_start",) == found(noisy_start, picture=clip[0])
