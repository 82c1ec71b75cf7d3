"""A library of small clips for the gallery's tests: real mp4 files, one coloured picture each."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
from PIL import Image

from turbodiff.archive.clips import clip_path, poster_path, sidecar_path
from turbodiff.media.video import ClipWriter
from turbodiff.spec.clips import Sidecar
from turbodiff.spec.request import make_request

COLOURS = ((200, 60, 50), (60, 90, 200), (50, 160, 90), (230, 180, 40), (120, 60, 170), (40, 170, 190))
SIDE, FRAMES = 128, 17


def fill(outputs, count, until=None, videos=6):
    """Put clips into a library: `count` of them, the newest made at `until`; clips share `videos` files by hard links.

    Returns:
        The names, the newest first.
    """
    until, made = until or datetime.now(UTC), []
    sources = [_video(outputs / ".partial" / f"source{number}.mp4", COLOURS[number % 6]) for number in range(videos)]
    poster = outputs / ".partial" / "poster.jpg"
    for number in range(count):
        when = until - timedelta(minutes=17 * number)
        subject = ("a red circle", "a blue square", "a green triangle", "一只猫")[number % 4]
        prompt = f"{subject} moves right on a black background, take {number}"
        clip = clip_path(outputs, "t2v", number, "demo", when.astimezone())
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.hardlink_to(sources[number % len(sources)])
        Image.new("RGB", (SIDE, SIDE), COLOURS[number % 6]).save(poster, quality=80)
        poster.rename(poster_path(clip))
        request = make_request({"model": "demo", "prompt": prompt, "seed": number})
        said = {"created": when, "request": request, "rating": "★" * (number % 6), "frames": FRAMES}
        sidecar_path(clip).write_text(json.dumps(Sidecar.model_validate(said).model_dump(mode="json")), "utf-8")
        made.append(clip.stem)
    return made


def add(outputs, prompt, lengths):
    """Put clips into a library that differ in the seed alone, one of so many frames each; they have no posters.

    Returns:
        The names, that of seed 0 first.
    """
    made, now = [], datetime.now(UTC)
    for seed, frames in enumerate(lengths):
        clip = clip_path(outputs, "t2v", seed, "demo", (now - timedelta(minutes=seed)).astimezone())
        request = make_request({"model": "demo", "prompt": prompt, "seed": seed})
        said = Sidecar.model_validate({"created": now, "request": request, "frames": frames})
        _video(outputs / ".partial" / clip.name, COLOURS[seed], frames).rename(_made(clip))
        sidecar_path(clip).write_text(said.model_dump_json(), "utf-8")
        made.append(clip.stem)
    return made


def _made(clip):
    clip.parent.mkdir(parents=True, exist_ok=True)
    return clip


def _video(path, colour, frames=FRAMES):
    with ClipWriter(_made(path), SIDE, SIDE, 16, {}) as writer:
        for step in range(frames):
            frame, left = np.full((1, SIDE, SIDE, 3), 20, np.uint8), 4 * step % (SIDE - 48)
            frame[0, 40:88, left : left + 48] = colour
            writer.write(frame)
    return path
