"""Each file of a model is marked before its download with what a plan of the form's first clip says of it."""

import pytest

from tests.plan.machines import card, gpu, machine
from turbodiff.plan import planner
from turbodiff.plan.hardware import Machine
from turbodiff.plan.planner import plan_request
from turbodiff.plan.tiers import counted_on, downloaded, first_request, fits_of, suited
from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import Inventory, Variant, all_models, find_model
from turbodiff.spec.numbers import GIB
from turbodiff.spec.plan import Change, Fit
from turbodiff.spec.wording import Words

BIG, PAIR = find_model("Wan2.1-14B"), find_model("Wan2.2-A14B")


def fit(name: str, where: Machine, model: str = "Wan2.1-14B") -> Fit:
    return fits_of(find_model(model), where)[find_model(model).variant(name)]


def test_plain_and_quant_at_480p_and_720p_are_told_apart_by_name():
    assert [variant.name for variant in BIG.variants] == ["480p-quant", "480p-plain", "720p-quant", "720p-plain"]
    assert [variant.name for variant in PAIR.variants] == ["720p-quant", "720p-plain"]
    assert [variant.name for variant in find_model("Wan2.2-T2V-A14B").variants] == ["plain"]
    for spec in all_models():
        for variant in spec.variants:
            files = spec.files_of(variant)
            assert [file.component for file in files] == list(dict.fromkeys(file.component for file in spec.files))
            networks = [file for file in files if file.component.startswith("dit")]
            assert {(file.quant, file.resolution) for file in networks} == {variant}
    with pytest.raises(RequestError, match=r"480p-quant \| 480p-plain"):
        BIG.variant("1080p")


@pytest.mark.parametrize(
    ("total_gib", "name", "variant"),
    [
        (23.5, "NVIDIA GeForce RTX 4090", "480p-quant"), (31.4, "NVIDIA GeForce RTX 5090", "720p-quant"),
        (47.5, "NVIDIA RTX A6000", "720p-quant"), (80, "NVIDIA A100-SXM4-80GB", "720p-quant"),
        (80, "NVIDIA H100 80GB HBM3", "720p-plain"), (95.6, "NVIDIA H20", "720p-plain"),
        (31.7, "Tesla V100-SXM2-32GB", "720p-quant"),
    ],
)  # fmt: skip
def test_the_file_that_is_proposed_is_the_one_that_the_form_starts_with(total_gib, name, variant):
    assert suited(BIG, card(total_gib, name=name)).name == variant


def test_where_the_first_clip_would_be_lowered_the_resolution_that_runs_as_it_is_goes_first():
    marks = {variant.name: told.mark for variant, told in fits_of(BIG, card(6)).items()}
    assert (marks["480p-quant"], marks["720p-quant"]) == ("fits", "changes")
    assert suited(BIG, card(6)).name == "480p-quant"


def test_without_a_card_the_smaller_file_is_proposed():
    assert suited(BIG, Machine()) == Variant(quant=True, resolution="720p")


@pytest.mark.parametrize("model", ["Wan2.1-1.3B", "Wan2.1-14B", "Wan2.2-A14B", "Wan2.2-T2V-A14B"])
@pytest.mark.parametrize("total_gib", [2, 7.6, 11.5, 23.5, 79])
def test_a_mark_is_what_the_form_will_say_once_the_file_is_here(model, total_gib):
    spec, where = find_model(model), card(total_gib)
    for variant, told in fits_of(spec, where).items():
        asked = first_request(spec, where, variant)
        both, sizes = len({one.quant for one in spec.variants}) > 1, {one.resolution for one in spec.variants}
        assert asked.quant_linear == (("on" if variant.quant else "off") if both else "auto")
        assert asked.resolution == (variant.resolution if len(sizes) > 1 else first_request(spec, where).resolution)
        try:
            plan = plan_request(asked, where, downloaded(spec, [variant]))
        except planner.Refusal as error:
            assert (told.mark, told.need_bytes, told.have_bytes) == ("no", error.need_bytes, error.have_bytes)
        else:
            lowered = any(change.lossy for change in plan.changes)
            assert (told.mark, told.band, told.seconds) == ("changes" if lowered else "fits", plan.band, plan.seconds)


@pytest.mark.parametrize("model", [spec.name for spec in all_models() if not spec.bundled])
@pytest.mark.parametrize("total_gib", [None, 7.6, 11.5, 23.5, 79])
def test_before_a_download_the_form_plans_the_very_clip_that_the_list_of_downloads_promises(model, total_gib):
    spec, where = find_model(model), Machine() if total_gib is None else card(total_gib)
    best = suited(spec, where)
    told, asked = fits_of(spec, where)[best], first_request(spec, where)
    disk = counted_on(asked, where, None, Inventory())
    plan = plan_request(asked, where, disk, policy="anyway")
    assert (plan.band, plan.seconds) == (told.band, told.seconds)
    assert {file.path for file in disk.files} == {file.names[0] for file in spec.files_of(best)}
    (needed,) = [reason.numbers["bytes"] for reason in plan.reasons if reason.key == "download"]
    assert needed == sum(file.bytes for file in spec.files_of(best))


def test_a_plan_counts_on_the_files_of_the_precision_that_is_asked_for_and_on_none_that_are_here():
    where, plain = card(11.5), BIG.variant("720p-plain")
    asked = first_request(BIG, where).model_copy(update={"quant_linear": "off"})
    assert {file.quant for file in counted_on(asked, where, None, Inventory()).files if "dit" in file.component} == {
        False
    }
    here = Inventory(
        files=tuple(file.model_copy(update={"to_fetch": False}) for file in downloaded(BIG, [plain]).files)
    )
    assert counted_on(first_request(BIG, where), where, None, here) is here


def test_what_fits_what_changes_and_what_does_not_fit_is_told_in_both_languages():
    fits, changes, none = fit("480p-quant", card(23.5)), fit("720p-quant", card(6)), fit("720p-quant", card(1.5))
    assert [found.mark for found in (fits, changes, none)] == ["fits", "changes", "no"]
    for lang in ("en", "zh"):
        words = Words(lang)
        assert words.seconds(fits.seconds) in words.fit(fits)
        assert f"{fits.frames}" in words.fit(fits) and fits.size in words.fit(fits)  # which clip that is
        assert "65" in words.fit(changes) and words.seconds(changes.seconds) in words.fit(changes)
        made = Change(field="quant_linear", from_value="off", to_value="on", lossy=True)
        assert "int8" in words.fit(changes._replace(changes=(made,)))
        assert words.gib(none.need_bytes) in words.fit(none) and words.gib(
            none.need_bytes - none.have_bytes
        ) in words.fit(none)


def test_an_hour_of_the_same_machine_costs_one_look(monkeypatch):
    where = card(23.5)
    first = fits_of(BIG, where)
    monkeypatch.setattr("turbodiff.plan.tiers.plan_request", None)  # would raise if it were asked again
    for load in (0.1, 0.9):
        busy = gpu(23.5, utilisation=load, temperature_c=40 + 40 * load, power_w=400 * load)
        assert fits_of(BIG, machine(busy)) == first


def test_another_program_on_the_card_moves_the_mark():
    full = gpu(23.5, free_bytes=5 * GIB, used_bytes=round(18.5 * GIB))
    assert fit("720p-quant", card(23.5)).mark == "fits"
    assert fit("720p-quant", machine(full)).mark == "changes"


def test_a_file_in_fp16_is_marked_as_one_that_is_made_at_load_time():
    for spec in all_models():
        for file in spec.files:
            if file.component.startswith("dit"):
                assert file.converted == ("fp16" in file.names[0]), file.names[0]
    spec = find_model("Wan2.2-T2V-A14B")
    assert {file.converted for file in downloaded(spec, spec.variants).files if file.component != "vae"} == {
        True,
        False,
    }
