"""BYTES -> PARAMETERS: what a checkpoint on disk is, where it lies, and how it becomes the parameters of a module.

Lives here: headers and pickles read without torch (headers, pth, gguf), recognition by keys and shapes (recognise,
keymaps), search (locate), parameters (load), downloads (fetch), checks (verify), conversion (quantize).
Never here: networks, devices, memory decisions. Only load and quantize import torch.
Who may knock: `turbodiff.runtime`, `turbodiff.studio`, `turbodiff.cli` and the scripts, each module by its own name.
"""
