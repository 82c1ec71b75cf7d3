"""A story of two cards: both busy, both named, one taken out in the middle; one paused by its switch, a clip for it."""

import json
import os
from pathlib import Path

import hollow
import pytest
from conftest import HERE, ROOT, SUPERVISE, start
from stories import begin, choose, tab, wait_done, write_prompt

from turbodiff.spec.request import make_request

pytestmark = pytest.mark.browser

# the supervisor on cards that a file lists, in place of a driver
CARDS = """
import json
from turbodiff.gpu.probe import CardSample, Sample
def sample():
    listed, gib = json.loads(Path(CARDS).read_text()), 1 << 30
    cards = [
        CardSample(name="NVIDIA GeForce " + name, uuid="-".join(["GPU", name[-4:] * 2, *more]), nvml_index=n,
                   capability=(8, 9), total_bytes=size * gib, free_bytes=(size - 1) * gib, used_bytes=gib)
        for n, (name, size, *more) in enumerate(listed)
    ]
    return Sample(state="ok", error="", driver="580.1", cards=tuple(cards), taken_s=id(cards) / 1e6)
"""
TWO = [["RTX 4090", 24], ["RTX 3060", 12]]
ALIKE = [["H100 80GB HBM3", 80], ["H100 80GB HBM3", 80, "b"]]
# a torch that uses cards, and host memory enough for two of them, whatever this machine has free
BOX_OF_CARDS = """
import importlib.metadata
from turbodiff.gpu import host_memory
version = importlib.metadata.version
importlib.metadata.version = lambda name: "2.13.0+cu130" if name == "torch" else version(name)
host_memory.host_memory = lambda own_pids=(), root=None: host_memory.HostMemory(64 << 30, 48 << 30)
"""
SLOW = json.dumps({"attempts": [{"steps": 900, "dt_s": 0.2}, {"steps": 2, "dt_s": 0.1}]})


def app_on(cards, folder, **environment):
    """An app on these cards, and the file that lists them."""
    listed = folder / "cards.json"
    listed.write_text(json.dumps(cards))
    before, after = SUPERVISE.split("state, outputs, worker", 1)
    told = CARDS.replace("Path(CARDS)", f"Path({str(listed)!r})")
    supervise = f"{before}{told}state, outputs, worker{after}".replace("working=state", "working=state, sample=sample")
    app = start(folder, supervise=supervise, **environment)
    app.listed = listed
    return app


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    app = app_on(TWO, tmp_path_factory.mktemp("cards"))
    yield app
    app.stop()


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Two cards of one kind in a box of its own, and the weights of 14B."""
    folder = tmp_path_factory.mktemp("alike")
    (folder / "sitecustomize.py").write_text(BOX_OF_CARDS)
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    weights = hollow.models(folder / "models", "wan2.1-14b")
    app = app_on(ALIKE, folder, PYTHONPATH=paths, TURBODIFF_MODELS=str(weights))
    yield app
    app.stop()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, cards):
    """An app without cards of its own that works with a cluster of three machines, and the file that lists them."""
    folder = tmp_path_factory.mktemp("nodes")
    listed = folder / "nodes.json"
    gpus = [
        {"index": n, "name": "NVIDIA GeForce RTX 4090", "uuid": f"GPU-far{n}", "total_bytes": 24 << 30,
         "free_bytes": 23 << 30, "used_bytes": 1 << 30, "capability": [8, 9]}
        for n in range(2)
    ]  # fmt: skip
    three = [
        {"node": "n1", "host": "studio-2", "cards": 2, "machine": {"gpus": gpus}},
        {"node": "n2", "host": "attic", "cards": 1, "machine": {"gpus": [{**gpus[0], "uuid": "GPU-attic"}]}},
        {"node": "n3", "host": "old-box", "cards": 1, "program": "0.0.1, protocol 1"},
    ]
    listed.write_text(json.dumps(three))
    bridge = HERE.parent / "cluster" / "scripted_bridge.py"
    before, after = SUPERVISE.split("state, outputs, worker", 1)
    told = (
        "from functools import partial\nfrom turbodiff.cluster import remote\n"
        f"remote.BRIDGE = (sys.executable, {str(bridge)!r})\n"
        "cluster = partial(remote.Cluster, address='10.0.0.1:6379', most_cards=9)\n"
    )
    far = "working=state, devices=(), sample=lambda: None, cluster=cluster"
    supervise = f"{before}{told}state, outputs, worker{after}".replace("working=state", far)
    app = start(folder, supervise=supervise, NODES=str(listed))
    app.listed, app.three = listed, three
    yield app
    app.stop()


def look(page, name):
    """Pictures for a person who asks for them: TURBODIFF_LOOK=folder."""
    if folder := os.environ.get("TURBODIFF_LOOK"):
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width in (1440, 390):
                page.set_viewport_size({"width": width, "height": 1000})
                page.wait_for_timeout(500)
                page.screenshot(path=str(Path(folder) / f"{name}_{scheme}_{width}.png"), full_page=True)
        page.set_viewport_size({"width": 1440, "height": 1000})
        page.emulate_media(color_scheme="light")


def test_two_cards_are_both_busy_and_named_and_the_job_of_one_that_is_taken_out_moves(cards, chromium):
    app = cards
    with tab(chromium, app, viewport={"width": 1440, "height": 1000}) as page, tab(chromium, app, "/zh") as zh:
        write_prompt(page, SLOW)
        jobs = [begin(page, app) for _ in range(2)]
        app.wait(lambda: [app.store.job(job).state for job in jobs] == ["running"] * 2)
        names = {app.store.job(job).slot: job for job in jobs}
        for slot, (name, _) in enumerate(TWO):
            page.wait_for_selector(f"#queue-list [data-job='{names[slot]}'] .starts:has-text('on {name}')")
        write_prompt(page, json.dumps({"steps": 2}))
        waits = begin(page, app)
        page.wait_for_selector(f"#queue-list [data-job='{waits}'] .starts:has-text('starts in about')")
        page.wait_for_selector("#verdict:has-text('starts in about')", timeout=30_000)
        assert "RTX" in page.inner_text("#go")
        zh.wait_for_selector(f"#queue-list [data-job='{waits}'] .starts:has-text('后在 RTX')")
        look(page, "busy_en")
        look(zh, "busy_zh")

        lost = names[1]
        app.listed.write_text(json.dumps(TWO[:1]))
        app.wait(lambda: app.store.job(lost).state == "queued")
        app.store.cancel(names[0])
        assert wait_done(app, lost).strikes == {}
        assert wait_done(app, waits).attempt == 1
        app.listed.write_text(json.dumps(TWO))
        app.wait(lambda: len(app.store.fact("fleet")["cards"]) == 2)


def test_a_clip_for_a_paused_card_says_so_and_any_card_lets_it_go(cards, chromium):
    app = cards
    with tab(chromium, app, viewport={"width": 1440, "height": 1000}) as page:
        page.click("button[role=tab]:has-text('System')")
        page.click("[data-card='GPU-30603060'] [data-arg$=' paused']")
        page.wait_for_selector("[data-card='GPU-30603060'] [data-arg$=' paused'][aria-pressed=true]")
        look(page, "system_en")
        with tab(chromium, app, "/zh", viewport={"width": 1440, "height": 1000}) as zh:
            zh.click("button[role=tab]:has-text('系统')")
            zh.wait_for_selector("[data-card='GPU-30603060']:has-text('暂停')")
            look(zh, "system_zh")
        page.click("button[role=tab]:has-text('Create')")
        write_prompt(page, json.dumps({"steps": 1}))
        page.click("#for-card button:has-text('RTX 3060')")
        page.wait_for_selector("#for-card button[aria-pressed=true]:has-text('RTX 3060')")
        mine = begin(page, app)
        assert app.store.job(mine).request.gpu == "GPU-30603060"
        page.wait_for_selector(f"#queue-list [data-job='{mine}']:has-text('RTX 3060, which is paused')")
        look(page, "paused_en")
        page.click(f"#queue-list [data-job='{mine}'] [data-act=any_card]")
        assert app.store.job(wait_done(app, mine).id).slot == 0


def test_one_clip_on_two_cards_says_what_each_needs_and_what_two_clips_would_gain(alike, chromium):
    app = alike
    app.wait(lambda: len(app.store.fact("fleet")["cards"]) == 2)
    with tab(chromium, app, viewport={"width": 1440, "height": 1000}) as page, tab(chromium, app, "/zh") as zh:
        for one in (page, zh):
            write_prompt(one, json.dumps({"steps": 20_000, "dt_s": 0.1}))
            choose(one, "Wan2.1-14B")
            one.click("#resolution label:has(input[value='720p'])")
            one.click("#for-clip [data-arg*='2']")
            one.wait_for_selector("#for-clip [aria-pressed=true][data-arg*='2']")
            one.wait_for_selector("#each-card :text('cuda:1')")
        assert "clips meanwhile" in page.inner_text("#for-clip")
        page.wait_for_selector("#verdict:has-text('H100 80GB HBM3 #1 + H100 80GB HBM3 #2')")
        look(page, "together_en")
        look(zh, "together_zh")
        both = begin(page, app)
        app.wait(lambda: app.store.job(both).state == "running")
        page.click("#for-clip [data-arg*='auto']")
        choose(page, "demo")
        page.wait_for_selector("#for-clip", state="detached")  # the demo gains nothing
        write_prompt(page, json.dumps({"steps": 1}))
        next_one = begin(page, app)
        page.wait_for_selector(f"#queue-list [data-job='{next_one}'] .starts:has-text('starts in about')")
        page.wait_for_selector(
            f"#queue-list [data-job='{both}'] .starts:has-text('H100 80GB HBM3 #1 + H100 80GB HBM3 #2')"
        )
        assert app.store.job(next_one).state == "queued"
        look(page, "together_busy_en")
        app.store.stop_and_decode(both)
        assert wait_done(app, both).plan.levers.cards == 2
        assert wait_done(app, next_one).attempt == 1


def test_the_cards_of_other_machines_are_shown_with_their_jobs_and_one_that_is_silent_as_such(nodes, chromium):
    app = nodes
    with tab(chromium, app, viewport={"width": 1440, "height": 1000}) as page, tab(chromium, app, "/zh") as zh:
        write_prompt(page, SLOW)
        jobs = [begin(page, app)]
        jobs += [app.store.submit(make_request({"prompt": SLOW, "model": "demo"})) for _ in range(2)]
        app.wait(lambda: [app.store.job(job).state for job in jobs] == ["running"] * 3)
        page.wait_for_selector(f"#queue-list [data-job='{jobs[0]}'] .starts:has-text('on RTX 4090')")
        app.listed.write_text(json.dumps([app.three[0], {**app.three[1], "state": "unreachable"}, app.three[2]]))
        page.click("button[role=tab]:has-text('System')")
        zh.click("button[role=tab]:has-text('系统')")
        page.wait_for_selector("[data-node='attic']:has-text('unreachable')")
        for job in jobs:
            page.wait_for_selector(f"#nodes .td-of:has-text('job {job}')")
            zh.wait_for_selector(f"#nodes .td-of:has-text('任务 {job}')")
        page.wait_for_selector("[data-node='old-box']:has-text('It runs turbodiff 0.0.1')")
        zh.wait_for_selector("[data-node='attic']:has-text('失联')")
        assert page.locator("#card-switches [data-card='GPU-far1']:has-text('RTX 4090 #2 (studio-2)')").count() == 1
        look(page, "nodes_en")
        look(zh, "nodes_zh")

        page.click("[data-card='GPU-far1'] [data-arg$=' paused']")  # a card of another machine obeys its switch, too
        page.wait_for_selector("[data-card='GPU-far1'] [data-arg$=' paused'][aria-pressed=true]")
        attic = next(job for job in jobs if app.store.job(job).slot == far_slot(app, "GPU-attic"))
        app.listed.write_text(json.dumps([app.three[0], app.three[2]]))
        app.wait(lambda: app.store.job(attic).strikes == {"node": 1})
        page.wait_for_selector("[data-node='attic']", state="detached")
        for job in set(jobs) - {attic}:
            app.store.cancel(job)
        assert wait_done(app, attic).attempt == 2


def far_slot(app, uuid):
    return next(card["slot"] for card in app.store.fact("fleet")["cards"] if card["uuid"] == uuid)
