"""The queue on disk: the SQLite store, the attempts of its jobs, what an ended attempt means, what phases took.

Never here: torch, Gradio, processes; what a clip needs or how it is made.
"""
