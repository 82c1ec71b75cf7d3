"""One file per panel: what it shows as a frozen view, the pure function that makes it, and its markup.

Contents: panels. `draw` turns a view into HTML; create.py builds the form's Gradio parts.
Never here: words (wording/), clicks (actions.py), decisions (the studio). Used by: webui.page, render, events.
"""
