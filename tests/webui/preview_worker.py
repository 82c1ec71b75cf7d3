"""The real worker, at rest for three seconds after each preview, so that a page that looks once a second sees it.

With TURBODIFF_TEST_NO_VAE set no VAE is at hand for previews, as on a GPU that is busy with the denoiser.
"""

import os
import sys
import time

from turbodiff.runtime import worker
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.events import PreviewEvent

REST_S = 3.0


class RestingWriter(worker.EventWriter):
    """Sends events, and rests after a preview."""

    def send(self, event):
        """Send one event."""
        super().send(event)
        if isinstance(event, PreviewEvent):
            time.sleep(REST_S)


if __name__ == "__main__":
    worker.EventWriter = RestingWriter
    if os.environ.get("TURBODIFF_TEST_NO_VAE"):
        ModelCache.preview_vae = lambda models: None
    sys.exit(worker.main())
