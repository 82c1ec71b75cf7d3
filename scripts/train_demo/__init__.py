"""Trains the bundled demo model from nothing: captions, clips, VAE, UMT5, DiT, few-step tuning, export.

Contents: everything that makes turbodiff/demo/*.safetensors. Never here: anything the product imports.
Used by: `python -m scripts.train_demo`, scripts/evaluate_demo.py and tests/demo.
"""
