"""The panels: each builds its Gradio parts, or draws a view as HTML.

Lives here: one module per panel, `build` for parts, `draw` for markup.
Never here: what to show (view/), words (wording/), clicks (page.py), decisions (the studio).
Who may knock: webui.page.
"""
