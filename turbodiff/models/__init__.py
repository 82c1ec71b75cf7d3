"""The networks: Wan's diffusion transformer, its text encoder and its VAE.

Contents: maths on tensors that the caller has already placed.
Never here: files, downloads, device moves, memory decisions (see `turbodiff.weights` and `turbodiff.runtime`).
Used by: `turbodiff.runtime`; the training and bench scripts. Imports `turbodiff.spec` and `turbodiff_kernels`.
"""
