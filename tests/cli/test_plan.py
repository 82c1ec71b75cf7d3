"""What a plan says in a shell: sentences, and other ways to run in one line."""

import json
import re

import pytest

from tests.plan.machines import ask, card, disk, gpu, machine
from turbodiff.cli.show import alternatives_line, plan_lines, plan_table
from turbodiff.plan.planner import plan_request
from turbodiff.spec.wording import Words

EN, ZH = Words("en"), Words("zh")
ON_DISK_14B = disk("wan2.1-14b")


@pytest.mark.parametrize("words", [EN, ZH], ids=["en", "zh"])
def test_every_reason_is_a_sentence(words, capsys):
    for plan in (
        plan_request(ask(), card(12), disk()),
        plan_request(ask("wan2.2-a14b", steps=2, sigma_max=200), card(24), ON_DISK_14B),
        plan_request(ask("wan2.1-1.3b", resolution="720p"), card(5), disk()),
    ):
        plan_table(plan, words)
        said = capsys.readouterr().out
        for reason in plan.reasons:
            assert f"{reason.key} {{" not in said
            assert words.reason(reason.key, reason.numbers) in said
        assert not re.search(r"[{}]|\d{7}", said)


def test_other_ways_to_run_are_one_line_of_frames_size_memory_and_time():
    plan = plan_request(ask(), card(24), disk())
    line = alternatives_line(plan, EN)
    assert re.fullmatch(r"or instead: \d+ frames at \d+p: [\d.]+ GiB, .*?; \d+ at 720p: [\d.]+ GiB, .*", line)
    first = plan.alternatives[0]
    assert f": {EN.gib(first.peak_bytes)}, {EN.seconds(first.seconds)}" in line
    assert alternatives_line(plan, ZH).startswith("也可以：480p 81帧：")


def test_a_model_that_must_be_fetched_says_how_large_it_is():
    line = alternatives_line(plan_request(ask(), card(12), ON_DISK_14B), EN)
    assert re.search(r"with Wan2\.1-1\.3B: [\d.]+ GiB, .* to download", line)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_text_encoder_of_fewer_bits_is_a_flag_and_stands_in_the_plan(turbodiff, monkeypatch, dtype):
    monkeypatch.setenv("TURBODIFF_PRETEND_VRAM", "23.5")
    code, said = turbodiff("plan", "a cat", "--model", "Wan2.1-1.3B", "--text-dtype", dtype, "--json")
    plan = json.loads(said.out)
    assert (code, plan["levers"]["text_dtype"], plan["request"]["text_dtype"]) == (0, dtype, dtype)
    code, said = turbodiff("plan", "a cat", "--model", "Wan2.1-1.3B", "--text-dtype", "int4")
    assert code == 2 and "text_dtype" in said.err


def test_a_rounded_exchange_is_a_flag_and_stands_in_the_plan(turbodiff):
    code, said = turbodiff("plan", "a cat", "--cards", "2", "--exchange", "int8", "--json")
    plan = json.loads(said.out)
    assert (code, plan["levers"]["exchange"], plan["request"]["exchange"]) == (0, "int8", "int8")
    assert "exchanged_in_int8" in [reason["key"] for reason in plan["reasons"]]
    code, said = turbodiff("plan", "a cat", "--exchange", "int4")
    assert code == 2 and "exchange" in said.err


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_driver_that_does_not_answer_is_said_beside_a_plan_and_before_a_refusal(turbodiff, tmp_path, lang):
    silent = (
        'gpu_state = "hang"\ngpu_reason = "gpu_hang"\ngpu_error = "2 s"\nram_total_gib = {0}\nram_available_gib = {0}'
    )
    (tmp_path / "large.toml").write_text(silent.format(64))
    (tmp_path / "small.toml").write_text(silent.format(3))
    why = Words(lang).reason("gpu_hang", {"got": "2 s"})
    code, told = turbodiff("plan", "a cat", "--machine", "large.toml", "--lang", lang)
    assert code == 0 and told.out.count(why) == 1
    code, told = turbodiff("plan", "a cat", "--machine", "small.toml", "--lang", lang, "--model", "Wan2.1-14B")
    assert code == 5 and why in told.err.splitlines()[0]


@pytest.mark.parametrize("words", [EN, ZH], ids=["en", "zh"])
def test_each_card_of_several_has_a_line_and_what_they_send_a_rate(words):
    here = machine(*[gpu(24, index=index, link_bytes_s=((2, 9.04e9),)) for index in range(2)])
    plan = plan_request(ask("wan2.1-14b", cards=2), here, ON_DISK_14B)
    lines = plan_lines(plan, words)
    for share in plan.shares:
        (line,) = [line for line in lines if line.startswith(share.device)]
        assert EN.gib(share.peak_bytes) in line and EN.gib(share.budget_bytes) in line
    (sent,) = [words.say(reason) for reason in plan.reasons if reason.key == "link_measured"]
    assert "9.0 GB/s" in sent
