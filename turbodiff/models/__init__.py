"""The networks: Wan's diffusion transformer, its text encoder and its VAE.

Lives here: maths on tensors that the caller has already placed.
Never here: files, downloads, device moves, memory decisions (see `turbodiff.weights` and `turbodiff.runtime`).
Who may knock: `turbodiff.runtime`; the training and bench scripts. Imports `turbodiff.spec` and `turbodiff_kernels`.
"""
