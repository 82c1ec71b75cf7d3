"""Row 35 of the fault table on the page: a clip that looks wrong is kept, and says so beside the knob that helps."""

from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest

from turbodiff.archive.clips import Clip
from turbodiff.media.verify import QualityWarning
from turbodiff.spec.clips import Sidecar, read_record
from webui.panels import stage
from webui.snapshot import clip_view
from webui.wording import Words


def card(*flaws, lang="en", **request):
    fields = {"kind": "t2v", "model": "demo", "prompt": "x", "steps": 4, "sampler": "sde", "topk": 0.15, **request}
    sidecar = read_record(Sidecar, {"request": fields, "warnings": list(flaws)})
    clip = Clip(Path("t2v_1.mp4"), sidecar, None, datetime.now(UTC))
    return stage.card(clip_view(clip), Words(lang))


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("flaw", get_args(QualityWarning))
def test_fault_35_a_flaw_is_a_badge_in_words(flaw, lang):
    said = dict(card(flaw, lang=lang).badges)["warn"]
    assert "flaw" not in said and len(said) > 8


def test_fault_35_a_good_clip_has_no_such_badge():
    assert "warn" not in dict(card().badges)


def test_fault_35_noise_at_the_start_has_its_knobs():
    noisy = [(knob.label, knob.fields) for knob in card("noisy_start", kind="i2v", sampler="ode").knobs[:2]]
    assert noisy == [("Boundary 0.7", {"boundary": 0.7}), ("SDE", {"sampler": "sde"})]
    assert card("noisy_start", sampler="ode").knobs[0].fields == {"sampler": "sde"}
