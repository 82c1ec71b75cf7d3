"""What programs send has the type of its field, or is refused in words that name the field; true is no number."""

import pytest

from turbodiff.spec.exports import Export
from turbodiff.spec.request import ALIASES, Request
from turbodiff.studio import Studio
from webui.api import Endpoints
from webui.snapshot import StudioReader

TEXT, WHOLE, NUMBER, SWITCH, NAMES = ("x",), (1,), (1, 1.5), (True, False), (["x"], [])
# by field what JSON may say; the words that stand for a number are text, too
OF_REQUEST = {
    **dict.fromkeys(("kind", "prompt", "negative_prompt", "model", "resolution", "aspect", "sampler", "weights_are",
                     "attention", "text_dtype", "fit", "gpu", "nonce", "after", "continues", "size", "image",
                     "noise_device", "end_image", "exchange", "encoder", "upscaler", "interpolator"), TEXT),
    **dict.fromkeys(("seed", "width", "height", "num_frames", "steps", "fps", "cards", "smooth_fps", "upscale"),
                    WHOLE),
    **dict.fromkeys(("sigma_max", "guidance", "guidance_low", "shift", "boundary", "topk"), NUMBER),
    **dict.fromkeys(("adaptive_resolution", "ode"), SWITCH),
    **dict.fromkeys(("auto", "pinned"), (*TEXT, *NAMES)),
    "quant_linear": (*TEXT, *SWITCH), "loras": (["x"], [], [1], [{}], [[]]),  # refused for what they are
}  # fmt: skip
OF_EXPORT = {
    "clip": TEXT,
    "format": TEXT,
    "quality": WHOLE,
    "fps": WHOLE,
    "upscale": WHOLE,
    "start_s": NUMBER,
    "end_s": NUMBER,
}
VALUES = (True, False, 1, 1.5, "x", [], ["x"], [1], [{}], {}, {"x": 1}, [[]], 10.5, float("nan"), float("inf"))


def is_one_of(value, right):
    """Whether a value has the type of one of the right ones."""
    return any(type(value) is type(one) and (not isinstance(value, list) or repr(value) == repr(one)) for one in right)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types")
    studio = Studio(folder / "state", folder / "outputs")
    yield Endpoints(StudioReader(studio))
    studio.close()


def test_every_field_of_a_request_of_a_wrong_type_is_refused_by_its_name(api):
    assert set(OF_REQUEST) == {*Request.model_fields, "size", "ode"} - {"grid"}
    refused = 0
    names = [(name, name) for name in OF_REQUEST] + list(ALIASES.items())
    for said, name in (*names, *((said.replace("_", "-"), name) for said, name in names if "_" in said)):
        for value in VALUES:
            if is_one_of(value, OF_REQUEST[name]):
                continue
            asked = {"prompt": "x", "model": "demo", said: value}
            for call in (api.submit, api.estimate):
                told = call(asked)
                assert (told.get("error", {}).get("code"), told["error"]["field"]) == ("bad_type", name), (said, value)
                assert told["error"]["expected"]
            told = api.submit({"batch": [{"prompt": "x", "model": "demo"}, asked]})
            assert told["error"]["field"] == name
            refused += 1
    assert refused > 400 and api.list_jobs(0)["jobs"] == []


def test_a_whole_number_may_be_written_with_a_point_and_words_stand_for_numbers_where_they_do(api):
    asked = {"prompt": "x", "model": "demo", "seed": 7.0, "fps": 16.0, "steps": "auto", "cards": "auto", "topk": None}
    assert api.estimate(asked)["request"]["seed"] == 7
    assert "error" not in api.estimate({**asked, "seed": -1, "sampler": "", "quant_linear": False, "ode": False})
    assert api.estimate({**asked, "steps": "4"})["error"]["code"] == "bad_type"


def test_what_is_around_requests_is_of_its_type(api):
    one = {"prompt": "x", "model": "demo"}
    for batch in (True, 0, 1.5, "x", "", {}, {"x": one}):
        assert api.submit({"batch": batch})["error"]["code"] == "bad_batch", batch
    assert api.submit({"batch": [one], **one})["error"]["code"] == "bad_batch"
    for each in (True, 0, "x", [], [one], None):
        assert api.submit({"batch": [one, each]})["error"]["code"] == "bad_fields", each
    for fields in (True, 0, 1.5, "x", [], [one], None):
        for call in (api.submit, api.estimate, api.export):
            assert call(fields)["error"]["code"] == "bad_fields", fields
    for ttl_s in (True, False, "60", [60], {}, float("nan")):
        assert api.submit({**one, "ttl_s": ttl_s})["error"]["code"] == "bad_ttl", ttl_s
    for number in (True, False, 1.5, "1", [1], {}, None, float("nan"), float("inf")):
        for call in (api.status, api.cancel, api.result, api.list_jobs):
            assert call(number)["error"]["code"] == "job_unknown", number
    assert api.list_jobs(0)["jobs"] == []


def test_every_field_of_an_export_of_a_wrong_type_is_refused_by_its_name(api):
    assert set(OF_EXPORT) == {*Export.model_fields, "clip"}
    for name, right in OF_EXPORT.items():
        for value in VALUES:
            if not is_one_of(value, right):
                told = api.export({"clip": "x", name: value})
                assert (told["error"]["code"], told["error"]["field"]) == ("bad_type", name), value


def test_no_other_name_of_a_field_opens_a_file_of_this_machine(api):
    for name in ("image", "image_path", "image-path"):
        told = api.submit({"prompt": "x", "model": "demo-i2v", name: "/etc/passwd"})
        assert told["error"]["code"] == "not_remote", told
    for name in ("end_image", "end-image", "last_image"):
        assert api.submit({"prompt": "x", "model": "demo-i2v", name: "/etc/passwd"})["error"]["code"] == "not_remote"
    assert api.submit({"prompt": "x", "model": "demo", "noise-device": "cuda"})["error"]["code"] == "not_remote"
    twice = api.estimate({"prompt": "x", "steps": 1, "num_steps": 2})
    assert (twice["error"]["code"], twice["error"]["field"]) == ("field_twice", "steps")


def test_a_clip_is_put_into_no_grid_from_outside(api):
    place = {"id": "0" * 16, "row": 0, "column": 0, "rows": 1, "columns": 1, "row_label": "", "column_label": ""}
    one = {"prompt": "x", "model": "demo"}
    for told in (api.estimate({**one, "grid": place}), api.submit({"batch": [{**one, "grid": place}]}),
                 api.submit({**one, "grid": place}), api.submit({**one, "grid": True})):  # fmt: skip
        assert told["error"]["field"] in ("grid", "fields"), told
