"""The form and requests say the same, and text never becomes markup."""

import json
from types import SimpleNamespace

import pytest

from tests.plan.machines import card, disk, gpu, machine
from turbodiff.plan.hardware import Machine, pretend
from turbodiff.plan.planner import plan_request
from turbodiff.spec.experts import experts_by_step
from turbodiff.spec.models import Inventory, all_models, find_model
from turbodiff.spec.request import make_request
from webui import form
from webui.actions import wished_request
from webui.markup import Html, action, el, join, text
from webui.panels import meter
from webui.wording import Words


@pytest.mark.parametrize("spec", all_models(), ids=lambda spec: spec.name)
def test_the_defaults_of_every_model_make_a_legal_request(spec):
    fields = form.request_fields({**form.defaults(spec), "prompt": "a cat runs", "image": "cat.png"})
    assert make_request(fields).model == spec.name


def test_a_request_survives_the_way_through_the_form():
    asked = make_request(
        {"prompt": "a cat runs", "model": "wan2.1-14b", "seed": 0, "num_frames": 49, "pinned": ["model"]}
    )
    values = form.from_request(asked.model_dump(mode="json"))
    assert make_request(form.request_fields(values)) == asked
    assert values["seed"] == "0"  # 0 is a seed, not "random"


def test_a_size_of_ones_own_survives_too():
    asked = make_request({"prompt": "a cat runs", "model": "wan2.1-14b", "size": "640x368"})
    back = make_request(form.request_fields(form.from_request(asked.model_dump(mode="json"))))
    assert (back.width, back.height) == (640, 368)


def test_another_model_takes_what_it_can_of_the_form():
    big = {**form.defaults(find_model("wan2.1-14b")), "prompt": "a cat runs", "num_frames": 81, "resolution": "720p"}
    small = form.fitted_to(find_model("demo"), big)
    assert make_request(form.request_fields(small)).num_frames == 17
    assert small["prompt"] == "a cat runs"


def test_text_to_video_drops_the_picture():
    assert "image" not in form.request_fields({"kind": "t2v", "prompt": "x", "image": "cat.png"})


def test_user_text_is_escaped_everywhere():
    bad = "<img onerror=x> {{evil}} ${1+1} `x` \"'"
    for markup in (text(bad), el("p", bad), el("p", title=bad), join(bad), action("go", bad, bad), join([bad])):
        assert "<img" not in markup
        assert "${" not in markup and "{{" not in markup and "`" not in markup


def test_only_our_own_markup_passes_as_it_is():
    assert el("p", Html("<b>x</b>"), "<i>") == "<p><b>x</b>&lt;i&gt;</p>"
    assert el("p", None, False, "x", hidden=True, id="", title=None) == "<p hidden>x</p>"


def letters(steps: int, boundary: float) -> str:
    return "".join(expert.letter for expert in experts_by_step("sde", steps, 200.0, 5.0, boundary))


@pytest.mark.parametrize("steps", [3, 4])
def test_between_the_two_boundaries_of_the_strips_note_nothing_changes(steps):
    low, high = meter.SAME_FROM + 0.001, meter.SAME_TO - 0.001
    inside = {letters(steps, low + (high - low) * n / 20) for n in range(21)}
    assert len(inside) == 1
    outside = {letters(steps, edge) for edge in (meter.SAME_FROM - 0.01, meter.SAME_TO + 0.01)}
    assert not inside & outside


@pytest.mark.parametrize(("boundary", "letters"), [(0.9, "HHLL"), (0.5, "HHHH")])
def test_the_strip_of_experts_is_the_plans(boundary, letters):
    wish = make_request(
        {"prompt": "it turns", "model": "wan2.2-a14b", "image": "x.png", "boundary": boundary, "steps": 4}
    )
    plan = plan_request(wish, pretend(Machine(), 24), Inventory())
    assert meter.experts(plan) == letters
    assert f'data-letters="{letters}"' in meter.draw_experts(meter.experts(plan), boundary, Words("en"))
    assert meter.experts(None) == "" == meter.draw_experts("", 0.9, Words("en"))


def test_what_the_weights_settled_follows_them_again_when_a_clip_is_repeated():
    asked = make_request({"prompt": "x", "model": "wan2.1-14b", "weights_are": "base", "seed": 1})
    plan = plan_request(asked, card(80), disk())
    clip = SimpleNamespace(request=plan.request, changes=plan.changes)
    wished = wished_request(clip)
    again = make_request(wished)
    assert again.sampler == "auto" and {"steps", "guidance", "negative_prompt"} <= again.auto
    assert plan_request(again, card(80), disk()).request == plan.request
    values = {**form.defaults(asked.spec), **form.from_request(wished)}
    assert (values["sampler"], values["guidance"], values.get("negative_prompt")) == ("auto", None, "")
    assert plan_request(make_request(form.request_fields(values)), card(80), disk()).request.steps == 50


def test_an_empty_number_follows_the_weights_also_under_a_sampler_of_ones_own():
    fields = form.request_fields({**form.defaults(all_models()[0]), "prompt": "x", "sampler": "unipc"})
    assert make_request(fields).auto == {"guidance", "guidance_low", "shift"}


def test_a_text_encoder_that_the_plan_made_smaller_is_automatic_again_when_a_clip_is_repeated():
    short = machine(gpu(11.5), ram_gib=4.2, bitsandbytes=True)
    values = {**form.defaults(find_model("wan2.1-1.3b")), "prompt": "x", "seed": "1"}
    plan = plan_request(make_request(form.request_fields(values)), short, disk())
    assert plan.request.text_dtype == "int8"
    wished = wished_request(SimpleNamespace(request=plan.request, changes=plan.changes))
    assert wished["text_dtype"] == "auto"
    lock = {**values, "text_dtype": "nf4", "pinned": ["text_dtype"]}
    locked = plan_request(make_request(form.request_fields(form.sanitize(lock))), short, disk())
    assert (locked.request.text_dtype, locked.levers.text_dtype) == ("nf4", "nf4")
    assert form.from_request(locked.request.model_dump(mode="json"))["text_dtype"] == "nf4"


def test_a_rounded_exchange_comes_from_the_form_and_goes_back_to_it():
    values = {**form.defaults(all_models()[0]), "prompt": "x", "exchange": "int8", "cards": "2"}
    asked = make_request(form.request_fields(form.sanitize(values)))
    assert asked.exchange == "int8" and form.from_request(asked.model_dump(mode="json"))["exchange"] == "int8"


def test_rows_of_the_storyboard_that_say_nothing_are_no_segments():
    text = json.dumps(
        [["a red circle", " 1,5 ", "7"], ["  ", "2", "3"], ["it grows", "", "x"], ["it stops", "soon", ""]]
    )
    values = {"num_frames": 17, "fps": 16, "storyboard": text}
    assert form.segments(values) == [
        ("a red circle", 1.5, "7"),
        ("it grows", 17 / 16, "x"),  # no seed, which is said there, too
        ("it stops", 0.0, ""),  # which the sum under the button says
    ]
    for nonsense in ("", None, "{", "7", '"a"', "[[1]]", "[[]]", "[" * 9999):
        assert form.segments({**values, "storyboard": nonsense}) == []


def test_a_form_that_went_back_to_text_continues_no_clip():
    held = {"kind": "i2v", "model": "demo-i2v", "prompt": "-", "continues": "t2v_1_demo"}
    assert form.request_fields(held)["continues"] == "t2v_1_demo"
    assert "continues" not in form.request_fields({**held, "kind": "t2v", "model": "demo"})
