"""What the start-up log says while weights are read."""

import logging
import re
from itertools import pairwise

import pytest

from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.request import make_request


@pytest.mark.parametrize(("component", "named"), [("dit", "model"), ("vae", "VAE"), ("text_encoder", "text encoder")])
def test_loading_is_told_with_bytes_and_seconds_at_most_once_a_second_and_its_end_once(component, named, caplog):
    cache = ModelCache(Device.pick("cpu"))
    cache.open(make_request({"prompt": "a red circle moves", "seed": 1}))
    with caplog.at_level(logging.INFO, "turbodiff.worker"):
        cache.get_or_load(component)
    start, *rest = [(one.created, one.getMessage()) for one in caplog.records if "Loading" in one.getMessage()]
    assert re.fullmatch(rf"Loading Demo {named}\.\.\. [\d.]+ MiB", start[1])
    parts = [re.fullmatch(rf"Loading Demo {named}\.\.\. ([\d.]+)/([\d.]+) MiB [\d.]+ s", line) for _, line in rest]
    assert parts and all(parts) and parts[-1][1] == parts[-1][2]
    times = [start[0], *(at for at, _ in rest[:-1])]  # its end is told when it comes
    assert all(later - earlier >= 0.99 for earlier, later in pairwise(times))
