"""TIME: the rCM schedule and steps, which expert runs when, the picture's condition, the noise.

Contents: pure functions on tensors that know nothing of networks, devices or files.
Never here: device moves, progress, cancellation (see `turbodiff.runtime`).
Used by: `turbodiff.runtime`; the training and bench scripts.
"""
