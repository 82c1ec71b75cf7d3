"""What a fresh form shows: this card's tier where its model is on this disk, else the bundled demo."""

from typing import Any

from turbodiff.spec.models import all_models, find_model
from webui import form
from webui.snapshot import StudioReader


def values(reader: StudioReader) -> dict[str, Any]:
    """Values of a fresh form."""
    spec = all_models()[0]
    return {**form.defaults(spec), **of_kind(reader, spec.kind)}


def of_kind(reader: StudioReader, kind: str) -> dict[str, Any]:
    """Values for a kind of clip: the tier's if its model is here, else those of the first model that is."""
    here = reader.here()
    tier = reader.tier()
    if tier is not None:
        fields: dict[str, Any] = getattr(tier, kind).fields()
        spec = find_model(str(fields["model"]))
        if here.get(spec.name):
            return {**form.defaults(spec), **fields, "model": spec.name}
    present = [spec for spec in form.models_of(kind) if here.get(spec.name)]
    return form.defaults((present or form.models_of(kind))[0])
