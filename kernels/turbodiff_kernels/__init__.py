"""Faster maths: the operations that Wan's blocks spend their time in.

Contents: one folder per operation (`norm`, `quant`, `gemm`, `sage`, `sla`), each a door (`__init__.py`), the plain
PyTorch meaning of the operation (`reference.py`) and, where there is one, its Triton twin (`kernel.py`).
Never here: models, weights, device moves, anything of `turbodiff`.
Used by: `turbodiff.models` and `turbodiff.runtime`.
"""
