"""What each panel shows, from plain data."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Some

import pytest

from tests.plan.machines import card, disk
from turbodiff.diagnostics.background_tasks import Check, SelfTest
from turbodiff.diagnostics.doctor import DoctorReport
from turbodiff.diagnostics.downloads import Download, Offer
from turbodiff.jobs.nodes import ClusterFacts, NodeFacts
from turbodiff.plan.hardware import GpuFacts, Machine, pretend
from turbodiff.plan.planner import Outlook, Refusal, plan_request
from turbodiff.plan.tiers import installed
from turbodiff.plan.tiers import rounds as tiers_rounds
from turbodiff.spec.clips import Sidecar, read_record
from turbodiff.spec.downloads import Progress as DownloadProgress
from turbodiff.spec.events import JobError, PhaseEvent, PreviewEvent
from turbodiff.spec.jobs import Outcome, Progress, QueuedJob
from turbodiff.spec.models import Inventory, PassedOver, all_models, find_model
from turbodiff.spec.numbers import GIB
from turbodiff.spec.plan import Change, Fit
from turbodiff.spec.request import make_request
from turbodiff.weights.storage import StoredFile
from webui import form
from webui.panels import first_aid, jobs, meter, models, stage, status_bar, system
from webui.panels.form_help import picture, prompt_help, round_tile, rounds_sum
from webui.snapshot import ClipView, Snapshot
from webui.wording import Words

EN, ZH = Words("en"), Words("zh")
BARE = Machine(ram_total_bytes=64 * GIB, ram_available_bytes=48 * GIB, cpu_count=8)
CAT = {"prompt": "a cat chases a butterfly"}


def plan_on(gib, **fields):
    return plan_request(make_request({**CAT, **fields}), pretend(BARE, gib), Inventory(), policy="auto")


def job(number, state="queued", **more):
    blank = dict.fromkeys(QueuedJob.__dataclass_fields__)
    known = {"id": number, "state": state, "attempt": 1, "place": float(number)}
    request = make_request({**CAT, "model": "wan2.1-14b", "resolution": "720p"})
    return QueuedJob(**{**blank, **known, "request": request, **more})


def test_the_button_says_what_will_run_not_what_was_asked():
    plan = plan_on(12, model="wan2.1-14b", resolution="720p")
    label = meter.button(plan, ZH).label
    assert label.startswith("生成 · ")
    assert f"{plan.request.num_frames}帧" in label
    assert plan.request.resolution in label


def test_run_anyway_is_offered_only_when_the_picture_was_changed():
    assert not meter.button(plan_on(80, model="wan2.1-14b"), EN).anyway
    changed = plan_on(6, model="wan2.1-14b", resolution="720p")
    assert any(change.lossy for change in changed.changes)
    assert meter.button(changed, EN).anyway


def test_the_meter_names_the_binding_phase_and_shows_each_change_once():
    plan = plan_on(6, model="wan2.1-14b", resolution="720p")
    shown = meter.meter(plan, EN)
    assert meter.draw(shown, EN).count('class="peak"') == 1
    assert {row.lossy for row in shown.diffs} >= {True}
    assert all(row.before != "automatic" for row in shown.diffs)
    assert len(shown.why) == len(plan.reasons)


def test_what_auto_settled_is_no_news():
    shown = meter.meter(plan_on(80, model="wan2.1-1.3b"), EN)
    assert shown.diffs == ()
    assert not shown.urgent


def test_an_illegal_form_shows_its_problem_instead_of_numbers():
    shown = meter.problem({"code": "frames_not_4n1", "got": "80", "expected": "1, 5, 9"}, ZH)
    assert "80" in shown.problem and shown.plan is None


def test_the_bar_splits_a_card_into_ours_others_and_unaccounted():
    card = GpuFacts(name="RTX 4090", uuid="GPU-1", total_bytes=24 * GIB, free_bytes=10 * GIB, used_bytes=14 * GIB)
    rows = (Some(kind="worker", bytes=9 * GIB, pid=5), Some(kind="browser", bytes=3 * GIB, pid=6))
    snapshot = Snapshot(machine=BARE.model_copy(update={"gpus": (card,)}), holders=(Some(uuid="GPU-1", rows=rows),))
    shares = {part.kind: round(part.share * 24) for part in status_bar.status_bar(snapshot, EN).gauges[0].segments}
    assert shares == {"ours": 9, "others": 3, "unknown": 2}


def test_a_machine_without_a_card_says_so_and_shows_no_vram():
    shown = status_bar.status_bar(Snapshot(machine=BARE), ZH)
    assert shown.card == "没有 GPU"
    assert [gauge.label for gauge in shown.gauges] == ["内存"]


def test_a_leftover_worker_is_named_with_its_memory():
    held = (Some(uuid="GPU-1", rows=(Some(kind="leftover", bytes=2 * GIB, pid=7),)),)
    shown = status_bar.status_bar(Snapshot(machine=BARE, leftovers=(Some(pid=7),), holders=held), EN)
    assert shown.leftovers == ((7, "a leftover worker holds 2.0 GiB"),)


def test_a_restart_says_how_many_bytes_came_back():
    shown = status_bar.status_bar(Snapshot(machine=BARE, restarted=Outcome(ok=True, freed_bytes=3 * GIB)), EN)
    assert shown.restarted == "3.0 GiB came back."


def test_progress_shows_phases_step_and_time_left():
    events = [
        PhaseEvent(job=1, attempt=1, name="text_encode", state="done", seconds=1.5),
        PhaseEvent(job=1, attempt=1, name="denoise", state="start"),
        PhaseEvent(job=1, attempt=0, name="write", state="done"),
    ]
    running = job(1, "running", plan=None, progress=Progress(phase="denoise", step=2, of=4, eta_s=12.0))
    shown = jobs.progress(running, events, EN)
    assert [chip.state for chip in shown.chips] == ["done", "now", "waiting", "waiting"]  # attempt 0 is forgotten
    assert shown.line == "Denoise, step 2 of 4"
    assert shown.eta == "about 12 s left"
    assert 0.3 < shown.share < 0.5
    assert shown.can_decode
    soon = job(1, "running", plan=None, progress=Progress(phase="denoise", step=2, of=4, eta_s=0.02))
    assert jobs.progress(soon, events, EN).eta == "about 1.0 s left"


def test_the_queue_is_in_the_order_it_will_run_and_failures_stay_visible():
    waiting = [job(5, place=2.0), job(4, place=1.0)]
    snapshot = Snapshot(
        jobs=(job(6, "failed", error=JobError(code="oom")), *waiting, job(3, "running"), job(2, "done"))
    )
    rows = jobs.queue(snapshot, EN)
    assert [(row.job, row.state) for row in rows] == [(3, "running"), (4, "queued"), (5, "queued"), (6, "failed")]
    assert "up" not in rows[1].acts and "up" in rows[2].acts


def test_a_job_that_waits_for_memory_says_how_much():
    held = job(4, hold_bytes=5 * GIB)
    rows = jobs.queue(Snapshot(jobs=(job(5), held)), EN)
    assert [row.note for row in rows] == ["Waiting: another program took memory, 5.0 GiB needed", CAT["prompt"]]


def test_a_job_whose_weights_no_machine_of_a_cluster_has_says_so():
    node = NodeFacts(host="attic", inventory=disk("wan2.1-14b"))
    said = [
        [row.note for row in jobs.queue(Snapshot(jobs=(job(5), job(4)), cluster=cluster), EN)]
        for cluster in (None, ClusterFacts(address="far:1", nodes=(node,)), ClusterFacts(address="far:1"))
    ]
    assert said == [[CAT["prompt"]] * 2, [CAT["prompt"]] * 2, [EN("run.waits_for_weights")] * 2]


def test_the_preview_of_the_running_job_is_its_newest_picture():
    events = [PreviewEvent(job=1, attempt=1, i=i, jpeg=jpeg) for i, jpeg in ((1, "AAAA"), (2, "/9j/"))]
    assert stage.preview(events) == "data:image/jpeg;base64,/9j/"
    assert stage.preview([]) == ""


def test_one_running_job_needs_no_queue():
    assert jobs.queue(Snapshot(jobs=(job(1, "running"),)), EN) == []


def test_first_aid_after_memory_failure_is_the_guides_and_steps_are_not_a_memory_lever():
    shown = first_aid.failure(job(1, "failed", error=JobError(code="oom", what="x")), EN)
    assert shown.memory
    assert dict(shown.smaller) == {
        "model": "wan2.1-1.3b", "resolution": "480p", "num_frames": 49, "steps": 2, "quant_linear": "on",
    }  # fmt: skip
    assert "steps do not change memory" in EN("run.aid_3_text")


def test_picture_to_video_retries_smaller_without_another_model():
    assert "model" not in first_aid.smaller("wan2.2-a14b", 81)


@pytest.mark.parametrize("code", ["clip_frames", "oom"])
def test_every_failed_job_offers_the_three_steps_and_folds_them_where_memory_was_not_the_cause(code):
    shown = first_aid.failure(job(1, "failed", error=JobError(code=code, what="x")), EN)
    drawn = first_aid.draw_failure(shown, Snapshot(), EN)
    assert all(EN(f"run.aid_{step}") in drawn for step in (1, 2, 3)) and EN("run.aid_3_button") in drawn
    assert ("<details>" in drawn) == (code == "clip_frames") == (not shown.memory)


def clip(**request):
    fields = make_request({**CAT, "seed": 7, **request}).model_dump(mode="json")
    change = Change(field="attention", from_value="sagesla", to_value="sla", lossy=False)
    plan = plan_on(80).model_copy(update={"peak_bytes": 3 * GIB, "changes": (change,)})
    made = {
        "plan": plan.model_dump(mode="json"),
        "ran": {"attention": "sla", "backend": "triton", "arch": "sm_120"},
        "measured": {"peak_bytes": 2 * GIB, "seconds": 9.0},
        "rating": "★★☆☆☆",
    }
    return ClipView("t2v_7", Path("t2v_7.mp4"), None, read_record(Sidecar, {"request": fields, **made}))


def test_the_card_says_what_was_asked_and_what_ran():
    facts = dict(stage.card(clip(), EN).facts)
    assert facts["Attention"] == "asked sagesla, ran sla (triton, sm_120)"
    assert facts["Peak"] == "3.0 GiB predicted, 2.0 GiB measured"
    assert facts["Took"] == f"{EN.seconds(plan_on(80).seconds)} predicted, 9.0 s measured"


def test_a_demo_clip_is_labelled_as_one():
    assert ("accent", EN("clip.demo")) in stage.card(clip(model="demo"), EN).badges


def test_symptoms_offer_only_knobs_that_would_change_something():
    i2v = {"model": "wan2.2-a14b", "image": "cat.png"}
    knobs = stage.card(clip(**i2v, boundary=0.7, sampler="sde", topk=0.15, steps=4), EN).knobs
    assert [knob.label for knob in knobs] == ["add a verb"]
    knobs = stage.card(clip(**i2v, boundary=0.9, sampler="ode", topk=0.1, steps=2), EN).knobs
    assert [dict(knob.fields) for knob in knobs[:4]] == [
        {"boundary": 0.7},
        {"sampler": "sde"},
        {"topk": 0.15},
        {"steps": 4},
    ]


@pytest.mark.parametrize(("prompt", "keys"), [
    ("一只猫在草地上,旁边有树,天空是蓝色的", {"no_verb", "flat_list"}),
    ("一只橙色的猫，追逐着蝴蝶，阳光洒在草地上，微风轻拂树叶", set()),
])  # fmt: skip
def test_the_guides_two_prompts_get_the_chips_they_deserve(prompt, keys):
    shown = prompt_help(prompt, 30, find_model("wan2.1-14b"), ZH)
    assert {chip.key for chip in shown.chips} == keys
    assert shown.chinese
    assert shown.tokens == "30 / 512 个 token"


def test_the_demo_prompts_get_no_rewrite():
    shown = prompt_help("a red circle on a black background", None, find_model("demo"), EN)
    assert not [chip for chip in shown.chips if chip.rewrite]
    assert shown.tokens == ""


def test_a_round_over_its_budget_says_so():
    start = Some(fields=lambda: {"model": "wan2.1-14b", "resolution": "720p", "steps": 4})
    found = [
        Some(name="deliver", budget_s=1, t2v=start, i2v=start),
        Some(name="between", budget_s=1, t2v=start, i2v=start),
    ]
    values = {"model": "wan2.1-1.3b", "kind": "t2v", **CAT}

    def seconds(fields):
        plan = plan_on(24, **{name: value for name, value in fields.items() if name != "kind"})
        return Outlook(plan.band, plan.seconds, plan.request.steps)

    shown = [round_tile(entry, values, seconds, EN) for entry in found]
    assert [(tile.name, tile.over) for tile in shown] == [("deliver", True), ("between", True)]
    assert "over 1.0 s" in shown[0].time
    assert shown[0].instead == "" and shown[0].instead_fields == {}  # nothing takes less than a second


def test_a_round_over_its_budget_names_what_fits_it():
    start = Some(fields=lambda: {"model": "wan2.1-14b", "resolution": "720p", "num_frames": 81, "steps": 4})
    slow = {("wan2.1-14b", "480p", 49): 100.0}

    def seconds(fields):
        return Outlook("fits", slow.get((fields["model"], fields["resolution"], fields["num_frames"]), 900.0), 30)

    found = Some(name="deliver", budget_s=180, t2v=start, i2v=start)
    tile = round_tile(found, {"model": "wan2.1-1.3b", "kind": "t2v", **CAT}, seconds, EN)
    assert tile.over
    assert (
        tile.instead == "14B 480p · 30 steps · 49 frames · 100 s"
    )  # of the weights, not the 4 that the round asks for
    assert tile.instead_fields == {"model": "wan2.1-14b", "resolution": "480p", "num_frames": 49, "steps": 4}


def rounds_told(words, **seconds_by_steps_and_size):
    """The sum of the three rounds where the form holds 14B 720p; no seconds: that round does not run."""
    asked = []

    def seconds(fields):
        asked.append((fields["model"], fields["resolution"], fields["steps"]))
        took = seconds_by_steps_and_size.get(f"{fields['resolution']}_{fields['steps']}")
        return Outlook("no" if took is None else "fits", took or 1.0, fields["steps"])

    values = {"model": "wan2.1-14b", "resolution": "720p", "kind": "t2v", **CAT}
    return rounds_sum(tiers_rounds(), values, seconds, words), asked


def test_the_three_rounds_show_their_sum_against_ten_minutes():
    (told, over), asked = rounds_told(EN, **{"480p_2": 60.0, "480p_4": 100.0, "720p_4": 141.0})
    assert told == "The three rounds together: 5 min 1 s of 10 min" and not over
    scout, polish, deliver = asked  # polish is of the scout's clip, not of what the form holds; Between is none of them
    assert scout == ("wan2.1-1.3b", "480p", 2) and polish == ("wan2.1-1.3b", "480p", 4)
    assert deliver == ("wan2.1-14b", "720p", 4)


def test_a_sum_over_ten_minutes_or_without_a_round_says_so():
    (told, over), _ = rounds_told(ZH, **{"480p_2": 100.0, "480p_4": 200.0, "720p_4": 301.0})
    assert told == "三轮合计：10 分 1 秒，超出 10 分钟" and over
    (told, over), _ = rounds_told(EN, **{"480p_2": 60.0, "480p_4": 100.0})
    assert "does not run here" in told and "2 min 40 s of 10 min" in told and over


def test_the_demo_has_rounds_of_its_own_that_only_grow():
    found = [(entry.name, entry.t2v.fields()) for entry in tiers_rounds(demo=True)]
    assert [name for name, _ in found] == ["scout", "polish", "deliver"]
    assert [(fields["num_frames"], fields["steps"]) for _, fields in found] == [(9, 2), (9, 4), (17, 4)]


def offer_of(name, nbytes=14_500_000_000, free=8e9, suited=True, here=False, mark="fits"):
    spec = find_model("wan2.1-14b")
    changes = (Change(field="num_frames", from_value=81, to_value=49, lossy=True),) if mark == "changes" else ()
    return Offer(
        spec.variant(name), () if here else (("a.pth", "org/repo", 11_400_000_000),), nbytes, 14_534_000_000,
        Path("checkpoints"), free, "hub",
        Fit("no" if mark == "no" else "fits", 90.0, changes, 9 * GIB, 6 * GIB, suited),
    )  # fmt: skip


def test_a_missing_model_is_offered_with_size_room_and_folder():
    spec = find_model("wan2.1-14b")
    progress = DownloadProgress("a.pth", 1, 4, 1_200_000_000, 10_000_000_000, 44_000_000.0, 200.0, "hub")
    snapshot = Snapshot(
        models=((spec, ["a.pth"]),),
        offers={spec.name: (offer_of("480p-quant"),)},
        downloads={spec.name: Download(state="running", model=spec.name, progress=progress)},
    )
    shown = system.system(snapshot, None, EN).models[0]
    choice = shown.best
    assert "14.5 GB to checkpoints" in choice.offer and "8.0 GB free" in choice.offer
    assert choice.files == ("a.pth  11.4 GB  org/repo",)
    assert not choice.enough_room
    assert (shown.state, shown.share) == ("running", 0.12)
    assert shown.words == "1.2 GB of 10.0 GB, 44.0 MB/s, 3 min 20 s left, a.pth (2/4)"


def downloading(words=EN, **fields):
    """The card of a model whose download is like that."""
    spec = find_model("wan2.1-14b")
    found = Download(model=spec.name, **fields)
    snapshot = Snapshot(
        models=((spec, ["a.pth"]),),
        offers={spec.name: (offer_of("480p-quant", free=1e12),)},
        downloads={spec.name: found},
    )
    return system.draw(system.system(snapshot, None, words), False, words)


def test_a_download_can_be_paused_resumed_and_given_up_as_it_stands():
    progress = DownloadProgress(done_bytes=3 * 10**9, total_bytes=10**10)
    assert all(name not in downloading() for name in ("pause_download", "cancel_download", "<progress"))
    running, paused = (downloading(state=state, progress=progress) for state in ("running", "paused"))
    assert "pause_download" in running and "cancel_download" in running and "Resume" not in running
    assert "Resume" in paused and "cancel_download" in paused and "pause_download" not in paused
    assert "3.0 GB of 10.0 GB" in paused and "30%" in paused


def test_why_a_download_failed_is_said_in_the_language_of_the_page_with_what_to_fetch_by_hand():
    error = {"code": "download_dns", "field": "hub", "got": "gaierror", "expected": "https://hub/a -> /m/a"}
    english, chinese = (downloading(words, state="failed", error=error) for words in (EN, ZH))
    assert "The name hub cannot be resolved" in english and "Resume" in english
    assert "无法解析域名 hub" in chinese and "继续" in chinese
    assert "https://hub/a -&gt; /m/a" in english


def test_another_server_is_named_with_the_reason():
    progress = DownloadProgress(done_bytes=1, total_bytes=10, left_host="hub", left_code="download_tls", host="other")
    assert "hub was left (its certificate is not trusted): the rest comes from other" in downloading(
        state="running", progress=progress
    )


def test_a_name_from_a_server_or_a_mirror_is_text_on_the_page():
    progress = DownloadProgress(file="<img src=x>", done_bytes=1, total_bytes=10, left_s=1.0, host="<b>")
    assert "<img" not in downloading(state="running", progress=progress)
    assert "<script" not in models.draw_source('"><script>', EN)


def test_each_variant_has_its_size_its_mark_and_its_button():
    spec = find_model("wan2.1-14b")
    offers = (
        offer_of("480p-quant", here=True), offer_of("480p-plain", free=1e12, suited=False, mark="changes"),
        offer_of("720p-plain", free=1e12, suited=False, mark="no"),
    )  # fmt: skip
    snapshot = Snapshot(models=((spec, []),), offers={spec.name: offers})
    for words, changed in ((EN, "49 frames"), (ZH, "49 帧")):
        shown = system.system(snapshot, None, words)
        assert [(c.label, c.mark) for c in shown.models[0].choices] == [
            ("480p int8", "fits"), (f"480p {words('value.quant_linear_off')}", "changes"),
            (f"720p {words('value.quant_linear_off')}", "no"),
        ]  # fmt: skip
        page = system.draw(shown, False, words)
        assert 'data-arg="wan2.1-14b 480p-plain"' in page and 'data-arg="wan2.1-14b 480p-quant"' not in page
        assert changed in page and "9.0 GiB" in page and "3.0 GiB" in page and "14.5 GB" in page
        assert words("fit.suited") in page and words("fit.here") in page


def test_the_room_of_a_model_is_told_and_deleting_asks_with_names_first():
    spec = find_model("wan2.1-14b")
    stored = (
        StoredFile(Path("/m/net.pth"), 14 * 10**9),
        StoredFile(Path("/m/vae.pth"), 5 * 10**8, ("wan2.1-1.3b",), "shared", Path("/far/vae.pth")),
        StoredFile(Path("/comfy/text.pth"), 10**10, (), "outside"),
    )
    snapshot = Snapshot(models=((spec, []),), stored={spec.name: stored})
    page = system.draw(system.system(snapshot, None, EN), False, EN)
    assert "14.0 GB of its own" in page and "0.5 GB shared with Wan2.1-1.3B: vae.pth" in page
    assert "10.0 GB elsewhere, never deleted here: text.pth" in page and "moved: /far" in page
    assert 'data-ask="Delete 14.0 GB of Wan2.1-14B? net.pth.' in page and 'data-from="move-folder"' in page
    assert "delete_model" not in system.draw(system.system(Snapshot(models=((spec, []),)), None, EN), False, EN)


def test_lines_to_end_a_program_are_offered_for_ones_own_only_and_gently_first():
    mine = Some(
        kind="same_user",
        bytes=3 * GIB,
        pid=77,
        name="python",
        command="python x.py",
        age_s=21_600.0,
        idle=True,
        kill_line="kill 77",
    )
    shown = system.holder(mine, EN)
    assert shown.kill == ("kill 77", "kill -9 77")
    assert "6 h 0 min" in shown.note and "idle" in shown.note
    browser = Some(kind="browser", bytes=GIB, pid=78, name="chrome", command="", age_s=None, idle=None, kill_line="")
    assert system.holder(browser, EN).kill == ()
    assert "close its video tabs" in system.holder(browser, EN).note


def test_the_difference_between_two_rounds_prompts_is_shown():
    pieces = stage.prompt_diff("宇航员在月球表面跳跃", "宇航员在月球表面轻盈地弹跳")
    assert "".join(word.text for word in pieces if word.how != "gone") == "宇航员在月球表面轻盈地弹跳"
    assert "".join(word.text for word in pieces if word.how != "new") == "宇航员在月球表面跳跃"
    assert stage.prompt_diff("a cat", "a cat") == ()


def test_the_round_before_is_the_newest_older_clip_of_the_same_seed_and_idea_in_other_words():
    def made(seed, prompt, at):
        return replace(clip(seed=seed, prompt=prompt), created_s=at)

    polished, scouted = "an astronaut bounces lightly on the moon", "an astronaut bounces on the moon"
    now, same, seed = made(7, polished, 9.0), made(7, polished, 8.0), made(8, scouted, 7.0)
    other, older = made(7, "a red circle grows on a black background", 6.5), made(7, scouted, 6.0)
    assert stage.round_before(now, [now, same, seed, other, older]) is older
    assert stage.round_before(older, [now, same, seed, other, older]) is None


def test_a_refusal_shows_what_was_asked_and_what_would_fit():
    request = make_request({**CAT, "model": "wan2.1-14b", "resolution": "720p", "num_frames": 161})
    with pytest.raises(Refusal) as caught:
        plan_request(request, pretend(BARE, 6), Inventory(), policy="never")
    error = caught.value
    would = plan_request(request, pretend(BARE, 6), Inventory())
    shown = meter.problem(error.fields(), ZH, error.plan, would)
    assert shown.plan.band == "no" and shown.urgent and shown.plan.phases and shown.problem
    assert {"num_frames": would.request.num_frames}.items() <= shown.choices[0].fields.items()
    assert meter.button(error.plan, ZH).anyway  # and it can be run all the same


def test_the_question_before_a_run_lists_what_the_picture_loses_and_nothing_else():
    plan = plan_on(6, model="wan2.1-14b", resolution="720p", num_frames=161)
    asked = meter.diffs(plan.changes, EN, lossy_only=True)
    assert asked and all(row.lossy and row.field for row in asked)
    assert meter.diffs(plan_on(80, model="wan2.1-1.3b").changes, EN, lossy_only=True) == ()


@pytest.mark.parametrize("gib", [6, 12, 24, 80])
@pytest.mark.parametrize("words", [EN, ZH], ids=["en", "zh"])
def test_residency_is_one_line_for_every_choice_of_levers(gib, words):
    line = meter.residency(plan_on(gib, model="wan2.1-14b"), words)
    assert "VAE" in line and "{" not in line


@pytest.mark.parametrize("words", [EN, ZH])
def test_an_encoder_of_fewer_bits_is_not_said_to_change_no_pixel(words):
    plan = plan_on(24, model="wan2.1-1.3b")
    small = plan.model_copy(update={"levers": plan.levers.model_copy(update={"text_dtype": "nf4"})})
    told = words("residency.text_dtype", dtype=words("value.text_dtype_nf4"))
    assert meter.residency(small, words) == f"{meter.residency(plan, words)} {told}"


@pytest.mark.parametrize("words", [EN, ZH])
def test_a_rounded_exchange_is_not_said_to_change_no_pixel_and_is_told_of_the_clip(words):
    plan = plan_on(24, model="wan2.1-1.3b")
    rounded = plan.model_copy(update={"levers": plan.levers.model_copy(update={"cards": 2, "exchange": "int8"})})
    assert meter.residency(rounded, words) == f"{meter.residency(plan, words)} {words('residency.exchange_int8')}"
    made = clip()
    lossy = ("warn", words("clip.exchanged_int8"))
    assert lossy not in stage.card(made, words).badges
    ran = made.sidecar.ran.model_copy(update={"exchange": "int8"})
    made = replace(made, sidecar=made.sidecar.model_copy(update={"ran": ran}))
    assert lossy in stage.card(made, words).badges


LOOK = Some(
    width=900, height=1200, boundary=0.7, sampler="sde", key="advice_close_portrait",
    numbers={"edges": 0.043, "border_edges": 0.08, "entropy_bits": 3.214},
)  # fmt: skip


def picture_of(words, look=LOOK, model="wan2.2-a14b", **values):
    spec = find_model(model)
    fields = {**CAT, "model": model, "image": "cat.png"}
    return picture(look, make_request(fields), b"jpeg", {**form.defaults(spec), **values}, spec, words)


def test_a_picture_proposes_its_boundary_with_the_reason_until_the_form_holds_it():
    shown = picture_of(EN)
    assert shown.preview.startswith("data:image/jpeg;base64,")
    assert "4% edges" in shown.reason and "3.2 bits" in shown.reason
    assert json.loads(shown.take) == {"boundary": 0.7, "sampler": "sde"}
    held = picture_of(ZH, boundary=0.7, sampler="sde")
    assert held.take == "" and "已设为 Boundary 0.7" in held.reason


def test_a_picture_that_is_cropped_says_so():
    shown = picture_of(ZH, model="demo-i2v")
    assert shown.caption == "由 900x1200 裁剪为 128x128。"
    assert "保持原样" in picture_of(ZH, Some(**{**vars(LOOK), "width": 128, "height": 128}), model="demo-i2v").caption


def test_first_aid_names_the_largest_holders_and_the_newest_job_that_memory_stopped():
    rows = [
        Some(kind="same_user", bytes=size << 30, pid=size, name="python", command="python x.py", age_s=60.0,
             idle=False, kill_line=f"kill {size}")
        for size in (1, 9, 3)
    ]  # fmt: skip
    oom = JobError(code="oom", what="out of memory")
    snapshot = Snapshot(
        holders=(Some(uuid="GPU-1", rows=rows, listed=True),),
        jobs=(job(4), job(3, "parked", error=oom), job(2, "failed", error=JobError(code="nan_latents", what="x"))),
    )
    shown = first_aid.draw(snapshot, "", EN)
    assert re.findall(r"python \((\d+)\)", shown) == ["9", "3", "1"]
    assert re.findall(r'data-arg="(\d+)" data-act="retry_smaller"', shown) == ["3"]
    assert EN("run.aid_3_text") in shown and "nvidia-smi" not in shown
    assert "nvidia-smi" in first_aid.draw(Snapshot(), "", EN)


@pytest.mark.parametrize("words", [EN, ZH])
def test_where_the_driver_lists_none_ones_own_programs_stand_beside_the_line_for_the_host(words):
    row = Some(kind="same_user", bytes=None, pid=41, name="python", command="python x.py", age_s=60.0, idle=None,
               kill_line="kill 41")  # fmt: skip
    snapshot = Snapshot(holders=(Some(uuid="GPU-1", rows=[row], listed=False),))
    tab = system.draw(system.system(snapshot, None, words), False, words)
    for shown in (tab, first_aid.draw(snapshot, "", words)):
        assert "python (41)" in shown and 'data-arg="kill 41"' in shown and "?" in shown
        assert words("system.holders_own") in shown and "nvidia-smi" in shown
        assert words("system.holders_unknown") not in shown


@pytest.mark.parametrize(("runs", "key", "numbers", "said"), [
    ("reference", "no_gpu", {"device": "cpu"}, "there is no GPU"), ("triton", "unchecked", {}, "first use"),
    ("triton", "equal", {}, "equal to its reference"),
    ("reference", "old", {"arch": "sm_75", "oldest": "sm_80"}, "sm_75 is older"),
    ("reference", "differs", {"got": "off by 0.3"}, "failed the check"),
    ("reference", "slower", {"got": "slower than x: 2 ms against 1 ms"}, "2 ms against 1 ms"),
    ("triton", "wish", {"wish": "triton"}, "TURBODIFF_KERNELS=triton"),
])  # fmt: skip
def test_which_kernels_run_is_said_with_the_reason(runs, key, numbers, said):
    report = doctor_report(kernel_reasons=[("sla", runs, key, numbers)])
    assert said in system.system(Snapshot(), report, EN).kernels[0][1]
    assert re.search("[\u4e00-\u9fff]", system.system(Snapshot(), report, ZH).kernels[0][1])


def doctor_report(machine=BARE, versions=(), **more):
    facts = {"found": {}, "warnings": [], "pip_line": "", "kernels": [], "notes": [], "optional": {"flash-attn"}}
    return DoctorReport(**{**facts, "machine": machine, "versions": dict(versions), "kernel_reasons": [], **more})


def test_versions_stay_as_they_are_and_that_there_is_none_is_worded():
    versions = {"torch": "2.13", "triton": "", "flash-attn": "", "GPU": "pretended card of 6 GiB (6.4 GB)"}
    shown = system.system(Snapshot(), doctor_report(pretend(BARE, 6), versions), ZH)
    assert [value for _, value in shown.versions] == [
        "2.13",
        ZH("fact.none"),
        ZH("fact.not_needed"),
        "假想的 6 GiB 显卡",
    ]


def test_the_self_test_is_shown_line_by_line():
    checks = (Check(name="install", ok=True, detail="torch 2.13"), Check(name="clip", ok=False, detail="no worker"))
    shown = system.system(Snapshot(selftest=SelfTest(running=True, checks=checks)), None, ZH)
    assert [(name, good) for name, good, _ in shown.checks] == [("安装", True), ("视频", False)]
    assert shown.checking


def test_one_button_fetches_what_this_card_runs():
    spec = find_model("wan2.1-14b")
    offers = {spec.name: (offer_of("480p-quant"), offer_of("720p-quant", suited=False))}
    tier = Some(t2v=Some(model=spec.name), i2v=Some(model="wan2.2-a14b"))
    best = system.system(Snapshot(models=((spec, ["a.pth"]),), offers=offers, tier=tier), None, EN).best
    assert (best.id, best.best.name) == (spec.name, "480p-quant")
    assert system.system(Snapshot(models=((spec, []),), offers=offers, tier=tier), None, EN).best is None


def test_files_that_no_model_uses_are_listed_with_the_reason_in_both_languages():
    one = PassedOver(path="/m/a.gguf", code="gguf_missing", what="x", got="y", expected="pip install 'turbodiff[gguf]'")
    for words in (EN, ZH):
        shown = system.system(Snapshot(passed_over=(one,)), None, words)
        assert shown.passed_over[0][0] == "/m/a.gguf" and "turbodiff[gguf]" in shown.passed_over[0][1]
        assert "passed-over" in system.draw(shown, False, words)
    assert re.search("[\u4e00-\u9fff]", shown.passed_over[0][1])


def test_a_button_has_room_for_every_models_name_and_tells_them_apart():
    names = [meter.short_model(spec.name) for spec in all_models()]
    assert len(set(names)) == len(names) and {"1.3B", "14B", "A14B", "T2V-A14B", "I2V-14B"} <= set(names)


@pytest.mark.parametrize("words", [EN, Words("zh")], ids=["en", "zh"])
def test_a_models_card_names_the_networks_that_are_here_with_their_own_schedule_and_seconds(words):
    spec = find_model("wan2.1-14b")
    on_disk = installed(card(80), disk(spec.name))
    shown = models.model_card(spec, (), Snapshot(installed=on_disk), words)
    drawn = models.draw_model(shown, False, words)
    one = on_disk[spec.name]
    assert one.files[0].path in shown.takes[0] and words.fit(one.fit) in shown.takes[0]
    assert all(line in drawn for line in shown.takes) and words.say(one.reasons[0]) in shown.takes
