"""A neighbour takes a quarter of the card at a random moment of a job: the clip is verified and the same to the bit.

A moment is an allocation: before it the neighbour comes, and nothing that is allocated from then on may bring the total
above what is left. So it comes between phases, between steps, between blocks and within them. $TURBODIFF_MOMENTS is how
many are tried (default 40).
"""

import gc
import hashlib
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.small_card import CardCache, card, write_toy
from tests.runtime.test_small_card import MB, PINS, OneCommand, words
from turbodiff.jobs.retry_policy import OOM_SHRINK
from turbodiff.plan.planner import plan_request
from turbodiff.runtime import elastic, pipeline, replan, worker
from turbodiff.spec.events import read_event
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import inventory

MOMENTS = int(os.environ.get("TURBODIFF_MOMENTS", "40"))
ATTEMPTS = 4

pytestmark = pytest.mark.slow


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Run a job on a card, attempt after attempt as the supervisor would; returns (hash of its frames, its events).

    `comes`, `leaves`: before which allocation a neighbour takes a quarter of the card and gives it back; 0: never.
    """
    write_toy(tmp_path / "toy", 4)
    monkeypatch.setenv("TURBODIFF_CONFIGS", str(tmp_path / "toy" / "configs"))
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "toy" / "models"))
    fixed = {"model": "toy", "steps": 2, "num_frames": 5, "seed": 7, "quant_linear": "off", "pinned": PINS}
    request = make_request({"prompt": "a red circle moves right", "size": "64x64", **fixed})
    wide = plan_request(request, card(100 * MB), inventory())
    total, models, decode = wide.peak_bytes, CardCache(), pipeline.decode
    frames, sent = hashlib.sha256(), []

    def tapped(attempt, latents):
        nonlocal frames
        frames = hashlib.sha256()
        for chunk in decode(attempt, latents):
            frames.update(np.ascontiguousarray(chunk))
            yield chunk

    monkeypatch.setattr(pipeline, "decode", tapped)
    monkeypatch.setattr(worker, "beat", lambda events, device: None)
    monkeypatch.setattr("turbodiff.runtime.model_cache.ModelCache", lambda device: models)
    models.warm(request)
    gc.collect()
    gc.freeze()  # what is there by now is not looked through whenever memory is given back

    def run(comes=0, leaves=0, asked=True):
        monkeypatch.setattr(elastic, "READ_EVERY_S", 0 if asked else 3600)
        plan, cap_bytes, here, now = plan_request(request, card(total), inventory()), None, total, 0
        name, told = f"run{len(sent)}", []
        sent.append(name)

        def before(number):
            nonlocal here, now
            now += 1
            here = total - total // 4 if now == comes else total if now == leaves else here
            models.ledger.cap_bytes = here

        def shown():
            return here

        for number in range(1, ATTEMPTS + 1):
            gpu = card(total).gpus[0].model_copy(update={"free_bytes": here, "used_bytes": total - here})
            machine = card(total).model_copy(update={"gpus": (gpu,)})
            monkeypatch.setattr(replan, "machine_for", lambda command, device, machine=machine: machine)
            command = {
                "job": 1, "attempt": number, "request": request.model_dump(mode="json"), "cap_bytes": cap_bytes,
                "plan": plan.model_dump(mode="json"), "outputs": tmp_path / name, "state": tmp_path / f"{name} state",
            }  # fmt: skip
            events = os.memfd_create("events")
            with models.insert(here, shown) as ledger:
                ledger.before = before
                worker.serve(worker.EventWriter(events), OneCommand(command), "cpu")
            os.lseek(events, 0, os.SEEK_SET)
            with os.fdopen(events, "rb") as lines:
                told += [read_event(line) for line in lines]
            if words(told, "result"):
                break
            if words(told, "wait"):
                here = total  # it waits until the neighbour has gone
            else:
                assert words(told, "error")[-1].code == "oom"
                cap_bytes = int(OOM_SHRINK * min(words(told, "plan")[-1].plan.peak_bytes, here))
        (result,) = words(told, "result")
        clip = Path(tmp_path / name / result.path)
        assert hashlib.sha256(clip.read_bytes()).hexdigest() == result.sha256 and result.frames == 5
        run.allocations = now
        return frames.hexdigest(), told

    yield run
    gc.unfreeze()


@pytest.mark.timeout(3600)
def test_a_neighbour_that_takes_a_quarter_of_the_card_changes_no_clip_and_ends_no_job(job):
    undisturbed, told = job()
    assert not words(told, "notice")
    allocations, chance, endings = job.allocations, random.Random(13), Counter()
    for number in range(MOMENTS):
        comes = chance.randint(1, allocations)
        leaves = comes + chance.randint(1, allocations // 2) if number % 4 == 3 else 0
        frames, told = job(comes, leaves, asked=number % 2 == 0)
        assert frames == undisturbed, (comes, leaves)
        attempts = max(event.attempt for event in words(told, "phase"))
        endings[f"attempts {attempts}"] += 1
        endings.update({notice.key for notice in words(told, "notice")})
    print(MOMENTS, "moments:", dict(sorted(endings.items())))
    assert endings["attempts 1"] >= 0.8 * MOMENTS  # a retry in a new process is for what is no network's
    assert endings["block_repeated"] and endings["blocks_left"] and endings["levers_pulled"]
