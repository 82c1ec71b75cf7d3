"""WHEN AND WHERE: the worker process, which model sits where, and the story of a clip from words to file.

Lives here: worker, pipeline, stages, shelf, residency (the only room that moves networks), ledger.
Never here: maths of networks (models/), arithmetic of memory (plan/), the queue (jobs/).
Who may knock: studio and the command line, which start `python -m turbodiff.runtime.worker`; tests, in process.
"""
