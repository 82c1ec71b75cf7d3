"""What follows the model and the form: hints, chips, the meter of another card, what a change of model sends."""

import re
import sys

import gradio as gr
import pytest
import test_page_events
from PIL import Image

from turbodiff.diagnostics.background_tasks import Check, SelfTest
from turbodiff.spec.models import find_model
from webui import form
from webui.api import Endpoints
from webui.events import OPENED
from webui.page import INITIAL_UI_STATE
from webui.panels import create, form_help, status_bar, system
from webui.panels.form_help import prompt_help
from webui.snapshot import Snapshot
from webui.wording import Words

EN, ZH = Words("en"), Words("zh")
events = test_page_events.events  # the fixture
DEMO = {"prompt": "a red circle moves right", "kind": "t2v"}


def demo_row(events, **changed):
    return test_page_events.row(events, **{**form.defaults(find_model("demo")), **DEMO, **changed})


@pytest.mark.parametrize("words", [EN, ZH])
def test_the_empty_prompt_invites_to_what_the_model_can_show(words):
    from turbodiff.prompt.demo_words import unknown_words

    assert unknown_words(create.prompt_hint(find_model("demo"), words)) == ()
    assert create.prompt_hint(find_model("wan2.1-14b"), words) == words("create.prompt_hint")


def test_a_change_of_model_brings_its_hint_and_its_meter_in_one_step(events):
    answer = events.new_model(*demo_row(events, model="wan2.1-1.3b"))
    assert len(answer) == len(events.fields) + len(events.boxes) + 2 + len(events.estimated)
    assert answer[events.names.index("prompt")]["placeholder"] == EN("create.prompt_hint")
    assert "value" not in answer[events.names.index("prompt")]  # a person may be writing on
    before, undo, meter = answer[len(events.fields) + len(events.boxes) :][:3]
    assert before["model"] == "wan2.1-1.3b" and 'data-form="undo"' in undo
    assert "data-band" in meter and "no resolution" not in meter


def test_a_form_between_two_models_is_no_reason_for_an_error(events):
    skipped = events.estimate(OPENED, *demo_row(events, model="wan2.1-14b"))
    assert skipped == [gr.skip()] * (len(events.estimated) + 1)
    assert "data-band" in events.estimate(OPENED, *demo_row(events))[0]


def test_words_that_the_demo_does_not_know_get_a_chip():
    prompt = "a red circle moves right on a white background"
    (chip,) = prompt_help(prompt, 10, find_model("demo"), EN).chips
    assert (chip.key, chip.sentence) == ("unknown", "The demo does not know: white background")
    assert all(chip.key != "unknown" for chip in prompt_help(prompt, 10, find_model("wan2.1-14b"), EN).chips)


def test_another_card_is_for_the_meter_only(events):
    own, other = (events.estimate(OPENED, *test_page_events.row(events, card=card)) for card in ("", "80"))
    assert 'id="pretended"' not in own[0] and 'id="pretended"' in other[0]
    assert 'data-band="fits"' in other[0] and "80 GiB" in other[0]
    label = events.estimated.index(events.page.create.go)
    assert own[label] == other[label]  # the button says what will run here
    assert "card" not in form.request_fields({"card": "80", **DEMO})
    assert other[-1]["card"] == ""  # a reload is this machine again


@pytest.fixture
def networks(events, tmp_path, monkeypatch):
    """A search root with a file of each kind of network behind the decode."""
    for folder, name in (("interpolators", "flownet.pkl"), ("upscalers", "x4.pth")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"x")
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path))
    events.reader.inventory.now()
    yield
    monkeypatch.undo()
    events.reader.inventory.now()


def hides_interpolator(events, **changed):
    return "#interpolator{display:none" in events.estimate(OPENED, *demo_row(events, **changed))[0]


def test_a_network_for_frames_in_between_is_offered_where_one_is_named(events):
    assert hides_interpolator(events)
    assert not hides_interpolator(events, interpolator="gone.pkl", smooth_fps=30)  # else nobody could take it out


def test_a_network_for_frames_in_between_is_offered_where_one_is_here(events, networks):
    assert not hides_interpolator(events)


@pytest.mark.parametrize(
    ("package", "extra", "asked"),
    [
        ("ccvfi", "interpolate", {"interpolator": "flownet.pkl", "smooth_fps": 30}),
        ("spandrel", "upscale", {"upscaler": "x4.pth", "upscale": 2}),
    ],
)
def test_a_network_whose_package_is_missing_is_refused_before_the_queue_with_what_to_install(
    events, networks, monkeypatch, package, extra, asked
):
    monkeypatch.setitem(sys.modules, package, None)
    events.reader.inventory.now()
    install = f"pip install &#x27;turbodiff[{extra}]&#x27;"
    assert install in events.estimate(OPENED, *demo_row(events, **asked))[0]  # the meter, while the form is filled in
    assert install in events.go({**INITIAL_UI_STATE}, *demo_row(events, **asked))[-1]
    told = Endpoints(events.reader).submit({"prompt": "a red circle", "model": "demo", **asked})["error"]
    assert (told["code"], told["field"]) == (f"{package}_missing", next(iter(asked)))
    assert told["try_instead"] == f"pip install 'turbodiff[{extra}]'"
    assert events.reader.studio.jobs() == []


def test_the_meter_follows_the_verdict_when_the_plan_is_another_and_stays_while_it_is_not(events):
    row = demo_row(events)
    drawn, verdict, *_ = events.estimate(OPENED, *row)
    _, older, *_ = events.estimate(OPENED, *demo_row(events, num_frames=9))
    assert events.begins(verdict, *row)[2] == gr.skip()  # what is folded out stays so while a person reads
    assert re.findall(r"about [^<]*", events.begins(older, *row)[2]) == re.findall(r"about [^<]*", drawn)


def test_the_system_tab_offers_usual_cards():
    drawn = system.draw(system.system(Snapshot(), None, EN), False, EN)
    assert re.findall(r'data-form="card"', drawn) == ['data-form="card"'] * len(form.CARDS)


def test_a_reload_keeps_a_picture_that_was_uploaded_here_and_no_other(events, tmp_path):
    uploads = events.reader.studio.state / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    for path in (uploads / "mine.png", tmp_path / "other.png"):
        Image.new("RGB", (64, 64), "navy").save(path)
    held = dict(
        zip(events.names, test_page_events.row(events, **form.defaults(find_model("wan2.2-a14b"))), strict=True)
    )
    place = events.names.index("image")
    kept = events.restore({**held, "image": str(uploads / "mine.png")})[place]
    assert kept["value"] == str(uploads / "mine.png")
    for gone in (str(tmp_path / "other.png"), str(uploads / "gone.png"), "a\0b", ""):
        assert not events.restore({**held, "image": gone})[place].get("value")


def test_a_picture_that_cannot_be_read_makes_no_job(events):
    uploads = events.reader.studio.state / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    (uploads / "web.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    spec, before = find_model("demo-i2v"), events.reader.studio.jobs()
    asked = {**form.defaults(spec), **DEMO, "kind": "i2v", "model": spec.name, "image": str(uploads / "web.png")}
    told = events.go({**INITIAL_UI_STATE}, *test_page_events.row(events, **asked))[-1]
    shown = events.look(*test_page_events.row(events, **asked))
    assert "warn" in told and re.sub("<[^>]*>", "", shown) in re.sub("<[^>]*>", "", told)
    assert events.reader.studio.jobs() == before and not list((events.reader.studio.state).glob("pictures/*"))


def test_a_folder_for_loras_is_named_where_there_is_none():
    drawn = form_help.draw_loras([], "/models/loras", False, EN)
    assert "LoRA" in drawn and "/models/loras" in drawn


def test_the_page_has_one_heading_and_names_that_are_the_labels():
    bar = status_bar.draw(status_bar.status_bar(Snapshot(), ZH), ZH)
    assert bar.count("<h1") == 1
    for button in re.findall(r"<button[^>]*>[^<]*</button>", bar):  # those whose label is text
        assert "aria-label" not in button
    assert 'class="td-btn skip"' in status_bar.draw_help(EN)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (("plan", True, {"peak": "0.6 GiB", "budget": "20.0 GiB"}), "需要 0.6 GiB，可用 20.0 GiB"),
        (("gpu", True, {"cards": "", "reason": "gpu_lost", "got": "x"}), "显卡已掉线"),
        (("clip", True, {"frames": "17", "seconds": "3.1", "sha256": "ab"}), "17 帧，用时 3.1 秒"),
        (("clip", False, {"code": "disk_full", "what": "the disk is full"}), "磁盘已满"),
        (("install", False, {"code": "torch_silent", "what": "torch does not start"}), "torch 无法启动"),
        (("clip", True, {}), "in English"),
    ],
    ids=lambda part: str(part)[:20],
)
def test_the_self_test_speaks_the_language_of_the_page(check, said):
    name, ok, facts = check
    made = Check(name=name, ok=ok, detail="in English", facts=facts)
    drawn = system.draw(system.system(Snapshot(selftest=SelfTest(False, (made,))), None, ZH), False, ZH)
    assert said in drawn
