"""The bundled demo weights: a Wan architecture at toy size, in the original files' layout, with a model card.

Lives here: dit_t2v, vae, umt5 (safetensors), spiece.model, README.md. Never here: code; `scripts/train_demo` makes the
files. Who may knock: turbodiff.weights.locate, which finds them like any other checkpoint.
"""
