"""The picture of an image-to-video run: what fitting makes of it, and what it proposes for the handoff."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbodiff.spec.models import ModelSpec
from webui.wording import Words


@dataclass(frozen=True)
class Picture:
    """What is shown below the picture; `proposal` is "" where there is none or the form holds it already."""

    preview: str  # a data: URL
    caption: str
    reason: str = ""
    proposal: str = ""
    take: str = ""  # the fields of the proposal as JSON
    problem: str = ""


def picture(
    look: Any, request: Any, preview: bytes, values: Mapping[str, Any], spec: ModelSpec, words: Words
) -> Picture:
    """The preview's caption and the advisor's proposal, with its reason.

    Args:
        look: Look of the picture. request: as it will run. preview: the fitted picture as a JPEG.
    """
    size = {"width": request.width, "height": request.height}
    if spec.limits.free_size and request.adaptive_resolution and request.resolution != "custom":
        caption = words("picture.adaptive", resolution=request.resolution, **size)
    elif (look.width, look.height) == (request.width, request.height):
        caption = words("picture.as_it_is", **size)
    else:
        caption = words(f"picture.{request.fit}", source=f"{look.width}x{look.height}", **size)
    url = "data:image/jpeg;base64," + base64.b64encode(preview).decode()
    if not spec.two_experts:
        return Picture(url, caption)
    reason = words(f"picture.{look.key}", **spoken(look.numbers))
    what = {"boundary": f"{look.boundary:g}", "sampler": look.sampler.upper()}
    if values.get("boundary") == look.boundary and values.get("sampler") == look.sampler:
        return Picture(url, caption, reason + " " + words("picture.as_proposed", **what))
    take = json.dumps({"boundary": look.boundary, "sampler": look.sampler})
    return Picture(url, caption, reason, words("picture.take", **what), take)


def spoken(numbers: Mapping[str, float]) -> dict[str, str]:
    """The advisor's numbers as people read them: shares in percent, colours in bits."""
    return {name: f"{value:.1f}" if name.endswith("_bits") else f"{value:.0%}" for name, value in numbers.items()}
