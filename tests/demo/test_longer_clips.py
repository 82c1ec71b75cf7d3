"""Continue: three demo segments as one clip, whose seams are no larger than what happens inside a segment; the same by
`turbodiff extend`, which is killed in the middle and goes on where it was."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from turbodiff.media.joining import read_frames
from turbodiff.spec.models import Inventory
from turbodiff.studio.longer_clips import continuing_fields

ROWS = (("right", 1), ("left", 2), ("down", 3))
FRAMES = 17
PHASES = ("image_encode", "denoise_high", "denoise_low", "vae_decode", "write")


def prompt(way: str) -> str:
    return f"a red circle moves {way} on a black background"


def read(clip: Path) -> np.ndarray:
    """The pixels of a file, uint8 [F, H, W, 3]."""
    return np.concatenate(list(read_frames(clip)))


@pytest.fixture(scope="module")
def made(product, tmp_path_factory) -> list[Path]:
    """A clip of one segment, of two and of three, made without a break."""
    folder, clips = tmp_path_factory.mktemp("made"), []
    for way, seed in ROWS:
        fields = {"prompt": prompt(way), "seed": seed, "model": "demo", "num_frames": FRAMES}
        before = {"continues": str(clips[-1])} if clips else {}
        product.clip(continuing_fields({**fields, **before}, Inventory()) if clips else fields)
        clips.append(folder / f"{way}.mp4")
        shutil.copyfile(product.folder / "clip.mp4", clips[-1])
    return clips


def test_three_segments_are_one_clip_of_49_frames_without_a_jump(made) -> None:
    frames = read(made[-1]).astype(float)
    assert len(frames) == 3 * FRAMES - 2
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert steps.min() > 0.2  # a doubled frame would not move at all
    seams, inside = (FRAMES - 1, 2 * FRAMES - 2), np.delete(steps, (FRAMES - 1, 2 * FRAMES - 2))
    for seam in seams:
        assert steps[seam] <= inside[seam - FRAMES + 1 : seam + FRAMES - 1].max(), steps.round(2)
    # the red of the first segment is the red of the last: a drift would add up
    red = [frame[(frame[..., 0] > 150)].mean(0) for frame in frames[[8, 44]]]
    assert np.abs(red[0] - red[1]).max() < 12, red


def extend(clip: Path, row: int, *more: str) -> subprocess.Popen[bytes]:
    """`turbodiff extend` in a process group of its own, by the command that a person types."""
    way, seed = ROWS[row]
    argv = [sys.executable, "-m", "turbodiff", "extend", str(clip), prompt(way), "--seed", str(seed), *more]
    return subprocess.Popen(
        [*argv, "--frames", str(FRAMES), "-o", f"{way}.mp4", "--json"],
        cwd=clip.parent, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def kill_within(running: subprocess.Popen[bytes], phase: str, pause_s: float) -> None:
    """SIGKILL to the whole group, so long after that phase began; its worker, a group of its own, goes with it."""
    worker = 0
    for line in running.stdout or ():
        event = json.loads(line)
        worker = event["fields"]["pid"] if event["type"] == "hello" else worker
        if event["type"] == "phase" and event["fields"]["name"] == phase:
            break
    time.sleep(pause_s)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    end_s = time.monotonic() + 60
    while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
        assert time.monotonic() < end_s, "the worker outlives its command"
        time.sleep(0.05)


def stamp(path: Path) -> tuple[int, int, int]:
    """What another content would change."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


@pytest.mark.slow
def test_a_killed_extend_leaves_no_half_clip_and_makes_its_segment_again_bit_for_bit(made, tmp_path: Path) -> None:
    """The first segment is there; each of the two that follow is killed once, at a random moment, and asked again."""
    chance = random.Random(20261201)
    shutil.copyfile(made[0], tmp_path / "right.mp4")
    for row in (1, 2):
        clip, wanted = tmp_path / f"{ROWS[row - 1][0]}.mp4", tmp_path / f"{ROWS[row][0]}.mp4"
        before = {path: stamp(path) for path in tmp_path.iterdir()}
        kill_within(extend(clip, row), PHASES[-1] if row == 2 else chance.choice(PHASES), chance.uniform(0, 0.1))
        assert not wanted.exists() or np.array_equal(read(wanted), read(made[row]))  # whole, where it was quicker
        wanted.unlink(missing_ok=True)
        again = extend(clip, row)
        again.communicate()
        assert again.returncode == 0
        assert np.array_equal(read(wanted), read(made[row]))
        assert {path: stamp(path) for path in before} == before  # only this segment was made anew
        assert [
            path.name for path in tmp_path.iterdir() if path.name.startswith(".")
        ] == []  # what the kill left is gone
    assert len(read(wanted)) == 3 * FRAMES - 2
