"""axe-core on every tab in both languages and both themes: nothing serious, Gradio's own parts included."""

import json
from importlib import resources

import pytest
from stories import begin, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser
axe = pytest.importorskip("axe_playwright_python")

TABS = 6
RUN = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
  .filter(rule => ["serious", "critical"].includes(rule.impact))
  .flatMap(rule => rule.nodes.map(node => [rule.id, node.target.join(" "), node.html.slice(0, 200),
  node.failureSummary]))"""


@pytest.mark.parametrize(("path", "scheme"), [("/", "light"), ("/zh/", "dark")], ids=["en-light", "zh-dark"])
def test_no_serious_violation_on_any_tab(app, chromium, path, scheme):
    script = resources.files(axe).joinpath("axe.min.js").read_text("utf-8")
    with tab(chromium, app, path, color_scheme=scheme) as page:
        write_prompt(page, json.dumps({"steps": 1}))
        wait_done(app, begin(page, app))
        page.wait_for_selector("#card [data-form=reuse]")
        page.evaluate(script)
        found = {}
        for number in range(TABS):
            page.click(f"#tabs [role=tab] >> nth={number}")
            page.wait_for_timeout(800)
            if number == 0:
                page.click("#advanced > button")
                page.wait_for_timeout(400)
            page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
            found |= {(row[0], row[2]): (number, *row) for row in page.evaluate(RUN)}
        assert not found, "\n\n".join(map(str, found.values()))
