import json
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import all_models, find_model
from turbodiff.spec.request import MAX_SEED, Request, make_request
from turbodiff.spec.wording import Words

PROMPT = "a red circle moves right on a black background"


def asked(**fields):
    return make_request({"prompt": PROMPT, **fields})


def test_what_is_left_out_is_the_models_default():
    request = asked(model="Wan2.1-14B")
    assert (request.width, request.height, request.num_frames, request.steps) == (1280, 720, 81, 4)
    assert (request.sampler, request.sigma_max, request.fps) == ("auto", 80.0, 16)
    assert asked(model="Wan2.2-A14B", image="p.png").sigma_max == 200.0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "word " * 5000}, "prompt"),
        ({"num_frames": 80}, "num_frames"),
        ({"num_frames": 21}, "num_frames"),
        ({"num_frames": "many"}, "num_frames"),
        ({"steps": 9}, "steps"),
        ({"steps": 0}, "steps"),
        ({"size": "833x480", "model": "Wan2.1-1.3B"}, "size"),
        ({"size": "832x480"}, "size"),
        ({"size": "large"}, "size"),
        ({"model": "Wan3"}, "model"),
        ({"resolution": "8k"}, "resolution"),
        ({"resolution": "480p", "model": "Wan2.1-1.3B", "aspect": "2:1"}, "aspect"),
        ({"seed": "abc"}, "seed"),
        ({"seed": -2}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"topk": 0}, "topk"),
        ({"topk": "nan"}, "topk"),
        ({"boundary": 0.2}, "boundary"),
        ({"sigma_max": "inf"}, "sigma_max"),
        ({"attention": "flash"}, "attention"),
        ({"quant_linear": "maybe"}, "quant_linear"),
        ({"fps": 0}, "fps"),
        ({"image": "cat.png"}, "image"),
        ({"model": "Wan2.2-A14B"}, "image"),
        ({"kind": "i2v"}, "kind"),
        ({"pinned": "colour"}, "pin"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(fields, field):
    with pytest.raises(RequestError) as caught:
        asked(**fields)
    assert caught.value.field == field
    assert caught.value.try_instead
    assert caught.value.exit_code == 2


def test_turbodiffusions_names_are_accepted():
    request = asked(model="Wan2.1-1.3B", num_steps=3, sla_topk=0.15, attention_type="original", aspect_ratio="1:1")
    assert (request.steps, request.topk, request.attention, request.aspect) == (3, 0.15, "dense", "1:1")


@pytest.mark.parametrize("seed", ["", None, -1, "-1", "random"])
def test_no_seed_means_a_random_one(seed):
    assert asked(seed=seed).seed is None
    assert 0 <= asked(seed=seed).seeded().seed <= MAX_SEED


def test_seed_zero_is_the_seed_zero():
    assert asked(seed=0).seed == 0
    assert asked(seed="0").seeded().seed == 0


def test_a_size_of_the_table_gets_its_name_back():
    request = asked(model="Wan2.1-1.3B", size="480*832")
    assert (request.resolution, request.aspect) == ("480p", "9:16")
    assert asked(model="Wan2.1-1.3B", size="640x320").resolution == "custom"


@pytest.mark.parametrize("given_value", [True, "on", "true", "1"])
def test_quant_linear_takes_a_switch_in_any_spelling(given_value):
    assert asked(quant_linear=given_value).quant_linear == "on"


def test_a_request_survives_json():
    request = asked(seed=42, pinned="model,num_frames")
    assert Request.model_validate(json.loads(request.model_dump_json())) == request


@given(st.dictionaries(st.sampled_from([*Request.model_fields, "size", "ode"]), st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2), st.booleans(),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=1))))  # fmt: skip
def test_whatever_comes_in_the_answer_is_a_request_or_a_request_error(fields):
    try:
        assert isinstance(make_request(fields), Request)
    except RequestError as error:
        assert error.field


def test_models_are_found_by_every_name_people_use():
    for spec in all_models():
        for name in (spec.name, spec.display_name, *spec.aliases, spec.display_name.upper()):
            assert find_model(name) is spec
    assert {"Demo", "Wan2.1-1.3B", "Wan2.1-14B", "Wan2.2-A14B"} <= {spec.display_name for spec in all_models()}


def test_an_error_can_be_sent_whatever_it_quotes() -> None:
    error = RequestError("odd", code="odd", field="x", got="a\ud800b")
    assert error.fields()["got"] == "a?b"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (name, value)
        for name, field in Request.model_fields.items()
        for value in get_args(field.annotation)
        if get_origin(field.annotation) is Literal and isinstance(value, int)
    ],
)
def test_a_flag_may_say_any_number_that_a_field_takes(field: str, value: int) -> None:
    assert getattr(make_request({"prompt": "x", field: str(value)}), field) == value


@pytest.mark.parametrize("cards", [0, -1, 9, "x", "0", 1.5])
def test_an_illegal_number_of_cards_hears_all_that_are_legal(cards):
    """Both kinds, of which pydantic names the first alone."""
    with pytest.raises(RequestError) as refused:
        make_request({"prompt": PROMPT, "cards": cards})
    error = refused.value
    assert (error.code, error.field, error.expected) == ("bad_cards", "cards", "auto or 1 to 8")
    english, chinese = (Words(lang).error_line(error) for lang in ("en", "zh"))
    assert "auto or 1 to 8" in english and "auto 或 1 到 8" in chinese and "auto or" not in chinese
