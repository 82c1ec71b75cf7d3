"""Buttons that fill the form: each gives values that make a legal request, and nonsense gives one clear error."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media.clips import shapes, write
from turbodiff.archive import clips, seeds
from turbodiff.jobs.store import Store
from turbodiff.spec.cached import CachedValue
from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import find_model
from turbodiff.spec.request import make_request
from turbodiff.studio import Studio
from turbodiff.supervisor import recovery
from webui import actions, form, form_actions, gallery_actions
from webui.panels import stage
from webui.snapshot import StudioReader
from webui.wording import Words

INITIAL_UI_STATE = {"at": "", "search": "", "left": "", "agreed": ""}
WAN = {**form.defaults(find_model("wan2.1-14b")), "prompt": "a cat runs", "pinned": [], "loras": "", "seed": "7"}


CLIP = "t2v_5_demo_20261123_120000"


@pytest.fixture
def reader(tmp_path):
    """A reader with one clip of nine frames in its library."""
    asked = make_request({"prompt": "a red circle moves right", "num_frames": 9, "seed": 5}).model_dump(mode="json")
    day = tmp_path / "outputs" / "2026-11-23"
    day.mkdir(parents=True)
    write(day / f"{CLIP}.mp4", shapes(9), settings={"request": asked})
    reader = StudioReader(Studio(tmp_path / "state", tmp_path / "outputs"))
    yield reader
    reader.studio.close()


def fill(reader, name, argument="", values=WAN):
    return form_actions.fill(reader, name, argument, values, INITIAL_UI_STATE)


def test_an_alternative_changes_only_fields_of_the_form(reader):
    filled = fill(reader, "fill", json.dumps({"num_frames": 49, "image": "/etc/passwd", "prompt": "x", "other": 1}))
    assert filled["num_frames"] == 49
    assert filled["prompt"] == "a cat runs" and "other" not in filled and "image" not in filled


def test_a_lock_pins_a_field_once_and_only_what_can_be_locked(reader):
    once = fill(reader, "pin", "num_frames")
    assert once["pinned"] == ["num_frames"]
    assert fill(reader, "pin", "num_frames", once)["pinned"] == ["num_frames"]
    assert fill(reader, "pin", "prompt")["pinned"] == []


def test_loras_go_on_change_strength_and_come_off(reader):
    on = fill(reader, "lora", json.dumps({"name": "style.safetensors", "on": True}))
    assert form.loras(on["loras"]) == [{"name": "style.safetensors", "strength": 1.0, "expert": "both"}]
    weak = fill(reader, "lora", json.dumps({"name": "style.safetensors", "strength": 0.6}), on)
    high = fill(reader, "lora", json.dumps({"name": "motion.safetensors", "expert": "high"}), weak)
    assert [(row["name"], row["strength"], row["expert"]) for row in form.loras(high["loras"])] == [
        ("motion.safetensors", 1.0, "high"),
        ("style.safetensors", 0.6, "both"),
    ]
    assert form.loras(fill(reader, "lora", json.dumps({"name": "style.safetensors", "on": False}), weak)["loras"]) == []
    assert fill(reader, "lora", json.dumps({"name": "x", "strength": {}}))["loras"] == ""


def test_the_first_aid_sets_the_form_to_what_fits_nearly_every_card(reader):
    filled = fill(reader, "smaller")
    asked = (filled["model"], filled["resolution"], filled["num_frames"], filled["steps"], filled["quant_linear"])
    assert asked == ("wan2.1-1.3b", "480p", 49, 2, "on")


def test_a_frame_of_a_clip_becomes_the_picture_of_the_next(reader):
    filled = fill(reader, "animate", f"{CLIP} 0.3")
    assert filled["kind"] == "i2v" and filled["prompt"] == "a red circle moves right"
    got = np.asarray(Image.open(filled["image"]).convert("RGB"), np.int16)
    errors = [np.abs(got - frame.astype(np.int16)).mean() for frame in shapes(9)]
    assert int(np.argmin(errors)) == 4  # 0.3 s at 16 frames a second
    assert Path(filled["image"]).is_relative_to(reader.studio.state / "uploads")
    assert fill(reader, "animate", f"{CLIP} ")["image"].endswith("frame8.png")  # no player: the last frame
    with pytest.raises(RequestError):
        fill(reader, "animate", "../../etc/passwd 0")


def test_polish_keeps_the_seed_and_the_prompt_of_the_clip_it_comes_from(reader):
    filled = fill(reader, "round", f"polish {CLIP}")
    assert (filled["prompt"], filled["seed"], filled["steps"]) == ("a red circle moves right", "5", 4)


@pytest.mark.parametrize("name", ["fill", "lora"])
@pytest.mark.parametrize("argument", ["", "[]", "1", "{", '"x"', "[" * 5000], ids=range(6))
def test_what_no_button_carries_is_one_clear_error(reader, name, argument):
    with pytest.raises(RequestError) as caught:
        fill(reader, name, argument)
    assert caught.value.code == "unknown_action"


def test_what_a_form_cannot_hold_is_left_out():
    assert form.from_request({"loras": "0"})["loras"] == form.from_request({"loras": ["x"]})["loras"] == ""
    odd = {"steps": "4", "topk": float("inf"), "pinned": "model", "fit": ["crop"], "seed": None, "prompt": "x"}
    assert form.sanitize(odd) == {"seed": None, "prompt": "x"}


def test_a_list_of_prompts_is_text_and_not_too_long(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n# two\nthree", "utf-8")
    assert actions.batch_text(tmp_path / "a.txt") == "one\n# two\nthree"
    for name, data in (("b.txt", b"\xff\xfe\x00"), ("c.txt", b" "), ("d.txt", b"x" * (actions.MAX_BATCH_BYTES + 1))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RequestError, match="prompts"):
            actions.batch_text(tmp_path / name)


@pytest.mark.parametrize("codec", ["gbk", "gb18030", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_a_list_of_prompts_is_read_in_any_chinese_encoding(tmp_path, codec):
    text = "樱花树下的武士,风吹起和服下摆\r\n赛博朋克雨夜,霓虹灯在街道上倒影\r\n"
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    assert actions.batch_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize("codec", ["big5", "shift_jis", "hz", "utf-7", "euc_jp"])
def test_a_list_of_prompts_in_another_encoding_is_refused_with_its_line(tmp_path, codec):
    prompt = "夜的街上一匹白犬" if codec in ("big5", "hz") else "夜の街を走る白い猫の写真"
    (tmp_path / "a.txt").write_bytes(f"a cat\n{prompt}\n".encode(codec))
    with pytest.raises(RequestError, match=r"a.txt \(line 2: "):
        actions.batch_text(tmp_path / "a.txt")


def test_a_line_that_shows_nothing_is_no_prompt_of_a_batch(reader):
    """Such a line ended the batch with an error, after the lines before it were queued."""
    lines = "a cat\n\u200b\n&zwnj;&#8203;\n\u3164\n# a comment\na dog\n"
    values = {**WAN, **form.defaults(find_model("demo"))}
    actions.generate_batch(reader, values, lines, INITIAL_UI_STATE, Words("en"))
    assert {job.request.prompt for job in reader.studio.jobs()} == {"a cat", "a dog"}
    with pytest.raises(RequestError, match="1 to 100"):
        actions.generate_batch(reader, values, "\u00ad\n\ufe0f", INITIAL_UI_STATE, Words("en"))


def test_each_expert_of_two_has_its_own_strength():
    text = form.with_lora("", "a", {"on": True})
    text = form.with_lora(text, "a", {"low": 0.5})
    assert [(row["strength"], row["expert"]) for row in form.loras(text)] == [(1.0, "high"), (0.5, "low")]
    assert form.strengths(form.loras(text)) == {"a": (1.0, 0.5)}
    text = form.with_lora(text, "a", {"high": 0})
    assert [(row["strength"], row["expert"]) for row in form.loras(text)] == [(0.5, "low")]
    assert [row["expert"] for row in form.loras(form.with_lora(text, "a", {"strength": 2}))] == ["both"]


@pytest.fixture
def archived(reader):
    """The reader's clip with its sidecar and its row in the archive."""
    (clip,) = reader.studio.clips()
    clips.sidecar_path(clip.path).write_text(clip.sidecar.model_dump_json(), "utf-8")
    store = Store(reader.studio.state)
    seeds.add_clip(store, clip.path, clip.sidecar)
    store.close()
    return reader


def rated(reader, *clicks):
    """The archive's rating after clicks on the card, and the card as it is drawn then."""
    for name, argument in clicks:
        actions.act(reader, name, f"{CLIP} {argument}", INITIAL_UI_STATE, Words("zh"))
    (row,) = reader.studio.seeds()
    return row.row.rating, stage.draw_card(stage.card(reader.clip(CLIP), Words("zh")), Words("zh"))


def test_a_rating_holds_stars_and_words_and_neither_takes_the_other_away(archived):
    assert rated(archived, ("praise", " 动作流畅,光影绝美 "))[0] == "动作流畅,光影绝美"
    rating, card = rated(archived, ("rate", "4 动作流畅,光影绝美"))
    assert rating == "★★★★☆ 动作流畅,光影绝美"
    assert card.count('class="td-btn on"') == 4 and 'value="动作流畅,光影绝美"' in card
    assert rated(archived, ("praise", "倒影稍糊 ★"))[0] == "★★★★☆ 倒影稍糊 ★"
    assert rated(archived, ("note", "再来"))[0] == "★★★★☆ 倒影稍糊 ★"
    assert rated(archived, ("praise", "☆ 不行"))[0] == "☆ 不行"  # stars that were typed
    rating, card = rated(archived, ("praise", ""), ("rate", "2"))
    assert rating == "★★☆☆☆" and card.count('class="td-btn on"') == 2
    assert "| ★★☆☆☆ | 再来 |" in (archived.studio.outputs / "seeds.md").read_text("utf-8")


def test_a_star_takes_along_the_words_that_were_typed_beside_it(archived):
    card = rated(archived)[1]
    fields = set(re.findall(r'data-from="(praise-[a-z]+)"', card))
    assert len(fields) == 1 and f'id="{fields.pop()}"' in card
    assert card.count("data-from=") == 7  # five stars and two buttons


def test_a_clip_is_found_however_many_newer_ones_there_are(reader, monkeypatch):
    monkeypatch.setattr("webui.snapshot.MAX_CLIPS", 1)
    day = reader.studio.outputs / "2026-11-24"
    day.mkdir()
    for second in range(3):
        (day / f"t2v_1_demo_20261124_00000{second}.mp4").write_bytes(b"newer")
    (day / "linked.mp4").symlink_to(reader.studio.outputs / "2026-11-23" / f"{CLIP}.mp4")
    assert [clip.id for clip in reader._clips()] == ["t2v_1_demo_20261124_000002"]
    found = reader.clip(CLIP)
    assert found is not None and found.request.seed == 5
    assert reader.clip("linked") is None and reader.clip("t2v_404") is None and reader.clip("../2026-11-23/x") is None


def test_a_row_of_the_archive_is_rated_and_used_however_many_newer_ones_there_are(archived):
    store = Store(archived.studio.state)
    with store.write() as db:
        row = "INSERT INTO seed (path, prompt, seed, model, resolution, created_s) VALUES (?, 'x', '1', 'm', 'r', 0)"
        db.executemany(row, [(f"/elsewhere/{number}.mp4",) for number in range(10_050)])
    store.close()
    archived.rate(CLIP, {"rating": "★★★", "note": "old"})
    first = archived.studio.seed(clip=CLIP)
    assert first == archived.studio.seed(row=1) and (first.row.rating, first.row.note) == ("★★★", "old")
    assert "| ★★★ | old |" in (archived.studio.outputs / "seeds.md").read_text("utf-8")
    assert fill(archived, "use_seed", "1")["prompt"] == "a red circle moves right"
    assert archived.studio.seed(clip="%") is None and archived.studio.seed(row=99_999) is None


def foreign_clip(reader, **changed):
    """The reader's clip, with a sidecar that somebody else wrote."""
    (clip,) = reader.studio.clips()
    asked = {**clip.sidecar.request.model_dump(mode="json"), **changed}
    clips.sidecar_path(clip.path).write_text(json.dumps({"request": asked, "sha256": "0" * 64}), "utf-8")
    reader.changed(clips=True)
    return clip.path


@pytest.mark.parametrize("field", ["image", "continues", "loras"])
def test_nobody_reads_a_file_that_only_a_foreign_sidecar_names(reader, tmp_path, field):
    mine = tmp_path / "mine" / f"{CLIP}.mp4"
    mine.parent.mkdir()
    mine.write_bytes((reader.studio.outputs / "2026-11-23" / f"{CLIP}.mp4").read_bytes())
    spec = {} if field == "loras" else {"model": "demo-i2v", "kind": "i2v"}
    clip = foreign_clip(reader, **spec, **{field: [{"path": str(mine)}] if field == "loras" else str(mine)})
    store = Store(reader.studio.state)
    recovery.rebuild(store, reader.studio.outputs)  # a start after the database was lost
    (taken,) = store.jobs()
    store.close()
    knob = json.dumps({"clip": clip.stem, "fields": {"steps": 2}})
    asks = [("neighbour", clip.stem), ("knob", knob), *((name, str(taken.id)) for name in ("retry", "duplicate"))]
    for name, argument in (*asks, ("retry_smaller", str(taken.id))):
        with pytest.raises(RequestError) as refused:
            actions.act(reader, name, argument, INITIAL_UI_STATE, Words("en"))
        assert refused.value.code == "file_elsewhere" and str(mine) in Words("zh").error(refused.value.fields())
    with pytest.raises(RequestError):
        gallery_actions.act(reader, "seeds", clip.stem, INITIAL_UI_STATE, Words("en"))
    assert [job.id for job in reader.studio.jobs()] == [taken.id]


def test_another_seed_of_a_clip_with_a_picture_that_was_chosen_here_is_queued(reader):
    kept = reader.studio.state / "pictures" / "0a1b.png"
    kept.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(kept)
    clip = foreign_clip(reader, model="demo-i2v", kind="i2v", image=str(kept))
    actions.act(reader, "neighbour", clip.stem, INITIAL_UI_STATE, Words("en"))
    assert [(job.request.image, job.request.seed) for job in reader.studio.jobs()] == [(str(kept), 6)]


def test_a_change_that_cannot_be_shown_is_still_done(reader, monkeypatch):
    def fail() -> None:
        raise RuntimeError("a panel that cannot be drawn")

    monkeypatch.setattr(reader, "snapshot", CachedValue(fail, 0.5))
    reader.changed()


def test_a_batch_or_a_count_is_queued_as_a_whole_or_not_at_all(reader):
    values = {**form.defaults(find_model("demo")), "prompt": "a cat", "pinned": [], "loras": ""}
    words, lines = Words("en"), "a cat\na dog\n" + "x" * 9000 + "\na cow"
    with pytest.raises(RequestError):
        actions.generate_batch(reader, values, lines, INITIAL_UI_STATE, words)
    with pytest.raises(RequestError):
        actions.generate(reader, {**values, "seed": str(2**53 - 3), "count": 8}, INITIAL_UI_STATE, words)
    assert reader.studio.jobs() == []
    actions.generate(reader, {**values, "seed": str(2**53 - 3), "count": 2}, INITIAL_UI_STATE, words)
    assert [job.request.seed for job in reader.studio.jobs()] == [2**53 - 2, 2**53 - 3]


def test_a_segment_that_is_run_again_smaller_stays_in_its_chain_and_size(reader):
    asked = {"prompt": "a red circle", "model": "demo", "num_frames": 17, "steps": 4, "nonce": "a"}
    first, second = reader.studio.submit_all([asked, {**asked, "nonce": "b", "after": "a"}])
    reader.studio.cancel(first)
    reader.studio.cancel(second)
    before = reader.studio.job(second)
    ui_state, _ = actions.act(reader, "retry_smaller", str(second), INITIAL_UI_STATE, Words("en"))
    again = reader.studio.job(int(ui_state["at"].removeprefix("job:")))
    assert (again.request.after, again.parent, again.request.num_frames) == ("a", second, 9)
    assert again.planned_request.width == before.planned_request.width
    ui_state, _ = actions.act(reader, "retry_smaller", str(first), INITIAL_UI_STATE, Words("en"))
    assert reader.studio.job(int(ui_state["at"].removeprefix("job:"))).parent == first
