"""BYTES -> PARAMETERS: what a checkpoint on disk is, where it lies, and how it becomes the parameters of a module.

Contents: readers of headers without torch (headers, pth, gguf), detection by keys and shapes (detect, keymaps),
search and verification (locate), downloads (download), parameters (load, lora), conversion (quantize).
Never here: networks, devices, memory decisions. Only load, lora and quantize import torch.
Used by: `turbodiff.runtime`, `turbodiff.studio`, `turbodiff.diagnostics`, `turbodiff.cli` and the scripts, each module
by its own name.
"""
