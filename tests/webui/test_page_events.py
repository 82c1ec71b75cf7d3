"""Handlers of the page without a browser: what they answer, in the order of the parts that get it."""

import json
import re

import gradio as gr
import pytest
from gradio.data_classes import ImageData

from turbodiff.diagnostics.logs import RUN_LOG, STARTUP_LOG, LogFile
from turbodiff.plan.hardware import Machine, pretend
from turbodiff.spec.cached import CachedValue
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GIB
from turbodiff.studio import Studio
from webui import app, form
from webui.events import OPENED, PageEvents
from webui.markup import text
from webui.page import INITIAL_UI_STATE, layout
from webui.render import PANELS
from webui.request_guard import BadRequest
from webui.snapshot import StudioReader
from webui.wording import Words

UI_STATE = dict(INITIAL_UI_STATE)


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """The English page over a studio that knows of a card of 6 GiB and 64 GiB of RAM, whatever is here."""
    folder = tmp_path_factory.mktemp("wire")
    reader = StudioReader(Studio(folder / "state", folder / "outputs"))
    machine = pretend(Machine(ram_total_bytes=64 * GIB, ram_available_bytes=48 * GIB, cpu_count=8), 6)
    reader._machine = CachedValue(lambda: machine, 3600.0)
    words = Words("en")
    with gr.Blocks(analytics_enabled=False):
        made = PageEvents(layout(reader, words, find_model("demo")), reader, words)
    yield made
    reader.studio.close()


def row(events, **changed):
    """What the form sends: a large clip that does not fit this card."""
    big = {**form.defaults(find_model("wan2.1-14b")), "resolution": "720p", "num_frames": 161}
    held = {**big, "prompt": "a cat chases a butterfly", "pinned": [], **changed}
    return [
        held.get(name, "" if name in ("seed", "size", "loras", "negative_prompt") else None) for name in events.names
    ]


def test_ask_shows_what_would_change_and_waits_for_a_second_click(events):
    events.reader.studio.set_policy("ask")
    *_, ui_state, note = events.go(UI_STATE, *row(events))
    assert 'id="ask"' in note and "num_frames" in note and 'data-arg="anyway"' in note
    assert ui_state["agreed"] and events.reader.studio.jobs() == []
    *_, note = events.go(ui_state, *row(events))
    assert "Files of this model are missing" in note  # agreed: it went on to the queue
    *_, note = events.go(ui_state, *row(events, num_frames=117))
    assert 'id="ask"' in note  # another form is another question


def test_auto_and_run_anyway_do_not_ask(events):
    events.reader.studio.set_policy("ask")
    assert "Files of this model" in events.go_anyway(UI_STATE, *row(events))[-1]
    events.reader.studio.set_policy("auto")
    assert "Files of this model" in events.go(UI_STATE, *row(events))[-1]


def test_never_refuses_and_names_what_would_fit(events):
    events.reader.studio.set_policy("never")
    meter, _, label, anyway, *_ = events.estimate(OPENED, *row(events))
    assert 'data-band="no"' in meter and 'id="alternatives"' in meter
    assert label["value"] == "Generate · 14B 720p 161 frames" and anyway["visible"]
    events.reader.studio.set_policy("auto")
    meter, _, label, *_ = events.estimate(OPENED, *row(events))
    assert 'id="changes"' in meter and 'data-form="pin"' in meter
    assert "161" not in label["value"]


def test_a_form_that_holds_nonsense_is_no_form_of_ours(events):
    with pytest.raises(BadRequest):
        events.estimate(OPENED, *row(events, steps="many"))
    with pytest.raises(BadRequest):
        events.estimate(OPENED, *row(events, pinned=["everything"]))


@pytest.mark.parametrize(
    "draft", [None, 1, "x", [], {"steps": []}, {"model": "gone"}, {"prompt": "kept", "fps": "x"}], ids=repr
)
def test_a_draft_of_any_shape_gives_a_form_that_works(events, draft):
    answer = events.restore(draft)
    assert len(answer) == len(events.fields) + len(events.boxes) + len(events.estimated)
    if isinstance(draft, dict) and "prompt" in draft:
        assert answer[events.names.index("prompt")]["value"] == "kept"


REFUSED = {
    "sampler": "ddim", "weights_are": "gguf", "attention": "xformers", "text_dtype": "int2", "quant_linear": "yes",
    "encoder": "av1", "exchange": "fp4", "fit": "zoom", "smooth_fps": 7, "upscale": 3, "steps": 1000, "topk": 9,
    "boundary": 5, "count": -3,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_field_can_hold_comes_from_no_draft_and_no_preset(events, name):
    # Gradio shows it all the same, and from then on refuses every event of the form: no meter, no Generate
    events.reader.studio.recipes.save({"odd": {"model": "demo", "prompt": "kept", name: REFUSED[name]}})
    place, held = events.names.index(name), row(events)
    draft = events.restore({"model": "demo", "prompt": "kept", name: REFUSED[name]})
    preset = events.fill(gr.EventData(None, {"act": "preset", "arg": "odd"}), UI_STATE, None, *held)
    for answer in (draft, preset):
        sent = answer[place].get("value", events.fields[place].value)
        assert sent != REFUSED[name] and events.fields[place].preprocess(sent) == sent
        assert answer[events.names.index("prompt")]["value"] == "kept"


def test_the_form_can_hold_what_a_request_may_ask(events):
    # a clip of the command line is reused: a field that refused its steps would leave a form that does nothing
    for name, values in {"steps": (1, 100), "topk": (0.01, 1.0), "boundary": (0.5, 1.0)}.items():
        part = events.page.create.fields[name]
        assert [part.preprocess(value) for value in values] == [*values]


def test_a_picture_of_any_bytes_is_opened_by_no_component(events, tmp_path):
    # Gradio makes a component anew, of the same class, for each tab to which a property of it was sent (6.31)
    odd = tmp_path / "renamed.png"
    odd.write_text("<svg/>")
    for name in form.PICTURES:
        part = events.page.create.fields[name]
        again = type(part)(**{**part.constructor_args, "visible": True, "render": False})
        assert again.preprocess(ImageData(path=str(odd))) == str(odd) and again.preprocess(None) is None
        assert again.get_block_name() == "image"


def test_what_comes_with_the_page_is_what_it_would_be_answered(events):
    first, told = events.first(), events.opened(UI_STATE, None)
    parts = [*events.panels, None, *events.fields, *events.boxes, *events.estimated, events.page.create.opened]
    assert len(told) == len(parts) and told[-1] == OPENED  # with no draft at once: what is typed now is kept
    for place, (part, answer) in enumerate(zip(parts, told, strict=True)):
        if part is None:
            continue
        props = first["panels" if place < len(PANELS) else "form"][str(part._id)]
        is_update = isinstance(answer, dict)
        assert props == (
            {name: answer[name] for name in answer if name != "__type__"} if is_update else {"value": answer}
        )
    # a field that is as it was built is not sent: it would be a change, and ask for the meter once more
    assert all(first["form"][str(part._id)] == {} for part in events.fields)
    assert "td-meter" in first["form"][str(events.page.create.meter._id)]["value"]


def test_a_draft_sends_the_fields_that_differ_from_the_form_as_it_was_built(events):
    told = dict(zip(events.names, events.restore({"model": "demo", "prompt": "kept", "steps": 2}), strict=False))
    assert {name: sent["value"] for name, sent in told.items() if "value" in sent} == {"prompt": "kept", "steps": 2}


def test_a_form_that_is_still_filled_from_the_draft_is_not_kept_and_does_not_say_when_it_would_start(events):
    """It would be lost, where the person leaves before the page shows it."""
    half = row(events, prompt="")
    meter, *_, kept = events.estimate("", *half)
    assert kept == gr.skip() and "td-meter" in meter  # where the answer to `load` is lost the form still works
    assert events.estimate(OPENED, *half)[-1]["prompt"] == ""
    told = [events.whole(UI_STATE, {}, opened, "", *half)[-3:] for opened in ("", OPENED)]
    assert told[0] == [gr.skip()] * 3 != told[1]


def test_the_log_tab_shows_the_start_up_log_or_the_run_log(events):
    assert (app.STARTUP_LOG, app.RUN_LOG) == (STARTUP_LOG, RUN_LOG)
    folder, store = events.reader.studio.state, events.reader.studio._store
    LogFile(folder / STARTUP_LOG).say("the page is up")
    LogFile(folder / RUN_LOG).say("[ERROR] verdict: oom: out of memory; try: 480p", who="j7")
    store.put("supervisor", {"log": str(folder / STARTUP_LOG)})

    def shown(ui_state, argument):
        answer = events.act(ui_state, gr.EventData(None, {"act": "log", "arg": argument}))
        return answer[-2], *(answer[PANELS.index(name)] for name in ("logs", "log", "tail"))

    ui_state, names, log, tail = shown(UI_STATE, RUN_LOG)
    assert "try: 480p" in log and "the page is up" not in log and 'data-level="ERROR"' in log
    assert re.findall(r'class="td-btn on" data-arg="([^"]+)"', names) == [RUN_LOG]
    assert "the page is up" in tail  # below the stage it stays the start-up log
    ui_state, names, log, _ = shown(ui_state, STARTUP_LOG)
    assert "the page is up" in log and "480p" not in log
    for name in ("../../etc/passwd", "studio.sqlite3", ""):
        assert shown(ui_state, name)[0]["log"] == STARTUP_LOG


@pytest.mark.parametrize("argument", ["job:x", "job:" + "9" * 5000, "\ud800", " ".join("abcdefgh"), ""])
def test_no_button_blanks_the_page(events, argument):
    for name in ("choose", "show", "compare", "undo_trash", "note"):
        event = gr.EventData(None, {"act": name, "arg": argument})
        *_, ui_state, note = events.act(UI_STATE, event)
        drawn = "".join(str(part) for part in events.renderer.changed(ui_state))
        assert (drawn + str(note)).encode() and len(ui_state["left"].split()) <= 3


@pytest.mark.parametrize("button", ["star", "tags", "note", "rate", "seeds", "trash", "versus"])
def test_what_is_done_to_a_clip_that_another_browser_deleted_is_not_said_to_be_done(events, button):
    # that tab still shows it, and has it chosen
    ui_state, argument = {**UI_STATE, "picked": "gone here"}, {"versus": "", "rate": "gone 3 x"}.get(button, "gone x")
    argument = "gone" if button == "star" else argument
    *_, note = events.act(ui_state, gr.EventData(None, {"act": button, "arg": argument}))
    assert "no longer there" in note


def test_half_a_surrogate_pair_in_a_search_or_a_name_is_drawn_as_a_question_mark(events):
    for answer in (events.look_for(UI_STATE, "\udcff", "all", "newest"), events.recall(UI_STATE, "\udcff")):
        assert "".join(str(part) for part in answer).encode()
    asked = row(events, prompt="a \udcff cat")
    for answer in (events.estimate(OPENED, *asked), events.restore({"prompt": "a \udcff cat"})):
        assert json.dumps(answer, ensure_ascii=False).encode()  # as Gradio writes it
    assert text("\udcff.safetensors") == "?.safetensors"
