"""A clip that several processes share is the clip of one, and losing one of them costs time and nothing else."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.plan.machines import gpu, machine
from tests.plan.test_shared_clip import TWO_24, planned
from tests.test_tiny import PROMPT, EventList, NoCommands, attempt
from turbodiff.archive.clips import read_sidecar
from turbodiff.gpu import probe
from turbodiff.gpu.card_measurements import all_measurements
from turbodiff.media.ffmpeg import ffmpeg_path
from turbodiff.plan.hardware import CONTEXT_BYTES
from turbodiff.plan.planner import plan_request
from turbodiff.runtime import ranks as ranks_module
from turbodiff.runtime.device import Device
from turbodiff.runtime.latents_cache import LatentsCache
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.pipeline import generate, make_latents
from turbodiff.runtime.shared_work import cap_allocator
from turbodiff.spec.errors import OutOfMemoryError
from turbodiff.spec.numbers import GIB
from turbodiff.studio import Studio
from turbodiff.weights.locate import inventory


@pytest.fixture(scope="module")
def models():
    torch.set_flush_denormal(True)  # as in workers
    yield ModelCache(Device.pick("cpu"))
    torch.set_flush_denormal(False)


def clip(folder, models, cards, events=None, levers=None, here=None, **fields):
    """The video stream of a demo clip of so many processes, without the tags, which name the job and its time."""
    made = attempt(folder, models, events, NoCommands, num_frames=17, **fields)
    made.cards, made.machine = cards, here
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


def test_a_rounded_exchange_is_nearly_the_same_clip_and_told_of_it(tmp_path, models, alone, monkeypatch):
    """Within 1 % of the latents, where 3e-3 of a velocity was measured; also of latents that are decoded later."""
    monkeypatch.setattr(LatentsCache, "delete", lambda self: None)
    whole = attempt(tmp_path / "exact", models, num_frames=17)
    models.open(whole.request)  # another test left its own model open
    exact = make_latents(whole)
    made = attempt(tmp_path, models, num_frames=17, cards=2, exchange="int8")
    made.cards = made.plan.followers
    first, latents = generate(made), LatentsCache(tmp_path / "state", 1).load(made.request)
    assert 0 < (latents - exact).norm() / exact.norm() < 0.01
    later = generate(attempt(tmp_path, models, num_frames=17, exchange="int8"))
    for result in (first, later):
        assert read_sidecar(tmp_path / "outputs" / result.path).ran.exchange == result.ran.exchange == "int8"
    assert not followers()


def test_a_shell_gets_the_same_clip_from_two_processes_and_keeps_what_they_send_each_other(
    tmp_path, alone, monkeypatch
):
    """On cards that no torch here sees: CPUs."""
    cards = [gpu(24, index=index, uuid=f"GPU-{name}") for index, name in enumerate("ab")]
    monkeypatch.setattr(probe, "machine_now", lambda: machine(*cards, pretended=True))
    studio, events = Studio(tmp_path / "state", tmp_path / "outputs"), EventList()
    fields = {"prompt": PROMPT, "seed": 7, "steps": 2, "num_frames": 17, "cards": "2"}
    made = studio.generate(fields, output=None, on_event=events)
    assert bare(tmp_path / "outputs" / made.path, tmp_path) == alone
    (first,) = events.of("plan")
    assert first.plan.levers.cards == 2 and first.plan.followers == ("GPU-b",)
    (kept,), (link,) = all_measurements().links, events.of("link")
    assert (kept.name, kept.cards, kept.bytes_s) == (cards[0].name, 2, link.bytes_s) and kept.bytes_s > 1e6
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
    assert clip(tmp_path, models, ("",), events, {"cards": 2}, machine(ram_gib=8)) == alone
    (lost,) = [event for event in events.of("notice") if event.key == "ranks_lost"]
    assert lost.numbers["left"] == 1
    both, left = [event.plan for event in events.of("plan")]
    fresh = plan_request(left.request, machine(ram_gib=8), inventory(), policy="never", ranks=1)
    assert (both.levers.cards, left.levers) == (2, fresh.levers) and left.phases == fresh.phases
    assert not followers() and not list((tmp_path / "outputs" / ".partial").iterdir())


def test_a_follower_that_runs_out_of_memory_ends_the_attempt_as_the_first_rank_would(tmp_path, models, monkeypatch):
    """Its card is none that was lost: the next attempt, one rung lower, may use it."""
    start = "from tests.runtime import small_follower; small_follower.main(8 << 20)"
    code = f"import sys; sys.path[:0] = {sys.path!r}; {start}"
    monkeypatch.setattr(ranks_module, "FOLLOWER", (sys.executable, "-c", code))
    made, events = attempt(tmp_path, models, EventList(), num_frames=17), EventList()
    made.cards, made.send = ("",), events
    with pytest.raises(OutOfMemoryError) as ran_out:
        generate(made)
    error = ran_out.value
    assert (error.code, error.field) == ("oom", "denoise") and error.got.startswith("rank 1: ") and error.expected
    assert made.cards == ("",) and made.ranks is None and not events.of("notice")
    assert not [child for child in psutil.Process().children() if "small_follower" in str(child.cmdline())]


def test_a_follower_stops_at_what_its_own_card_has(monkeypatch):
    """Of a card that torch does not see."""
    fractions, plan = [], planned(TWO_24, 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: fractions.append(part))
    second = plan.shares[1].model_copy(update={"budget_bytes": plan.budget_bytes + GIB, "peak_bytes": 30 * GIB})
    plan = plan.model_copy(update={"shares": (plan.shares[0], second)})
    card = Device(torch.device("cuda:0"), "RTX 4090", torch.bfloat16)
    for band in ("fits", "no"):
        cap_allocator(card, plan.model_copy(update={"band": band}), 1)
    cap_allocator(card, plan, 2)  # of which nothing is known: what the one with the least has
    capped_bytes = [round(part * 24 * GIB) for part in fractions]
    assert capped_bytes == [plan.budget_bytes + GIB - CONTEXT_BYTES, 24 * GIB, plan.budget_bytes - CONTEXT_BYTES]


def test_of_several_the_one_that_a_signal_ended_is_lost_and_not_the_one_that_heard_of_it(models, monkeypatch):
    """Whose own last words come first: what it exchanged with has closed."""
    said = json.dumps(ranks_module.made_of(models.device))
    code = f"""
import os, pathlib, sys, time
print({said!r}, flush=True)
gone = pathlib.Path(sys.argv[3] + ".gone")
if sys.argv[1] == "2":
    gone.touch()
    os.kill(os.getpid(), 9)
while not gone.exists():
    time.sleep(0.01)
sys.exit(print('{{"error": "Connection closed by peer"}}', flush=True) or 1)
"""
    monkeypatch.setattr(ranks_module, "FOLLOWER", (sys.executable, "-c", code))
    monkeypatch.setattr(ranks_module, "JOIN_S", 3.0)
    group, files = ranks_module.Ranks(models.device, ("", "")), psutil.Process().num_fds()
    with pytest.raises(ranks_module.RanksLostError, match="rank 2 ended with -9"):
        group.open()
    group.close()
    assert group.lost_rank == 2 and psutil.Process().num_fds() == files


def test_what_a_library_prints_is_no_word_of_a_follower_and_loses_none(models, monkeypatch, capfd, tmp_path):
    """NCCL_DEBUG=VERSION does: before it has said what it is made of, and after, on what was its standard output."""
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
os.write(1, b'NCCL version 2.27.5+cuda12.9\\n\\xff\\n3\\n' + b'[' * 10**5 + b'\\n')
from turbodiff.runtime import follower
say = follower.say
follower.say = lambda *word: (os.write(1, b'NCCL INFO here\\n'), say(*word))
follower.run(*sys.argv[1:])
"""
    monkeypatch.setattr(ranks_module, "FOLLOWER", (sys.executable, "-c", code))
    with monkeypatch.context() as soon, pytest.raises(RuntimeError):  # a meeting that failed must not spoil the next
        soon.setattr(ranks_module, "JOIN_S", 0.2)
        ranks_module.join(models.device, tmp_path / "store", 0, 2)
    group = ranks_module.Ranks(models.device, ("",))
    group.open()
    monkeypatch.setattr(ranks_module, "UNHELD_S", -1.0)
    ranks_module.remove_left()
    assert Path(group._folder.name).is_dir(), "it is held"
    assert group.link_rate(1000) > 0 and group.lost_rank is None
    group.close()
    assert "NCCL INFO here" in capfd.readouterr().err


def test_to_meet_in_the_second_group_may_not_take_the_hour_that_an_exchange_may(models, monkeypatch, tmp_path):
    """A follower may die between the two."""
    asked, new_group = [], dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda **how: asked.append(how["timeout"]) or new_group(**how))
    ranks_module.join(models.device, tmp_path / "store", 0, 1)
    dist.destroy_process_group()
    assert asked == [timedelta(seconds=ranks_module.JOIN_S)]


THREE_24 = machine(*[gpu(24, index=index, uuid=f"GPU-{name}") for index, name in enumerate("abc")])


def test_a_first_rank_that_waits_in_vain_says_who_was_lost_before_it_ends(tmp_path, models, monkeypatch, capsys):
    """As NCCL may, for a process that is gone: nothing wakes the thread that waits. Whoever hears it knows which cards
    are left."""

    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(ranks_module, "GRACE_S", 0.0)
    made, events = attempt(tmp_path, models, EventList()), EventList()
    made.plan, made.cards, made.send = planned(THREE_24, 3, "wan2.1-1.3b"), ("GPU-b", "GPU-c"), events
    group = made.ranks = ranks_module.Ranks(
        Device(torch.device("cuda:0"), "RTX 4090", torch.bfloat16), made.cards, made._say_lost
    )
    group._lose(1, "ended with -9")
    with pytest.raises(SystemExit):
        group._watch()
    group.close()
    assert "rank 1 ended with -9" in capsys.readouterr().err
    (left,), (error,) = events.of("plan"), events.of("error")
    assert (error.code, error.got) == ("ranks_lost", "rank 1 ended with -9")
    assert left.plan.followers == ("GPU-c",) and made.cards == ("GPU-c",)


def test_folders_that_killed_processes_left_are_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ("left", "empty", "held", "young", "strange", "others")
    left, empty, held, young, strange, others = [tmp_path / f"{ranks_module.MEETINGS}{name}" for name in names]
    elsewhere, link = tmp_path / "elsewhere", tmp_path / f"{ranks_module.MEETINGS}link"
    for folder in (left, empty, held, young, strange, others, elsewhere):
        folder.mkdir()
    for folder in (left, held, young, strange, others, elsewhere):
        (folder / "store").touch()
    (strange / "notes").touch()
    link.symlink_to(elsewhere)
    (tmp_path / f"{ranks_module.MEETINGS}file").touch()
    for folder in (left, empty, held, strange, others, elsewhere):
        os.utime(folder, (0, 0))
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    fstat, inode = os.fstat, others.stat().st_ino

    def owned(descriptor):
        facts = fstat(descriptor)
        return SimpleNamespace(st_uid=os.getuid() + (facts.st_ino == inode), st_mtime=facts.st_mtime)

    before = set(tmp_path.rglob("*"))
    with monkeypatch.context() as owners:
        owners.setattr(os, "fstat", owned)
        ranks_module.remove_left()
    assert before - set(tmp_path.rglob("*")) == {left, left / "store", empty}
    os.close(lock)


def test_a_follower_sees_the_card_that_the_first_rank_counts_so(models, monkeypatch):
    """CUDA counts the numbers of a CUDA_VISIBLE_DEVICES among all cards of the machine, not among those of another."""
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)"
    monkeypatch.setattr(ranks_module, "FOLLOWER", (sys.executable, "-S", "-c", code))
    group, seen = ranks_module.Ranks(models.device, ("1",)), []
    outer = {"2,5": "1", "GPU-a, GPU-b": "1", "GPU-c,GPU-a": "GPU-a", "3": "", None: "1"}
    for devices, visible in outer.items():
        if devices is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        with group._start(1, visible) as process:
            seen.append(process.stdout.read().decode().strip())
    group.close()
    assert seen == ["5", "GPU-b", "GPU-a", "", "1"]


class PausedOnce:
    """A clock of a process that is stopped for so long while it sleeps for the first time."""

    def __init__(self, stopped_s):
        self.now_s, self.stopped_s = 0.0, stopped_s

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s, self.stopped_s = self.now_s + seconds + self.stopped_s, 0.0


def test_a_first_rank_that_was_stopped_itself_hears_its_followers_before_it_loses_one(models, monkeypatch):
    """As by `docker pause`, which stops all of them. One that stays silent is lost all the same."""
    group = ranks_module.Ranks(models.device, ("",))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as follower:
        group._processes, group._heard_s, group._said = [follower], [0.0], [[{}]]
        clock = PausedOnce(stopped_s=3600.0)
        monkeypatch.setattr(ranks_module, "time", clock)
        group._watch()
        group.close()
    assert group.lost_rank == 1
    assert 3600.0 + ranks_module.SILENT_S < clock.now_s < 3600.0 + 2 * ranks_module.SILENT_S


def test_a_follower_that_does_not_start_is_lost(models, monkeypatch):
    monkeypatch.setattr(ranks_module, "FOLLOWER", ("/nowhere/python",))
    group, files = ranks_module.Ranks(models.device, ("",)), psutil.Process().num_fds()
    with pytest.raises(ranks_module.RanksLostError, match="did not start"):
        group.open()
    group.close()
    assert group.lost_rank == 1 and psutil.Process().num_fds() == files


@pytest.mark.timeout(60)
def test_a_follower_that_lives_and_never_starts_is_lost(models, monkeypatch):
    """Its import of torch hangs on a dead file system, and its beat goes on."""
    code = "import time\nwhile True:\n    print('{}', flush=True)\n    time.sleep(0.1)"
    monkeypatch.setattr(ranks_module, "FOLLOWER", (sys.executable, "-c", code))
    monkeypatch.setattr(ranks_module, "AGREE_S", 1.0)
    group = ranks_module.Ranks(models.device, ("",))
    with pytest.raises(ranks_module.RanksLostError, match="rank 1 did not start within 1 s"):
        group.open()
    group.close()
    assert group.lost_rank == 1


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
