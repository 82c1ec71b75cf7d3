"""Stories with Wan models on a pretended card of 6 GiB: weights that are all header, a worker that reads none."""

import json

import hollow
import pytest
from stories import begin, choose, newest, submit, tab, wait_done, write_prompt

from webui.form import PINS

pytestmark = pytest.mark.browser

PROMPT = "an astronaut bounces across the moon, dust flies up, the earth turns slowly behind, wide shot, dramatic light"


@pytest.fixture(scope="module")
def card(start_app, tmp_path_factory):
    """The app on a card of 6 GiB with every Wan model on its disk."""
    folder = tmp_path_factory.mktemp("card")
    weights = hollow.models(folder / "models", "wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b")
    made = start_app(folder, TURBODIFF_PRETEND_VRAM="6", TURBODIFF_MODELS=str(weights))
    yield made
    made.stop()


def changes(page, label):
    """Wait until the button says something else."""
    page.wait_for_function(f"document.querySelector('#go').innerText !== {json.dumps(label)}")
    page.wait_for_timeout(500)


def test_a_lock_holds_what_the_planner_would_lower(card, chromium):
    # the first story: what later ones run teaches the plan, and the scripted worker needs almost nothing
    with tab(chromium, card) as page:
        write_prompt(page, PROMPT)
        choose(page, "Wan2.1-14B")
        page.click("#resolution label:has(input[value='720p'])")
        page.wait_for_function("document.querySelector('#go').innerText.includes('720p 65')")
        before = page.inner_text("#go")
        page.click("#advanced > button")
        page.click(f"#pins label >> nth={PINS.index('num_frames')}")
        changes(page, before)
        assert "81" in page.inner_text("#go")


def test_what_does_not_fit_becomes_an_alternative_that_runs_in_three_clicks(card, chromium):
    with tab(chromium, card) as page:
        write_prompt(page, PROMPT)
        choose(page, "Wan2.1-14B")
        page.click("#resolution label:has(input[value='720p'])")
        page.wait_for_selector("#changes")  # said before anything runs, with what changes
        before = page.inner_text("#go")
        first = page.locator("#alternatives button").first
        fields = json.loads(first.get_attribute("data-arg"))
        first.click()
        changes(page, before)
        assert page.locator("#changes").count() == 0  # an alternative runs as it is
        job = submit(page, card)
        assert {name: getattr(job.request, name) for name in fields if hasattr(job.request, name)} == fields
        page.wait_for_selector("#player video")


def test_run_anyway_runs_exactly_what_was_asked(card, chromium):
    with tab(chromium, card) as page:
        write_prompt(page, PROMPT)
        choose(page, "Wan2.1-14B")
        page.click("#resolution label:has(input[value='720p'])")
        page.wait_for_selector("#anyway", state="visible")
        before = newest(card).id if card.store.jobs(1) else 0
        page.click("#anyway")
        job = card.wait(lambda: card.store.jobs(1) and newest(card).id > before and newest(card))
        assert (job.request.model, job.request.resolution, job.request.num_frames) == (
            "wan2.1-14b",
            "720p",
            81,
        )
        wait_done(card, job.id)


def test_three_rounds_from_an_idea_to_a_delivery(card, chromium):
    with tab(chromium, card, "/zh/") as page:
        write_prompt(page, PROMPT)
        choose(page, "Wan2.1-1.3B")
        page.fill("#seed textarea, #seed input", "42")
        before = page.inner_text("#go")
        page.click("#rounds [data-arg^=scout]")
        page.wait_for_timeout(1500)
        scout = submit(page, card)
        assert (scout.request.model, scout.request.steps, scout.request.seed) == ("wan2.1-1.3b", 2, 42)
        page.wait_for_selector("#card :text('能不能看到核心动作')")
        before = page.inner_text("#go")
        page.click("#card [data-form=round]")
        page.wait_for_timeout(1500)
        write_prompt(page, PROMPT.replace("wide shot", "close shot"))
        polish = submit(page, card)
        assert (polish.request.steps, polish.request.seed, polish.request.model) == (4, 42, "wan2.1-1.3b")
        page.wait_for_selector("#card .td-words ins")  # what changed in the prompt
        before = page.inner_text("#go")
        page.click("#rounds [data-arg^=deliver]")
        changes(page, before)
        deliver = begin(page, card)
        wait_done(card, deliver)
        plan = card.store.job(deliver).plan
        asked = {change.field: change.from_value for change in plan.changes}
        wanted = {**card.store.job(deliver).request.model_dump(), **asked}
        assert (wanted["model"], wanted["resolution"], wanted["seed"]) == ("wan2.1-14b", "720p", 42)


def test_a_failed_wan_clip_runs_smaller_after_one_click(card, chromium):
    oom = {"error": {"code": "oom", "what": "out of memory", "exit_code": 1}}
    with tab(chromium, card, "/zh/") as page:
        choose(page, "Wan2.1-14B")
        write_prompt(page, json.dumps({"attempts": [oom, oom, oom, {"steps": 1}]}))
        failed = submit(page, card, "parked")
        page.click("#progress .failed [data-act=retry_smaller]")
        small = card.wait(lambda: (job := card.store.job(failed.id)).state != "parked" and job)
        assert (small.request.model, small.request.resolution, small.request.num_frames) == (
            "wan2.1-1.3b", "480p", 49
        )  # fmt: skip
