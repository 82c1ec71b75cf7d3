"""A follower is killed or stopped at random moments of its life; its clip is made all the same, and nothing is left.

3 times in the suite, 50 in `scripts/test soak`.
"""

import contextlib
import json
import random
import signal
import sys
import threading
import time

import psutil
import pytest

from tests.runtime.test_ranks import alone, clip, followers, models  # noqa: F401 - fixtures
from tests.soak import SOAK
from tests.test_tiny import EventList
from turbodiff.runtime import ranks as ranks_module

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(7200)]
TURNS = 50 if SOAK else 3
START_S = 30.0


class Disturbance(threading.Thread):
    """Waits for a follower, then so long, then sends it a signal, where it still lives."""

    def __init__(self, number: int, wait_s: float) -> None:
        super().__init__(daemon=True)
        self.number, self.wait_s = number, wait_s
        self.victims: list[psutil.Process] = []
        self.sent = self.over = False

    def run(self) -> None:
        while not self.victims and not self.over:
            self.victims = followers()
            time.sleep(0.005)
        time.sleep(self.wait_s)
        for victim in self.victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                if not self.over and victim.is_running():
                    victim.send_signal(self.number)
                    self.sent = True


def test_a_signal_at_a_random_moment_never_loses_a_clip(tmp_path, models, alone, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ranks_module, "START_S", START_S)
    draw, life_s, story, turn = random.Random(0), 3600.0, [], 0
    while sum(told["sent"] for told in story) < TURNS:  # a moment after the end of the clip is none
        number = (signal.SIGKILL, signal.SIGSTOP)[sum(told["sent"] for told in story) % 2]
        disturbance = Disturbance(number, draw.uniform(0, 0.9) * life_s if turn else life_s)  # the first is left alone
        disturbance.start()
        folder, events, start_s = tmp_path / str(turn), EventList(), time.monotonic()
        folder.mkdir()
        made = clip(folder, models, ("",), events)
        took_s, disturbance.over = time.monotonic() - start_s, True
        lost = [event.numbers["why"] for event in events.of("notice") if event.key == "ranks_lost"]
        began = [event.name for event in events.of("phase") if event.state == "start"]
        story.append({"signal": number.name, "sent": disturbance.sent, "wait_s": disturbance.wait_s, "s": took_s})
        story[-1] |= {"lost": lost, "began": began, "steps": len(events.of("step"))}
        sys.stderr.write(json.dumps(story[-1]) + "\n")
        assert made == alone, story
        assert not followers() and not any(victim.is_running() for victim in disturbance.victims), story
        assert not list((folder / "outputs" / ".partial").iterdir()), story
        assert disturbance.sent or not lost, story
        if not disturbance.sent:
            life_s = took_s  # of this clip on this machine at this time
        turn += 1
