"""A clip whose weights are made from their file on the way, by a copy on disk: the same latents, made once."""

import torch

from turbodiff.runtime.pipeline import make_latents
from turbodiff.weights.copies import copies


def only_found(self, module):
    assert self._file is None, "made again"


def test_a_clip_from_a_copy_on_disk_is_the_same(attempt_of, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "models"))
    found = []
    for where in ("in_memory", "on_disk", "on_disk"):
        job = attempt_of({"converted": where}, quant_linear="on")
        job.models.open(job.request, on_disk=where == "on_disk")
        found.append(make_latents(job))
        dit = job.models.get_or_load("dit").blocks[0].ffn[0].int8_weight
        assert dit.untyped_storage().resizable() == (where == "in_memory")
        monkeypatch.setattr(job.models, "_kept", {})
        if where == "on_disk":
            made = [copy.source for copy in copies(tmp_path / "models")]
            assert made and all("demo" in path.parts for path in made)
            monkeypatch.setattr("turbodiff.weights.converted.ConvertedCopy.finish", only_found)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
