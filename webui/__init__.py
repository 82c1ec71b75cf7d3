"""THE PAGE: Gradio panels over the studio.

Contents: panels, the sentences a person reads (wording/), the web server with its security rules and media routes.
Never here: torch, devices, files of weights, decisions about memory.
Used by: nobody; `python webui/app.py` starts it.
"""
