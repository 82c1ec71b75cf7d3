"""What `turbodiff calibrate --quick` kept reaches the machine that plans are made for, and nothing else does."""

from datetime import datetime

import pytest

from tests.plan.machines import ask, card, disk, gpu, machine
from turbodiff.gpu import probe
from turbodiff.gpu.card_measurements import (
    FILE,
    CardMeasurement,
    all_measurements,
    card_measurements,
    keep_link,
    keep_measurement,
    measurement_of,
)
from turbodiff.gpu.probe import WSL_PINNED_BYTES, page_lock_limit
from turbodiff.plan.planner import plan_request
from turbodiff.plan.roofline import speed_of
from turbodiff.spec.events import LinkEvent
from turbodiff.spec.files import state_folder
from turbodiff.spec.numbers import GIB, MIB
from webui.panels import meter
from webui.wording import Words

ANSWER_S = 30.0
AT = datetime(2026, 11, 29).astimezone()


def measured(**fields) -> CardMeasurement:
    known = {"name": "NVIDIA GeForce RTX 4090", "total_bytes": 24 * GIB, "driver": "580", "torch": "2.13.0", "at": AT}
    return CardMeasurement.model_validate({**known, "context_bytes": 400 * MIB, **fields})


def test_a_record_is_of_one_card_one_driver_and_one_torch():
    keep_measurement(measured())
    (kept,) = card_measurements()
    assert measurement_of((kept,), gpu(24), "580", "2.13.0") == kept
    for other in ((gpu(16), "580", "2.13.0"), (gpu(24), "615", "2.13.0"), (gpu(24), "580", "2.14.0"),
                  (gpu(24, name="NVIDIA L4"), "580", "2.13.0"), (gpu(24), None, None)):  # fmt: skip
        assert measurement_of((kept,), *other) is None


def test_a_new_measurement_takes_the_place_of_the_older_one_and_of_no_other():
    keep_measurement(measured())
    keep_measurement(measured(driver="615"))
    keep_measurement(measured(context_bytes=500 * MIB))
    assert [(one.driver, one.context_bytes) for one in card_measurements()] == [
        ("615", 400 * MIB),
        ("580", 500 * MIB),
    ]


def test_a_rate_that_a_shared_clip_measured_is_planned_with_until_calibrate_measures_it():
    here = machine(gpu(24), gpu(24, index=1), driver="580", torch="2.13.0")
    for bytes_s in (5e9, 7e9):
        keep_link(here.gpus[0], here, LinkEvent(cards=2, bytes_s=bytes_s))
    known = all_measurements()
    assert known.facts_of(gpu(24), "580", "2.13.0") == {"link_bytes_s": ((2, 7e9),)}, "in the place of the older one"
    assert known.facts_of(gpu(24), "615", "2.13.0") == known.facts_of(gpu(16), "580", "2.13.0") == {}
    assert "measured" not in known.facts_of(gpu(24), "580", "2.13.0"), "the rest of the card is to be measured yet"
    keep_measurement(measured(link_bytes_s=((2, 9e9),)))
    keep_link(here.gpus[0], here, LinkEvent(cards=4, bytes_s=3e9))
    facts = all_measurements().facts_of(gpu(24), "580", "2.13.0")
    assert facts["link_bytes_s"] == ((2, 9e9), (4, 3e9)) and facts["context_bytes"] == 400 * MIB
    assert len(card_measurements()) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"cards": [{}]}', "{"])
def test_a_damaged_file_counts_as_none(text):
    state_folder().mkdir(parents=True, exist_ok=True)
    (state_folder() / FILE).write_text(text)
    assert card_measurements() == ()
    keep_measurement(measured())
    assert len(card_measurements()) == 1


def test_the_machine_carries_what_was_measured_on_its_card(fake_nvml):
    fake_nvml("normal")
    before = probe.machine_now(ANSWER_S)
    (seen,) = before.gpus
    assert seen.measured == () and seen.context_bytes is None
    about = {"name": seen.name, "total_bytes": seen.total_bytes, "driver": before.driver, "torch": before.torch}
    keep_measurement(
        measured(**about, pcie_bytes_s=11e9, vmm_works=False, page_locked_bytes=GIB, page_lock_refused=True)
    )
    after = probe.machine_now(ANSWER_S)
    (known,) = after.gpus
    assert (known.context_bytes, known.pcie_bytes_s, known.vmm_works) == (400 * MIB, 11e9, False)
    assert set(known.measured) == {"context_bytes", "pcie_bytes_s", "vmm_works"} and known.measured_on == "2026-11-29"
    assert after.allocator == "limited" and after.pinned_limit_bytes == GIB
    keep_measurement(measured(**{**about, "driver": "1.0"}, pcie_bytes_s=1e9))
    assert probe.machine_now(ANSWER_S).gpus == after.gpus


@pytest.mark.parametrize(
    "found, wsl, limit",
    [
        (None, False, None),
        (None, True, WSL_PINNED_BYTES),
        (measured(page_locked_bytes=4 * GIB), False, None),
        (measured(page_locked_bytes=4 * GIB), True, 4 * GIB),
        (measured(page_locked_bytes=0), True, WSL_PINNED_BYTES),
        (measured(page_locked_bytes=GIB, page_lock_refused=True), True, GIB),
        (measured(page_locked_bytes=0, page_lock_refused=True), False, 0),
    ],
)
def test_page_locked_memory_ends_where_more_was_refused(found, wsl, limit):
    assert page_lock_limit(found, wsl) == limit


def test_a_plan_goes_by_what_the_card_did():
    plain = plan_request(ask("wan2.1-1.3b"), card(24), disk())
    facts = measured(context_bytes=900 * MIB, block_rate=0.5, decode_rate=0.25).facts
    told = plan_request(ask("wan2.1-1.3b"), machine(gpu(24, **facts)), disk())
    for before, after in zip(plain.phases, told.phases, strict=True):
        assert after.peak_bytes - before.peak_bytes == 300 * MIB
        if before.name == "vae_decode":
            assert after.seconds > 3.5 * before.seconds
    halved, whole = speed_of(gpu(24, **facts), 8), speed_of(gpu(24), 8)
    assert (halved.bf16_flops, halved.int8_flops) == (whole.bf16_flops / 2, whole.int8_flops / 2)
    assert halved.conv_flops == whole.conv_flops / 4


@pytest.mark.parametrize("lang, word", [("en", "measured on this card"), ("zh", "本卡实测")])
def test_the_meter_says_measured_on_this_card_instead_of_predicted(lang, word):
    words = Words(lang)
    plain = plan_request(ask("wan2.1-1.3b"), card(24), disk())
    told = plan_request(ask("wan2.1-1.3b"), machine(gpu(24, **measured().facts)), disk())
    shown = [str(meter.draw(meter.meter(plan, words), words)) for plan in (plain, told)]
    assert [word in text for text in shown] == [False, True]
    assert [words("meter.predicted") in text for text in shown] == [True, False]
