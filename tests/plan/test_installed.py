"""What is on this disk: a plan and the list name the files that are taken, their own seconds, and what is not here."""

import pytest

from tests.plan.machines import ask, card, disk
from turbodiff.plan.explain import REASON_KEYS
from turbodiff.plan.hardware import pretend
from turbodiff.plan.planner import plan_request
from turbodiff.plan.tiers import fits_of, installed
from turbodiff.spec.models import FoundFile, Inventory, PassedOver, find_model
from turbodiff.spec.schedules import Training
from turbodiff.spec.wording import Words, shared_catalogue

WORDS = [Words("en"), Words("zh")]
PLAIN = Training("base", evidence="keys")
LIGHTNING = Training("step-distilled", "lightning", evidence="metadata")


def networks(model: str, training: Training, name: str = "mine.safetensors") -> Inventory:
    """All files of a model, its networks being one plain file per expert of this training."""
    spec, rest = find_model(model), disk(model).files
    mine = [
        FoundFile(
            model=spec.name, component=expert.component, path=f"/weights/{expert.component}/{name}", bytes=28 << 30,
            training=training,
        )
        for expert in spec.experts
    ]  # fmt: skip
    return Inventory(files=(*mine, *(file for file in rest if not file.component.startswith("dit"))))


def told(plan, *keys):
    return {reason.key: reason.numbers for reason in plan.reasons if reason.key in keys}


def test_seconds_of_weights_on_this_disk_are_those_of_their_own_schedule():
    spec, where = find_model("wan2.1-14b"), card(80)
    turbo, plain = (installed(where, files)[spec.name] for files in (disk(spec.name), networks(spec.name, PLAIN)))
    assert "schedule_base" in [reason.key for reason in plain.reasons]
    # 50 steps of two passes instead of 4 of one
    assert plain.fit.seconds > 10 * turbo.fit.seconds
    assert spec.name not in installed(where, Inventory())


def test_a_variant_that_is_here_takes_the_schedule_of_the_file_that_is_here():
    spec, where = find_model("wan2.2-t2v-a14b"), card(80)
    (variant,) = spec.variants
    here = networks(spec.name, LIGHTNING)
    published, mine = fits_of(spec, where)[variant], fits_of(spec, where, here=here)[variant]
    assert mine.seconds < published.seconds / 5  # 4 steps without guidance instead of 40 with
    assert "schedule_step_distilled" in [reason.key for reason in installed(where, here)[spec.name].reasons]


def test_what_would_be_downloaded_beside_other_weights_keeps_its_own_schedule():
    spec, where = find_model("wan2.1-14b"), card(80)
    before, beside = fits_of(spec, where), fits_of(spec, where, here=networks(spec.name, PLAIN))
    assert {one.name: fit.seconds for one, fit in beside.items()} == {one.name: f.seconds for one, f in before.items()}


@pytest.mark.parametrize("model", ["wan2.1-14b", "wan2.2-t2v-a14b"])
def test_a_plan_names_the_files_that_it_is_about(model):
    files = told(plan_request(ask(model), card(80), networks(model, PLAIN)), "network_files")["network_files"]["files"]
    assert files == ", ".join(f"{expert.component}/mine.safetensors" for expert in find_model(model).experts)
    for words in WORDS:
        assert "mine.safetensors" in words.reason("network_files", {"files": files})


@pytest.mark.parametrize("where", [card(24), pretend(card(8), 24)], ids=["a card", "a pretended card"])
def test_a_plan_says_what_is_not_on_this_disk_and_how_to_get_it(where):
    plan = plan_request(ask(), where, Inventory())
    numbers = told(plan, "download")["download"]
    assert numbers["bytes"] > 20e9
    without_vae = Inventory(files=tuple(file for file in disk("wan2.1-14b").files if file.component != "vae"))
    parts = told(plan_request(ask(), where, without_vae), "download", "download_parts")
    assert parts["download_parts"]["files"] == "Wan2.1_VAE.pth"
    assert not told(plan_request(ask(), where, disk("wan2.1-14b")), "download", "download_parts")
    for words in WORDS:
        for key, found in (("download", numbers), ("download_parts", parts["download_parts"])):
            assert "turbodiff models pull Wan2.1-14B" in words.reason(key, found)


def test_networks_that_are_published_in_one_form_alone_are_counted_whatever_is_asked_for():
    plan = plan_request(ask("wan2.2-t2v-a14b", quant_linear="on"), card(24), Inventory())
    assert told(plan, "download")["download"]["bytes"] > 57e9


def test_a_gguf_file_that_cannot_be_read_for_want_of_its_package_is_said_with_the_command():
    one = PassedOver(
        path="/weights/wan-Q4_K_M.gguf", code="gguf_missing", what="x", expected="pip install 'turbodiff[gguf]'",
        component="dit", models=("wan2.1-14b",),
    )  # fmt: skip
    rest = tuple(file for file in disk("wan2.1-14b").files if file.component != "dit")
    plan = plan_request(ask(), card(24), Inventory(files=rest, passed_over=(one,)))
    numbers = told(plan, "package_missing", "download")["package_missing"]
    assert "download" not in told(plan, "download"), "what is here need not be fetched"
    for words in WORDS:
        said = words.reason("package_missing", numbers)
        assert "wan-Q4_K_M.gguf" in said and "pip install 'turbodiff[gguf]'" in said
    good = plan_request(ask(), card(24), disk("wan2.1-14b").model_copy(update={"passed_over": (one,)}))
    assert not told(good, "package_missing"), "another file is taken"


def test_ways_out_with_a_model_that_is_not_here_say_so_on_a_pretended_card_too():
    plan = plan_request(ask(), pretend(card(8), 12), disk("wan2.1-14b"))
    other = [way for way in plan.alternatives if any(change.field == "model" for change in way.changes)]
    assert other and all(way.download_bytes > 0 for way in other)
    same = [way for way in plan.alternatives if way not in other]
    assert same and all(way.download_bytes == 0 for way in same)


@pytest.mark.parametrize("words", WORDS, ids=["en", "zh"])
def test_every_size_and_every_duration_of_a_reason_has_its_unit(words):
    for key, names in REASON_KEYS.items():
        for name in names:
            size, duration = "bytes" in name, "seconds" in name or name.endswith("_s")
            if f"{{{name}}}" not in shared_catalogue()[f"reason.{key}"][0] or not (size or duration):
                continue
            rest = {other: 1 for other in names if other != name}
            said = words.reason(key, rest | {name: 423.4 if duration else 423 << 30})
            assert (words.seconds(423.4) if duration else words.gib(423 << 30)) in said, (key, name, said)
