"""What changed beside a job is said in the shell too: by `generate`, `jobs watch` and `jobs show`, in its language."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbodiff.cli.show import event_lines
from turbodiff.jobs.attempts import claim, record_event
from turbodiff.jobs.store import Store
from turbodiff.spec.events import NoticeEvent
from turbodiff.spec.wording import Words, shared_catalogue
from turbodiff.studio import Studio

PROMPT = "a red circle moves right on a black background"
YELLOW = Path(__file__).parents[1] / "demo" / "data" / "yellow_lora.safetensors"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_notice_is_one_line_in_the_shells_language(lang):
    keys = [name.removeprefix("notice.") for name in shared_catalogue() if name.startswith("notice.")]
    assert {"latents_resumed", "one_rung_lower", "levers_pulled", "lora_names_unused"} <= set(keys)
    for key in keys:
        (line,) = event_lines(NoticeEvent(key=key, text="", numbers={}), Words(lang))
        assert line.startswith({"en": "note: ", "zh": "提示: "}[lang])


@pytest.fixture
def failed(tmp_path, monkeypatch):
    """A job of a served app that resumed its latents and then failed."""
    monkeypatch.chdir(tmp_path)
    studio = Studio()
    job = studio.submit({"prompt": PROMPT, "seed": 42})
    store = Store(studio.state)
    claimed = claim(store)
    assert claimed is not None
    record_event(store, NoticeEvent(job=job, attempt=claimed.attempt, key="latents_resumed", text="resumed"))
    studio.cancel(job)
    with store.write() as db:
        db.execute("UPDATE job SET state = 'cancelled' WHERE id = ?", (job,))
    store.close()
    return str(job)


def test_a_watched_job_tells_its_notices_and_how_it_ended(turbodiff, failed, monkeypatch):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    code, said = turbodiff("jobs", "watch", failed)
    assert code == 1 and "提示: 上一次尝试的潜变量" in said.err and "已取消" in said.err
    monkeypatch.setenv("LC_ALL", "C")
    assert "note: The latents of an earlier attempt" in turbodiff("jobs", "watch", failed)[1].err
    (line,) = turbodiff("jobs", "watch", failed, "--json")[1].out.splitlines()
    assert json.loads(line)["fields"]["key"] == "latents_resumed"
    assert "The latents of an earlier attempt" in turbodiff("jobs", "show", failed)[1].out
    assert json.loads(turbodiff("jobs", "show", failed, "--json")[1].out)["notices"][0]["key"] == "latents_resumed"


@pytest.mark.parametrize("as_json", [False, True])
def test_unused_names_of_a_lora_are_said_while_generating(turbodiff, tmp_path, as_json):
    foreign = {f"diffusion_model.blocks.0.cross_attn.k_img.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}
    save_file(load_file(YELLOW) | foreign, tmp_path / "more.safetensors")
    small = ("--frames", "5", "--steps", "1", "--seed", "1", "--lora", str(tmp_path / "more.safetensors"))
    code, said = turbodiff("generate", PROMPT, *small, *(["--json"] if as_json else []))
    assert code == 0, said.err
    if as_json:
        (notice,) = [event for event in map(json.loads, said.out.splitlines()) if event["type"] == "notice"]
        assert notice["fields"]["key"] == "lora_names_unused" and notice["fields"]["numbers"]["n"] == 2
    else:
        assert "note: more.safetensors" in said.err and "k_img.lora_A.weight" in said.err
