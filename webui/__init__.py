"""THE PAGE: Gradio panels over the studio.

Lives here: panels, the sentences a person reads (wording/), the web server with its security rules and media routes.
Never here: torch, devices, files of weights, decisions about memory.
Who may knock: nobody; `python webui/app.py` starts it.
"""
