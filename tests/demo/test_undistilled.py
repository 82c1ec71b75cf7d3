"""The demo taken as undistilled weights: its own folder without the marks of distillation, or a person's word."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.evaluate_demo import chosen_captions
from scripts.train_demo.scoring import FIELDS, score
from tests.soak import SOAK
from turbodiff.gpu.probe import machine_now
from turbodiff.plan.planner import plan_request
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import bundled_root, inventory, with_loras

STEPS_LORA = Path(__file__).parent / "data" / "steps_lora.safetensors"  # train_lora.py --distil 4
PROMPT = "a red circle moves right on a black background"


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A search root that holds the demo's network under a plain name, without SLA's projections."""
    weights = load_file(bundled_root() / "dit_t2v.safetensors")
    kept = {name: value for name, value in weights.items() if ".proj_l." not in name}
    save_file(kept, tmp_path / "wan_t2v.safetensors")
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path))
    return tmp_path


def planned(**fields):
    request = make_request({"prompt": PROMPT, "seed": 7, **fields})
    return plan_request(request, machine_now(), with_loras(inventory(), request.loras))


def keys(plan):
    return {reason.key for reason in plan.reasons}


def test_plain_weights_are_taken_and_run_with_unipc_and_guidance(plain):
    plan = planned()
    assert plan.request.sampler == "unipc" and plan.request.guidance > 1 and 30 <= plan.request.steps <= 50
    assert "schedule_base" in keys(plan)
    assert planned(weights_are="rcm").request.sampler == "sde"


def test_a_persons_word_makes_the_bundled_demo_undistilled():
    assert planned().request.sampler == "sde"
    word = planned(weights_are="base")
    assert word.request.sampler == "unipc"
    seconds = [next(phase.seconds for phase in plan.phases if phase.name == "denoise") for plan in (planned(), word)]
    assert seconds[1] > 5 * seconds[0]


def test_under_a_lora_that_distils_four_steps_are_chosen_and_it_makes_the_clip(plain, product):
    fields = {"loras": [{"path": str(STEPS_LORA)}]}
    plan = planned(**fields)
    assert (plan.request.sampler, plan.request.steps, plan.request.guidance) == ("euler", 4, 1.0)
    assert "schedule_step_distilled" in keys(plan)
    caption, sentence = chosen_captions(1)[0]
    frames = product.clip({"model": "demo", "prompt": sentence, "seed": 0, **fields})
    assert sum(score(frames, caption).values()) >= 3


def test_a_sampler_for_distilled_weights_is_warned_of_before_the_start(plain):
    plan = planned(sampler="sde")
    assert plan.request.sampler == "sde" and "distilled_sampler_on_base" in keys(plan)
    assert "not_distilled_for_sla" in keys(planned(attention="sla"))


@pytest.mark.slow
def test_as_undistilled_weights_the_demo_scores_as_with_rcm(plain, product):
    """Paired captions and seeds, scored from pixels; 50 of them are quoted in turbodiff/demo/README.md."""
    means = []
    for word in ("base", "rcm"):
        marks = []
        for seed, (caption, sentence) in enumerate(chosen_captions(12 if SOAK else 4)):
            frames = product.clip({"model": "demo", "prompt": sentence, "seed": seed, "weights_are": word})
            marks += [score(frames, caption)[name] for name in FIELDS]
        means.append(100 * sum(marks) / len(marks))
    assert means[0] >= means[1] - 2, means
