"""Stories of the live preview: the page over the real supervisor and the real worker, on the CPU."""

import base64
import io

import pytest
from PIL import Image
from stories import begin, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("environment", [{}, {"TURBODIFF_TEST_NO_VAE": "1"}], ids=["decoded", "projected"])
def test_a_picture_of_the_running_clip_is_on_the_stage_before_step_3_of_4(start_app, chromium, tmp_path, environment):
    app = start_app(tmp_path, worker="preview_worker.py", **environment)
    try:
        with tab(chromium, app) as page:
            write_prompt(page, "a red circle moves right on a black background")
            job = begin(page, app)
            page.wait_for_selector("#player img[src^='data:image/jpeg;base64,']")
            progress = app.store.job(job).progress
            source = page.get_attribute("#player img", "src")
            assert (progress.of, progress.step < 3) == (4, True)
            picture = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
            assert max(picture.size) >= 128
            assert picture.convert("L").getextrema()[1] > 40  # something is on the black background
            wait_done(app, job)
            page.wait_for_selector("#player video")
    finally:
        app.stop()
