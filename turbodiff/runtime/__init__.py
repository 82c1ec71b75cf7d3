"""WHEN AND WHERE: the worker process, which model sits where, and a clip from its words to its file.

Contents: worker, pipeline, denoise, attempt, replan, model_cache, offload (the only module that moves networks).
Never here: maths of networks (models/), arithmetic of memory (plan/), the queue (jobs/).
Who may import it: memory_lab; tests and scripts, in process. The supervisor and the command line start
`python -m turbodiff.runtime.worker`.
"""
