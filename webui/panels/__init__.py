"""One file per panel: what it shows as a frozen view, the pure function that makes it, and its markup.

Lives here: panels. `draw` turns a view into HTML; create.py builds the form's Gradio parts.
Never here: words (wording/), clicks (actions.py), decisions (the studio). Who may knock: webui.page, render, events.
"""
