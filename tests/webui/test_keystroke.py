"""What one keystroke on the 14B form costs, in plans and Python calls: a busy machine bends time, not these."""

import json
import sys
from collections import Counter

import pytest

from tests.plan.machines import disk, gpu, machine
from tests.webui import hollow
from turbodiff.jobs.cards import Fleet, FleetCard
from turbodiff.jobs.dispatch import Card
from turbodiff.plan import planner
from turbodiff.plan.hardware import Machine, pretend
from turbodiff.plan.tiers import downloaded, tier_here
from turbodiff.spec.cached import CachedValue
from turbodiff.spec.numbers import GIB
from turbodiff.studio import Studio
from webui import form, render
from webui.form_actions import initial_values
from webui.snapshot import StudioReader
from webui.wording import Words

MOST_PLANS, MOST_CALLS = 4, 8000
# anew: every candidate twice, plain and INT8, with kept and with recomputed text keys; and the start in the queue, with
# the rules for several cards asked once: 13,558 on a card of 16 GiB
MOST_CALLS_ANEW = 14_000
# with 2 and with 8 cards: seconds on each of them, and on each number of them together
MOST_CALLS_TOGETHER, MOST_CALLS_TOGETHER_ANEW = {2: 6000, 8: 7500}, {2: 17_000, 8: 26_000}
MODEL = "wan2.1-14b"


@pytest.fixture(params=[16, 24], ids=["16GiB", "24GiB"])
def reader(request, tmp_path):
    """A reader that knows of one card and 64 GiB of RAM, and has answered a form before."""
    studio = Studio(tmp_path / "state", tmp_path / "outputs")
    studio.jobs(1)  # makes the queue: what runs taught is read, too
    reader = StudioReader(studio)
    see(reader, request.param)
    reader.inventory = CachedValue(disk, 3600.0)
    planner._decision.cache_clear()
    render.estimate(reader, values(), Words("en"))
    yield reader
    studio.close()


def see(reader, vram_gib, ram_gib=48):
    """Show the reader a machine."""
    machine = Machine(ram_total_bytes=64 * GIB, ram_available_bytes=round(ram_gib * GIB), cpu_count=8)
    reader._machine = CachedValue(lambda: pretend(machine, vram_gib), 3600.0)


def values(**changed):
    held = {"prompt": "a cat chases a butterfly", "pinned": [], "loras": "", "seed": ""}
    return {**form.defaults(form.model_called(MODEL)), **held, **changed}


def counted(reader, held):
    """(plans, decisions, Python calls) of the estimate for what the form holds."""
    plan, decide = planner._plan.__code__, planner._decide.__code__
    calls: Counter[object] = Counter()

    def count(frame, event, _):
        if event == "call":
            calls[frame.f_code] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        told = render.estimate(reader, held, Words("en"))
    finally:
        sys.setprofile(before)
    assert "14B" in told[2]["value"] and told[-1]
    return calls[plan], calls[decide], calls.total()


def test_a_letter_of_the_prompt_decides_nothing_anew(reader):
    plans, decisions, calls = counted(reader, values(prompt="a cat chases a butterfly o"))
    assert decisions == 0
    assert plans <= MOST_PLANS and calls <= MOST_CALLS


def test_a_letter_of_the_prompt_beside_a_neighbour_that_moved(reader):
    see(reader, reader._machine().gpus[0].total_bytes / GIB, ram_gib=47.9)
    plans, _, calls = counted(reader, values(prompt="a cat chases a butterfly o"))
    assert plans <= MOST_PLANS and calls <= MOST_CALLS_ANEW


@pytest.mark.parametrize("count", [2, 8])
def test_a_letter_of_the_prompt_on_several_cards(reader, count):
    """The number of cards that help, what each takes on its own, and which of them are idle."""
    cards = [gpu(24, uuid=f"GPU-{index}", index=index) for index in range(count)]
    fleet = Fleet(
        cards=tuple(FleetCard(slot=at, uuid=one.uuid, name=f"RTX 4090 #{at + 1}") for at, one in enumerate(cards)),
        workers=tuple(Card(at) for at in range(count)),
    )

    def now(ram_gib):
        reader._machine = CachedValue(lambda: machine(*cards, ram_gib=ram_gib), 3600.0)
        reader.studio._store.put("fleet", fleet.model_dump(mode="json"))
        reader.snapshot.now()

    now(64)
    large = {"resolution": "720p", "num_frames": 81}
    told = render.estimate(reader, values(**large), Words("en"))
    assert f"{count} cards" in str(told[0]) and f"RTX 4090 #{count}" in str(told[1])
    plans, decisions, calls = counted(reader, values(**large, prompt="a cat chases a butterfly o"))
    assert decisions == 0 and plans <= MOST_PLANS and calls <= MOST_CALLS_TOGETHER[count]
    now(63.9)
    plans, _, calls = counted(reader, values(**large, prompt="a cat chases a butterfly on"))
    assert plans <= MOST_PLANS and calls <= MOST_CALLS_TOGETHER_ANEW[count]


def test_a_letter_of_the_prompt_beside_a_lora_of_another_width_which_the_form_warns_of(reader, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "weights"))
    (tmp_path / "weights" / "loras").mkdir(parents=True)
    halves = {"A": (4, 1536), "B": (1536, 4)}
    layers = [f"diffusion_model.blocks.{n}.self_attn.{name}" for n in range(40) for name in "qkvo"]
    shapes = {f"{layer}.lora_{half}.weight": shape for layer in layers for half, shape in halves.items()}
    hollow.save(shapes, tmp_path / "weights" / "loras" / "style.safetensors")
    reader.loras = CachedValue(reader.studio.loras, 3600.0)
    held = values(loras=json.dumps([{"name": "style.safetensors", "strength": 1.0, "expert": "both"}]))
    told = render.estimate(reader, held, Words("en"))
    assert "LoRA style.safetensors cannot be used with Wan2.1-14B" in str(told)
    plans, decisions, calls = counted(reader, {**held, "prompt": "a cat chases a butterfly o"})
    assert decisions == 0
    assert plans <= MOST_PLANS and calls <= MOST_CALLS_ANEW  # its header is read for its picture


@pytest.mark.parametrize("changed", [{"num_frames": 49}, {"resolution": "720p"}, {"steps": 2}], ids=str)
def test_a_change_of_the_form_plans_once(reader, changed):
    plans, _, calls = counted(reader, values(**changed))
    assert plans <= MOST_PLANS and calls <= MOST_CALLS_ANEW


def test_the_marks_say_what_a_plan_of_each_choice_says(reader):
    for frames in form.offered_frames(form.model_called(MODEL)):
        fields = {**form.request_fields(values(num_frames=frames)), "pinned": form.PINS}
        asked = reader.outlook(fields)
        try:
            plan = reader.estimate(fields)
        except planner.Refusal:
            assert asked.band == "no"
        else:
            assert asked == (plan.band, plan.seconds, plan.request.steps)


@pytest.mark.parametrize("model", [MODEL, "wan2.2-a14b"])
def test_the_mark_before_a_download_is_what_the_form_says_after_it(reader, model, monkeypatch):
    """The page's first form, its machine and its plan, with the files of one variant on the disk."""
    spec = form.model_called(model)
    machine = reader._machine()
    monkeypatch.setattr(reader, "here", lambda: {spec.name: True})
    monkeypatch.setattr(reader, "tier", lambda: tier_here(machine))
    first = initial_values(reader, spec.kind)
    if first["model"] != spec.name:  # another model's card: what the form holds once this one is chosen
        first = form.defaults(spec)
    marks = {offer.variant: offer.fit for offer in reader.studio.offers(machine)[spec.name]}
    assert list(marks) == list(spec.variants)
    for variant, told in marks.items():
        reader.inventory = CachedValue(lambda variant=variant: downloaded(spec, [variant]), 3600.0)
        switch = "on" if variant.quant else "off"
        # of one resolution alone: the form keeps its own
        resolution = variant.resolution if len({one.resolution for one in spec.variants}) > 1 else first["resolution"]
        held = {**first, "resolution": resolution, "quant_linear": switch, "pinned": ["model"]}
        asked = form.request_fields({**held, "prompt": "-"})
        plan = reader.estimate(
            {**asked, **({"image": "-", "adaptive_resolution": False} if spec.kind == "i2v" else {})}
        )
        assert (told.band, told.seconds) == (plan.band, plan.seconds)
        assert told.changes == tuple(change for change in plan.changes if change.lossy)


def test_a_keystroke_pays_for_no_mark_of_a_download(reader, monkeypatch):
    monkeypatch.setattr(reader.studio, "offers", None)  # would raise if it were asked
    assert render.estimate(reader, values(prompt="a cat chases a butterfly o"), Words("en"))
