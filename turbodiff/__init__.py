"""turbodiff: a sentence or a picture becomes a short video, and the GPU never runs out of memory.

Contents: everything but the page and the kernels; `studio` is the one front door.
Never here: Gradio (webui/) and Triton (kernels/).
Used by: the page, the command line and the API, all through `turbodiff.studio`.
"""
