"""Which schedule suits which weights, as a pure function; and what a request leaves to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbodiff.spec.errors import RequestError
from turbodiff.spec.experts import Expert, sampler_times
from turbodiff.spec.models import all_models
from turbodiff.spec.request import FROM_WEIGHTS, make_request
from turbodiff.spec.schedules import MOST_STEPS, RECIPES, BaseFacts, Training, objections, schedule_for, steps_of_share

TRAININGS = st.builds(
    Training,
    st.sampled_from(["rcm", "base", "step-distilled"]),
    st.sampled_from([*RECIPES, "of the future"]),
    st.integers(0, 16),
)


@given(TRAININGS, st.sampled_from([spec.base for spec in all_models()]), st.sampled_from([399_360, 921_600]))
def test_what_is_chosen_for_weights_never_meets_an_objection(training, base, pixels):
    chosen = schedule_for(training, base, 0.9, pixels)
    assert objections(training, chosen.sampler, chosen.steps, chosen.guidance) == ()
    assert 1 <= chosen.steps <= MOST_STEPS.get(chosen.sampler, 100)


@given(TRAININGS, st.sampled_from(["sde", "ode", "unipc", "euler", "lcm", "dmd"]))
def test_a_sampler_of_ones_own_gets_steps_that_it_takes(training, sampler):
    chosen = schedule_for(training, BaseFacts(), 0.9, 399_360, sampler)
    assert chosen.sampler == sampler and 1 <= chosen.steps <= MOST_STEPS.get(sampler, 100)


@given(st.integers(1, 100), st.integers(1, 60))
def test_a_share_is_whole_at_four_and_grows(wanted, steps):
    assert steps_of_share(4, steps) == steps
    assert steps_of_share(wanted, steps) >= 1
    if wanted > 4:
        assert steps_of_share(wanted, steps) == wanted


def test_samplers_with_published_times_take_as_many_steps_as_there_are_times():
    assert {name: len(sampler_times(name, 9, 80.0, 5.0)) for name in MOST_STEPS} == MOST_STEPS


def test_published_makers_values_are_in_the_range_that_they_recommend():
    for spec in all_models():
        assert 30 <= spec.base.steps <= 50 and min(spec.base.guidance) > 1


def asked(**fields):
    return make_request({"prompt": "x", "model": "wan2.1-14b", **fields})


def test_what_is_not_said_follows_the_weights_under_auto_alone():
    assert asked().auto == FROM_WEIGHTS
    assert asked(steps=3, shift=4).auto == FROM_WEIGHTS - {"steps", "shift"}
    assert asked(steps="auto", sampler="unipc").auto == {"steps"}
    assert asked(sampler="sde").auto == frozenset()
    again = make_request(asked(steps=3).model_dump(mode="json"))
    assert again == asked(steps=3)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"auto": "prompt"}, "auto"),
        ({"weights_are": "magic"}, "weights_are"),
        ({"sampler": "heun"}, "sampler"),
        ({"sampler": "dmd", "steps": 4}, "steps"),
        ({"guidance_low": -1}, "guidance_low"),
        ({"guidance": "nan"}, "guidance"),
    ],
)
def test_bad_values_are_named(fields, field):
    with pytest.raises(RequestError) as caught:
        asked(**fields)
    assert caught.value.field == field


def test_each_expert_has_its_own_guidance_where_two_are_given():
    both = asked(sampler="unipc", guidance=4, guidance_low=3)
    assert (both.guidance_of(Expert.HIGH), both.guidance_of(Expert.LOW)) == (4, 3)
    one = asked(sampler="euler", guidance=3.5)
    assert (one.guidance_of(Expert.HIGH), one.guidance_of(Expert.LOW)) == (3.5, 3.5)
    assert asked(sampler="sde", guidance=5).guidance_of(Expert.SINGLE) == 1 and not asked(guidance=5).guided


def test_every_wan_model_states_how_its_undistilled_weights_are_sampled():
    for spec in all_models():
        assert "base" in spec.model_fields_set, spec.name
        assert spec.bundled or spec.base.negative_prompt, spec.name
