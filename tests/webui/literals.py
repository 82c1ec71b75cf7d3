"""What stays as it is in Chinese: literal labels of the product, names, units, code."""

import re

LITERAL = re.compile(
    r"\{[^}]*\}|turbodiff models pull|"
    r"NVLink|PCIe|FastWan|MultiTalk|InfiniteTalk|UMT5|T5|FLUX|Ray|Stable Diffusion|Fun-Control|FLF2V|7z|CLIP|open-clip|"
    r"ViT-H/14|ControlNet|Hunyuan|Git LFS|PDF|RAR|U-Net|pickle|gzip|TAEHV|LightVAE|Transformer|TI2V-5B|"
    r"quant_linear|Adaptive Resolution|num_frames|Boundary|SLA TopK|ODE/SDE|SDE|ODE|UniPC|TopK|"
    r"Turbo\w*|turbodiff|bitsandbytes|NF4|"
    r"Wan[\d.]*|A14B|14B|1\.3B|480p|720p|int8|VAE|RAM|GPU|CPU|VRAM|NVIDIA|Python|UTF-8|Markdown|torch(?:vision)?|cuDNN|CUDA|conv3d|Shift|"
    r"SageAttention|SpargeAttn|flash-attn|sparselinear|GB|GiB|MiB|KiB|token|Ctrl\+Enter|mp4|English|EN|t\b|and\b|x\b|H\b|L\b|HF_\w+|"
    r"txt|WebM|MP4|ProRes|HQ|VP9|zip|seed:|tag:|rating:|JSON|\.safetensors|LoRA|DoRA|LoHa|LoKr|alpha|NaN|loras|install|interpolate|mcp|cluster|TURBODIFF_\w+|dense|sage|NVIDIA|auto|on|off|--[a-z-]+|https?://\S+|\.pth|PNG|JPEG|WebP|GIF|pip|state|outputs|webui_\w+\.log|nvidia-smi|Triton|NVML|nvidia-ml-py|pynvml|"
    r"MIG|SHA-256|SLA|calibrate|nonce|upscalers|interpolators|RIFE [\d.]+ heavy|"
    r"spandrel|Lanczos|ESRGAN|SwinIR|ffmpeg|RGB"
)
# and what models, sizes and files add once the sentences stand on the page; the longer names first
LITERAL_ON_THE_PAGE = re.compile(
    r"turbo|diff|Demo\S*|Wan[\d.]+\S*|\d+p\b|\S*14B|x\d+|\d+x|sagesla|sla|/[\w./-]+|" + LITERAL.pattern
)
