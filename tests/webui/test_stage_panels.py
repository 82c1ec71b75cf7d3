"""What the stage, the queue, the log and compare say of jobs and clips, from plain data."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Some

import pytest
from test_view import BARE, EN, ZH, job, plan_on

from turbodiff.cli.machine import _check
from turbodiff.diagnostics import doctor
from turbodiff.jobs.cards import FleetCard
from turbodiff.jobs.dispatch import Card, Price, WaitingJob
from turbodiff.jobs.nodes import ClusterFacts, NodeCard, NodeDownload, NodeFacts
from turbodiff.spec.clips import Measured, Sidecar
from turbodiff.spec.jobs import Outcome, Progress
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GIB
from turbodiff.spec.plan import Fit
from turbodiff.spec.request import make_request
from turbodiff.studio import Begin, Fleet, Studio
from webui import snapshot as snapshots
from webui.panels import compare, export, jobs, meter, models, nodes, stage, system, tabs
from webui.render import _progress, looked_at
from webui.snapshot import ClipView, Snapshot, StudioReader

ALONE = Fleet(cards=(FleetCard(slot=0, uuid="GPU-a", name="RTX 4090"),), workers=(Card(0, 60.0),))
RUNNING = job(1, "running", progress=Progress(phase="denoise", step=1, of=4, eta_s=60.0), strikes={})
QUIET = Some(clip=lambda name: None)


def clip(name, prompt="a cat"):
    sidecar = Sidecar(request=make_request({"prompt": prompt, "model": "demo"}))
    return ClipView(name, Path(f"{name}.mp4"), None, sidecar)


def test_a_job_that_was_queued_beside_the_running_one_does_not_hide_it():
    queued = (WaitingJob(2, "", {0: Price(90.0, 90.0)}),)
    seen = Snapshot(machine=BARE, jobs=(job(2), RUNNING), fleet=ALONE.model_copy(update={"waiting": queued}))
    shown, _ = looked_at(seen, "job:2", QUIET)
    assert shown is RUNNING
    drawn = _progress(shown, [], seen, EN, "job:2")
    assert 'data-job="1"' in drawn and 'role="progressbar"' in drawn
    assert "Job 2 is in the queue and starts in about 1 min" in drawn.replace("60 s", "1 min")
    gone = Snapshot(machine=BARE, jobs=(job(2, "cancelled"), RUNNING))
    assert looked_at(gone, "job:2", QUIET)[0] is RUNNING
    alone = Snapshot(machine=BARE, jobs=(job(2),))
    assert looked_at(alone, "job:2", QUIET)[0].id == 2


def test_a_waiting_job_says_when_it_starts_as_it_is_dispatched():
    plan = plan_on(80, model="wan2.1-1.3b")
    waiting = tuple(job(number, plan=plan) for number in (3, 2))
    price = {0: Price(plan.seconds, plan.seconds)}
    queued = tuple(WaitingJob(number, "", price) for number in (2, 3))
    fleet = ALONE.model_copy(update={"waiting": queued})
    seen = Snapshot(machine=BARE, jobs=(*waiting, RUNNING), fleet=fleet)
    rows = {row.job: row.starts for row in jobs.queue(seen, EN)}
    assert rows == {
        1: "",
        2: EN("run.starts_in", time=EN.seconds(60)),
        3: EN("run.starts_in", time=EN.seconds(60 + plan.seconds)),
    }
    assert "starts in about" in jobs.draw_queue(jobs.queue(seen, EN), False, "", "", EN)
    assert not any(row.starts for row in jobs.queue(replace(seen, paused=True), EN))
    unknown = fleet.model_copy(update={"told": False})
    assert not any(row.starts for row in jobs.queue(replace(seen, fleet=unknown), EN))
    lost = job(4, request=make_request({"prompt": "a cat", "model": "demo-i2v", "after": "0" * 32}))
    assert [row.starts for row in jobs.queue(Snapshot(jobs=(lost,), fleet=fleet), EN)] == [
        ""
    ]  # the segment before it was stopped
    assert {row.job: "down" in row.acts for row in jobs.queue(seen, EN)} == {1: False, 2: True, 3: False}


TWO = Fleet(
    cards=(
        FleetCard(slot=0, uuid="GPU-a", name="RTX 4090"),
        FleetCard(slot=1, uuid="GPU-b", name="RTX 3060", state="paused"),
    ),
    workers=(Card(0, 60.0),),
    waiting=(WaitingJob(2, "", {0: Price(90.0, 90.0)}), WaitingJob(3, "", {})),
    names={"GPU-old": "RTX 2080"},
)


def test_of_several_cards_each_job_names_its_own_and_one_that_cannot_start_says_what_to_try():
    asked = {"prompt": "a cat", "model": "wan2.1-14b"}
    held = job(3, request=make_request({**asked, "gpu": "GPU-b"}))
    gone = job(4, request=make_request({**asked, "gpu": "GPU-old"}))
    running = replace(RUNNING, slot=0)
    seen = Snapshot(machine=BARE, jobs=(gone, held, job(2), running), fleet=TWO)
    rows = {row.job: row for row in jobs.queue(seen, EN)}
    assert rows[1].starts == "on RTX 4090" and "RTX 4090" in _progress(running, [], seen, EN)
    assert rows[2].starts == EN("run.starts_on", time=EN.seconds(60), card="RTX 4090")
    assert rows[3].starts == rows[4].starts == ""
    assert rows[3].note == EN("run.card_paused", card="RTX 3060") and rows[3].acts[0] == "any_card"
    assert rows[4].note == EN("run.card_gone", card="RTX 2080") and "any_card" not in rows[2].acts
    plan = plan_on(24, model="wan2.1-1.3b")
    begin = Begin(130.0, 40.0, "RTX 4090")
    assert meter.button(plan, EN, begin).label.endswith("RTX 4090")
    verdict = meter.draw_verdict(meter.meter(plan, EN), EN, begin)
    assert EN("run.starts_on", time=EN.seconds(130), card="RTX 4090") in verdict and EN.seconds(40.0) in verdict
    choice = meter.draw_cards(TWO, "GPU-old", EN)
    assert all(name in choice for name in ("any", "RTX 3060 · paused", "RTX 2080 · not here"))
    assert meter.draw_cards(ALONE, "", EN) == "" and meter.button(plan, EN, Begin(9.0, 1.0, "")).label.endswith(
        "frames"
    )
    tab = system.draw(system.system(seen, None, EN), False, EN)
    assert 'data-card="GPU-b"' in tab and 'data-arg="GPU-b excluded"' in tab and "job 1" in tab


def test_the_system_tab_compares_what_the_newest_clips_took_with_what_was_predicted():
    def took(seconds, peak_bytes=0):
        made = clip("one")
        measured = Measured(seconds=seconds, peak_bytes=peak_bytes)
        return replace(made, sidecar=made.sidecar.model_copy(update={"plan": plan, "measured": measured}))

    plan = plan_on(80, model="wan2.1-1.3b")
    older = [took(9 * plan.seconds)] * 10  # beyond the newest 50
    newest = [took(plan.seconds * ratio, int(plan.peak_bytes * 0.9)) for ratio in (0.8, 1.0, 1.1, 1.5)]
    untold = [clip("no plan"), replace(clip("odd"), sidecar=Sidecar(request=clip("x").request, plan=plan))]
    shown = system.system(Snapshot(clips=(*newest, *untold, *[took(plan.seconds)] * 44, *older)), None, EN)
    time, memory = shown.accuracy
    assert (time.clips, memory.clips) == (48, 4) and time.ratios == pytest.approx((0.8, 1.0, 1.5))
    assert time.typical == pytest.approx(0.0) and memory.typical == pytest.approx(0.1, abs=1e-6)
    for words in (EN, ZH):
        tab = system.draw(shown, False, words)
        assert 'id="accuracy"' in tab and "1.50x" in tab and "10%" in tab
    assert 'id="accuracy"' not in system.draw(system.system(Snapshot(clips=tuple(untold)), None, EN), False, EN)


def test_a_job_for_an_idle_card_starts_now():
    fleet = ALONE.model_copy(update={"workers": (Card(0),), "waiting": (WaitingJob(2, "", {0: Price(9.0, 9.0)}),)})
    assert [row.starts for row in jobs.queue(Snapshot(jobs=(job(2),), fleet=fleet), EN)] == ["starts now"]
    assert "starts now on RTX 4090" in meter.draw_verdict(
        meter.meter(plan_on(24), EN), EN, Begin(0.0, 40.0, "RTX 4090")
    )


def test_the_machines_of_a_cluster_stand_with_their_cards_jobs_and_downloads():
    cards = (NodeCard(name="RTX 4090 #1", job=7, ours=True), NodeCard(name="RTX 4090 #2"))
    loads = NodeDownload(model="wan2.1-1.3b", share=0.42)
    full = NodeDownload(model="wan2.1-14b", state="failed", error={"code": "disk_quota", "got": "/w"})
    here = NodeFacts(host="studio-2", cards=cards, downloads=(loads, full))
    away = NodeFacts(host="attic", state="unreachable", cards=(NodeCard(),))
    told = ClusterFacts(address="10.0.0.1:6379", joined=True, nodes=(here, away))
    for words in (EN, ZH):
        shown = nodes.nodes(Snapshot(cluster=told), words)
        assert shown is not None and shown.rows[0].look == "good" and shown.rows[1].look == "bad"
        drawn = nodes.draw_nodes(shown, words)
        wanted = ("RTX 4090 #2", "42%", "studio-2", words("system.card_runs", job=7), words("system.node_unreachable"))
        assert drawn is not None and all(said in drawn for said in wanted)
        assert words.error(full.error) in drawn and words("system.card_unknown") in drawn
        apart = nodes.draw_nodes(nodes.nodes(Snapshot(cluster=ClusterFacts(address="10.0.0.1:6379")), words), words)
        assert apart is not None and "td-note warn" in apart and "cluster join" not in apart
    assert nodes.nodes(Snapshot(), EN) is None


def test_the_handles_of_a_trim_reach_over_all_of_a_continued_clip():
    alone = clip("one")
    joined = replace(alone, sidecar=alone.sidecar.model_copy(update={"frames": 49}))
    assert f"0.00 – {alone.request.num_frames / 16:.2f} s" in export.draw_form(alone, EN)
    assert "0.00 – 3.06 s" in export.draw_form(joined, EN)


def test_a_queue_says_how_long_it_takes_and_that_it_waits_for_the_night():
    plan = plan_on(80, model="wan2.1-1.3b")
    seen = Snapshot(machine=BARE, jobs=(job(3, plan=plan), job(2, plan=plan), RUNNING), queued=2)
    assert jobs.total(seen, EN) == EN("run.total", n=2, time=EN.predicted(60 + 2 * plan.seconds))
    assert "more than" in jobs.total(replace(seen, queued=5), EN)  # three are not listed
    two = TWO.model_copy(update={"cards": (*TWO.cards, FleetCard(slot=2, uuid="GPU-c", name="RTX 4080"))})
    both = EN("run.total", n=2, time=EN.predicted((60 + 2 * plan.seconds) / 2))  # the paused card makes none of it
    assert jobs.total(replace(seen, fleet=two), EN) == both
    assert jobs.total(Snapshot(jobs=(RUNNING,)), EN) == ""
    assert 'id="held"' in jobs.draw_queue([], False, "23:00", "", ZH)


def test_a_segment_that_waits_for_nobody_offers_to_retry_or_to_drop():
    segment = job(3, request=make_request({"prompt": "a cat", "model": "demo-i2v", "after": "a"}))
    for state, again, acts in (
        ("cancelled", (), ("retry_before", "drop")),
        ("failed", (job(4, "cancelled", parent=2),), ("retry_before", "drop")),
        ("failed", (job(4, parent=2),), ("edit_job", "duplicate", "cancel")),  # it is being made again
        ("done", (), ("edit_job", "duplicate", "cancel")),
    ):
        seen = Snapshot(jobs=(*again, segment, job(2, state, nonce="a")))
        row = next(row for row in jobs.queue(seen, EN) if row.job == 3)
        assert set(acts) <= set(row.acts)
        assert row.before == (max(one.id for one in seen.jobs if one is not segment) if "drop" in acts else 0)
    seen = Snapshot(jobs=(job(4, "failed", nonce="a"), segment))
    assert "Retry job 4" in jobs.draw_queue(jobs.queue(seen, EN), False, "", "", EN)


def test_to_stop_what_runs_is_asked_about_and_to_cancel_what_waits_is_not():
    drawn = jobs.draw_progress(jobs.progress(RUNNING, [], ZH), ZH)
    assert 'data-ask="停止这个视频' in drawn
    rows = jobs.draw_queue(jobs.queue(Snapshot(jobs=(job(2), RUNNING)), EN), False, "", "", EN)
    assert re.findall(r'data-act="(\w+)" data-ask=', rows) == ["clear", "cancel"]


def test_an_attempt_after_the_first_says_why_there_is_one():
    again = job(1, "running", attempt=2, strikes={"killed": 1})
    told = jobs.progress(again, [], EN).notices
    assert told == ("Attempt 2, by itself, because the worker was ended from outside.",)
    assert jobs.progress(RUNNING, [], EN).notices == ()


def test_every_strike_has_its_words_in_both_languages():
    from typing import get_args

    from turbodiff.jobs.retry_policy import Strike

    for strike in get_args(Strike):
        assert EN(f"run.strike_{strike}") != ZH(f"run.strike_{strike}")


def test_compare_waits_for_a_second_clip_that_is_another():
    first, second = (stage.card(clip(name, name), EN) for name in ("one", "two"))
    assert "Choose another clip to see it beside “one”" in compare.draw([first, first], False, EN)
    assert "<video" not in compare.draw([first], True, EN) and compare.draw([], False, EN) == ""
    assert compare.draw([first, second], False, EN).count("<video") == 2
    assert compare.draw([first, second], True, EN).count('class="edge"') == 1


def test_open_the_file_opens_it_and_another_button_saves_it():
    drawn = stage.draw_card(stage.card(clip("one"), EN), EN)
    opened = next(part for part in drawn.split("<a ") if "Open the file" in part)
    saved = next(part for part in drawn.split("<a ") if "Save a copy" in part)
    assert "download" not in opened.split(">")[0] and 'target="_blank"' in opened
    assert "download" in saved.split(">")[0]


def test_a_filter_that_nothing_passes_has_words_for_it():
    assert 'data-none="No such line in this log."' in tabs.draw_log(("[INFO] up",), EN)


def test_a_file_that_does_not_fit_is_never_the_button_to_press():
    spec = find_model("wan2.1-14b")
    variant = spec.variants[0]

    def drawn(band):
        fit = Fit(band, 60.0, (), 58 * GIB, 12 * GIB, suited=True)
        offer = Some(
            variant=variant, fit=fit, nbytes=10, free_bytes=100, network_bytes=10, files=(("a", "b", 1),),
            folder="checkpoints", host="huggingface.co",
        )  # fmt: skip
        seen = Snapshot(machine=BARE, offers={spec.name: (offer,)})
        return models.draw_model(models.model_card(spec, ("a",), seen, EN), True, EN)

    assert "td-btn main" in drawn("fits") and "For this machine" in drawn("fits")
    assert "td-btn main" not in drawn("no") and "For this machine" not in drawn("no")


def test_memory_has_one_unit_everywhere():
    assert doctor._memory(23 * GIB) == EN.gib(23 * GIB) == "23.0 GiB"
    assert all(told.endswith(" GiB") for told in _check("plan").values())  # the self-test's


def test_what_a_restart_brought_back_is_news_for_a_while_only(tmp_path, monkeypatch):
    outcome = Outcome(ok=True)
    reader = StudioReader(Studio(tmp_path / "state", tmp_path / "outputs"))
    monkeypatch.setattr(reader.studio, "restart_outcome", lambda number: outcome)
    assert reader.restarted() is None
    reader.restart()
    assert reader.restarted() is outcome and reader.restarted() is outcome
    monkeypatch.setattr(snapshots, "RESTART_NEWS_S", -math.inf)
    assert reader.restarted() is None and reader.restarted() is None
    reader.studio.close()
