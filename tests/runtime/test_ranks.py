"""A clip that several processes share is the clip of one, and losing one of them costs time and nothing else."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from PIL import Image

from tests.test_tiny import PROMPT, EventList, NoCommands, attempt
from turbodiff.media.ffmpeg import ffmpeg_path
from turbodiff.runtime import ranks as ranks_module
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.pipeline import generate
from turbodiff.studio import Studio


@pytest.fixture(scope="module")
def models():
    torch.set_flush_denormal(True)  # as in workers
    yield ModelCache(Device.pick("cpu"))
    torch.set_flush_denormal(False)


def clip(folder, models, cards, events=None, levers=None, **fields):
    """The video stream of a demo clip of so many processes, without the tags, which name the job and its time."""
    made = attempt(folder, models, events, NoCommands, num_frames=17, **fields)
    made.cards = cards
    if levers is not None:
        made.plan = made.plan.model_copy(update={"levers": made.plan.levers.model_copy(update=levers)})
    result = generate(made)
    assert made.ranks is None
    return bare(folder / "outputs" / result.path, folder)


def bare(path, folder):
    """The video stream of a clip."""
    how = ["-map_metadata", "-1", "-fflags", "+bitexact", "-c", "copy", "-f", "mp4"]
    whole = subprocess.run([ffmpeg_path(), "-v", "error", "-i", path, *how, folder / "bare.mp4"], check=True)
    assert whole.returncode == 0
    return (folder / "bare.mp4").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models):
    return clip(tmp_path_factory.mktemp("alone"), models, ())


def followers():
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends at this moment
            found += [child] if "turbodiff.runtime.follower" in child.cmdline() else []
    return found


def test_the_demo_clip_of_two_processes_is_that_of_one_bit_for_bit(tmp_path, models, alone):
    events = EventList()
    assert clip(tmp_path, models, ("",), events) == alone
    assert not [event for event in events.of("notice") if event.key == "ranks_lost"]
    assert not followers()


def test_blocks_that_two_processes_spread_over_themselves_make_the_same_clip(tmp_path, models, alone):
    events = EventList()
    levers = {"experts": "streamed", "blocks_resident": 1, "blocks_shared": 2, "cards": 2}
    assert clip(tmp_path, models, ("",), events, levers) == alone
    assert not [event for event in events.of("notice") if event.key == "ranks_lost"] and not followers()


def test_a_picture_that_two_processes_encode_and_decode_is_the_same_clip(tmp_path, models):
    Image.effect_noise((128, 128), 90).convert("RGB").save(tmp_path / "start.png")
    clips, events = [], EventList()
    for cards in ((), ("",)):
        folder = tmp_path / str(len(cards))
        folder.mkdir()
        fields = {"model": "demo-i2v", "kind": "i2v", "image": str(tmp_path / "start.png"), "steps": 1}
        clips.append(clip(folder, models, cards, events, **fields))
    assert clips[0] == clips[1]
    assert not [event for event in events.of("notice") if event.key == "ranks_lost"] and not followers()


def test_a_shell_gets_the_same_clip_from_two_processes(tmp_path, alone):
    studio, events = Studio(tmp_path / "state", tmp_path / "outputs"), EventList()
    fields = {"prompt": PROMPT, "seed": 7, "steps": 2, "num_frames": 17, "cards": "2"}
    made = studio.generate(fields, output=None, on_event=events)
    assert bare(tmp_path / "outputs" / made.path, tmp_path) == alone
    (first,) = events.of("plan")
    assert first.plan.levers.cards == 2 and first.plan.followers == ("",)
    assert not [event for event in events.of("notice") if event.key == "ranks_lost"] and not followers()


class Disturbing(EventList):
    """Sends a signal to the followers when the n-th event of a kind comes."""

    def __init__(self, number, kind="step", index=1):
        super().__init__()
        self.number, self.kind, self.index = number, kind, index

    def __call__(self, event):
        super().__call__(event)
        if len(self.of(self.kind)) == self.index and event.type == self.kind:
            for child in followers():
                os.kill(child.pid, self.number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_follower_that_dies_or_hangs_costs_time_and_not_the_clip(tmp_path, models, alone, number, monkeypatch):
    monkeypatch.setattr(ranks_module, "SILENT_S", 5.0)
    events = Disturbing(number)
    assert clip(tmp_path, models, ("",), events) == alone
    (lost,) = [event for event in events.of("notice") if event.key == "ranks_lost"]
    assert lost.numbers["left"] == 1
    assert not followers() and not list((tmp_path / "outputs" / ".partial").iterdir())


def test_a_follower_that_is_another_program_is_not_used(tmp_path, models, alone, monkeypatch):
    monkeypatch.setattr(ranks_module, "made_of", lambda device: {"torch": "0.0"})
    events = EventList()
    assert clip(tmp_path, models, ("",), events) == alone
    (lost,) = [event for event in events.of("notice") if event.key == "ranks_lost"]
    assert "another program" in lost.text and not followers()


def test_a_follower_that_dies_while_they_meet_is_not_waited_for(tmp_path, models, alone, monkeypatch):
    """It has said what it is made of, so that the first rank goes to meet it."""
    said = json.dumps(ranks_module.made_of(models.device))
    monkeypatch.setattr(
        ranks_module, "FOLLOWER", (sys.executable, "-c", f"import time; print({said!r}, flush=True); time.sleep(1)")
    )
    monkeypatch.setattr(ranks_module, "JOIN_S", 5.0)
    events = EventList()
    assert clip(tmp_path, models, ("",), events) == alone
    (lost,) = [event for event in events.of("notice") if event.key == "ranks_lost"]
    assert lost.numbers["left"] == 1 and not followers()
