"""The bundled demo weights: a Wan architecture at toy size, in the original files' layout, with a model card.

Contents: dit_t2v, dit_i2v_high, dit_i2v_low, vae, umt5 (safetensors), spiece.model, README.md. Never here: code;
`scripts/train_demo` makes the files. Used by: turbodiff.weights.locate, which finds them like any other checkpoint.
"""
