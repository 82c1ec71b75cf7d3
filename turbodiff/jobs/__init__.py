"""Jobs that survive: the queue, the processes that work it off, and what is said about them.

Lives here: the SQLite store, the supervisor, worker processes, orphans, restart, the seed archive, the logs.
Never here: torch, Gradio, a CUDA context; what a clip needs or how it is made.
Who may knock: the studio and the command line.
"""
