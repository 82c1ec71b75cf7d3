"""The schedule follows the weights, says why, and a schedule that cannot work with them is never silent."""

import pytest

from tests.plan.machines import ask, card, disk
from turbodiff.plan.planner import plan_request
from turbodiff.spec.models import FoundLora, Inventory, find_model
from turbodiff.spec.schedules import WARNINGS, Training

BASE = Training("base")
LIGHTNING = Training("step-distilled", "lightning", 4, "name")


def trained(inventory: Inventory, training: Training, component: str = "dit") -> Inventory:
    """The inventory with these networks trained so; distilled for SLA only where for rCM."""
    change = {"training": training, "sla": training.trained_for == "rcm"}
    files = [f.model_copy(update=change) if f.component.startswith(component) else f for f in inventory.files]
    return inventory.model_copy(update={"files": tuple(files)})


def planned(training: Training, model: str = "wan2.1-14b", lora: Training | None = None, **fields):
    inventory = trained(disk(), training)
    if lora is not None:
        inventory = inventory.model_copy(update={"loras": (FoundLora(path="l", bytes=1 << 20, training=lora),)})
        fields["loras"] = [{"path": "l", "strength": fields.pop("strength", 1.0)}]
    return plan_request(ask(model, **fields), card(80), inventory)


def run(plan):
    request = plan.request
    return request.sampler, request.steps, request.guidance, request.shift


def keys(plan):
    return [reason.key for reason in plan.reasons]


def warnings(plan):
    return [key for key in keys(plan) if key in WARNINGS]


@pytest.mark.parametrize(
    ("model", "resolution", "expected"),
    [
        ("wan2.1-14b", "480p", ("unipc", 50, 5.0, 3.0)),
        ("wan2.1-14b", "720p", ("unipc", 50, 5.0, 5.0)),
        ("wan2.1-1.3b", "480p", ("unipc", 50, 6.0, 8.0)),
        ("wan2.2-a14b", "720p", ("unipc", 40, 3.5, 5.0)),
    ],
)
def test_plain_wan_takes_unipc_with_guidance_as_its_makers_publish_it(model, resolution, expected):
    plan = planned(BASE, model, resolution=resolution)
    assert run(plan) == expected
    assert plan.request.auto == frozenset() and "schedule_base" in keys(plan) and not warnings(plan)
    assert plan.request.negative_prompt == find_model(model).base.negative_prompt != ""


def test_distilled_weights_take_rcm_as_ever():
    plan = planned(Training("rcm", evidence="keys"))
    assert run(plan)[:2] == ("sde", 4)
    assert (plan.request.guidance, plan.request.negative_prompt) == (1.0, "")
    assert "schedule_rcm" in keys(plan) and not warnings(plan)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("lightning", ("euler", 4, 1.0, 5.0)),
        ("lightx2v", ("lcm", 4, 1.0, 5.0)),
        ("self-forcing", ("lcm", 4, 1.0, 5.0)),
        ("fastwan", ("dmd", 3, 1.0, 8.0)),
        ("causvid", ("euler", 8, 1.0, 5.0)),
        ("accvid", ("unipc", 10, 1.0, 5.0)),
        ("fusionx", ("unipc", 8, 1.0, 2.0)),
        ("", ("euler", 4, 1.0, 5.0)),
    ],
)
@pytest.mark.parametrize("as_lora", [False, True])
def test_a_step_distillation_runs_as_it_was_distilled_as_weights_and_as_a_lora(family, expected, as_lora):
    distilled = Training("step-distilled", family, 0, "name")
    plan = planned(BASE, lora=distilled) if as_lora else planned(distilled)
    assert run(plan) == expected
    assert "schedule_step_distilled" in keys(plan) and not warnings(plan)


def test_steps_that_a_name_tells_go_before_those_of_the_family():
    assert run(planned(LIGHTNING._replace(steps=8)))[:2] == ("euler", 8)
    assert run(planned(Training("step-distilled", "fastwan", 8)))[:2] == ("dmd", 3)  # its times are three


def test_a_lora_that_is_off_or_on_distilled_weights_changes_no_schedule_and_the_second_is_warned_of():
    assert run(planned(BASE, lora=LIGHTNING, strength=0.0))[0] == "unipc"
    plan = planned(Training("rcm"), lora=LIGHTNING)
    assert run(plan)[0] == "sde" and warnings(plan) == ["distilled_twice"]


def two_loras(first: Training, second: Training, training: Training = BASE, **fields):
    loras = tuple(FoundLora(path=f"/l/{n}.safetensors", bytes=1, training=t) for n, t in (("a", first), ("b", second)))
    found = trained(disk(), training).model_copy(update={"loras": loras})
    model, experts = fields.pop("model", "wan2.1-14b"), fields.pop("experts", ("both", "both"))
    asked = [{"path": lora.path, "expert": expert} for lora, expert in zip(loras, experts, strict=True)]
    return plan_request(ask(model, loras=asked, **fields), card(80), found)


def numbers_of(plan, key):
    return next(reason.numbers for reason in plan.reasons if reason.key == key)


CAUSVID = Training("step-distilled", "causvid", 0, "name")


@pytest.mark.parametrize(("pair", "sets"), [((LIGHTNING, CAUSVID), "euler 4"), ((CAUSVID, LIGHTNING), "euler 8")])
def test_of_two_step_loras_it_is_said_which_sets_the_schedule(pair, sets):
    plan = two_loras(*pair)
    assert warnings(plan) == ["loras_distil_apart"] and f"{plan.request.sampler} {plan.request.steps}" == sets
    told = numbers_of(plan, "loras_distil_apart")
    assert told["first"] == f"{pair[0].title} (a)" and told["others"] == f"{pair[1].title} (b)"
    assert f"{told['sampler']} {told['steps']}" == sets and told["guidance"] == 1.0


def test_two_step_loras_for_two_experts_are_no_two_at_once():
    high, low = ("high", "low"), ("both", "low")
    assert not warnings(two_loras(LIGHTNING, LIGHTNING, model="wan2.2-a14b", experts=high))
    assert warnings(two_loras(LIGHTNING, CAUSVID, model="wan2.2-a14b", experts=low)) == ["loras_distil_apart"]
    assert not warnings(two_loras(LIGHTNING, Training("base")))


def test_step_loras_on_distilled_weights_are_named_beside_what_sets_the_schedule():
    plan = two_loras(LIGHTNING, CAUSVID, Training("step-distilled", "lightx2v", 4, "name"))
    assert warnings(plan) == ["distilled_twice"] and plan.request.sampler == "lcm"
    told = numbers_of(plan, "distilled_twice")
    assert (told["weights"], told["loras"]) == ("LightX2V", "Lightning (a), CausVid (b)")
    said = planned(BASE, lora=LIGHTNING, weights_are="rcm")
    assert warnings(said) == ["distilled_twice"] and said.request.sampler == "sde"
    assert not warnings(planned(BASE, lora=LIGHTNING, weights_are="step-distilled")), "the word means the LoRA"


def test_a_step_lora_for_another_width_leaves_plain_weights_plain():
    """Its layers are left out: 4 steps without guidance of what stays would be noise."""
    for dim, sampler in ((0, "euler"), (5120, "euler"), (1536, "unipc")):
        lora = FoundLora(path="l", bytes=1 << 20, training=LIGHTNING, dim=dim)
        found = trained(disk(), BASE).model_copy(update={"loras": (lora,)})
        plan = plan_request(ask(loras=[{"path": "l", "strength": 1.0}]), card(80), found)
        assert plan.request.sampler == sampler


def test_plain_weights_under_an_rcm_lora_are_sampled_with_rcm():
    assert run(planned(BASE, lora=Training("rcm", evidence="name")))[:2] == ("sde", 4)


@pytest.mark.parametrize(
    ("word", "expected"), [("base", "unipc"), ("rcm", "sde"), ("step-distilled", "euler"), ("auto", "lcm")]
)
def test_a_persons_word_counts_more_than_the_file(word, expected):
    plan = planned(Training("step-distilled", "lightx2v", 4, "name"), weights_are=word)
    assert plan.request.sampler == ("lcm" if word == "step-distilled" else expected)  # its family stays known
    assert plan.request.weights_are == word


@pytest.mark.parametrize(
    ("training", "fields", "expected"),
    [
        (BASE, {"sampler": "sde"}, ["distilled_sampler_on_base"]),
        (BASE, {"sampler": "ode", "steps": 2}, ["distilled_sampler_on_base"]),
        (BASE, {"sampler": "dmd", "steps": 3}, ["distilled_sampler_on_base"]),
        (BASE, {"sampler": "unipc"}, ["few_steps_on_base", "no_guidance_on_base"]),
        (BASE, {"sampler": "euler", "steps": 40, "guidance": 5}, []),
        (BASE, {"steps": 4, "pinned": ["steps"]}, ["few_steps_on_base"]),
        (LIGHTNING, {"sampler": "euler", "guidance": 5}, ["guidance_on_distilled"]),
        (LIGHTNING, {"sampler": "sde"}, ["sampler_of_another_distillation"]),
        (LIGHTNING, {"sampler": "lcm"}, []),
        (Training("rcm"), {"sampler": "unipc", "steps": 40}, ["sampler_of_another_distillation"]),
        (Training("rcm"), {"sampler": "ode"}, []),
        (Training("rcm"), {"guidance": 5}, ["guidance_unread"]),
        (Training("rcm"), {"negative_prompt": "blue"}, ["guidance_unread"]),
        (LIGHTNING, {"sampler": "dmd", "steps": 3, "guidance": 5}, ["guidance_unread"]),
        (BASE, {"attention": "sla"}, ["not_distilled_for_sla"]),
        (Training("rcm"), {"attention": "sla"}, []),
    ],
)
def test_a_schedule_of_ones_own_that_cannot_work_is_warned_of_and_kept(training, fields, expected):
    plan = planned(training, **fields)
    assert warnings(plan) == expected
    kept = {name: value for name, value in fields.items() if name != "pinned"}
    assert {name: getattr(plan.request, name) for name in kept} == kept


def test_one_to_four_steps_are_a_share_of_what_the_weights_need():
    assert [run(planned(BASE, steps=steps))[1] for steps in (1, 2, 4, 30)] == [13, 25, 50, 30]
    assert [run(planned(LIGHTNING, steps=steps))[1] for steps in (1, 2, 4)] == [1, 2, 4]
    assert [run(planned(Training("rcm"), steps=steps))[1] for steps in (1, 4)] == [1, 4]
    more = planned(BASE, steps=4)
    assert [reason.numbers for reason in more.reasons if reason.key == "steps_of_share"] == [{"asked": 4, "steps": 50}]
    others = (planned(BASE), planned(BASE, steps=30), planned(LIGHTNING, steps=2), planned(Training("rcm"), steps=2))
    assert not [plan for plan in others if "steps_of_share" in keys(plan)]
    assert not [change for change in more.changes if change.field == "steps" and change.lossy]


def test_too_many_steps_for_rcm_are_lowered_and_it_is_said():
    plan = planned(Training("rcm"), steps=9)
    assert plan.request.steps == 4
    assert ("steps", 9, 4, True) in [(c.field, c.from_value, c.to_value, c.lossy) for c in plan.changes]
    assert "lossless_is_slow" not in keys(plan)


def test_what_is_said_stays_and_what_is_auto_follows_also_a_sampler_of_ones_own():
    plan = planned(BASE, guidance=3.0, shift=7.0, negative_prompt="grey")
    assert run(plan) == ("unipc", 50, 3.0, 7.0) and plan.request.negative_prompt == "grey"
    plan = planned(BASE, sampler="euler", steps="auto", guidance="auto")
    assert run(plan) == ("euler", 50, 5.0, 5.0)
    plan = planned(BASE, sampler="unipc", auto="steps,guide_scale")
    assert run(plan)[:3] == ("unipc", 50, 5.0)


def test_seconds_and_memory_are_those_of_the_schedule_that_runs():
    turbo, plain = planned(Training("rcm"), attention="dense"), planned(BASE, attention="dense")
    denoise = [next(p for p in plan.phases if p.name == "denoise") for plan in (turbo, plain)]
    reading = 28e9 / 2e9  # at most: the file is read once in both
    assert denoise[1].seconds > 20 * (denoise[0].seconds - reading)  # 100 passes against 4
    assert denoise[1].activations_bytes > denoise[0].activations_bytes  # keys and values of the negative prompt
    once = planned(BASE, attention="dense", guidance=1.0)
    (at_one,) = [p for p in once.phases if p.name == "denoise"]
    assert at_one.seconds < 0.6 * denoise[1].seconds


def test_experts_that_do_not_belong_together_are_warned_of():
    inventory = trained(trained(disk(), BASE), LIGHTNING, "dit_low")
    plan = plan_request(ask("wan2.2-a14b"), card(80), inventory)
    assert warnings(plan) == ["experts_trained_apart"]
    assert plan.request.sampler == "unipc"


def test_a_plan_of_its_own_request_is_the_same_and_its_warnings_stay_for_a_replan():
    for training in (BASE, LIGHTNING, Training("rcm")):
        inventory = trained(disk(), training)
        plan = plan_request(ask(), card(80), inventory)
        again = plan_request(plan.request, card(80), inventory)
        assert again.request == plan.request and again.changes == ()


@pytest.mark.parametrize("sampler", ["sde", "ode", "unipc"])
def test_a_request_of_before_means_what_it_meant(sampler):
    request = ask(sampler=sampler)
    assert (request.steps, request.guidance, request.shift, request.auto) == (4, 1.0, 5.0, frozenset())
    plan = plan_request(request, card(80), trained(disk(), Training("rcm")))
    assert run(plan) == (sampler, 4, 1.0, 5.0)
    assert not {"sampler", "steps", "guidance", "shift"} & {change.field for change in plan.changes}
